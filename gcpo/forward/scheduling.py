"""
Which forwards answer the causal step's questions: row by row, continued from keys and values that rows share, or packed
into trees. Nothing here knows what a forward does: a model computes in it, a plan counts.

Everything is collective: a process with less to do repeats its last forward, as ZeRO-3 and FSDP need.
"""

from collections.abc import Hashable, Iterator
from typing import Any, NamedTuple

import torch

from gcpo.causal.options import CausalOptions
from gcpo.causal.port import Continuation, Ids, Piece, Reading, length_of
from gcpo.forward.packing import PackedRow, pack
from gcpo.forward.prefix_tree import grow


class Scored(NamedTuple):
    """Of one completion."""

    key: int  # which of the rows
    logp: torch.Tensor  # (T,)
    z: torch.Tensor  # (H,)


class ScheduledPolicy:
    """
    The part of a policy (`gcpo.causal.port.Policy`) that decides how contexts and completions are read.

    Attributes:
        can_continue: whether rows can be read after keys and values.
        can_pack: whether rows can be packed into trees.
        alone: whether this process asks no other for the moment, because its forwards wait for none and another thread
            of it may be talking to them.
    """

    options: CausalOptions
    device: torch.device
    rank = 0
    size = 1
    alone = False
    eos_token_ids: list[int]
    can_continue: bool
    can_pack: bool

    @property
    def shares(self) -> bool:
        return self.options.share_prefix and self.can_continue

    @property
    def rows_per_forward(self) -> int:
        raise NotImplementedError

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    def gather_lists(self, items: list[Any]) -> list[Any]:
        return items

    def reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    def most(self, count: int) -> int:
        """The largest `count` of any process."""
        return (
            count if self.size == 1 or self.alone else int(self.gather(torch.tensor([count], device=self.device)).max())
        )

    # What a subclass does. `counts`: whether this is a row of its own, and not one for other processes' sake.

    def _forward_rows(self, prompts: list[Ids], completions: list[Ids], tokens: str, counts: bool) -> list[Scored]:
        raise NotImplementedError

    def _forward_continuations(self, rows: list[Continuation], keep: bool, counts: bool) -> list[Reading]:
        raise NotImplementedError

    def _forward_packed(self, row: PackedRow, counts: bool) -> list[Scored]:
        """Of every branch, by its key."""
        raise NotImplementedError

    # -----------------------------------------------------------------------------------------------------------------

    def score(
        self, prompts: list[Ids], completions: list[Ids], length: int, tokens: str
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Score each completion after its prompt: log-probabilities (rows, length), 0 behind a completion's end, and
        representations (rows, H) float32.
        """
        if not self.shares:
            scored = self._score_rows(prompts, completions, tokens)
        elif tokens == "scored_contexts" and self._packs(prompts, completions):
            scored = self._score_packed(prompts, completions)
        else:
            scored = self._score_by_level(prompts, completions, tokens)
        return arrange(scored, len(prompts), length)

    def read(self, rows: list[Continuation], keep: bool = False) -> list[Reading]:
        """Log-probabilities and representations of continuations; with `keep`, their own keys and values too."""
        return self._read(rows, keep)

    def _read(self, rows: list[Continuation], keep: bool, counted: bool = True) -> list[Reading]:
        """`read`, with its tokens `counted` or not."""
        if not self.most(len(rows)):
            return []
        readings: list[Any] = [None] * len(rows)
        # A process without rows of its own takes part with one token that is thrown away.
        offered = rows or [Continuation([], self.eos_token_ids[:1], 0)]
        past = [sum(map(length_of, filter(None, row.past))) for row in offered]
        for part, counts in self._parts([len(row.ids) for row in offered], past):
            read = self._forward_continuations([offered[k] for k in part], keep, counted and counts and bool(rows))
            if counts and rows:
                for k, reading in zip(part, read, strict=True):
                    readings[k] = reading
        return readings

    def _packs(self, contexts: list[Ids], completions: list[Ids]) -> bool:
        """Attention over a packed row costs its square: where rows would be long, shared keys and values cost less."""
        longest = max(len(x) + len(y) for x, y in zip(contexts, completions, strict=True))
        return self.can_pack and self.most(2 * longest) <= self.options.pack_tokens

    def _score_rows(self, prompts: list[Ids], completions: list[Ids], tokens: str) -> Iterator[Scored]:
        """Whole rows; those of similar length share a forward."""
        for part, counts in self._parts([len(x) + len(y) for x, y in zip(prompts, completions, strict=True)]):
            found = self._forward_rows([prompts[k] for k in part], [completions[k] for k in part], tokens, counts)
            if counts:
                yield from (Scored(k, logp, z) for k, (_, logp, z) in zip(part, found, strict=True))

    def _score_by_level(self, contexts: list[Ids], completions: list[Ids], tokens: str) -> Iterator[Scored]:
        """
        What contexts begin with passes through the model once, level by level of their tree: the same values from fewer
        tokens. Holds the keys and values of the whole tree.
        """
        # The last token of a context predicts its completion's first, and is read with it.
        nodes, spelled = grow([context[:-1] for context in contexts])
        pieces: dict[int, Piece] = {}
        for level in range(self.most(max((len(node.path) for node in nodes), default=-1) + 1)):
            numbers = [k for k, node in enumerate(nodes) if len(node.path) == level]
            rows = [
                Continuation([pieces[n] for n in nodes[k].path], nodes[k].ids, nodes[k].start, tokens, scores=False)
                for k in numbers
            ]
            pieces.update((k, reading.own) for k, reading in zip(numbers, self.read(rows, keep=True), strict=True))
        rows = [
            Continuation([pieces[n] for n in path], x[-1:] + y, len(x) - 1, tokens)
            for x, y, path in zip(contexts, completions, spelled, strict=True)
        ]
        for k, reading in enumerate(self.read(rows)):
            yield Scored(k, reading.logp, reading.z)

    def _score_packed(self, contexts: list[Ids], completions: list[Ids]) -> Iterator[Scored]:
        """Tokens that contexts share pass through the model once: the same values, fewer tokens."""
        packed = pack(contexts, completions, self.options.pack_tokens)
        for number in range(self.most(len(packed))):
            counts = number < len(packed)
            found = self._forward_packed(packed[min(number, len(packed) - 1)], counts)
            if counts:
                yield from found

    def _parts(self, lengths: list[int], past: list[int] | None = None) -> Iterator[tuple[list[int], bool]]:
        """
        Rows for a forward each, of similar length, so that little is padded; False with those that are repeated for
        other processes' sake.
        """
        before = past or [0] * len(lengths)
        parts: list[list[int]] = []
        for k in sorted(range(len(lengths)), key=lambda k: (lengths[k], before[k])):
            fits = parts and len(parts[-1]) < self.rows_per_forward
            if fits and lengths[k] <= 1.25 * lengths[parts[-1][0]] + 16:
                parts[-1].append(k)
            else:
                parts.append([k])
        for number in range(self.most(len(parts))):
            counts = number < len(parts)
            yield (parts[number] if counts else parts[0][:1]), counts


def hashable(ids: Ids) -> Hashable:
    return tuple(ids) if isinstance(ids, list) else ids


def distinct_rows(rows: list[Continuation]) -> tuple[list[int], list[int]]:
    """
    Rows that are the same but for what they are counted as: the number of each at its first, and for every row which of
    these it is. Pieces are the same where they are one object.
    """
    keys = [(tuple(map(id, row.past)), hashable(row.ids), row.first_position) for row in rows]
    numbers: dict[Hashable, int] = {}
    place = [numbers.setdefault(key, len(numbers)) for key in keys]
    return [place.index(number) for number in range(len(numbers))], place


def arrange(scored: Iterator[Scored], rows: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities (rows, length) float32, 0 behind a completion's end, and representations (rows, H)."""
    found = sorted(scored, key=lambda item: item.key)
    logp = torch.zeros(rows, length, device=found[0].logp.device)
    for row, item in zip(logp, found, strict=True):
        width = min(len(item.logp), length)
        row[:width] = item.logp[:width]
    return logp, torch.stack([item.z for item in found])
