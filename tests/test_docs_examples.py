"""What docs/quickstart.md and the README say to type works: Python blocks run as they stand, and so do commands."""

import contextlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from gcpo import cli
from gcpo.commands.train import parse
from gcpo_kernels import causal_weights, gcpo_loss

ROOT = Path(__file__).resolve().parents[1]
QUICKSTART, README = ROOT / "docs" / "quickstart.md", ROOT / "README.md"
# What a test changes in a run from the hub: the model, which is not there, and how long it takes.
SHORT = (
    "--model_name_or_path runs/quickstart --max_steps 1 --max_completion_length 8 --collider_max_completion_length 8 "
    "--per_device_train_batch_size 8 --save_strategy no --use_cpu true --bf16 false --disable_tqdm true"
).split()


def blocks(page: Path, language: str) -> list[str]:
    """The contents of a page's fenced blocks in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def block_with(page: Path, language: str, text: str) -> str:
    """The one block that holds `text`."""
    (found,) = [block for block in blocks(page, language) if text in block]
    return found


def run_block(source: str, name: str = "block") -> dict[str, Any]:
    """Run a block as a script of its own; what it leaves."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(source, name, "exec"), namespace)
    return namespace


def commands(page: Path, name: str) -> list[list[str]]:
    """The arguments of every `gcpo NAME ...` in a page's shell blocks, without what stands behind a #."""
    lines = [line for block in blocks(page, "bash") for line in block.replace("\\\n", " ").splitlines()]
    return [shlex.split(line, comments=True)[2:] for line in lines if line.startswith(f"gcpo {name} ")]


