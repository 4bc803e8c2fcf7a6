"""
The same steps on one process, and on two under data parallelism, FSDP2 and DeepSpeed ZeRO-2 and ZeRO-3, started by
`accelerate launch` with the files of examples/configs.
"""

import importlib.util
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import CONFIGS, finish, launch, start
from run_layouts import build, train
from safetensors.torch import load_file
from tiny_policy import parameters, save_policy

# Three groups of 4 rows: with two processes, each has 6 rows, and the second group is on both.
ROWS = 12
# (tied embeddings, micro-batches, options): what is trained under every layout, with a loss from hidden states and
# rows without padding unless they are off. The loss types reduce differently.
TRLS_PATH = {"fused_loss": False, "padding_free": False}
CHECKPOINTED = {"loss_type": "dapo", "context_attention": "parallel", "gradient_checkpointing": True}
RUNS: dict[str, tuple[bool, int, dict[str, Any]]] = {
    "tied": (True, 1, {"loss_type": "dapo"}),
    "tied, accumulated": (True, 2, {"loss_type": "grpo", "estimator": "scored"}),
    "untied": (False, 1, {"loss_type": "grpo", "max_grad_norm": 0.5, "kl_target": "ensemble", "weight_scale": "unit"}),
    "untied, accumulated": (False, 2, CHECKPOINTED),
    "untied, accumulated, TRL's path": (False, 2, CHECKPOINTED | TRLS_PATH),
    # The second process has no token to train on, and one row to read where the first has more.
    "cut off": (True, 2, {"loss_type": "grpo", "cuts_off": True, "mask_truncated_completions": True}),
    "adapter": (False, 1, {"loss_type": "dapo", "adapter": True}),
}
# Sampled for real, with as many or as few forwards as the draw asks for, which differ between processes.
SAMPLED: dict[str, dict[str, Any]] = {
    "sampled estimator": {"estimator": "sampled", "kl_fraction": 0.5, "causal_policy_context": "context"},
    "parallel contexts": {"context_attention": "parallel", "kl_fraction": 0.5, "num_kl_contexts": 1},
    "greedy, on text": {"context_attention": "parallel", "collider_attention": "full", "collider_choice": "greedy"},
    "by reward": {"collider_choice": "reward", "kl_target": "context", "weight_scale": "unit"},
}
# Rewards beside colliders: as the run of the same name without.
OVERLAPPED = {
    f"{name}, overlapped": {**SAMPLED[name], "overlap_rewards": True} for name in ("parallel contexts", "by reward")
}
needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed")


@dataclass
class Layout:
    """What a launched run leaves."""

    folder: Path
    models: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)
    metrics: dict[str, dict[str, Any]] = field(default_factory=dict)

    def rows(self, name: str) -> list[list[int]]:
        """How many rows each forward of a loss read, by process."""
        return [json.loads((self.folder / name / f"rows-{rank}.json").read_text()) for rank in (0, 1)]

    def add(self, name: str) -> None:
        (saved,) = (self.folder / name / "model").glob("*model.safetensors")  # the model's, or the adapter's
        self.models[name] = load_file(saved)
        self.metrics[name] = json.loads((self.folder / name / "metrics.json").read_text())


def settings(name: str, processes: int, policies: dict[bool, str], folder: Path) -> dict[str, Any]:
    tied, micro, extra = (
        RUNS[name]
        if name in RUNS
        else (True, 2, {"fixed": False, "learning_rate": 0.05, **(SAMPLED | OVERLAPPED)[name]})
    )
    (folder / name).mkdir(parents=True)
    return {
        "policy": policies[tied],
        "folder": str(folder / name),
        "per_device_train_batch_size": ROWS // processes // micro,
        "gradient_accumulation_steps": micro,
        "per_device_eval_batch_size": 4 // processes,
        **extra,
    }


def accelerate(config: str) -> list[str]:
    """`accelerate launch` with a file of examples/configs, in float32."""
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
    return [*command, "--config_file", str(CONFIGS / "accelerate" / f"{config}.yaml"), "--mixed_precision", "no"]


def run_all(config: str, policies: dict[bool, str], folder: Path) -> Layout:
    names = [*RUNS, *SAMPLED, *(OVERLAPPED if config == "ddp" else ())]
    runs = [settings(name, 2, policies, folder) | {"use_cpu": config == "ddp"} for name in names]
    launch(accelerate(config), "run_layouts.py", json.dumps(runs))
    layout = Layout(folder)
    for name in names:
        layout.add(name)
    return layout


@pytest.fixture(scope="module")
def policies(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, str]:
    folder = tmp_path_factory.mktemp("policies")
    return {tied: save_policy(folder / str(tied), tied) for tied in (True, False)}


