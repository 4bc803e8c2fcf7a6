"""
The `torch` backend of the functions that would otherwise hold (N, V) logits: tiles of tokens, on any device.

A tile is (M, V): M tokens against the whole vocabulary, one matrix product. Where the objective is known in the forward
(`linear_loss`), the tile turns into the gradient of its logits in place and two more products finish the step: three in
all, two with a frozen head. `linear_logprob` must wait for its upstream gradient and makes the logits again: four.

Within a tile the softmax is left unnormalised, E = exp(logits - max): its sum scales rows of the products' thin side
instead of the tile. With s = sum(E), a row of d loss / d logits for d loss / d logp = g is -(g / s) (E - s onehot).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from gcpo_kernels import reference
from gcpo_kernels.options import HeadOptions, LossOptions
from gcpo_kernels.reference import TokenInputs, compute_dtype

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


@dataclass
class Head:
    """The output layer, and products with it in the arithmetic type whatever type its weight is stored in."""

    weight: torch.Tensor  # (V, H)
    bias: torch.Tensor | None  # (V,)
    options: HeadOptions
    dtype: torch.dtype  # of all arithmetic
    storage: torch.dtype  # operands are rounded to this first: the type autocast or promotion asks for

    def _rows(self) -> Iterator[tuple[slice, torch.Tensor]]:
        vocab = self.weight.shape[0]
        step = vocab if self.weight.dtype == self.storage == self.dtype else _WIDEN_ROWS
        for start in range(0, vocab, max(step, 1)):
            rows = slice(start, min(start + step, vocab))
            yield rows, self.weight[rows].to(self.storage).to(self.dtype)

    def widen(self, x: torch.Tensor) -> torch.Tensor:
        return x.to(self.storage).to(self.dtype)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden @ weight.T + bias: (M, V) from (M, H), before scale, softcap and temperature."""
        out = hidden.new_empty(hidden.shape[0], self.weight.shape[0])
        for rows, weight in self._rows():
            torch.mm(hidden, weight.T, out=out[:, rows])
        if self.bias is not None:
            out += self.bias.to(self.dtype)
        return out

    def to_hidden(self, tile: torch.Tensor) -> torch.Tensor:
        """tile @ weight: (M, H) from (M, V)."""
        out = tile.new_zeros(tile.shape[0], self.weight.shape[1])
        for rows, weight in self._rows():
            out.addmm_(tile[:, rows], weight)
        return out


@dataclass
class TileResult:
    logp: torch.Tensor  # (M,)
    entropy: torch.Tensor  # (M,)
    total: torch.Tensor  # (M,), s: what the tile must be divided by to be a softmax


