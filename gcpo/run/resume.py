"""Going on after a kill: which checkpoint is whole and of this model, and what of TRL's and ours belongs in one."""

import json
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import is_peft_model, send_to_device
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from transformers.trainer import TRAINER_STATE_NAME
from trl import GRPOTrainer

from gcpo.run.cycle import changed_settings, cycle_settings

REFERENCE = "gcpo_reference.safetensors"  # of a checkpoint: the weights of a reference model that follows the policy
_FOLDER = re.compile(r"checkpoint-(\d+)")
# What must be equal for one model's weights to fit another.
_SHAPES = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
)


def checkpoints(folder: str | Path) -> list[Path]:
    """The checkpoint folders in `folder`, newest first by their step, whole or not."""
    found = [path for path in Path(folder).glob("checkpoint-*") if _FOLDER.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]), reverse=True)


def last_complete_checkpoint(folder: str | Path) -> str | None:
    """The newest whole checkpoint in `folder`, or None. Newer ones that are not whole are skipped with a warning."""
    for path in checkpoints(folder):
        reason = why_incomplete(path)
        if reason is None:
            return str(path)
        warnings.warn(f"Skipping {path}, which is not a whole checkpoint: {reason}.", stacklevel=2)
    return None


def why_incomplete(folder: str | Path) -> str | None:
    """
    What is missing from a checkpoint or cut short in it, in words; None for a whole one.

    The trainer writes `trainer_state.json` last, after all processes have written theirs. Files are checked for their
    own end all the same: after a power cut, those written first may be the ones that are short.
    """
    folder = Path(folder)
    if not (folder / TRAINER_STATE_NAME).is_file():
        return f"{TRAINER_STATE_NAME}, which is written last, is missing"
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    for path in files:
        if not _is_readable(path):
            return f"{path.relative_to(folder)} is damaged or was not written to its end"
    names = {str(path.relative_to(folder)) for path in files}
    for index in folder.glob("*.index.json"):
        missing = set(json.loads(index.read_text())["weight_map"].values()) - names
        if missing:
            return f"{min(missing)}, which {index.name} names, is missing"
    # FSDP and DeepSpeed keep weights and optimizer in folders of their own.
    sharded = [path for path in folder.iterdir() if path.is_dir()]
    for part in sharded:
        if any(part.glob("*.distcp")) and not (part / ".metadata").is_file():
            return f"{part.name}/.metadata, which is written last, is missing"
    if sharded:
        return None
    if not any(name.endswith((".safetensors", ".bin")) and "model" in name for name in names):
        return "it holds no weights"
    if any(name.startswith("rng_state") for name in names) and "optimizer.pt" not in names:
        return "optimizer.pt is missing"
    return None


def _is_readable(path: Path) -> bool:
    """Whether a file's own format says that it is there to its end; its contents are not read."""
    try:
        if path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix == ".safetensors":
            with safe_open(path, framework="pt"):
                pass
        elif path.suffix in (".pt", ".pth", ".bin"):  # torch.save writes zip archives, whose index is at the end
            return zipfile.is_zipfile(path)
    except (ValueError, OSError, SafetensorError):
        return False
    return True


def step_of(checkpoint: str | Path) -> int:
    """The optimizer steps that were made before a checkpoint."""
    return int(json.loads((Path(checkpoint) / TRAINER_STATE_NAME).read_text())["global_step"])


def check_same_model(checkpoint: str | Path, model: Any) -> None:
    """
    Refuse a checkpoint whose weights cannot be those of `model`.

    Raises:
        ValueError: the configurations differ in a size, or one is an adapter and the other is not, or of another shape.
    """
    checkpoint = Path(checkpoint)
    wanted = f"The checkpoint to resume from must be one of the model being trained: {checkpoint} "
    adapter, config = checkpoint / "adapter_config.json", checkpoint / "config.json"
    if adapter.is_file() != is_peft_model(model):
        got = (
            "an adapter, and this run trains a whole model"
            if adapter.is_file()
            else "no adapter, which this run trains"
        )
        raise ValueError(f"{wanted}holds {got}.")
    if adapter.is_file():
        saved = json.loads(adapter.read_text())
        current = model.peft_config[model.active_adapters[0]].to_dict()
        for name in ("peft_type", "r", "target_modules"):
            _compare(wanted, name, saved.get(name), current.get(name))
    elif config.is_file():
        text = json.loads(config.read_text())
        text = text.get("text_config", text)
        for name in _SHAPES:
            _compare(wanted, name, text.get(name), getattr(model.config.get_text_config(), name, None))


