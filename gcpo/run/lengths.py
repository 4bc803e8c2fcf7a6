"""Whether every prompt of a dataset leaves room for what GCPO shows beside it, before the first step."""

from typing import Any

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset

from gcpo.causal.contexts import PromptBuilder, longest_prompt
from gcpo.causal.port import Prompt

# Rows whose tokens are counted, the longest texts first. If a later one has more tokens, the step that it comes up in
# says so.
_ROWS = 20_000


def check_prompt_lengths(trainer: Any, builder: PromptBuilder, can_be_parallel: bool) -> None:
    """
    Refuse a training dataset with a row whose fusion prompt or contexts may need more positions than the model has. It
    is the lengths' upper bound that counts: candidates and colliders at their limits. Streams are not looked at.

    Raises:
        ValueError: naming the row, counted from 1, and the options to change.
    """
    dataset, limit = trainer.train_dataset, trainer.max_positions
    refuse_nothing(trainer)
    if limit is None or not isinstance(dataset, Dataset) or dataset.format["type"] == "custom" or not len(dataset):
        return
    dataset = dataset.select_columns("prompt").with_format(None)
    shown: list[list[int]] = [[]] * trainer.args.num_generations
    try:
        first: Prompt = dataset[0]["prompt"]
        template = max(len(builder.fusion(first, shown)), len(builder.context(first, shown, [])))
    except Exception:  # no row, or no chat template: others say so, the template itself when a row comes up
        return
    config, length = trainer.args, trainer.generation_limit or 0
    added = max(
        longest_prompt(config, config.num_generations, length),
        length + max(length, config.collider_limit(length)),
    )
    room = limit - added - template  # in bytes: a token is one or more of them
    turn = _tokens_of_a_turn(trainer) if isinstance(first, list) else 0
    # With rows that may have been filtered out since.
    if _bytes(dataset.data.column("prompt"), turn).max(initial=0) <= room:
        return
    batches = dataset.with_format("arrow").iter(batch_size=10_000)
    sizes = np.concatenate([_bytes(batch["prompt"], turn) for batch in batches])
    longest = np.argsort(-sizes, kind="stable")[:_ROWS]
    for row in sorted(longest[sizes[longest] > room].tolist()):
        prompt = dataset[row]["prompt"]
        own = _prompt_tokens(trainer, prompt)
        if own > room:  # its tokens with those of the whole template: then exactly
            _check_row(trainer, builder, can_be_parallel, prompt, own, row + 1, limit)


def refuse_nothing(trainer: Any) -> None:
    """An empty text is a prompt only where the tokenizer begins every text with a token of its own."""
    dataset = trainer.train_dataset
    if not isinstance(dataset, Dataset) or dataset.format["type"] == "custom" or trainer._tokenizer("")["input_ids"]:
        return
    column = dataset.select_columns("prompt").with_format(None)
    if not len(column) or not isinstance(column[0]["prompt"], str):
        return
    for number, text in enumerate(column["prompt"], 1):
        if not text:
            raise ValueError(f"Row {number} of `train_dataset` must hold a prompt, got an empty text.")


def _tokens_of_a_turn(trainer: Any) -> int:
    """What a chat template adds for each message, about."""
    short, long = ([{"role": "user", "content": "a"}, {"role": "assistant", "content": "a"}] * n for n in (1, 3))
    try:
        return max(0, -(-(_prompt_tokens(trainer, long) - _prompt_tokens(trainer, short)) // 4))
    except Exception:  # a template that takes no such conversation
        return 0


def _check_row(
    trainer: Any,
    builder: PromptBuilder,
    can_be_parallel: bool,
    prompt: Prompt,
    own: int,
    number: int,
    limit: int,
) -> None:
    config, length = trainer.args, trainer.generation_limit or 0
    collider = config.collider_limit(length)
    shown = length if config.candidate_context_tokens is None else min(length, config.candidate_context_tokens)
    word = next(token for token in range(len(trainer._tokenizer)) if token not in builder.special_ids)
    candidates = [[word] * shown] * config.num_generations
    needed = {"a fusion prompt with its collider": len(builder.fusion(prompt, candidates)) + collider}
    if config.uses_contexts:
        parallel = own + max(length, collider) + length
        if config.context_attention == "parallel":
            needed["a parallel context with its candidate"] = parallel
        elif not can_be_parallel or parallel > limit:  # where parallel ones do not fit, full ones are taken
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


def _prompt_tokens(trainer: Any, prompt: Prompt) -> int:
    tokenizer = trainer._tokenizer
    if isinstance(prompt, str):
        return len(tokenizer(prompt)["input_ids"])
    options: dict[str, Any] = {"add_generation_prompt": True, **(trainer.chat_template_kwargs or {})}
    if trainer.chat_template is not None:
        options["chat_template"] = trainer.chat_template
    return len(tokenizer.apply_chat_template(prompt, tokenize=True, return_dict=True, **options)["input_ids"])


def _bytes(column: Any, turn: int = 0) -> np.ndarray:
    """(rows,) bytes of text in each prompt of a `pyarrow.ChunkedArray`, with `turn` more for each message."""
    try:
        if not hasattr(column.type, "value_type"):
            return pc.binary_length(column).to_numpy()
        texts = pc.binary_length(pc.struct_field(pc.list_flatten(column), "content")).fill_null(0).to_numpy()
        return np.bincount(pc.list_parent_indices(column).to_numpy(), weights=texts + turn, minlength=len(column))
    except (TypeError, NotImplementedError, ValueError):  # content in parts, or JSON
        return np.array([len(str(prompt).encode()) + turn * len(prompt or "") for prompt in column.to_pylist()])