def softmax_tile_(
    tile: torch.Tensor,  # (M, V), raw logits; becomes E times the softcap's slope if keep, garbage otherwise
    token_ids: torch.Tensor,  # (M,)
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
    step = max(1, _BLOCK_ELEMENTS[_device_key(tile.device)] // max(vocab, 1))
    for start in range(0, rows, step):
        block = slice(start, min(start + step, rows))
        z, ids = tile[block], token_ids[block, None]
        slope = None
        if head.logit_softcap is not None:
            z.mul_(head.logit_scale / head.logit_softcap).tanh_()
            if keep:
                slope = 1.0 - z.square()
            z.mul_(head.logit_softcap / head.temperature)
        elif head.logit_scale != head.temperature:
            z.mul_(head.logit_scale / head.temperature)
        z.sub_(z.amax(dim=1, keepdim=True))
        target = z.gather(1, ids)
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


def check_token_ids(token_ids: torch.Tensor, vocab: int) -> torch.Tensor:
    """
    The ids to gather at. On a CPU an id outside [0, V) raises; elsewhere that check would force a sync, so ids are
    clamped here and the result is overwritten with NaN (`poison`).
    """
    if token_ids.device.type == "cpu":
        if token_ids.numel():
            low, high = token_ids.aminmax()
            if low < 0 or high >= vocab:
                raise ValueError(
                    f"`token_ids` must be in [0, {vocab}) where they count, got values from {low} to {high}."
                )
        return token_ids
    return token_ids.clamp(0, vocab - 1)


def poison(x: torch.Tensor, token_ids: torch.Tensor, vocab: int) -> torch.Tensor:
    if token_ids.device.type == "cpu":
        return x
    return torch.where((token_ids < 0) | (token_ids >= vocab), torch.nan, x)


def gradient_dtype(dtype: torch.dtype) -> torch.dtype:
    """float16 gradients made in the forward wait for the loss scale in float32: without it they would underflow."""
    return torch.float32 if dtype == torch.float16 else dtype


class _Gradients:
    """Accumulates d hidden, d weight and d bias over tiles, in the arithmetic type."""

    def __init__(self, hidden: torch.Tensor, head: Head, need_hidden: bool, need_weight: bool, need_bias: bool):
        self.head = head
        weight = head.weight
        self.hidden: torch.Tensor | None = None  # (N, H)
        if need_hidden:
            self.hidden = torch.zeros(hidden.shape, dtype=gradient_dtype(hidden.dtype), device=hidden.device)
        self.weight = torch.zeros(weight.shape, dtype=head.dtype, device=weight.device) if need_weight else None
        self.bias = torch.zeros(weight.shape[0], dtype=head.dtype, device=weight.device) if need_bias else None

    def add(self, index: torch.Tensor, tile: torch.Tensor, x: torch.Tensor, row_scale: torch.Tensor) -> None:
        """Add the gradients of tokens `index` with hidden states x, where d loss / d raw logits = row_scale * tile."""
        if self.hidden is not None:
            grad = self.head.to_hidden(tile).mul_(row_scale.unsqueeze(1))
            self.hidden.index_copy_(0, index, grad.to(self.hidden.dtype))
        if self.weight is not None:
            self.weight.addmm_(tile.T, x * row_scale.unsqueeze(1))
        if self.bias is not None:
            self.bias.addmv_(tile.T, row_scale)

    def results(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        empty = self.head.weight.new_empty(0)
        bias_dtype = self.head.bias.dtype if self.head.bias is not None else self.head.dtype
        return (
            empty if self.hidden is None else self.hidden,
            empty if self.weight is None else self.weight.to(gradient_dtype(self.head.weight.dtype)),
            empty if self.bias is None else self.bias.to(gradient_dtype(bias_dtype)),
        )


def make_head(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, options: HeadOptions, storage: torch.dtype
) -> Head:
    return Head(weight, bias, options, compute_dtype(hidden, weight), storage)


def linear_logprob_forward(
    hidden: torch.Tensor,  # (N, H)
    head: Head,
    token_ids: torch.Tensor,  # (N,)
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability and entropy of each token, (N,)."""
    count, vocab = hidden.shape[0], head.weight.shape[0]
    logp, entropy = (torch.zeros(count, dtype=head.dtype, device=hidden.device) for _ in range(2))
    ids = check_token_ids(token_ids, vocab)
    for start in range(0, count, step := tile_rows(vocab, head.dtype, hidden.device)):
        block = slice(start, min(start + step, count))
        result = softmax_tile_(head.logits(head.widen(hidden[block])), ids[block], head.options, keep=False)
        logp[block], entropy[block] = result.logp, result.entropy
    return poison(logp, token_ids, vocab), entropy


def linear_logprob_backward(
    hidden: torch.Tensor,  # (N, H)
    head: Head,
    token_ids: torch.Tensor,  # (N,)
    g_logp: torch.Tensor,  # (N,)
    g_entropy: torch.Tensor | None,  # (N,)
    need: tuple[bool, bool, bool],  # hidden, weight, bias
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients in hidden, weight and bias; the logits are made again, for the tokens that have a gradient."""
    vocab = head.weight.shape[0]
    grads = _Gradients(hidden, head, *need)
    active = g_logp != 0
    if g_entropy is not None:
        active = active | (g_entropy != 0)
    index = active.nonzero().squeeze(1)
    ids = check_token_ids(token_ids, vocab)
    step = tile_rows(vocab, head.dtype, hidden.device)
    for part in index.split(step) if index.numel() else ():
        x = head.widen(hidden[part])
        tile = head.logits(x)
        upstream = poison(g_logp[part].to(head.dtype), token_ids[part], vocab)
        g_h = None if g_entropy is None else g_entropy[part].to(head.dtype)
        result = softmax_tile_(tile, ids[part], head.options, keep=True, g_logp=upstream, g_entropy=g_h)
        grads.add(part, tile, x, -_chain(head.options) / result.total)
    return grads.results()


def _chain(options: HeadOptions) -> float:
    """d logit / d raw logit, but for the softcap's slope, which is in the tile."""
    return options.logit_scale / options.temperature


def _tiles(mask: torch.Tensor, whole_sequences: bool, step: int) -> tuple[list[torch.Tensor], list[int]]:
    """
    Flat indices of the unmasked tokens, in tiles of at most `step`. With `whole_sequences`, no tile divides a sequence
    that fits into one, and the sequences that do not fit are returned too.
    """
    index = mask.flatten().nonzero().squeeze(1)
    if not whole_sequences:
        return list(index.split(step)) if index.numel() else [], []
    tiles: list[torch.Tensor] = []
    long: list[int] = []
    start = end = 0
    for row, count in enumerate(mask.sum(dim=1).tolist()):
        if end - start + count > step and end > start:
            tiles.append(index[start:end])
            start = end
        end += count
        if count > step:
            long.append(row)
            tiles.extend(index[start:end].split(step))
            start = end
    if end > start:
        tiles.append(index[start:end])
    return tiles, long


def linear_loss(
    hidden: torch.Tensor,  # (B * T, H)
    head: Head,
    token_ids: torch.Tensor,  # (B * T,)
    inputs: TokenInputs,  # (B, T)
    weights: torch.Tensor,  # (B, T): the loss is sum(weights * per-token loss)
    options: LossOptions,
    need: tuple[bool, bool, bool],  # gradients of hidden, weight, bias
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    (B, T) log-probabilities and entropies (0 where masked), and the gradients of the loss in hidden, weight and bias.

    With a ratio per sequence, a token's gradient depends on its whole sequence: tiles hold whole sequences, and one
    that is longer than a tile is scored first.
    """
    shape, vocab = inputs.mask.shape, head.weight.shape[0]
    logp, entropy = (torch.zeros(shape, dtype=head.dtype, device=hidden.device) for _ in range(2))
    flat_logp, flat_entropy = logp.view(-1), entropy.view(-1)
    flat_inputs, flat_weights = inputs.flatten(), weights.flatten()
    grads = _Gradients(hidden, head, *need)
    by_sequence = options.importance_sampling_level == "sequence"
    tiles, long = _tiles(inputs.mask, by_sequence, tile_rows(vocab, head.dtype, hidden.device))
    if any(need):
        for row in long:
            index = inputs.mask[row].nonzero().squeeze(1) + row * shape[1]
            flat_logp[index] = linear_logprob_forward(hidden[index], head, token_ids[index])[0]
    for index in tiles:
        x = head.widen(hidden[index])
        ids = check_token_ids(token_ids[index], vocab)
        tile = head.logits(x)
        result = softmax_tile_(tile, ids, head.options, keep=any(need))
        flat_logp[index] = poison(result.logp, token_ids[index], vocab)
        flat_entropy[index] = result.entropy
        if not any(need):
            continue
        if by_sequence:
            g = _sequence_gradient(index, logp, inputs, weights, options)
        else:
            taken = flat_inputs.take(index)
            d_ratio, d_logp, _ = objective_gradient(flat_logp[index], taken, options)
            g = (d_ratio + d_logp) * flat_weights[index]
        grads.add(index, tile, x, -_chain(head.options) * g / result.total)
    return logp, entropy, *grads.results()


def objective_gradient(
    logp: torch.Tensor, inputs: TokenInputs, options: LossOptions
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """`reference.token_objective_gradient` with the ratio and the projection made from `logp`."""
    ratio = reference.log_ratio(logp, inputs, options.importance_sampling_level)
    log_proj, _ = reference.causal_target(logp, inputs, options)
    return reference.token_objective_gradient(logp, ratio, log_proj, inputs, options)


def _sequence_gradient(
    index: torch.Tensor, logp: torch.Tensor, inputs: TokenInputs, weights: torch.Tensor, options: LossOptions
) -> torch.Tensor:
    """d loss / d logp of tokens `index` (whole sequences, or parts of scored ones), ratios being per sequence."""
    length = logp.shape[1]
    first, last = int(index[0]) // length, int(index[-1]) // length + 1
    part, rows = inputs.take(slice(first, last)), slice(first, last)
    d_ratio, d_logp, _ = objective_gradient(logp[rows], part, options)
    per_sequence = torch.where(part.mask, d_ratio * weights[rows], 0.0).sum(dim=1, keepdim=True)
    count = part.mask.sum(dim=1, keepdim=True).clamp(min=1)
    g = per_sequence / count + d_logp * weights[rows]
    return g.flatten()[index - first * length]


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
    return poison(logp, token_ids, vocab), entropy
