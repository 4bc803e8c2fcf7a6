"""Which rows of a rollout share a micro-batch: those of one prompt, and in all micro-batches about as many tokens."""

import math
from typing import Any

import torch

Batch = dict[str, Any]


def regrouped(batches: list[Batch], accumulation: int) -> list[Batch]:
    """
    The rows of a rollout, dealt out anew to its micro-batches. No row moves to another optimizer step, and every
    micro-batch keeps its number of rows: a step's gradient is what it was, but for roundings, where a micro-batch's
    loss is a sum over its rows, or a mean over rows.

    Args:
        batches: micro-batches of one size, in order: tensors whose first dimension is a row, numbers without one, and
            None. With anything else they are returned as they are.
        accumulation: micro-batches of an optimizer step.
    """
    if not all(value is None or isinstance(value, torch.Tensor) for batch in batches for value in batch.values()):
        return batches
    window = math.gcd(len(batches), accumulation)  # steps begin at multiples of it, whatever the rollout before was
    found: list[Batch] = []
    for start in range(0, len(batches), window):
        found += _deal_out(batches[start : start + window])
    return found


def _deal_out(batches: list[Batch]) -> list[Batch]:
    whole = {name: _joined([batch[name] for batch in batches]) for name in batches[0]}
    prompts = torch.cat([whole["prompt_ids"], whole["prompt_mask"]], dim=1)
    _, group = torch.unique(prompts, dim=0, return_inverse=True)
    lengths, reads = whole["completion_mask"].sum(dim=1).tolist(), whole["prompt_mask"].sum(dim=1).tolist()
    dealt = deal(group.tolist(), lengths, reads, len(batches))
    return [{name: _taken(value, rows) for name, value in whole.items()} for rows in dealt]


def _joined(values: list[Any]) -> Any:
    return torch.cat(values) if isinstance(values[0], torch.Tensor) and values[0].dim() else values[0]


def _taken(value: Any, rows: list[int]) -> Any:
    return value[rows] if isinstance(value, torch.Tensor) and value.dim() else value


def deal(groups: list[int], lengths: list[int], reads: list[int], count: int) -> list[list[int]]:
    """
    Rows in `count` lists of one size: rows of a group together as far as they fit, and the lists alike in tokens.

    Args:
        groups: the group of each row.
        lengths: tokens of its own.
        reads: tokens that the rows of a group have in common.
    """
    size = len(groups) // count
    members: dict[int, list[int]] = {}
    for row in sorted(range(len(groups)), key=lambda row: -lengths[row]):
        members.setdefault(groups[row], []).append(row)
    chunks: list[list[int]] = []
    for rows in members.values():
        parts = -(-len(rows) // size)
        # Back and forth, the longest first: the parts of a group come out alike.
        order = [k % parts if k // parts % 2 == 0 else parts - 1 - k % parts for k in range(len(rows))]
        chunks += [[row for row, part in zip(rows, order, strict=True) if part == number] for number in range(parts)]

    def tokens(rows: list[int]) -> int:
        return sum(lengths[row] for row in rows) + reads[rows[0]]

    dealt: list[list[int]] = [[] for _ in range(count)]
    filled = [0] * count
    chunks.sort(key=lambda rows: (-len(rows), -tokens(rows)))
    while chunks:
        rows = chunks.pop(0)
        fits = [k for k in range(count) if len(dealt[k]) + len(rows) <= size]
        # Where a group fits nowhere as a whole, what fits goes where there is most room.
        place = min(fits, key=lambda k: filled[k]) if fits else min(range(count), key=lambda k: len(dealt[k]))
        room = size - len(dealt[place])
        if rows[room:]:
            chunks.append(rows[room:])
        dealt[place] += rows[:room]
        filled[place] += tokens(rows[:room])
    return [sorted(rows) for rows in dealt]