@pytest.fixture(scope="module")
def alone(policies: dict[bool, str], tmp_path_factory: pytest.TempPathFactory) -> Layout:
    """One process, in one batch, on TRL's path."""
    layout = Layout(tmp_path_factory.mktemp("alone"))
    for name, (_, _, extra) in RUNS.items():
        run = settings(name, 1, policies, layout.folder) | TRLS_PATH
        run |= {"per_device_train_batch_size": ROWS, "gradient_accumulation_steps": 1, "use_cpu": True}
        folder = Path(run["folder"])
        trainer = build(run.pop("policy"), Path(run.pop("folder")), **run)
        before = parameters(trainer.model)
        train(trainer, folder)
        layout.add(name)
        trained = {k: x.detach() for k, x in trainer.model.named_parameters() if x.requires_grad}
        moved = {k: (x - before[k]).abs().max() / x.abs().max() for k, x in trained.items()}
        assert min(moved.values()) > 1e-3, (name, extra, moved)  # equality below says something
    return layout


@pytest.fixture(scope="module")
def ddp(policies: dict[bool, str], tmp_path_factory: pytest.TempPathFactory) -> Layout:
    return run_all("ddp", policies, tmp_path_factory.mktemp("ddp"))


def assert_alike(ours: dict[str, torch.Tensor], want: dict[str, torch.Tensor], what: str) -> None:
    """Parameters that differ by less than 1e-5 of each one's largest entry."""
    assert set(want) <= set(ours), what
    for key, x in want.items():
        error = ((ours[key] - x).abs().max() / x.abs().max()).item()
        assert error < 1e-5, f"{what}: {key} is off by {error:.1e}"
    if "lm_head.weight" in set(ours) - set(want):  # saved twice where tied
        assert torch.equal(ours["lm_head.weight"], ours["model.embed_tokens.weight"]), what


def assert_alone(layout: Layout, alone: Layout) -> None:
    """Parameters, and metrics that do not depend on the layout, are those of one process."""
    for name in RUNS.keys() & layout.models.keys():
        micro = RUNS[name][1]
        assert_alike(layout.models[name], alone.models[name], name)
        ours, want = layout.metrics[name], alone.metrics[name]
        assert ours["own"] == [RUNS[name][2].get("fused_loss", True)] * 2 and want["own"] == [False, False]
        names = ["gcpo/upsilon/mean", "reward", "loss", "grad_norm", "gcpo/tokens/generated", "gcpo/colliders/ended"]
        names += ["gcpo/kl_causal"]
        if micro == 1:  # TRL's own are means of means where there are several micro-batches
            names += ["kl", "entropy"]
        for step in (0, 1):
            for key in names:
                assert ours["train"][step][key] == pytest.approx(want["train"][step][key], rel=2e-4), (name, step, key)
            found = [one["train"][step].get("gcpo/kl_causal_correlation") for one in (ours, want)]
            assert found[0] == pytest.approx(found[1], abs=1e-3), (name, step)
            assert found[1] is not None or name == "cut off", (name, step)
        for key in ("eval_loss", "eval_reward", "eval_kl", "eval_entropy"):
            assert ours["eval"][key] == pytest.approx(want["eval"][key], rel=2e-4, abs=1e-6), (name, key)


@pytest.mark.hazard(2, 25, 26)
@pytest.mark.slow
def test_data_parallel(ddp: Layout, alone: Layout) -> None:
    """Seen in trl#7245, trl#5619, trl#3896."""
    assert_alone(ddp, alone)
    first, second = ddp.rows("tied, accumulated")
    assert len(first) == len(second) == 4 and first != second
    first, second = ddp.rows("cut off")
    assert second == [1] * 4 and max(first) > 1


@pytest.mark.slow
def test_overlap_changes_no_number_on_two_processes(ddp: Layout) -> None:
    for name in OVERLAPPED:
        plain = name.removesuffix(", overlapped")
        for key, x in ddp.models[plain].items():
            assert torch.equal(ddp.models[name][key], x), (name, key)
        for ours, want in zip(ddp.metrics[name]["train"], ddp.metrics[plain]["train"], strict=True):
            times = [key for key in ours if key.startswith("gcpo/seconds/")]
            for key in ours.keys() - {*times} - {"step_time"}:
                assert ours[key] == want[key], (name, key)