def _compare(wanted: str, name: str, saved: Any, current: Any) -> None:
    if isinstance(saved, list) and isinstance(current, list | set | tuple):
        saved, current = sorted(saved), sorted(current)
    if saved is not None and current is not None and saved != current:
        raise ValueError(f"{wanted}has {name} {saved}, the model {current}.")


def save_reference(model: Any, path: Path) -> None:
    """Write the parameters of a reference model; those that are tied, once."""
    save_file({name: parameter.detach().contiguous() for name, parameter in model.named_parameters()}, path)


def load_reference(model: Any, path: Path) -> None:
    """
    Put into a reference model what `save_reference` wrote.

    Raises:
        ValueError: the file is of a model with other parameters.
    """
    saved, current = load_file(path), dict(model.named_parameters())
    shapes = [{name: tuple(tensor.shape) for name, tensor in tensors.items()} for tensors in (saved, current)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"The reference model must have the parameters that {path} holds, and has others.")
    with torch.no_grad():
        for name, parameter in current.items():
            parameter.copy_(saved[name])


class ResumableGRPOTrainer(GRPOTrainer):
    """
    TRL's GRPOTrainer, whose checkpoints also hold what a run needs to go on as if it had not stopped: where it is in
    the cycle of `steps_per_generation * num_iterations` micro-batches that share a rollout, that rollout if the
    cycle is not over, what was to be logged next, and the reference model where `sync_ref_model` moves it.
    `train(resume_from_checkpoint=True)` takes the newest whole checkpoint in `output_dir`.

    Where a setting that the cycle depends on is another one now, a run goes on as GRPOTrainer would: with a fresh
    rollout and a cycle that begins, after one warning that names the settings.

    vLLM keeps random states of its own, which no checkpoint holds: with it a resumed run is a valid one, not the same.
    """

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_complete_checkpoint(self.args.output_dir)
            if resume_from_checkpoint is None:
                raise ValueError(f"`resume_from_checkpoint=True`: no whole checkpoint in {self.args.output_dir!r}.")
        if resume_from_checkpoint:
            check_same_model(resume_from_checkpoint, self.accelerator.unwrap_model(self.model))
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _get_train_sampler(self, dataset: Any = None) -> Any:
        self._train_sampler = super()._get_train_sampler(dataset)
        return self._train_sampler

    def _init_training_state(
        self, max_steps: int, steps_per_epoch: int, num_epochs: int, *args: Any, **kwargs: Any
    ) -> tuple[int, int]:
        epochs_trained, steps_trained = super()._init_training_state(
            max_steps, steps_per_epoch, num_epochs, *args, **kwargs
        )
        finished = self.state.global_step >= max_steps
        # Where no completions are made, the table of the last step's is not to be written over.
        self.log_completions = self.args.log_completions and not finished
        if finished:  # no epoch is left to begin: `max_steps` is looked at after a step, so one more would be made
            return num_epochs, 0
        sampler = getattr(self, "_train_sampler", None)
        if sampler is not None:
            # It draws the order of every epoch from one stream, which a new process starts from its beginning.
            for _ in range(epochs_trained):
                next(iter(sampler), None)
        return epochs_trained, steps_trained

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        # A folder of this step that a killed run left must not look whole while it is written over.
        if self.args.should_save:
            folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
            (folder / TRAINER_STATE_NAME).unlink(missing_ok=True)
        super()._save_checkpoint(model, trial)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        torch.save(self._state_of_cycle(), self._own_state(output_dir))
        self._save_reference(Path(output_dir) / REFERENCE)
        # trainer_state.json comes next, and says that the checkpoint is whole: of all processes.
        self.accelerator.wait_for_everyone()

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)
        if checkpoint is None:
            return
        self._load_reference(Path(checkpoint) / REFERENCE)
        path = self._own_state(checkpoint)
        state = torch.load(path, weights_only=True, map_location="cpu") if path.is_file() else None
        continues = self._continues_cycle(checkpoint, state)
        if state is not None and continues:
            # Here, for torch.load knows no device "cpu:0", which accelerate names the CPUs of several processes.
            self._load_state_of_cycle(send_to_device(state, self.accelerator.device))
        else:
            self._step, self._buffered_inputs = 0, None

    def _state_of_cycle(self) -> dict[str, Any]:
        """What this process adds to a checkpoint."""
        cycle = self.args.steps_per_generation * self.num_iterations
        return {
            "settings": self._cycle_settings(),
            "step": self._step,
            "rollout": self._buffered_inputs if self._step % cycle else None,
            "metrics": dict(self._metrics["train"]),
            "loss": self._tr_loss,
            "last_logged": self._globalstep_last_logged,
            # TRL writes these after trainer_state.json, where a kill can come between.
            "entropy": (self.entropy_coef, self._last_world_entropy),
        }

    def _cycle_settings(self) -> dict[str, str]:
        return cycle_settings(self.args, self.accelerator.num_processes, self.reward_func_names)

    def _load_state_of_cycle(self, state: dict[str, Any]) -> None:
        self._step, self._buffered_inputs = state["step"], state["rollout"]
        self._metrics["train"].update(state["metrics"])
        self._tr_loss, self._globalstep_last_logged = state["loss"], state["last_logged"]
        if self.use_adaptive_entropy:
            self.entropy_coef, self._last_world_entropy = state["entropy"]

    def _continues_cycle(self, checkpoint: str, state: dict[str, Any] | None) -> bool:
        """Whether the run goes on within the cycle of a checkpoint: on all processes or on none."""
        changed = []
        if state is not None:
            saved, current = state.get("settings"), self._cycle_settings()
            changed = (
                ["it does not say with which"]  # of a release that did not keep them
                if saved is None
                else changed_settings(saved, current, keeps_rollout=state["rollout"] is not None)
            )
        stops = torch.tensor([state is None or bool(changed)], device=self.accelerator.device)
        if not self.accelerator.gather(stops).any():
            return True
        # One of TRL's own lacks what ours add, and promises nothing.
        if state is not None and self.accelerator.is_main_process:
            reason = "; ".join(changed) or "the state of another process is missing"
            warnings.warn(
                f"{checkpoint} was made with other settings: {reason}. The run goes on with a fresh rollout, as "
                "GRPOTrainer would, and not as if it had not stopped.",
                stacklevel=2,
            )
        return False

    def _save_reference(self, path: Path) -> None:
        if not self.args.sync_ref_model or not self.args.should_save:
            return
        if self._dist.is_fsdp or self._dist.is_zero3:
            warnings.warn(
                "`sync_ref_model` with sharded parameters (FSDP, DeepSpeed ZeRO-3): checkpoints do not hold the "
                "reference model. A resumed run would begin again with the one that training began with.",
                stacklevel=2,
            )
        else:
            save_reference(self.accelerator.unwrap_model(self.ref_model), path)

    def _load_reference(self, path: Path) -> None:
        if not self.args.sync_ref_model:
            return
        if path.is_file():
            load_reference(self.accelerator.unwrap_model(self.ref_model), path)
        elif self.accelerator.is_main_process:
            warnings.warn(
                f"{path.parent} does not hold the reference model that `sync_ref_model` moves: the run goes on with "
                "the one that training began with, as GRPOTrainer would.",
                stacklevel=2,
            )

    def _own_state(self, folder: str) -> Path:
        return Path(folder) / f"gcpo_state_{self.accelerator.process_index}.pt"
