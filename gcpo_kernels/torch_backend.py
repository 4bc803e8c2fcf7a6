"""
The `torch` backend of the functions that would otherwise hold (N, V) logits, on any device.

Within a tile the softmax is left unnormalised, E = exp(logits - max): its sum scales rows of the products' thin side
instead of the tile. With s = sum(E), a row of d loss / d logits for d loss / d logp = g is -(g / s) (E - s onehot).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from gcpo_kernels.linear import RowScores, RowState, Scores, TileGradient, Tiles, check_token_ids
from gcpo_kernels.maths import compute_dtype, head_logits
from gcpo_kernels.options import HeadOptions

# Large enough for full-speed products, small enough that a tile stays well below the weight and its gradient.
_TILE_BYTES = {"cpu": 96 << 20, "other": 1 << 30}
_MIN_TILE_ROWS = {"cpu": 128, "other": 1024}
# Rows of a tile that are handled at a time on a CPU, so that temporaries stay in its cache.
_BLOCK_ELEMENTS = {"cpu": 1 << 18, "other": 1 << 62}
# float16 and bfloat16 weights are widened in slices of this many rows of the vocabulary.
_WIDEN_ROWS = 8192


def _device_key(device: torch.device) -> str:
    return "cpu" if device.type == "cpu" else "other"


def tile_rows(vocab: int, dtype: torch.dtype, device: torch.device) -> int:
    """Tokens per tile."""
    key = _device_key(device)
    rows = _TILE_BYTES[key] // (vocab * torch.empty((), dtype=dtype).element_size())
    return max(_MIN_TILE_ROWS[key], rows // 8 * 8)


def _blocks(tile: torch.Tensor) -> Iterator[slice]:
    """Rows of a tile, in blocks whose temporaries stay small."""
    step = max(1, _BLOCK_ELEMENTS[_device_key(tile.device)] // max(tile.shape[1], 1))
    return (slice(start, min(start + step, len(tile))) for start in range(0, len(tile), step))


@dataclass
class TileResult:
    logp: torch.Tensor  # (M,)
    entropy: torch.Tensor  # (M,)
    total: torch.Tensor  # (M,), s: what the tile must be divided by to be a softmax


def softmax_tile_(
    tile: torch.Tensor,  # (M, V), raw logits; becomes E times the softcap's slope if keep, garbage otherwise
    token_ids: torch.Tensor,  # (M,); the log-probability of an id outside [0, V) is NaN
    head: HeadOptions,
    keep: bool,
    g_entropy: torch.Tensor | None = None,  # (M,)
    g_logp: torch.Tensor | None = None,  # (M,)
) -> TileResult:
    """
    Log-probability and entropy of each row. With `keep`, the tile becomes D such that d loss / d raw logits is
    -(1 / total) D g for a loss whose d loss / d logp is g, which may still be unknown; given `g_logp` (and
    `g_entropy`), D holds them already, so that the entropy's gradient can be added.
    """
    rows, vocab = tile.shape
    logp, entropy, total = (tile.new_empty(rows) for _ in range(3))
    for block in _blocks(tile):
        z = tile[block]
        ids = token_ids[block, None].clamp(0, vocab - 1)
        slope = None
        if head.logit_softcap is not None:
            z.mul_(head.logit_scale / head.logit_softcap).tanh_()
            if keep:
                slope = 1.0 - z.square()
            z.mul_(head.logit_softcap / head.temperature)
        elif head.logit_scale != head.temperature:
            z.mul_(head.logit_scale / head.temperature)
        z.sub_(z.amax(dim=1, keepdim=True))
        target = torch.where(ids == token_ids[block, None], z.gather(1, ids), torch.nan)
        e = torch.exp(z)
        s = e.sum(dim=1, keepdim=True)
        log_s = s.log()
        block_logp = target - log_s
        dot = torch.linalg.vecdot(e, z).unsqueeze(1)
        if z.device.type != "cpu" or dot.isnan().any():  # 0 * -inf: a token of probability 0 adds nothing
            dot = torch.where(e > 0, e * z, 0.0).sum(dim=1, keepdim=True)
        block_entropy = log_s - dot / s
        logp[block], entropy[block], total[block] = block_logp[:, 0], block_entropy[:, 0], s[:, 0]
        if not keep:
            continue
        hit = s * torch.expm1(block_logp)  # E - s at the target, without the cancellation of p - 1 as p -> 1
        if g_logp is not None:
            hit = hit * g_logp[block, None]
            d = e * g_logp[block, None]
            if g_entropy is not None:
                # d entropy / d z_j = -p_j (log p_j + entropy)
                extra = torch.where(e > 0, e * (z - log_s + block_entropy), 0.0) * g_entropy[block, None]
                hit = hit + extra.gather(1, ids)
                d += extra
            e = d
        e.scatter_(1, ids, hit)
        torch.mul(e, slope, out=z) if slope is not None else z.copy_(e)
    return TileResult(logp, entropy, total)


class TorchTiles(Tiles):
    """Products in the arithmetic type, of operands rounded to the storage type: right everywhere, fast on a CPU."""

    def rows(self, tokens: int, estimated: bool, narrow_weight: bool) -> int:
        return self.rows_alike(tokens, self.vocab)

    def rows_alike(self, tokens: int, vocab: int) -> int:
        return tile_rows(vocab, self.dtype, self.weight.device)

    def operand(self, x: torch.Tensor) -> torch.Tensor:
        return x.to(self.storage).to(self.dtype)

    def _weights(self) -> Iterator[tuple[slice, torch.Tensor]]:
        """The weight as the products take it, in slices of the vocabulary where that means a copy."""
        step = self.vocab if self.weight.dtype == self.storage == self.dtype else _WIDEN_ROWS
        for start in range(0, self.vocab, step):
            some = slice(start, min(start + step, self.vocab))
            yield some, self.operand(self.weight[some])

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        out = x.new_empty(x.shape[0], self.vocab)
        for some, weight in self._weights():
            torch.mm(x, weight.T, out=out[:, some])
        return out if self.bias is None else out.add_(self.bias.to(self.dtype))

    def score_only(self, x: torch.Tensor, token_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scores = softmax_tile_(self.logits(x), token_ids, self.head, keep=False)
        return scores.logp, scores.entropy

    def score(self, x: torch.Tensor, token_ids: torch.Tensor, offset: torch.Tensor | None) -> Scores:
        tile = self.logits(x)
        scores = softmax_tile_(tile, token_ids, self.head, keep=True)
        return Scores(scores.logp, scores.entropy, tile, (scores.total,))

    def gradient(self, scores: Scores, token_ids: torch.Tensor, g_logp: torch.Tensor) -> TileGradient:
        return TileGradient(scores.tile, -self.chain * g_logp / scores.state[0])

    def gradient_with_entropy(
        self, x: torch.Tensor, token_ids: torch.Tensor, g_logp: torch.Tensor, g_entropy: torch.Tensor
    ) -> TileGradient:
        tile = self.logits(x)
        scores = softmax_tile_(tile, token_ids, self.head, keep=True, g_logp=g_logp, g_entropy=g_entropy)
        return TileGradient(tile, -self.chain / scores.total)

    def row_state(self, tile: torch.Tensor, token_ids: torch.Tensor) -> RowState:
        state = RowState(*(tile.new_empty(len(tile)) for _ in range(4)))
        for block in _blocks(tile):
            z, ids = head_logits(tile[block], self.head), token_ids[block, None]
            near = ids.clamp(0, tile.shape[1] - 1)
            state.target[block] = torch.where(ids == near, z.gather(1, near), 0.0)[:, 0]
            peak = z.amax(dim=1, keepdim=True)
            z.sub_(torch.where(peak == -torch.inf, 0.0, peak))
            e = torch.exp(z)
            state.peak[block], state.total[block] = peak[:, 0], e.sum(dim=1)
            # Where e is 0, z may be -inf; where it is NaN, so is the sum.
            state.weighted[block] = torch.where(e == 0, 0.0, e * z).sum(dim=1)
        return state

    def part_gradient(
        self,
        tile: torch.Tensor,
        token_ids: torch.Tensor,
        scores: RowScores,
        g_logp: torch.Tensor,
        g_entropy: torch.Tensor | None,
    ) -> TileGradient:
        for block in _blocks(tile):
            z, ids = head_logits(tile[block], self.head), token_ids[block, None]
            slope = None
            if self.head.logit_softcap is not None:
                slope = 1.0 - (z * (self.head.temperature / self.head.logit_softcap)).square()
            logp, entropy, peak, total = (x[block, None] for x in scores)
            log_p = z.sub_(peak).sub_(total.log())
            p = torch.exp(log_p)
            near = ids.clamp(0, tile.shape[1] - 1)
            d = p * -g_logp[block, None]
            hit = torch.where(ids == near, -torch.expm1(logp) * g_logp[block, None], d.gather(1, near))
            d.scatter_(1, near, hit)  # 1 - p at the target, without the cancellation as p -> 1
            if g_entropy is not None:
                d -= torch.where(p == 0, 0.0, p * (log_p + entropy)) * g_entropy[block, None]
            tile[block] = d if slope is None else d.mul_(slope)
        return TileGradient(tile, tile.new_full((len(tile),), self.chain))

    def to_hidden(self, gradient: TileGradient, out: torch.Tensor) -> None:
        tile, row_scale = gradient
        assert row_scale is not None
        total: torch.Tensor | None = None
        for some, weight in self._weights():
            part = tile[:, some]
            total = torch.mm(part, weight) if total is None else total.addmm_(part, weight)
        assert total is not None
        torch.mul(total, row_scale.unsqueeze(1), out=out)

    def to_weight(
        self, gradient: TileGradient, x: torch.Tensor, total: torch.Tensor | None, dtype: torch.dtype
    ) -> torch.Tensor:
        assert gradient.row_scale is not None
        scaled = x * gradient.row_scale.unsqueeze(1)
        if total is None:
            return torch.mm(gradient.tile.T, scaled).to(dtype)
        return total.addmm_(gradient.tile.T, scaled)

    def add_to_bias(self, total: torch.Tensor, gradient: TileGradient) -> None:
        assert gradient.row_scale is not None
        total.addmv_(gradient.tile.T, gradient.row_scale)


def selective_forward(
    logits: torch.Tensor,  # (N, V) or (B, T, V), any strides
    token_ids: torch.Tensor,  # (N,) or (B, T)
    temperature: float,
    g_logp: torch.Tensor | None = None,
    g_entropy: torch.Tensor | None = None,
    d_logits: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Log-probability and entropy of each row; with `d_logits`, also fills it with the gradient for the upstream
    gradients given. Works through rows in tiles, because the input may not be copied and is not overwritten.
    """
    vocab, dtype = logits.shape[-1], compute_dtype(logits)
    logp, entropy = (torch.zeros(token_ids.shape, dtype=dtype, device=logits.device) for _ in range(2))
    ids = check_token_ids(token_ids, vocab)
    head = HeadOptions(temperature=temperature)
    step = max(1, tile_rows(vocab, dtype, logits.device) // 8)
    # A (N, V) input is one sequence: never flattened, because flattening a sliced (B, T, V) would copy all of it.
    rows = [0] if logits.dim() == 2 else range(logits.shape[0])
    for row in rows:
        at_row = () if logits.dim() == 2 else (row,)
        for start in range(0, logits.shape[-2], step):
            at = (*at_row, slice(start, start + step))
            tile = logits[at].to(dtype, copy=True)
            g = None if g_logp is None else g_logp[at].to(dtype)
            g_h = None if g_entropy is None else g_entropy[at].to(dtype)
            result = softmax_tile_(tile, ids[at], head, keep=d_logits is not None, g_logp=g, g_entropy=g_h)
            logp[at], entropy[at] = result.logp, result.entropy
            if d_logits is not None:
                d_logits[at] = tile.mul_((-1.0 / (temperature * result.total)).unsqueeze(1)).to(d_logits.dtype)
    return logp, entropy