@pytest.mark.hazard(3, 4, 5, 25)
@pytest.mark.slow
@pytest.mark.parametrize(
    "config", ["fsdp2", *(pytest.param(name, marks=needs_deepspeed) for name in ("zero2", "zero3"))]
)
def test_sharded(config: str, policies: dict[bool, str], alone: Layout, ddp: Layout, tmp_path: Path) -> None:
    """Seen in trl#6384, verl#7520, accelerate#4171, trl#5619."""
    layout = run_all(config, policies, tmp_path)
    assert_alone(layout, alone)
    heads = [name for name in RUNS if "lm_head.weight" in "".join(layout.metrics[name]["put_away"])]
    assert heads == ([name for name, (tied, _, _) in RUNS.items() if not tied] if config == "zero3" else [])
    for name in SAMPLED:
        assert_alike(layout.models[name], ddp.models[name], name)
        for step in (0, 1):
            ours, want = layout.metrics[name]["train"][step], ddp.metrics[name]["train"][step]
            for key in ("loss", "reward", "gcpo/tokens/generated", "gcpo/tokens/scored_contexts", "gcpo/kl_causal"):
                assert ours[key] == pytest.approx(want[key], rel=2e-4), (name, step, key)


@needs_deepspeed
@pytest.mark.slow
def test_deepspeed_files(policies: dict[bool, str], alone: Layout, tmp_path: Path) -> None:
    """DeepSpeed's own files, given to GCPOConfig, in place of accelerate's."""
    runs = []
    for name, file in (("tied, accumulated", "zero2.json"), ("untied", "zero3.json")):
        run = settings(name, 2, policies, tmp_path) | {"deepspeed": str(CONFIGS / "deepspeed" / file)}
        runs.append(run | {"use_cpu": False})
    launch(accelerate("ddp"), "run_layouts.py", json.dumps(runs))
    layout = Layout(tmp_path)
    for run in runs:
        layout.add(Path(run["folder"]).name)
    assert_alone(layout, alone)


# ---------------------------------------------------------------------------------------------------------------------
# What cannot work
# ---------------------------------------------------------------------------------------------------------------------

REFUSED: list[tuple[dict[str, Any], list[str]]] = [
    (
        {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 1},
        ["`num_generations` must divide the rows of a rollout", "3 x 2 x 1 = 6, got 4"],
    ),
    (
        {"by_rank": {"kappa": [0.5, 0.0], "num_colliders": [3, 4]}},
        ["same options, got by rank `kappa`: 0.5, 0.0; `num_colliders`: 3, 4."],
    ),
    ({"by_rank": {"gradient_accumulation_steps": [2, 1]}}, ["`gradient_accumulation_steps`: 2, 1", "same options"]),
    ({"overlap_rewards": True}, ["`overlap_rewards` must be False: FSDP gathers weights from all processes"]),
    ({"fused_loss": True, "entropy_coef": 0.1}, ["`fused_loss` must be False or None: `entropy_coef=0.1` needs"]),
]


@pytest.mark.slow
def test_refused_by_every_process(policies: dict[bool, str], tmp_path: Path) -> None:
    """None of them waits for another that has given up."""
    runs = []
    for number, (extra, _) in enumerate(REFUSED):
        (tmp_path / str(number)).mkdir()
        run = {"policy": policies[True], "folder": str(tmp_path / str(number)), "per_device_train_batch_size": 4}
        runs.append(run | {"use_cpu": False, "refused": True} | extra)
    launch(accelerate("fsdp2"), "run_layouts.py", json.dumps(runs))
    for number, (extra, words) in enumerate(REFUSED):
        for rank in (0, 1):
            message = (tmp_path / str(number) / f"refused-{rank}.txt").read_text()
            assert all(word in message for word in words), (extra, rank, message)


@pytest.fixture
def lost_run(policies: dict[bool, str], tmp_path: Path) -> Iterator[Any]:
    def lose(how: str) -> tuple[int, str, str]:
        run = {"policy": policies[True], "folder": str(tmp_path), "use_cpu": False, "ddp_timeout": 15, "max_steps": 3}
        run |= {"lost": how, "per_device_train_batch_size": 4}
        return finish(start(accelerate("fsdp2"), "run_layouts.py", json.dumps([run])), timeout=150)

    return lose


@pytest.mark.slow
def test_a_killed_process_ends_the_run(lost_run: Any) -> None:
    code, out, err = lost_run("killed")
    assert "rank 1 is lost" in out
    assert code != 0
    assert "Signal 9 (SIGKILL)" in err


@pytest.mark.slow
def test_a_process_that_hangs_ends_the_run(lost_run: Any) -> None:
    code, out, err = lost_run("hangs")
    assert "rank 1 is lost" in out
    assert code != 0
    assert "Process 0 of 2 stops: another one has ended, or did not come" in err
    assert "`ddp_timeout` = 15 s" in err
