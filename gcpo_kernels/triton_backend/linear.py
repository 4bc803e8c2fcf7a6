"""
Tiles of the Triton backend: products by the vendor's library, or by our own where the gate says so; what is between
them in one kernel each way.
"""

from functools import cached_property

import torch

from gcpo_kernels import linear
from gcpo_kernels.linear import RowState, Scores, TileGradient, Tiles
from gcpo_kernels.options import LossOptions
from gcpo_kernels.tokens import TokenInputs
from gcpo_kernels.triton_backend import gate
from gcpo_kernels.triton_backend.logprob import (
    RowScores,
    head_numbers,
    logprob_backward,
    logprob_forward,
    narrowed,
    softmax_once,
)
from gcpo_kernels.triton_backend.product import Product, num_programs
from gcpo_kernels.triton_backend.tiling import tile_rows
from gcpo_kernels.triton_backend.token_loss import token_derivatives

# Scoring by slices: one should stay in the L2 cache between the product and the kernel.
_SLICE_ROWS, _SLICE_VOCAB = 2048, 4096
# Scoring by a product of our own: hidden states that stay in the L2 cache while the weight streams by.
_SCORED_BYTES = 24 << 20
_SCORED_ROWS = 1024
# Where processes must agree on the height of tiles, whatever devices they have.
_SMS = 132


