"""Going on after a stop: the same losses and weights as without it, whatever was being written when it came."""

import json
import os
import random
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file
from test_trainer_causal import make_trainer
from tiny_policy import SHORT_TEMPLATES, count_low, options, parameters, prompts, save_policy
from transformers import AutoModelForCausalLM, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from gcpo import GCPOConfig, GCPOTrainer
from gcpo.cli import main
from gcpo.run.checkpoints import (
    REFERENCE,
    check_same_model,
    last_complete_checkpoint,
    load_reference,
    save_reference,
    why_incomplete,
)
from gcpo.run.cycle import LAYOUT, OTHERS, ROLLOUT, changed_settings, cycle_settings
from gcpo.run.meter import AccountedGRPOTrainer
from gcpo.run.records import read_run

OFF = {"kappa": 0.0, "estimator": "none"}
OWN = {"fused_loss": True, "padding_free": True}
MOMENTS = ("first rollout", "rollout", "weights", "optimizer", "state", "saved")


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_policy(tmp_path_factory.mktemp("policy"))


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """The runs that are killed are of other processes; sums are taken in another order by another number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class StopAt(TrainerCallback):
    def __init__(self, step: int):
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


def losses(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What was logged per step, but for times."""
    return [
        {k: v for k, v in entry.items() if "seconds" not in k and "time" not in k and "per_second" not in k}
        for entry in history
        if "loss" in entry
    ]


def lora() -> Any:
    from peft import LoraConfig

    return LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", lora_dropout=0.1)


# 8 prompts, 2 per rollout where nothing else is said: an epoch is 4 steps.
@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"num_iterations": 2},  # step 3 is in the middle of the updates that share a rollout
        # Likewise; and of what one log entry sums up, and one table shows.
        {"steps_per_generation": 4, "logging_steps": 2, "log_completions": True, "num_completions_to_print": 0},
        {"estimator": "sampled", "kl_fraction": 0.5, "num_kl_contexts": 1, "shuffle_candidates": True},
        {"num_iterations": 2, "peft_config": lora, "beta": 0.1, "causal_policy_context": "context"},
        {"generation_batch_size": 32, "steps_per_generation": None, "per_device_train_batch_size": 16},  # 2 epochs
        # In the middle of a rollout whose rows were dealt out to micro-batches anew, and of the updates that share it.
        {**OWN, "steps_per_generation": 4, "num_iterations": 2, "beta": 0.1, "max_completion_length": 24},
        {**OFF, "beta": 0.5, "sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 0.6},
    ],
    ids=[
        "plain",
        "iterations",
        "steps_per_generation",
        "sampled",
        "adapter",
        "epochs",
        "dealt out",
        "synced_reference",
    ],
)
def test_six_steps_are_three_and_three_more(changed: dict[str, Any], policy: str, tmp_path: Path) -> None:
    def run(folder: str, stop: int | None = None, resume: bool = False) -> Any:
        settings = {
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 2,
            "max_steps": 6,
            "save_strategy": "steps",
            "save_steps": 3,
            "learning_rate": 1e-2,
            **{name: value() if callable(value) else value for name, value in changed.items()},
        }
        trainer = make_trainer(policy, tmp_path / folder, **settings)
        if stop:
            trainer.add_callback(StopAt(stop))
        # Both runs start from one state; the process that goes on is in another, like any new one.
        random.seed(99 if resume else 1)
        torch.manual_seed(99 if resume else 1)
        trainer.train(resume_from_checkpoint=True if resume else None)
        return trainer

    whole = run("whole")
    with pytest.raises(KeyboardInterrupt):
        run("parts", stop=3 if changed.get("num_iterations") is None else 4)
    resumed = run("parts", resume=True)
    assert resumed.state.global_step == 6
    assert losses(resumed.state.log_history) == losses(whole.state.log_history)
    expected, got = parameters(whole.model), parameters(resumed.model)
    assert all(torch.equal(expected[name], got[name]) for name in expected)
    if changed.get("log_completions"):
        samples = [read_run(tmp_path / folder / "out").samples for folder in ("whole", "parts")]
        assert samples[0] == samples[1] and samples[0][0]["colliders"]


