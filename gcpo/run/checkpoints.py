"""Checkpoint folders: which one is whole, which belongs to this model, and what they hold of a reference model."""

import json
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import is_peft_model
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from transformers.trainer import TRAINER_STATE_NAME

REFERENCE = "gcpo_reference.safetensors"  # of a checkpoint: the weights of a reference model that follows the policy
_FOLDER = re.compile(r"checkpoint-(\d+)")
# What must be equal for one model's weights to fit another.
_SHAPES = (
    "model_type vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads"
).split()


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


def checkpoint_to_resume(output_dir: str, given: str | None, resume: bool = False) -> str | None:
    """
    The checkpoint folder that a run goes on from, None for a run from the start.

    Args:
        output_dir: of the run. Without `given` and `resume`, checkpoints in it are refused: a later `--resume` would
            take them for the new run's.
        given: `--resume_from_checkpoint`: a folder, or `last` or `true` for the newest whole one in `output_dir`.
        resume: `--resume`: the newest whole one too, but None where the run was stopped before its first.
    """
    wanted = None if given is None or given.lower() in ("false", "none") else given
    if resume and wanted is not None:
        raise ValueError(
            f"`--resume` and `--resume_from_checkpoint {wanted}` are two answers to one question: give one."
        )
    if resume:
        return last_complete_checkpoint(output_dir)
    if wanted is None:
        found = checkpoints(output_dir)
        if found:
            raise ValueError(
                f"`--output_dir` {output_dir!r} holds {found[0].name} of an earlier run: `--resume` goes on "
                "with it; for a new run, name another folder or remove the checkpoints."
            )
        return None
    if wanted.lower() in ("true", "last"):
        last = last_complete_checkpoint(output_dir)
        if last is None:
            raise FileNotFoundError(
                f"`--resume_from_checkpoint {wanted}`: no checkpoint in {output_dir!r} that is whole."
            )
        return last
    if not Path(wanted).is_dir():
        raise FileNotFoundError(f"`--resume_from_checkpoint` must be a checkpoint folder or 'last', got {wanted!r}.")
    reason = why_incomplete(wanted)
    if reason is not None:
        raise ValueError(
            f"`--resume_from_checkpoint` must be a whole checkpoint, got {wanted!r}: {reason}. `--resume` takes the "
            "newest whole one."
        )
    return wanted
