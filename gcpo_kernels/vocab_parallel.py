"""
An output layer whose vocabulary is divided over processes: each holds some rows of it, and all hold the same tokens.

A tile is then (M, this process's V). What a softmax needs of a row, its largest logit, sum, entropy and target, is
gathered from all processes once per tile, four numbers a token, and combined in rank order: every process ends up with
the same bits. The gradient in the hidden states is summed over processes, tile by tile; the weight's is local.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from gcpo_kernels.linear import RowScores, RowState, Scores, TileGradient, Tiles
from gcpo_kernels.options import LossOptions
from gcpo_kernels.tokens import TokenInputs


@dataclass(frozen=True)
class VocabShards:
    """
    How a vocabulary is divided.

    Attributes:
        group: the processes, by rank.
        first: this process's first token id.
        sizes: tokens of each process.
    """

    group: Any
    first: int
    sizes: tuple[int, ...]

    @property
    def whole(self) -> int:
        return sum(self.sizes)

    def combine(self, part: RowState, token_ids: torch.Tensor) -> RowScores:
        """Scores over the whole vocabulary; NaN for an id outside it. Collective."""
        mine = torch.stack(part)
        parts = [torch.empty_like(mine) for _ in self.sizes]
        dist.all_gather(parts, mine, group=self.group)
        states = [RowState(*x.unbind()) for x in parts]
        peak = torch.stack([x.peak for x in states]).amax(dim=0)
        peak = torch.where(peak == -torch.inf, 0.0, peak)  # every logit is -inf
        total, weighted, target = (torch.zeros_like(peak) for _ in range(3))
        for x in states:
            # A part without any finite logit adds nothing.
            down = torch.where(x.peak == -torch.inf, -torch.inf, x.peak - peak)
            scale = torch.exp(down)
            total += x.total * scale
            weighted += torch.where(scale == 0, 0.0, (x.weighted + x.total * down) * scale)
            target += x.target
        log_s = torch.log(total)
        valid = (token_ids >= 0) & (token_ids < self.whole)
        logp = torch.where(valid, (target - peak) - log_s, torch.nan)
        return RowScores(logp, log_s - weighted / total, peak, total)


def find_shards(name: str, hidden: torch.Tensor, weight: torch.Tensor) -> VocabShards:
    """
    The shards of a process group, from its name. Collective, and a sync: sizes must be known on the host.

    Raises:
        ValueError: processes disagree on what they must share; on all of them.
    """
    group = dist.distributed_c10d._resolve_process_group(dist.distributed_c10d.GroupName(name))
    mine = torch.tensor([weight.shape[0], *hidden.shape], device=hidden.device)
    gathered = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(gathered, mine, group=group)
    shapes = torch.stack(gathered).tolist()
    for number, what in ((1, "tokens"), (2, "columns")):
        if len({shape[number] for shape in shapes}) > 1:
            raise ValueError(
                f"`hidden` must be the same on every process of `process_group`, got {what} "
                f"{[shape[number] for shape in shapes]} by rank."
            )
    sizes = tuple(shape[0] for shape in shapes)
    if 0 in sizes:
        raise ValueError(
            f"`weight` must have at least one row on every process of `process_group`, got {sizes} by rank."
        )
    return VocabShards(group, sum(sizes[: dist.get_rank(group)]), sizes)


@dataclass
class ShardedTiles(Tiles):
    """Tiles of this process's part of the vocabulary, made by a backend, with scores over all of it."""

    inner: Tiles
    shards: VocabShards

    @classmethod
    def around(cls, inner: Tiles, shards: VocabShards) -> "ShardedTiles":
        return cls(inner.weight, inner.bias, inner.head, inner.dtype, inner.storage, inner, shards)

    @property
    def vocab(self) -> int:
        return self.shards.whole

    def rows(self, tokens: int, estimated: bool, narrow_weight: bool) -> int:
        # The same on every process: each tile is collective.
        return self.rows_alike(tokens, max(self.shards.sizes))

    def rows_alike(self, tokens: int, vocab: int) -> int:
        return self.inner.rows_alike(tokens, vocab)

    def operand(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner.operand(x)

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner.logits(x)

    def _scores(self, tile: torch.Tensor, token_ids: torch.Tensor) -> RowScores:
        return self.shards.combine(self.inner.row_state(tile, token_ids - self.shards.first), token_ids)

    def score_only(self, x: torch.Tensor, token_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scores = self._scores(self.logits(x), token_ids)
        return scores.logp, scores.entropy

    def score(self, x: torch.Tensor, token_ids: torch.Tensor, offset: torch.Tensor | None) -> Scores:
        tile = self.logits(x)
        scores = self._scores(tile, token_ids)
        return Scores(scores.logp, scores.entropy, tile, tuple(scores))

    def gradient(self, scores: Scores, token_ids: torch.Tensor, g_logp: torch.Tensor) -> TileGradient:
        local = token_ids - self.shards.first
        return self.inner.part_gradient(scores.tile, local, RowScores(*scores.state), g_logp, None)

    def gradient_with_entropy(
        self, x: torch.Tensor, token_ids: torch.Tensor, g_logp: torch.Tensor, g_entropy: torch.Tensor
    ) -> TileGradient:
        tile = self.logits(x)
        scores = self._scores(tile, token_ids)
        return self.inner.part_gradient(tile, token_ids - self.shards.first, scores, g_logp, g_entropy)

    def to_hidden(self, gradient: TileGradient, out: torch.Tensor) -> None:
        part = torch.empty(out.shape, dtype=self.dtype, device=out.device)
        self.inner.to_hidden(gradient, part)
        dist.all_reduce(part, group=self.shards.group)
        out.copy_(part)

    def to_weight(
        self, gradient: TileGradient, x: torch.Tensor, total: torch.Tensor | None, dtype: torch.dtype
    ) -> torch.Tensor:
        return self.inner.to_weight(gradient, x, total, dtype)

    def add_to_bias(self, total: torch.Tensor, gradient: TileGradient) -> None:
        self.inner.add_to_bias(total, gradient)

    def row_state(self, tile: torch.Tensor, token_ids: torch.Tensor) -> RowState:
        return self.inner.row_state(tile, token_ids)

    def part_gradient(
        self,
        tile: torch.Tensor,
        token_ids: torch.Tensor,
        scores: RowScores,
        g_logp: torch.Tensor,
        g_entropy: torch.Tensor | None,
    ) -> TileGradient:
        return self.inner.part_gradient(tile, token_ids, scores, g_logp, g_entropy)

    def loss_gradient(
        self, logp: torch.Tensor, inputs: TokenInputs, weights: torch.Tensor, options: LossOptions
    ) -> torch.Tensor:
        return self.inner.loss_gradient(logp, inputs, weights, options)