@pytest.fixture(scope="module")
def killed(policy: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run's YAML file, and a folder of its outputs: whole, and killed at every moment, each in a folder so named."""
    folder = tmp_path_factory.mktemp("killed")
    data, config = folder / "data.json", folder / "config.yaml"
    prompts().to_json(data)
    settings = {
        **options(folder),
        **SHORT_TEMPLATES,
        "model_name_or_path": policy,
        "dataset_name": str(data),
        "reward_funcs": "tiny_policy.count_low",
        "num_colliders": 2,
        "collider_max_completion_length": 4,
        "max_steps": 6,
        "save_strategy": "steps",
        "save_steps": 2,
    }
    config.write_text(yaml.safe_dump(settings))
    tests = str(Path(__file__).parent)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([tests, os.environ.get("PYTHONPATH", "")])}
    folders = json.dumps({moment: str(folder / moment) for moment in MOMENTS})
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("run_killed.py")), str(config), folders],
        env={**environment, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert main(["train", "--config", str(config), "--output_dir", str(folder / "whole")]) == 0
    return config, folder


def history(folder: Path) -> list[dict[str, Any]]:
    return losses(json.loads((folder / "checkpoint-6" / "trainer_state.json").read_text())["log_history"])


@pytest.mark.slow
@pytest.mark.parametrize("moment", MOMENTS)
def test_after_a_kill_the_same_command_with_resume_goes_on(
    moment: str, killed: tuple[Path, Path], capsys: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    config, folder = killed
    assert not (folder / moment / "checkpoint-6").exists()
    assert main(["train", "--config", str(config), "--output_dir", str(folder / moment), "--resume"]) == 0
    last = {"first rollout": None, "saved": "checkpoint-4"}.get(moment, "checkpoint-2")
    out = capsys.readouterr().out
    assert (f"going on from {folder / moment / last}" in out) if last else ("going on from" not in out)
    skipped = [str(warning.message) for warning in recwarn if "not a whole checkpoint" in str(warning.message)]
    torn = {"weights": "trainer_state.json, which", "optimizer": "trainer_state.json, which", "state": "is damaged"}
    assert len(skipped) == (moment in torn)
    assert all("checkpoint-4" in text and torn[moment] in text for text in skipped)
    assert history(folder / moment) == history(folder / "whole")
    whole, resumed = (
        torch.load(folder / name / "checkpoint-6" / "optimizer.pt", weights_only=True) for name in ("whole", moment)
    )
    assert all(
        torch.equal(whole["state"][k]["exp_avg"], resumed["state"][k]["exp_avg"]) for k in whole["state"]
    ) and len(whole["state"])


def test_every_file_of_a_checkpoint_is_checked(killed: tuple[Path, Path], tmp_path: Path) -> None:
    """Cut in half, emptied or removed: never taken for whole."""
    source = killed[1] / "whole" / "checkpoint-4"
    assert why_incomplete(source) is None
    needed = {"model.safetensors", "optimizer.pt", "trainer_state.json"}
    checked = needed | {"rng_state.pth", "scheduler.pt", "training_args.bin", "config.json", "gcpo_state_0.pt"}
    assert checked <= {path.name for path in source.iterdir()}
    for name in sorted(checked):
        for size in (source.joinpath(name).stat().st_size // 2, 0, None):
            if size is None and name not in needed:
                continue
            copy = tmp_path / "checkpoint-4"
            shutil.copytree(source, copy)
            if size is None:
                (copy / name).unlink()
            else:
                os.truncate(copy / name, size)
            assert why_incomplete(copy) is not None, (name, size)
            with pytest.warns(UserWarning, match="Skipping .*checkpoint-4, which is not a whole checkpoint"):
                assert last_complete_checkpoint(tmp_path) is None
            shutil.rmtree(copy)


def test_sharded_checkpoints_need_every_shard(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint-1"
    (folder / "pytorch_model_fsdp_0").mkdir(parents=True)
    (folder / "trainer_state.json").write_text("{}")
    (folder / "pytorch_model_fsdp_0" / "__0_0.distcp").write_bytes(b"x")
    assert "pytorch_model_fsdp_0/.metadata" in str(why_incomplete(folder))
    (folder / "pytorch_model_fsdp_0" / ".metadata").write_bytes(b"x")
    assert why_incomplete(folder) is None
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "model-00001-of-00002.safetensors" in str(why_incomplete(folder))


def test_a_torn_checkpoint_named_outright_is_refused(
    killed: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, folder = killed
    torn = tmp_path / "checkpoint-4"
    shutil.copytree(folder / "whole" / "checkpoint-4", torn)
    os.truncate(torn / "model.safetensors", 100)
    assert main(["train", "--config", str(config), "--resume_from_checkpoint", str(torn)]) == 2
    error = capsys.readouterr().err
    assert "must be a whole checkpoint" in error and "model.safetensors is damaged" in error
    assert main(["train", "--config", str(config), "--resume_from_checkpoint", str(torn), "--resume"]) == 2
    assert "give one" in capsys.readouterr().err


def test_a_checkpoint_of_another_model_is_refused(
    killed: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from gcpo.demo.tiny import save_tiny, tiny_model, tiny_tokenizer

    config, folder = killed
    tokenizer = tiny_tokenizer(["a"])
    save_tiny(tiny_model(tokenizer, hidden_size=16, num_layers=1), tokenizer, tmp_path / "other")
    checkpoint = folder / "whole" / "checkpoint-4"
    flags = ["--model_name_or_path", str(tmp_path / "other"), "--resume_from_checkpoint", str(checkpoint)]
    assert main(["train", "--config", str(config), *flags]) == 2
    error = capsys.readouterr().err
    assert "checkpoint to resume from must be one of the model being trained" in error
    assert f"{checkpoint} has vocab_size 101, the model 260" in error
    # The same from Python.
    trainer = make_trainer(str(tmp_path / "other"), tmp_path, max_completion_length=4)
    with pytest.raises(ValueError, match="has vocab_size 101, the model 260"):
        trainer.train(resume_from_checkpoint=str(checkpoint))
    adapted = make_trainer(str(tmp_path / "other"), tmp_path, peft_config=lora(), max_completion_length=4)
    with pytest.raises(ValueError, match="holds no adapter, which this run trains"):
        adapted.train(resume_from_checkpoint=str(checkpoint))
    adapted.save_model(str(tmp_path / "adapter"))
    with pytest.raises(ValueError, match="holds an adapter, and this run trains a whole model"):
        check_same_model(tmp_path / "adapter", trainer.model)
    adapted.model.peft_config["default"].r = 4
    with pytest.raises(ValueError, match="has r 2, the model 4"):
        check_same_model(tmp_path / "adapter", adapted.model)


def test_without_any_whole_checkpoint(policy: str, tmp_path: Path) -> None:
    trainer = make_trainer(policy, tmp_path)
    with pytest.raises(ValueError, match="no whole checkpoint in"):
        trainer.train(resume_from_checkpoint=True)


# A step of 8 completions each time. After the first step, two updates per rollout leave one to be made.
TWO_UPDATES = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "num_iterations": 2}
ONE_UPDATE = {**TWO_UPDATES, "num_iterations": 1}
HALVES = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}


@pytest.mark.parametrize(
    ("before", "after", "named"),
    [
        (ONE_UPDATE, HALVES, ("`per_device_train_batch_size` was 8 and is 4", "`gradient_accumulation_steps` was 1")),
        (TWO_UPDATES, HALVES, ("`steps_per_generation` was 1 and is 2",)),
        (TWO_UPDATES, {"beta": 0.1}, ("settings: `beta` was 0 and is 0.1. The",)),
        (TWO_UPDATES, {}, ("does not say with which",)),
        (TWO_UPDATES, {}, ()),
    ],
    ids=["accumulation", "accumulation with a rollout", "beta with a rollout", "settings not kept", "of TRL's own"],
)
def test_with_other_settings_a_run_goes_on_as_grpo(
    before: dict[str, Any], after: dict[str, Any], named: tuple[str, ...], policy: str, tmp_path: Path
) -> None:
    def trainer(kind: str, **settings: Any) -> Any:
        build, configure = (GRPOTrainer, GRPOConfig) if kind == "grpo" else (GCPOTrainer, GCPOConfig)
        saved = {"save_strategy": "steps", "save_steps": 1, "max_completion_length": 4}
        shared = options(tmp_path, **{**saved, **settings})
        args = configure(**shared, **(OFF if kind == "gcpo" else {}))
        return build(policy, count_low, args, prompts())

    trainer("gcpo", **before, max_steps=1).train()
    checkpoint = tmp_path / "out" / "checkpoint-1"
    own = checkpoint / "gcpo_state_0.pt"
    if not after:
        state = torch.load(own, weights_only=True)
        del state["settings"]
        torch.save(state, own) if named else own.unlink()
    found = {}
    for kind in ("grpo", "gcpo"):
        resumed = trainer(kind, **{**before, **after, "max_steps": 3, "save_strategy": "no"})
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            resumed.train(resume_from_checkpoint=str(checkpoint))
        found[kind] = losses(resumed.state.log_history), parameters(resumed.model)
    told = [str(warning.message) for warning in caught if str(checkpoint) in str(warning.message)]
    assert len(told) == bool(named) and all(text in told[0] for text in named)
    assert len(found["grpo"][0]) == 3 and found["gcpo"][0] == found["grpo"][0]
    assert all(torch.equal(found["grpo"][1][name], got) for name, got in found["gcpo"][1].items())


def test_a_rollout_without_causal_parts_is_not_gone_on_with(policy: str, tmp_path: Path) -> None:
    """It lacks the weights and the context scores that are asked for now."""
    settings = {"save_strategy": "steps", "save_steps": 1, "num_iterations": 2, "num_colliders": 2}
    make_trainer(policy, tmp_path, **settings, **OFF, max_steps=1).train()
    resumed = make_trainer(policy, tmp_path, **settings, max_steps=2)
    with pytest.warns(UserWarning, match=r"`kappa` was 0 and is 0.06; .*`estimator` was 'none' and is 'loo'"):
        resumed.train(resume_from_checkpoint=True)
    assert resumed.state.log_history[1]["gcpo/kl_causal"] > 0


def test_settings_of_a_cycle_are_options() -> None:
    known = {item.name for item in fields(GCPOConfig)}
    assert {*LAYOUT, *ROLLOUT, *OTHERS} <= known
    assert len({*LAYOUT, *ROLLOUT, *OTHERS}) == len(LAYOUT) + len(ROLLOUT) + len(OTHERS)


def test_one_value_in_two_spellings_is_one_setting(tmp_path: Path) -> None:
    """A file gives 1 where a flag gives 1.0. Reward functions are no option, and count by their names."""
    spelled = [
        cycle_settings(GCPOConfig(**options(tmp_path, temperature=t, generation_kwargs=g), kappa=k), 1, ["count_low"])
        for t, k, g in ((1, 1, None), (1.0, 1.0, {}))
    ]
    assert not changed_settings(*spelled, keeps_rollout=True)
    other = cycle_settings(GCPOConfig(**options(tmp_path, temperature=1), kappa=1), 1, ["count_low", "other"])
    (told,) = changed_settings(spelled[0], other, keeps_rollout=True)
    assert "`reward_funcs` was ['count_low'] and is ['count_low', 'other']" in told


def test_a_reference_model_that_is_kept(policy: str, tmp_path: Path) -> None:
    """Tied weights are kept once; a checkpoint with a torn reference is not whole, one without is warned of."""
    folder = tmp_path / "checkpoint-1"
    folder.mkdir()
    (folder / "trainer_state.json").write_text("{}")
    save_file({"a": torch.zeros(2)}, folder / "model.safetensors")
    model, other = (AutoModelForCausalLM.from_pretrained(policy) for _ in range(2))
    save_reference(model, folder / REFERENCE)
    for parameter in other.parameters():
        parameter.data.zero_()
    load_reference(other, folder / REFERENCE)
    assert all(torch.equal(value, parameters(model)[name]) for name, value in parameters(other).items())
    assert other.lm_head.weight is other.model.embed_tokens.weight and why_incomplete(folder) is None
    with pytest.raises(ValueError, match=r"must have the parameters that .* holds"):
        load_reference(torch.nn.Linear(2, 2), folder / REFERENCE)
    trainer = make_trainer(policy, tmp_path, **OFF, beta=0.1, sync_ref_model=True)
    before = parameters(trainer.ref_model)
    with pytest.warns(UserWarning, match="does not hold the reference model that `sync_ref_model` moves"):
        trainer._load_reference(tmp_path / REFERENCE)
    assert all(torch.equal(value, before[name]) for name, value in parameters(trainer.ref_model).items())
    os.truncate(folder / REFERENCE, 100)
    assert f"{REFERENCE} is damaged" in str(why_incomplete(folder))


def test_sharded_reference_models_are_warned_of(policy: str, tmp_path: Path) -> None:
    trainer = make_trainer(policy, tmp_path, **OFF, beta=0.1, sync_ref_model=True)
    trainer._dist = SimpleNamespace(is_fsdp=True, is_zero3=False)
    with pytest.warns(UserWarning, match="checkpoints do not hold the reference model"):
        trainer._save_reference(tmp_path / REFERENCE)
    assert not (tmp_path / REFERENCE).exists()


def test_the_plain_trainer_resumes_too(policy: str, tmp_path: Path) -> None:
    """What GCPO is compared with has the same checkpoints."""

    def run(folder: str, resume: bool = False) -> Any:
        adaptive = {"use_adaptive_entropy": True, "entropy_target": 10.0, "entropy_coef_delta": 0.1}
        saved = {"save_strategy": "steps", "save_steps": 1}
        arguments = options(tmp_path / folder, max_steps=4, num_iterations=2, **adaptive, **saved)
        trainer = AccountedGRPOTrainer(
            model=policy,
            reward_funcs=count_low,
            args=GRPOConfig(**arguments),
            train_dataset=prompts(),
        )
        trainer.train(resume_from_checkpoint=resume or None)
        return trainer

    whole = run("whole")
    shutil.rmtree(tmp_path / "whole" / "out" / "checkpoint-4")
    # TRL writes this one last, when all else says that the checkpoint is whole.
    (tmp_path / "whole" / "out" / "checkpoint-3" / "entropy_ctrl_state.json").unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        resumed = run("whole", resume=True)
    assert losses(resumed.state.log_history) == losses(whole.state.log_history)