class TritonTiles(Tiles):
    def rows(self, tokens: int, estimated: bool, narrow_weight: bool) -> int:
        # The gradient takes the place of float32 logits; in the epilogue's way there are exponentials only.
        bytes_per_logit = self.storage.itemsize if self._way(estimated) == "epilogue" else 4
        hidden, sms = self.weight.shape[1], num_programs(self.weight.device)
        return tile_rows(tokens, hidden, self.vocab, sms, bytes_per_logit, narrow_weight)

    def rows_alike(self, tokens: int, vocab: int) -> int:
        return tile_rows(tokens, self.weight.shape[1], vocab, _SMS, 4, False)

    def scored_rows(self, tokens: int) -> int:
        row_bytes = self.weight.shape[1] * self.storage.itemsize
        return max(_SCORED_ROWS, _SCORED_BYTES // max(row_bytes, 1) // 128 * 128)

    def _choice(self, operation: str) -> str:
        return gate.choose(operation, self.weight.device, self.weight.shape[1], self.vocab)

    def _way(self, estimated: bool) -> str:
        """From hidden states to a gradient; float16 holds no exponentials of 28 nats."""
        return self._choice("loss") if estimated and self.storage != torch.float16 else "two_reads"

    def operand(self, x: torch.Tensor) -> torch.Tensor:
        return x.to(self.storage)

    @cached_property
    def _weight(self) -> torch.Tensor:
        weight = self.weight.to(self.storage)
        return weight if weight.stride(1) == 1 else weight.contiguous()

    @cached_property
    def _bias(self) -> torch.Tensor | None:
        return None if self.bias is None else self.bias.contiguous()

    def _product(self, x: torch.Tensor, token_ids: torch.Tensor) -> Product:
        return Product(x.contiguous(), self._weight, self._bias, token_ids.contiguous(), self.head)

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        return self._slice(x, self._weight, self.bias)

    @staticmethod
    def _slice(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        u = _mm_float32(x, weight.T)
        return u if bias is None else u.add_(bias.to(torch.float32))

    def score_only(self, x: torch.Tensor, token_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self._choice("scoring") == "product" and (self.storage != torch.float32 or x.device.type == "cpu"):
            # A float32 product of our own, without tensor cores, does not come near the vendor's.
            return self._product(x, token_ids).scores()
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

    def score(self, x: torch.Tensor, token_ids: torch.Tensor, offset: torch.Tensor | None) -> Scores:
        way = self._way(offset is not None)
        if way == "two_reads":
            tile = self.logits(x)
            scores = logprob_forward(tile, token_ids, self.head)
            return Scores(scores.logp, scores.entropy, tile, tuple(scores))
        assert offset is not None
        offset = offset.to(torch.float32).contiguous()
        product = self._product(x, token_ids)
        if way == "epilogue":
            out = product.exponentials(offset)
        else:
            out = softmax_once(self.logits(x), token_ids, self.head, offset, self.storage)
        if x.device.type != "cpu" or out.total.isnan().any():  # on the interpreter looking is cheaper than launching
            product.redo(out)
        return Scores(out.logp, out.entropy, out.e, (out.total,))

    def gradient(self, scores: Scores, token_ids: torch.Tensor, g_logp: torch.Tensor) -> TileGradient:
        if len(scores.state) == 1:
            # Exponentials: what a row must be multiplied by goes to the thin side of the products.
            row_scale = g_logp * -head_numbers(self.head).signed_chain / scores.state[0]
            return TileGradient(scores.tile, torch.where(g_logp == 0, 0.0, row_scale))
        return self._gradient(scores.tile, token_ids, RowScores(*scores.state), g_logp, None)

    def gradient_with_entropy(
        self, x: torch.Tensor, token_ids: torch.Tensor, g_logp: torch.Tensor, g_entropy: torch.Tensor
    ) -> TileGradient:
        tile = self.logits(x)
        return self._gradient(tile, token_ids, logprob_forward(tile, token_ids, self.head), g_logp, g_entropy)

    def row_state(self, tile: torch.Tensor, token_ids: torch.Tensor) -> RowState:
        """In logits; the kernel counts in z, see `head_logit`."""
        unfinished = logprob_forward(tile, token_ids, self.head, finish=False)
        chain = head_numbers(self.head).chain
        return RowState(unfinished.logp * chain, unfinished.entropy, unfinished.peak * chain, unfinished.total)

    def part_gradient(
        self,
        tile: torch.Tensor,
        token_ids: torch.Tensor,
        scores: linear.RowScores,
        g_logp: torch.Tensor,
        g_entropy: torch.Tensor | None,
    ) -> TileGradient:
        peak = scores.peak / head_numbers(self.head).chain
        return self._gradient(
            tile, token_ids, RowScores(scores.logp, scores.entropy, peak, scores.total), g_logp, g_entropy
        )

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
        out = narrowed(tile, self.storage)
        logprob_backward(tile, token_ids, self.head, scores, g_logp, g_entropy, out)
        return TileGradient(out, scale)

    def to_hidden(self, gradient: TileGradient, out: torch.Tensor) -> None:
        if gradient.row_scale is not None:
            torch.mul(_mm_float32(gradient.tile, self._weight), gradient.row_scale.unsqueeze(1), out=out)
        elif out.dtype == self.storage:
            torch.mm(gradient.tile, self._weight, out=out)
        else:
            out.copy_(torch.mm(gradient.tile, self._weight))

    def to_weight(
        self, gradient: TileGradient, x: torch.Tensor, total: torch.Tensor | None, dtype: torch.dtype
    ) -> torch.Tensor:
        tile, row_scale = gradient
        if self.storage == torch.float16 and row_scale is not None:  # the same for all rows, too large or small for x
            product = _mm_float32(tile.T, x).mul_(row_scale[0])
            return product.to(dtype) if total is None else total.add_(product)
        if row_scale is not None:
            x = torch.mul(x, row_scale.unsqueeze(1), out=torch.empty_like(x))
        if total is None:
            return torch.mm(tile.T, x) if dtype == self.storage else _mm_float32(tile.T, x).to(dtype)
        if _float32_out(tile):
            return torch.addmm(total, tile.T, x, out_dtype=torch.float32, out=total)
        return total.addmm_(tile.float().T, x.float())

    def add_to_bias(self, total: torch.Tensor, gradient: TileGradient) -> None:
        tile, row_scale = gradient
        if row_scale is None:
            total.add_(tile.sum(dim=0, dtype=torch.float32))
        elif self.storage == torch.float16:
            total.add_(tile.sum(dim=0, dtype=torch.float32) * row_scale[0])
        else:
            # One read of the tile: its product with the row scales, in as many parts of the tile's type as hold them.
            parts, rest = [], row_scale.to(torch.float32)
            for _ in range(1 if self.storage == torch.float32 else 3):
                parts.append(rest.to(self.storage))
                rest = rest - parts[-1].to(torch.float32)
            total.add_(_mm_float32(tile.T, torch.stack(parts, dim=1)).sum(dim=1))

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
