"""Whether every prompt of a dataset leaves room for what GCPO shows beside it, before the first step."""

from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset

from gcpo.causal.contexts import Prompt, longest_prompt

if TYPE_CHECKING:
    from gcpo.trainer import GCPOTrainer

# Rows that are looked at, the longest texts first: in tokens, no other is likely to be longer. If one is, the step that
# it comes up in says so.
_ROWS = 1000


def check_prompt_lengths(trainer: "GCPOTrainer") -> None:
    """
    Refuse a training dataset with a row whose fusion prompt or contexts may need more positions than the model has. It
    is the lengths' upper bound that counts: candidates and colliders at their limits. Streams are not looked at.

    Raises:
        ValueError: naming the row, counted from 1, and the options to change.
    """
    dataset, limit = trainer.train_dataset, trainer.max_positions
    if limit is None or not isinstance(dataset, Dataset) or dataset.format["type"] == "custom" or not len(dataset):
        return
    dataset = dataset.select_columns("prompt").with_format(None)
    builder = trainer._causal.builder
    shown: list[list[int]] = [[]] * trainer.args.num_generations
    try:
        first: Prompt = dataset[0]["prompt"]
        template = max(len(builder.fusion(first, shown)), len(builder.context(first, shown, [])))
    except Exception:  # no row, or no chat template: others say so, the template itself when a row comes up
        return
    config, length = trainer.args, trainer.max_completion_length
    added = max(longest_prompt(config, length), length + max(length, config.collider_max_completion_length))
    room = limit - added - template  # in bytes: a token is one or more of them
    if _bytes(dataset.data.column("prompt")).max(initial=0) <= room:  # with rows that may have been filtered out since
        return
    sizes = np.concatenate([_bytes(batch["prompt"]) for batch in dataset.with_format("arrow").iter(batch_size=10_000)])
    longest = np.argsort(-sizes, kind="stable")[:_ROWS]
    for row in sorted(longest[sizes[longest] > room].tolist()):
        _check_row(trainer, dataset[row]["prompt"], row + 1, limit)


def _check_row(trainer: "GCPOTrainer", prompt: Prompt, number: int, limit: int) -> None:
    config, length, builder = trainer.args, trainer.max_completion_length, trainer._causal.builder
    own, collider = _prompt_tokens(trainer, prompt), config.collider_max_completion_length
    shown = length if config.candidate_context_tokens is None else min(length, config.candidate_context_tokens)
    word = next(token for token in range(len(trainer._tokenizer)) if token not in builder.special_ids)
    candidates = [[word] * shown] * config.num_generations
    needed = {"a fusion prompt with its collider": len(builder.fusion(prompt, candidates)) + collider}
    if config.uses_contexts:
        parallel = own + max(length, collider) + length
        if config.context_attention == "parallel":
            needed["a parallel context with its candidate"] = parallel
        elif not trainer._causal.parallel or parallel > limit:  # where parallel ones do not fit, full ones are taken
            context = builder.context(prompt, candidates[1:], [word] * collider)
            needed["a context with its candidate"] = len(context) + length
    what = max(needed, key=lambda name: needed[name])
    if needed[what] > limit:
        raise ValueError(
            f"Row {number} of `train_dataset` does not fit into the model's {limit} positions: its prompt has {own} "
            f"tokens, and {what} needs up to {needed[what]}. Leave the row out, or lower `candidate_context_tokens` "
            "(how much of each candidate is shown), `collider_max_completion_length`, `num_generations` or "
            "`max_completion_length`."
        )


def _prompt_tokens(trainer: "GCPOTrainer", prompt: Prompt) -> int:
    tokenizer = trainer._tokenizer
    if isinstance(prompt, str):
        return len(tokenizer(prompt)["input_ids"])
    options: dict[str, Any] = {"add_generation_prompt": True, **(trainer.chat_template_kwargs or {})}
    if trainer.chat_template is not None:
        options["chat_template"] = trainer.chat_template
    return len(tokenizer.apply_chat_template(prompt, tokenize=True, return_dict=True, **options)["input_ids"])


def _bytes(column: Any) -> np.ndarray:
    """(rows,) bytes of text in each prompt of a `pyarrow.ChunkedArray`."""
    try:
        if not hasattr(column.type, "value_type"):
            return pc.binary_length(column).to_numpy()
        texts = pc.binary_length(pc.struct_field(pc.list_flatten(column), "content")).fill_null(0).to_numpy()
        return np.bincount(pc.list_parent_indices(column).to_numpy(), weights=texts, minlength=len(column))
    except (TypeError, NotImplementedError, ValueError):  # content in parts, or JSON
        return np.array([len(str(prompt).encode()) for prompt in column.to_pylist()])