def rewards_of(trainer: Any) -> list[float]:
    return [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the trainer's block runs, and the commands after it."""
    return tmp_path_factory.mktemp("quickstart")


@pytest.fixture
def inside(folder: Path) -> Iterator[None]:
    with contextlib.chdir(folder):
        yield


@pytest.fixture(scope="module")
def trained(folder: Path) -> dict[str, Any]:
    """What the block with the trainer leaves."""
    with contextlib.chdir(folder):
        return run_block(block_with(QUICKSTART, "python", "GCPOTrainer("))


@pytest.fixture(scope="module")
def own_loop() -> dict[str, Any]:
    """What the block with the losses leaves."""
    return run_block(block_with(QUICKSTART, "python", "fused_loss"))


def test_every_python_block_has_a_test_below() -> None:
    tested = ("GCPOTrainer(", "fused_loss", "def train_step(")
    assert [sum(text in block for text in tested) for block in blocks(QUICKSTART, "python")] == [1, 1, 1]


def test_complete_blocks_of_the_readme_run(tmp_path: Path) -> None:
    """Complete: it imports what it uses. There may be none; the diffs have tests of their own."""
    with contextlib.chdir(tmp_path):
        for block in blocks(README, "python"):
            if block.startswith(("import ", "from ")):
                run_block(block)


def test_the_losses(own_loop: dict[str, Any]) -> None:
    """Weights in their range, one loss from either function, the same gradients, none of a masked token."""
    upsilon, loss, fused = (own_loop[name] for name in ("upsilon", "loss", "fused_loss"))
    assert upsilon.shape == (own_loop["P"], own_loop["n"])
    assert upsilon.abs().max() <= 2.0 and upsilon.std() > 0.01
    assert own_loop["metrics"]["kl_causal"] > 1e-4
    torch.testing.assert_close(loss, fused, rtol=1e-5, atol=1e-6)
    hidden, weight = own_loop["hidden"], own_loop["weight"]
    plain = torch.autograd.grad(loss, [hidden, weight], retain_graph=True)
    for found, expected in zip((hidden.grad, weight.grad), plain, strict=True):
        assert expected.abs().max() > 1e-4
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert hidden.grad[0, 4:].count_nonzero() == 0 and (hidden.grad[0, :4] != 0).any()


def test_the_toy_loop_learns() -> None:
    rewards = run_block(block_with(QUICKSTART, "python", "def train_step("))["rewards"]
    assert len(rewards) == 30
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.15


def test_the_change_of_a_loss(own_loop: dict[str, Any]) -> None:
    """What goes is GRPO's loss, as gcpo_loss has it; what comes is GCPO's, with the paper's weights."""
    lines = block_with(QUICKSTART, "diff", "gcpo_loss(").splitlines()
    before, after = ("\n".join(line[2:] for line in lines if line.startswith(sign)) for sign in "-+")
    given = {name: own_loop[name] for name in ("logp", "mask", "old_logp", "z", "context_z", "context_logp")}
    given |= {"torch": torch, "advantages": own_loop["advantages"] / own_loop["upsilon"].flatten()}
    # Away from the old policy, so that some ratios are clipped.
    given["logp"] = given["logp"] + torch.linspace(-0.5, 0.5, given["logp"].numel()).view_as(given["logp"])
    grpo, gcpo = dict(given), dict(given)
    exec(before, grpo)
    exec(after, gcpo)
    logp, advantages, mask, old_logp = (given[name] for name in ("logp", "advantages", "mask", "old_logp"))
    expected, metrics = gcpo_loss(logp, advantages, mask, old_logp=old_logp)
    assert metrics["clip_low"] + metrics["clip_high"] > 0
    torch.testing.assert_close(grpo["loss"], expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gcpo["upsilon"], causal_weights(given["z"], given["context_z"]))
    options = {"old_logp": old_logp, "context_logp": given["context_logp"], "kappa": 0.06}
    expected, _ = gcpo_loss(logp, advantages * gcpo["upsilon"].flatten(), mask, **options)
    torch.testing.assert_close(gcpo["loss"], expected)
    assert (gcpo["loss"] - grpo["loss"]).abs() > 1e-3


def test_the_readmes_change_of_a_trainer() -> None:
    """What goes is TRL's, what comes is exported here, and the names are all that differs."""
    lines = block_with(README, "diff", "GCPOTrainer(").splitlines()
    before, after = ([line[2:] for line in lines if line[:1] in (sign, " ", "")] for sign in "-+")
    assert [re.sub(" +#.*", "", line).replace("GCPO", "GRPO").replace("gcpo", "trl") for line in after] == before
    for imports in (before[0], after[0]):
        exec(imports, {})


def test_the_trainer_learns(trained: dict[str, Any], folder: Path) -> None:
    rewards = rewards_of(trained["trainer"])
    assert len(rewards) == 20
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.05
    last = trained["trainer"].state.log_history[-2]
    assert 0.5 < last["gcpo/upsilon/mean"] <= 2.0 and last["gcpo/upsilon/fallback"] == 0
    assert last["gcpo/kl_causal"] > 0 and last["gcpo/seconds/colliders"] > 0
    assert (folder / "runs" / "quickstart" / "model.safetensors").is_file()


def test_the_two_trainers_can_be_exchanged(trained: dict[str, Any], tmp_path: Path) -> None:
    """GRPOTrainer runs the same block, less GCPO's own options, and draws the same first candidates."""
    source = block_with(QUICKSTART, "python", "GCPOTrainer(")
    own = [line for line in source.splitlines(keepends=True) if "collider" in line]
    assert len(own) == 2
    for line in own:
        source = source.replace(line, "")
    source = source.replace("from gcpo import", "from trl import").replace("GCPO", "GRPO")
    with contextlib.chdir(tmp_path):
        grpo = run_block(source.replace("max_steps=20", "max_steps=2"))["trainer"]
    assert type(grpo).__module__.startswith("trl.")
    assert rewards_of(grpo)[0] == rewards_of(trained["trainer"])[0]


def test_plan(inside: None, capsys: pytest.CaptureFixture[str]) -> None:
    (argv,) = commands(QUICKSTART, "plan")
    assert cli.main(["plan", *argv]) == 0
    ratio = re.search(r"GCPO to GRPO: ([\d.]+)x operations, ([\d.]+)x seconds", capsys.readouterr().out)
    assert ratio and 0.9 < float(ratio[1]) < 1.5


def test_diagnose_and_report(trained: dict[str, Any], inside: None, capsys: pytest.CaptureFixture[str]) -> None:
    """The page says what is wrong with its run, and the exit code."""
    (diagnose,), (report,) = commands(QUICKSTART, "diagnose"), commands(QUICKSTART, "report")
    assert cli.main(["diagnose", *diagnose]) == 1
    out = capsys.readouterr().out
    named = re.findall(r"! ([\w -]+):", out)
    may_be = ["second KL without signal"]  # a mean over 20 logs, of something whose expectation is 0
    assert [name for name in named if name not in may_be] == ["completions cut off", "colliders say little"]
    if named[:1] == may_be:
        assert "over 20 logs: the 95% interval is not above 0" in out and "E[p'] = pi(y | q)" in out
    assert cli.main(["report", *report]) == 0
    page = Path(report[0], "report.html").read_text(encoding="utf-8")
    assert "share_of_letters" in page and "Say something about the number" in page


def test_train_and_eval(trained: dict[str, Any], inside: None, capsys: pytest.CaptureFixture[str]) -> None:
    """The run from the hub and its evaluation, with a model that is here, in a few seconds."""
    train = next(argv for argv in commands(QUICKSTART, "train") if "--dataset_name" in argv)
    assert cli.main(["train", *train, *SHORT]) == 0
    (evaluate,) = commands(QUICKSTART, "eval")
    assert evaluate[evaluate.index("--model_name_or_path") + 1] == train[train.index("--output_dir") + 1]
    capsys.readouterr()
    assert cli.main(["eval", *evaluate, "--limit", "2", "--max_new_tokens", "4"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"pass@1 +0\.\d+ ±", out) and re.search(r"pass@4 +0\.\d+ ±", out)


def test_train_with_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the page passes beside `--config run.yaml` is read, by the command or by accelerate, which gets the file."""
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text(yaml.safe_dump({"dataset_name": "reasoning_gym:chain_sum", "bf16": False}))
    resumed, launched = [parse(argv) for argv in commands(QUICKSTART, "train") if "--config" in argv]
    assert resumed[0].resume and not resumed[-1]
    assert resumed[0].dataset_name == launched[0].dataset_name == "reasoning_gym:chain_sum"
    name, file, *processes = launched[-1]
    assert name == "--accelerate_config" and processes == ["--num_processes", "4"]
    assert yaml.safe_load((ROOT / file).read_text())["distributed_type"] == "FSDP"
