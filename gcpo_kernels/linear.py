"""
From hidden states and the output layer to log-probabilities and losses, tile by tile: no (N, V) tensor, ever.

A tile is (M, V): M tokens against the whole vocabulary, one matrix product. Where the objective is known in the forward
(`linear_loss`), the tile turns into the gradient of its logits and two more products finish the step: three in all, two
with a frozen head. `linear_logprob` must wait for its upstream gradient and makes the logits again: four.

The loops are here; what happens to a tile is a backend's, a subclass of `Tiles`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from gcpo_kernels import maths
from gcpo_kernels.options import HeadOptions, LossOptions
from gcpo_kernels.tokens import TokenInputs

Need = tuple[bool, bool, bool]  # gradients of hidden, weight, bias


def gradient_dtype(dtype: torch.dtype) -> torch.dtype:
    """float16 gradients made in the forward wait for the loss scale in float32: without it they would underflow."""
    return torch.float32 if dtype == torch.float16 else dtype


def check_token_ids(token_ids: torch.Tensor, vocab: int) -> torch.Tensor:
    """
    On a CPU, an id outside [0, vocab) raises. Elsewhere that would force a sync: such a token scores NaN instead.
    """
    if token_ids.device.type == "cpu" and token_ids.numel():
        low, high = token_ids.aminmax()
        if low < 0 or high >= vocab:
            raise ValueError(f"`token_ids` must be in [0, {vocab}) where they count, got values from {low} to {high}.")
    return token_ids


class Scores(NamedTuple):
    """Of the rows of a tile."""

    logp: torch.Tensor  # (M,)
    entropy: torch.Tensor  # (M,)
    tile: torch.Tensor  # (M, V), as the backend left it
    state: tuple[torch.Tensor, ...]  # what else the backend needs to make the gradient


class TileGradient(NamedTuple):
    """d loss / d raw logits = row_scale * tile."""

    tile: torch.Tensor  # (M, V)
    row_scale: torch.Tensor | None  # (M,); None: 1


class RowState(NamedTuple):
    """Of each row, (M,): what a part of the vocabulary says about a softmax over all of it."""

    target: torch.Tensor  # the target's logit; 0 where the target is not in this part
    weighted: torch.Tensor  # sum of exp(logit - peak) (logit - peak)
    peak: torch.Tensor  # largest logit
    total: torch.Tensor  # sum of exp(logit - peak)


class RowScores(NamedTuple):
    """Of each row, (M,), over the whole vocabulary: log p of a logit is (logit - peak) - log(total)."""

    logp: torch.Tensor
    entropy: torch.Tensor
    peak: torch.Tensor
    total: torch.Tensor


@dataclass
class Tiles(ABC):
    """What a backend does with a tile of logits."""

    weight: torch.Tensor  # (V, H)
    bias: torch.Tensor | None  # (V,)
    head: HeadOptions
    dtype: torch.dtype  # of all arithmetic but the products'
    storage: torch.dtype  # operands of the products are rounded to this: what autocast or promotion asks for

    @property
    def vocab(self) -> int:
        return self.weight.shape[0]

    @property
    def chain(self) -> float:
        """d logit / d raw logit, but for the softcap's slope."""
        return self.head.logit_scale / self.head.temperature

    @abstractmethod
    def rows(self, tokens: int, estimated: bool, narrow_weight: bool) -> int:
        """
        Tokens per tile, for so many tokens in all.

        Args:
            estimated: whether `score` will be given offsets.
            narrow_weight: whether the weight's gradient is wanted in a narrower type than sums over tiles have.
        """

    @abstractmethod
    def rows_alike(self, tokens: int, vocab: int) -> int:
        """The same for a vocabulary of that size, on every process alike."""

    def scored_rows(self, tokens: int) -> int:
        """The same where no gradient will follow."""
        return self.rows(tokens, False, False)

    @abstractmethod
    def operand(self, x: torch.Tensor) -> torch.Tensor:
        """`x` (M, H) as the products take it."""

    @abstractmethod
    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """Raw logits x @ weight.T + bias, (M, V)."""

    @abstractmethod
    def score_only(self, x: torch.Tensor, token_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities and entropies of operands x, (M,) each, where no gradient will follow."""

    @abstractmethod
    def score(self, x: torch.Tensor, token_ids: torch.Tensor, offset: torch.Tensor | None) -> Scores:
        """
        Scores of operands x that `gradient` will be asked of. `offset` (M,): estimates of the log-probabilities, which
        may make it faster and change nothing.
        """

    @abstractmethod
    def gradient(self, scores: Scores, token_ids: torch.Tensor, g_logp: torch.Tensor) -> TileGradient:
        """The gradient of the raw logits for a loss with d loss / d logp = g_logp (M,); uses up the scores' tile."""

    @abstractmethod
    def gradient_with_entropy(
        self, x: torch.Tensor, token_ids: torch.Tensor, g_logp: torch.Tensor, g_entropy: torch.Tensor
    ) -> TileGradient:
        """The same of unscored operands, for a loss that depends on the entropies too."""

    @abstractmethod
    def row_state(self, tile: torch.Tensor, token_ids: torch.Tensor) -> RowState:
        """Of a tile over a part of the vocabulary, which it leaves as it is; ids count from the part's first."""

    @abstractmethod
    def part_gradient(
        self,
        tile: torch.Tensor,
        token_ids: torch.Tensor,  # (M,), from the part's first; those outside are in other parts
        scores: RowScores,
        g_logp: torch.Tensor,  # (M,)
        g_entropy: torch.Tensor | None,  # (M,)
    ) -> TileGradient:
        """The gradient of the raw logits of such a tile, whose scores are known; may use up the tile."""

    @abstractmethod
    def to_hidden(self, gradient: TileGradient, out: torch.Tensor) -> None:
        """out (M, H), of any type, = d loss / d hidden = d loss / d logits @ weight."""

    @abstractmethod
    def to_weight(
        self, gradient: TileGradient, x: torch.Tensor, total: torch.Tensor | None, dtype: torch.dtype
    ) -> torch.Tensor:
        """
        total (V, H), of the arithmetic type, with d loss / d logits.T @ x added in place; None: a new tensor of
        `dtype`.
        """

    @abstractmethod
    def add_to_bias(self, total: torch.Tensor, gradient: TileGradient) -> None:
        """total (V,) += d loss / d logits, summed over rows."""

    def loss_gradient(
        self, logp: torch.Tensor, inputs: TokenInputs, weights: torch.Tensor, options: LossOptions
    ) -> torch.Tensor:
        """d sum(weights * per-token loss) / d logp, of tokens (N,), or of whole sequences (B, T)."""
        ratio = maths.log_ratio(logp, inputs, options.importance_sampling_level)
        log_proj, _ = maths.causal_target(logp, inputs, options)
        d_ratio, d_logp, _ = maths.token_objective_gradient(logp, ratio, log_proj, inputs, options)
        if options.importance_sampling_level == "token":
            return (d_ratio + d_logp) * weights
        per_sequence = torch.where(inputs.mask, d_ratio * weights, 0.0).sum(dim=1, keepdim=True)
        count = inputs.mask.sum(dim=1, keepdim=True).clamp(min=1)
        return torch.where(inputs.mask, per_sequence / count + d_logp * weights, 0.0)


class _Gradients:
    """
    Accumulates d hidden, d weight and d bias over tiles; the latter two in the arithmetic type. The first tile writes
    what later ones add to, and a single one writes the weight's own type.
    """

    def __init__(self, hidden: torch.Tensor, tiles: Tiles, need: Need, parts: list["_Part"], dtype: torch.dtype | None):
        """`dtype`: of the weight's gradient; None: that of `gradient_dtype`."""
        self.tiles, self.need = tiles, need
        self.weight_dtype = gradient_dtype(tiles.weight.dtype) if dtype is None else dtype
        self.first_dtype = self.weight_dtype if len(parts) == 1 else tiles.dtype
        self.hidden: torch.Tensor | None = None
        if need[0]:
            # Where every token is in a part, every row will be written.
            whole = sum(part.size for part in parts) == len(hidden)
            make = torch.empty if whole else torch.zeros
            self.hidden = make(hidden.shape, dtype=gradient_dtype(hidden.dtype), device=hidden.device)
        self.weight: torch.Tensor | None = None
        self.bias: torch.Tensor | None = None

    def add(self, index: "Index", gradient: TileGradient, x: torch.Tensor) -> None:
        """Add those of tokens `index`, whose operands are x."""
        if self.hidden is not None:
            if isinstance(index, slice):
                self.tiles.to_hidden(gradient, self.hidden[index])
            else:
                rows = self.hidden.new_empty(len(index), self.hidden.shape[1])
                self.tiles.to_hidden(gradient, rows)
                self.hidden.index_copy_(0, index, rows)
        if self.need[1]:
            self.weight = self.tiles.to_weight(gradient, x, self.weight, self.first_dtype)
        if self.need[2]:
            if self.bias is None:
                weight = self.tiles.weight
                self.bias = torch.zeros(weight.shape[0], dtype=self.tiles.dtype, device=weight.device)
            self.tiles.add_to_bias(self.bias, gradient)

    def results(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        weight, bias = self.tiles.weight, self.tiles.bias
        bias_dtype = gradient_dtype(bias.dtype if bias is not None else self.tiles.dtype)

        def final(x: torch.Tensor | None, shape: torch.Size, dtype: torch.dtype, needed: bool) -> torch.Tensor:
            # A tensor of its own for each gradient that is not needed: an operator's outputs may not alias each other.
            if not needed:
                return weight.new_empty(0)
            return torch.zeros(shape, dtype=dtype, device=weight.device) if x is None else x.to(dtype)

        return (
            weight.new_empty(0) if self.hidden is None else self.hidden,
            final(self.weight, weight.shape, self.weight_dtype, self.need[1]),
            final(self.bias, weight.shape[:1], bias_dtype, self.need[2]),
        )


def _narrow_weight(tiles: Tiles, need: Need, dtype: torch.dtype | None) -> bool:
    """Whether several tiles take a float32 gradient of the weight beside the one that is wanted; one tile does not."""
    wanted = gradient_dtype(tiles.weight.dtype) if dtype is None else dtype
    return need[1] and wanted.itemsize < tiles.dtype.itemsize


def linear_logprob_forward(
    hidden: torch.Tensor,  # (N, H)
    tiles: Tiles,
    token_ids: torch.Tensor,  # (N,)
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability and entropy of each token, (N,)."""
    logp, entropy = (torch.zeros(len(hidden), dtype=tiles.dtype, device=hidden.device) for _ in range(2))
    ids = check_token_ids(token_ids, tiles.vocab)
    for start in range(0, len(hidden), step := tiles.scored_rows(len(hidden))):
        block = slice(start, start + step)
        logp[block], entropy[block] = tiles.score_only(tiles.operand(hidden[block]), ids[block])
    return logp, entropy


def linear_logprob_backward(
    hidden: torch.Tensor,  # (N, H)
    tiles: Tiles,
    token_ids: torch.Tensor,  # (N,)
    logp: torch.Tensor | None,  # (N,), from the forward
    g_logp: torch.Tensor,  # (N,)
    g_entropy: torch.Tensor | None,  # (N,)
    need: Need,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients in hidden, weight and bias; the logits are made again, for the tokens that have a gradient."""
    used = g_logp != 0 if g_entropy is None else (g_logp != 0) | (g_entropy != 0)
    index = used.nonzero().squeeze(1)
    ids = check_token_ids(token_ids, tiles.vocab)
    estimated = g_entropy is None and logp is not None
    parts = _cut(index, len(hidden), tiles.rows(index.numel(), estimated, _narrow_weight(tiles, need, None)))
    grads = _Gradients(hidden, tiles, need, parts, None)
    g_logp = g_logp.to(tiles.dtype)
    for part in parts:
        at = part.tokens
        x = tiles.operand(hidden[at])
        if g_entropy is None:
            scores = tiles.score(x, ids[at], None if logp is None else logp[at])
            gradient = tiles.gradient(scores, ids[at], g_logp[at])
        else:
            gradient = tiles.gradient_with_entropy(x, ids[at], g_logp[at], g_entropy[at].to(tiles.dtype))
        grads.add(at, gradient, x)
    return grads.results()


Index = torch.Tensor | slice


class _Part(NamedTuple):
    """Tokens of one tile."""

    tokens: Index  # flat indices
    size: int
    rows: slice  # with whole sequences: which
    scored_first: bool  # of a sequence that does not fit into one


def _cut(
    index: torch.Tensor, whole: int, step: int, start: int = 0, end: int | None = None, **rest: Any
) -> list[_Part]:
    """Entries `start` to `end` of the flat index, of `whole` tokens in all, in parts of at most `step`."""
    end = len(index) if end is None else end
    bounds = [(at, min(at + step, end)) for at in range(start, end, step)]
    fields: dict[str, Any] = {"rows": slice(0, 0), "scored_first": False} | rest
    # Where no token is left out a slice says the same, and neither gathers nor scatters.
    return [_Part(slice(a, b) if len(index) == whole else index[a:b], b - a, **fields) for a, b in bounds]


def _split(mask: torch.Tensor, whole_sequences: bool, rows: Callable[[int], int]) -> list[_Part]:
    """
    The unmasked tokens, in parts of at most `rows` of their number. With `whole_sequences`, no part divides a sequence
    that fits into one. Finding the tokens is one sync where the mask is on a GPU; counting them per sequence is
    another.
    """
    index = mask.flatten().nonzero().squeeze(1)
    whole, step = mask.numel(), rows(index.numel())
    if not whole_sequences:
        return _cut(index, whole, step)
    parts: list[_Part] = []
    start = end = first = 0
    counts = mask.sum(dim=1).tolist()
    for row, count in enumerate(counts):
        if end - start + count > step and end > start:
            parts += _cut(index, whole, step, start, end, rows=slice(first, row))
            start = end
        first = row if start == end else first
        end += count
        if count > step:
            parts += _cut(index, whole, step, start, end, rows=slice(row, row + 1), scored_first=True)
            start = end
    if end > start:
        parts += _cut(index, whole, step, start, end, rows=slice(first, len(counts)))
    return parts


def _shifted(index: Index, by: int) -> Index:
    return slice(index.start + by, index.stop + by) if isinstance(index, slice) else index + by


def linear_loss(
    hidden: torch.Tensor,  # (B * T, H)
    tiles: Tiles,
    token_ids: torch.Tensor,  # (B * T,)
    inputs: TokenInputs,  # (B, T)
    weights: torch.Tensor,  # (B, T): the loss is sum(weights * per-token loss)
    options: LossOptions,
    need: Need,
    offset: torch.Tensor | None = None,  # (B, T): estimates of the log-probabilities, for speed only
    weight_dtype: torch.dtype | None = None,  # of the weight's gradient; None: that of `gradient_dtype`
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    (B, T) log-probabilities and entropies (0 where masked), and the gradients of the loss in hidden, weight and bias.

    Masked tokens are left out of every product. With a ratio per sequence, and in vespo, a token's gradient depends on
    its whole sequence: tiles hold whole sequences, and one that is longer than a tile is scored first.
    """
    shape = inputs.mask.shape
    logp, entropy = (torch.zeros(shape, dtype=tiles.dtype, device=hidden.device) for _ in range(2))
    flat_logp, flat_entropy = logp.view(-1), entropy.view(-1)
    flat_inputs, flat_weights = inputs.flatten(), weights.flatten()
    offset = inputs.old_logp if offset is None else offset
    flat_offset = None if offset is None else offset.flatten()
    by_sequence = options.whole_sequences

    def rows_of(tokens: int) -> int:
        if not any(need):
            return tiles.scored_rows(tokens)
        return tiles.rows(tokens, offset is not None, _narrow_weight(tiles, need, weight_dtype))

    parts = _split(inputs.mask, by_sequence, rows_of)
    grads = _Gradients(hidden, tiles, need, parts, weight_dtype)
    if any(need):
        for part in parts:
            if part.scored_first:
                flat_logp[part.tokens] = linear_logprob_forward(hidden[part.tokens], tiles, token_ids[part.tokens])[0]
    for part in parts:
        at, rows = part.tokens, part.rows
        x = tiles.operand(hidden[at])
        ids = check_token_ids(token_ids[at], tiles.vocab)
        if not any(need):
            flat_logp[at], flat_entropy[at] = tiles.score_only(x, ids)
            continue
        scores = tiles.score(x, ids, None if flat_offset is None else flat_offset[at])
        flat_logp[at], flat_entropy[at] = scores.logp, scores.entropy
        if by_sequence:
            weighed = maths.weigh_by_phi(logp[rows], inputs.take(rows), options)
            g = tiles.loss_gradient(logp[rows], weighed, weights[rows], options)
            g = g.flatten()[_shifted(at, -rows.start * shape[1])]
        else:
            g = tiles.loss_gradient(scores.logp, flat_inputs.take(at), flat_weights[at], options)
        grads.add(at, tiles.gradient(scores, ids, g), x)
    return logp, entropy, *grads.results()
