"""Errors of what the user asked for, and checks of models and files before anything is loaded or worked out."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class ArgumentsError(Exception):
    """What the user asked for cannot be done; the message says what to change."""


@contextmanager
def argument_errors() -> Iterator[None]:
    """Errors that reading and checking arguments raises, as ArgumentsError: they need no traceback."""
    try:
        yield
    except ImportError as error:
        if (error.name or "").split(".")[0] in ("gcpo", "gcpo_kernels"):
            raise
        hint = "; `pip install 'gcpo[train]'` brings what the commands need"
        raise ArgumentsError(f"{error}{hint if isinstance(error, ModuleNotFoundError) else ''}") from error
    except (ValueError, TypeError, OSError) as error:
        raise ArgumentsError(str(error)) from error


def one_line(text: str) -> str:
    """A text without line breaks, for a message of one line."""
    return " ".join(text.split())


def check_output(path: str | Path) -> None:
    """Refuse a file that could not be written, before what is to be written to it has been worked out."""
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"`--output` must be a file, got the folder {str(path)!r}.")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"`--output` must be in a folder that exists, got {str(path)!r}.")
    existed = path.exists()
    try:
        path.open("a").close()
    except OSError as error:
        raise ValueError(f"`--output` must be a file that can be written, got {str(path)!r} ({error}).") from error
    if not existed:  # nothing is left behind where what follows fails
        path.unlink()


def check_model(name: str | None) -> str:
    """The model's name, unless it is missing or a path to nothing (which the hub would be asked for)."""
    if name is None:
        raise ValueError("`--model_name_or_path` is missing: a model's name on the hub, or a folder.")
    if (name.startswith((".", "/", "~")) or name.count("/") > 1) and not Path(name).exists():
        raise FileNotFoundError(f"`--model_name_or_path` must be a name on the hub or a folder, got {name!r}.")
    return name


def check_chat_template(tokenizer: Any, dataset: Any, model: str) -> None:
    """Refuse messages for a model that has no template to write them with, before the first step does."""
    first: dict[str, Any] = next(iter(dataset), {})
    if not isinstance(first.get("prompt"), list) or getattr(tokenizer, "chat_template", None) is not None:
        return
    try:  # tokenizers of mistral-common need no template
        tokenizer.apply_chat_template(first["prompt"], add_generation_prompt=True, tokenize=True, return_dict=True)
    except ValueError as error:
        raise ValueError(
            f"{model!r} has no chat template and the prompts are messages: choose an instruct model, or plain text "
            "(for reasoning_gym:NAME and for rows of problem and answer: --no_task_conversational)."
        ) from error
