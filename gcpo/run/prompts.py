"""Whether a dataset's prompts can be trained on, before a model is loaded for them."""

import difflib
from collections.abc import Mapping
from typing import Any

# Names under which other trainers and public datasets keep what is a prompt here, the likelier ones first.
_OTHER_NAMES = tuple(
    "prompts question questions problem instruction query input messages conversations conversation text".split()
)
_BATCH = 10_000
_WANTED = "text, or a list of messages with `role` and `content`"


class PromptError(ValueError):
    """A dataset without prompts, or a row whose prompt cannot be trained on; the message names it."""


def check_prompts(dataset: Any, what: str = "The dataset") -> Any:
    """
    Refuse a dataset without a column `prompt`, and prompts that are neither text nor messages, or not all of one kind.
    A `datasets.Dataset` is read through Arrow: a million good rows take a fraction of a second. Of a stream, each row
    is looked at when it comes up.

    Args:
        dataset: a `datasets.Dataset` or `IterableDataset`; any other kind, and one whose rows are made by a function
            (`set_transform`), is left alone.
        what: what to call it in errors.

    Returns:
        The dataset to go on with: itself, or for a stream, one that checks its rows.

    Raises:
        PromptError: naming the row, counted from 1.
    """
    from datasets import Dataset, IterableDataset

    if not isinstance(dataset, Dataset | IterableDataset) or getattr(dataset, "format", {}).get("type") == "custom":
        return dataset
    columns = dataset.column_names or list(next(iter(dataset), {}))  # a stream may not know before its first row
    if "prompt" not in columns:
        raise PromptError(
            f"{what} must have a column `prompt`, got {', '.join(columns) or 'no column'}{_hint(columns)}."
        )
    check = _RowCheck(what)
    if isinstance(dataset, IterableDataset):
        return dataset.map(check.mapped, with_indices=True, input_columns="prompt", features=dataset.features)
    prompts = dataset.select_columns("prompt")
    start = 0
    for batch in prompts.with_format("arrow").iter(batch_size=_BATCH):
        kind = _kind_of_whole(batch["prompt"])
        if kind is None:  # or not surely: row by row
            for number, prompt in enumerate(prompts.with_format(None)[start : start + len(batch)]["prompt"], start + 1):
                check(prompt, number)
        else:
            check.same_kind(kind, start + 1)
        start += len(batch)
    return dataset


class _RowCheck:
    def __init__(self, what: str):
        self.what = what
        self._first: tuple[str, int] | None = None  # kind and number of the first row that was seen

    def mapped(self, prompt: Any, index: int) -> dict[str, Any]:
        """As a function of `datasets.IterableDataset.map`."""
        self(prompt, index + 1)
        return {}

    def __call__(self, prompt: Any, number: int) -> None:
        problem = _problem(prompt)
        if problem is not None:
            raise PromptError(f"{self.what}'s row {number}: `prompt` must be {_WANTED}, got {problem}.")
        self.same_kind("text" if isinstance(prompt, str) else "messages", number)

    def same_kind(self, kind: str, number: int) -> None:
        self._first = self._first or (kind, number)
        if kind != self._first[0]:
            wanted, first = self._first
            raise PromptError(
                f"{self.what}'s row {number}: `prompt` must be {wanted} in every row, as in row {first}, got {kind}."
            )


def _problem(prompt: Any) -> str | None:
    """What is wrong with a prompt; None where nothing is."""
    if prompt is None:
        return "null"
    if isinstance(prompt, str):
        return None
    if not isinstance(prompt, list):
        return f"{type(prompt).__name__}: {_short(prompt)}"
    if not prompt:
        return "an empty list"
    for message in prompt:
        if not isinstance(message, Mapping):
            return f"a list with {_short(message)}"
        if message.get("role") is None and "from" in message and "value" in message:
            return (
                f"a message with `from` and `value`: {_short(message)}. Rename these keys, and the speakers `human` "
                "and `gpt` to `user` and `assistant`"
            )
        missing = [name for name in ("role", "content") if name not in message]
        if missing or not isinstance(message["role"], str):
            return f"a message without `{missing[0] if missing else 'role'}`: {_short(message)}"
        # No content is one of an assistant that calls a tool, or nothing said.
        if not isinstance(message["content"], str | list | None):
            return f"a message whose `content` is no text: {_short(message)}"
    return None


def _kind_of_whole(column: Any) -> str | None:
    """The kind of a batch of prompts (a `pyarrow.ChunkedArray`) of which Arrow can tell that each is right; or None."""
    import pyarrow.compute as pc
    from pyarrow import types

    def is_text(kind: Any) -> bool:
        return kind is not None and (types.is_string(kind) or types.is_large_string(kind))

    kind = column.type
    if column.null_count:
        return None
    if is_text(kind):
        return "text"
    if not ((types.is_list(kind) or types.is_large_list(kind)) and types.is_struct(kind.value_type)):
        return None
    fields = {field.name: field.type for field in kind.value_type}
    if not (is_text(fields.get("role")) and is_text(fields.get("content"))):
        return None
    messages = pc.list_flatten(column)
    are_whole = pc.min(pc.list_value_length(column)).as_py() and not messages.null_count
    return "messages" if are_whole and not pc.struct_field(messages, "role").null_count else None


def _hint(columns: list[str]) -> str:
    lower = {name.lower(): name for name in columns}
    found = [lower[name] for name in ("prompt", *_OTHER_NAMES) if name in lower]
    found += difflib.get_close_matches("prompt", columns, n=1)
    return f": rename the one that holds the prompts, probably `{found[0]}`" if found else ""


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
