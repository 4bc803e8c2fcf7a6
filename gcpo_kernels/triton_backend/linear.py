"""Tiles of the Triton backend: products by the vendor's library, everything between them in one kernel each way."""

from functools import cached_property

import torch

from gcpo_kernels import linear
from gcpo_kernels.linear import RowState, Scores, TileGradient, Tiles
from gcpo_kernels.options import LossOptions
from gcpo_kernels.reference import TokenInputs
from gcpo_kernels.triton_backend.logprob import RowScores, logprob_backward, logprob_forward
from gcpo_kernels.triton_backend.token_loss import token_derivatives

# With gradients, a tile holds float32 logits and their gradient in the operands' type: 6 bytes an entry in bfloat16.
_TILE_BYTES = 1536 << 20
_MIN_ROWS, _MAX_ROWS = 1024, 8192
# Without gradients, a slice of the tile should stay in the L2 cache between the product and the kernel.
_SLICE_ROWS, _SLICE_VOCAB = 2048, 4096


class TritonTiles(Tiles):
    def rows(self, vocab: int | None = None) -> int:
        bytes_per_entry = 4 + self.storage.itemsize
        rows = _TILE_BYTES // (bytes_per_entry * max(vocab or self.vocab, 1))
        return min(_MAX_ROWS, max(_MIN_ROWS, rows // 256 * 256))

    def operand(self, x: torch.Tensor) -> torch.Tensor:
        return x.to(self.storage)

    @cached_property
    def _weight(self) -> torch.Tensor:
        return self.weight.to(self.storage)

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        return self._slice(x, self._weight, self.bias)

    @staticmethod
    def _slice(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        u = _mm_float32(x, weight.T)
        return u if bias is None else u.add_(bias.to(torch.float32))

    def score_only(self, x: torch.Tensor, token_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logp, entropy = (torch.empty(len(x), dtype=torch.float32, device=x.device) for _ in range(2))
        weight = self._weight
        for start in range(0, len(x), _SLICE_ROWS):
            rows = slice(start, start + _SLICE_ROWS)
            scores: RowScores | None = None
            for first in range(0, self.vocab, _SLICE_VOCAB):
                some = slice(first, first + _SLICE_VOCAB)
                u = self._slice(x[rows], weight[some], None if self.bias is None else self.bias[some])
                scores = logprob_forward(u, token_ids[rows], self.head, scores, first, self.vocab)
            assert scores is not None
            logp[rows], entropy[rows] = scores.logp, scores.entropy
        return logp, entropy

    def score(self, tile: torch.Tensor, token_ids: torch.Tensor) -> Scores:
        scores = logprob_forward(tile, token_ids, self.head)
        return Scores(scores.logp, scores.entropy, tuple(scores))

    def gradient(
        self, tile: torch.Tensor, token_ids: torch.Tensor, scores: Scores, g_logp: torch.Tensor
    ) -> TileGradient:
        return self._gradient(tile, token_ids, RowScores(*scores.state), g_logp, None)

    def gradient_with_entropy(
        self, tile: torch.Tensor, token_ids: torch.Tensor, g_logp: torch.Tensor, g_entropy: torch.Tensor
    ) -> TileGradient:
        return self._gradient(tile, token_ids, logprob_forward(tile, token_ids, self.head), g_logp, g_entropy)

    def row_state(self, tile: torch.Tensor, token_ids: torch.Tensor) -> RowState:
        unfinished = logprob_forward(tile, token_ids, self.head, finish=False)
        return RowState(unfinished.logp, unfinished.entropy, unfinished.peak, unfinished.total)

    def part_gradient(
        self,
        tile: torch.Tensor,
        token_ids: torch.Tensor,
        scores: linear.RowScores,
        g_logp: torch.Tensor,
        g_entropy: torch.Tensor | None,
    ) -> TileGradient:
        return self._gradient(tile, token_ids, RowScores(*scores), g_logp, g_entropy)

    def _gradient(
        self,
        tile: torch.Tensor,
        token_ids: torch.Tensor,
        scores: RowScores,
        g_logp: torch.Tensor,
        g_entropy: torch.Tensor | None,
    ) -> TileGradient:
        scale = None
        if self.storage == torch.float16:
            # Gradients of a mean over many tokens would underflow: keep the tile near 1, and the size beside it.
            size = g_logp.abs() if g_entropy is None else torch.maximum(g_logp.abs(), g_entropy.abs())
            scale = torch.where(size > 0, size, 1.0).amax().expand(len(tile))
            g_logp = g_logp / scale
            g_entropy = None if g_entropy is None else g_entropy / scale
        out = tile if self.storage == torch.float32 else torch.empty_like(tile, dtype=self.storage)
        logprob_backward(tile, token_ids, self.head, scores, g_logp, g_entropy, out)
        return TileGradient(out, scale)

    def to_hidden(self, gradient: TileGradient) -> torch.Tensor:
        if gradient.row_scale is None:
            return gradient.tile @ self._weight
        return _mm_float32(gradient.tile, self._weight) * gradient.row_scale.unsqueeze(1)

    def add_to_weight(self, total: torch.Tensor, gradient: TileGradient, x: torch.Tensor) -> None:
        tile = gradient.tile
        if gradient.row_scale is not None:  # the same for all rows
            total.add_(_mm_float32(tile.T, x) * gradient.row_scale[0])
        elif _float32_out(tile):
            torch.addmm(total, tile.T, x, out_dtype=torch.float32, out=total)
        else:
            total.addmm_(tile.float().T, x.float())

    def add_to_bias(self, total: torch.Tensor, gradient: TileGradient) -> None:
        column_sums = gradient.tile.sum(dim=0, dtype=torch.float32)
        total.add_(column_sums if gradient.row_scale is None else column_sums * gradient.row_scale[0])

    def loss_gradient(
        self, logp: torch.Tensor, inputs: TokenInputs, weights: torch.Tensor, options: LossOptions
    ) -> torch.Tensor:
        return token_derivatives(logp, inputs, options) * weights


def _float32_out(x: torch.Tensor) -> bool:
    """Whether the vendor's product can take `x`'s type and give float32: CUDA and ROCm, half types."""
    return x.device.type == "cuda" and x.dtype in (torch.bfloat16, torch.float16)


def _mm_float32(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a @ b in float32, without rounding it to the operands' type first."""
    return torch.mm(a, b, out_dtype=torch.float32) if _float32_out(a) else torch.mm(a.float(), b.float())
