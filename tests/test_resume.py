"""Going on after a stop: the same losses and weights as without it, whatever was being written when it came."""

import json
import os
import random
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from test_trainer_causal import make_trainer
from tiny_policy import SHORT_TEMPLATES, count_low, options, parameters, prompts, save_policy
from transformers import TrainerCallback
from trl import GRPOConfig

from gcpo.cli import main
from gcpo.training.accounting import AccountedGRPOTrainer
from gcpo.training.resume import check_same_model, last_complete_checkpoint, why_incomplete

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
        {"steps_per_generation": 4, "logging_steps": 2},  # likewise; and of what one log entry sums up
        {"estimator": "sampled", "kl_fraction": 0.5, "num_kl_contexts": 1, "shuffle_candidates": True},
        {"num_iterations": 2, "peft_config": lora, "beta": 0.1, "causal_policy_context": "context"},
        {"generation_batch_size": 32, "steps_per_generation": None, "per_device_train_batch_size": 16},  # 2 epochs
    ],
    ids=["plain", "iterations", "steps_per_generation", "sampled", "adapter", "epochs"],
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


def test_a_checkpoint_of_another_trainer_stays_in_step(policy: str, tmp_path: Path) -> None:
    """TRL's own checkpoints lack what ours add: the rollout is drawn anew, and its cycle keeps the sampler's."""
    settings = {"save_strategy": "steps", "save_steps": 3, "max_steps": 4, "num_iterations": 2}
    trainer = make_trainer(policy, tmp_path, **settings)
    trainer.train()
    (tmp_path / "out" / "checkpoint-3" / "gcpo_state_0.pt").unlink()
    resumed = make_trainer(policy, tmp_path, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-3"))
    assert resumed.state.global_step == 4 and resumed._step == 4


def test_the_plain_trainer_resumes_too(policy: str, tmp_path: Path) -> None:
    """What GCPO is compared with has the same checkpoints."""

    def run(folder: str, resume: bool = False) -> Any:
        arguments = options(tmp_path / folder, max_steps=4, save_strategy="steps", save_steps=1, num_iterations=2)
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
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        resumed = run("whole", resume=True)
    assert losses(resumed.state.log_history) == losses(whole.state.log_history)
