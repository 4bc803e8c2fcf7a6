"""
Log-probability, entropy and their gradients from logits, (M, V) or (B, T, V): one program per token, vocabulary by
blocks.

Three passes. `logprob_forward` reads the logits once, with a running maximum, and may go on from other logits of the
same tokens, so that a vocabulary can be scored slice by slice. `logprob_backward` reads them once more and writes the
gradient. `softmax_once` does both in one read, where somebody's estimate of the tokens' log-probabilities says what
the exponentials are relative to. The last two may write over what they read: a row's result, in a narrower type, lies
in the row's own first bytes.

A block is (DEPTH, LANES, VEC): a thread holds DEPTH vectors of VEC neighbours, reduces them by itself, and carries one
running maximum, so that moving the sums to a new maximum costs one exponential a thread and block, not one an element.
"""

from typing import NamedTuple

import torch
import triton

from gcpo_kernels.options import HeadOptions
from gcpo_kernels.triton_backend.logprob_kernels import (
    logprob_backward_kernel,
    logprob_forward_kernel,
    softmax_once_kernel,
)


class Shape(NamedTuple):
    """Of a block of a row."""

    depth: int
    lanes: int
    vec: int

    @property
    def warps(self) -> int:
        """A lane is a thread: its sums then need no other thread."""
        return max(1, self.lanes // (32 if torch.version.hip is None else 64))

    @property
    def constexprs(self) -> dict[str, int]:
        return {"DEPTH": self.depth, "LANES": self.lanes, "VEC": self.vec}


def row_block(vocab: int, itemsize: int) -> Shape:
    """Loads of 16 bytes, 256 threads, 64 bytes a thread: less for a vocabulary that is smaller than such a block."""
    vec = 16 // itemsize
    lanes = min(256, max(32, triton.next_power_of_2(triton.cdiv(vocab, vec))))
    depth = min(64 // 16, triton.next_power_of_2(triton.cdiv(vocab, vec * lanes)))
    return Shape(depth, lanes, vec)


def _rows(u: torch.Tensor) -> tuple[int, int, tuple[int, int, int]]:
    """(rows, rows per batch, strides) of (M, V) or (B, T, V)."""
    if u.dim() == 2:
        return u.shape[0], max(u.shape[0], 1), (0, *u.stride())  # type: ignore[return-value]
    return u.shape[0] * u.shape[1], max(u.shape[1], 1), u.stride()  # type: ignore[return-value]


class HeadNumbers(NamedTuple):
    """HeadOptions as kernels take them, see `head_logit`."""

    scale: float
    softcap: float
    chain: float  # logit = chain * z
    signed_chain: float  # d logit / d raw logit, but for the softcap's slope
    flags: dict[str, bool]


def head_numbers(head: HeadOptions) -> HeadNumbers:
    signed = head.logit_scale / head.temperature
    chain = abs(signed) if head.logit_softcap is None else 1.0 / head.temperature
    # 0 * -inf of what stands for nothing would be NaN: logits that are all 0 are as good as all almost 0.
    chain = max(chain, 1e-30)
    flags = {
        "HAS_SOFTCAP": head.logit_softcap is not None,
        "NEGATIVE": head.logit_softcap is None and head.logit_scale < 0,
    }
    return HeadNumbers(head.logit_scale, head.logit_softcap or 1.0, chain, signed, flags)


class RowScores(NamedTuple):
    """Of each row, float32, of token_ids' shape; the last two are for the backward."""

    logp: torch.Tensor  # NaN for an id outside [0, V)
    entropy: torch.Tensor
    peak: torch.Tensor  # the largest z, see `head_logit`
    total: torch.Tensor  # sum of exp(chain (z - peak))


def logprob_forward(
    u: torch.Tensor,  # (M, V) or (B, T, V), any strides
    token_ids: torch.Tensor,  # (M,) or (B, T) int64
    head: HeadOptions,
    so_far: RowScores | None = None,  # of the slices before this one: taken over, and updated in place
    first_v: int = 0,  # where in the vocabulary this slice begins
    whole_v: int | None = None,  # size of the vocabulary; None: this is all of it
    finish: bool = True,
) -> RowScores:
    """
    Scores of each row. Between slices of a vocabulary they are unfinished, the target's z (0 if it is in none so far)
    for logp and sum of exp(logit - peak) (logit - peak) for the entropy; those of the last one are final, if `finish`.
    """
    rows, per_batch, strides = _rows(u)
    whole_v = u.shape[-1] if whole_v is None else whole_v
    scores = so_far
    if scores is None:
        scores = RowScores(*(torch.empty(token_ids.shape, dtype=torch.float32, device=u.device) for _ in range(4)))
    if rows:
        numbers = head_numbers(head)
        block = row_block(u.shape[-1], u.element_size())
        logprob_forward_kernel[(rows,)](
            u,
            token_ids.contiguous(),
            *scores,
            *strides,
            per_batch,
            numbers.scale,
            numbers.softcap,
            numbers.chain,
            first_v,
            whole_v,
            **numbers.flags,
            FIRST=so_far is None,
            LAST=finish and first_v + u.shape[-1] == whole_v,
            V=u.shape[-1],
            **block.constexprs,
            num_warps=block.warps,
        )
    return scores


def logprob_backward(
    u: torch.Tensor,  # as in the forward
    token_ids: torch.Tensor,
    head: HeadOptions,
    scores: RowScores,  # from the forward
    g_logp: torch.Tensor,  # (M,) or (B, T)
    g_entropy: torch.Tensor | None,
    out: torch.Tensor,  # (M, V) or (B, T, V), rows evenly apart: receives the gradient in u; may be `narrowed(u)`
) -> None:
    rows, per_batch, strides = _rows(u)
    if rows:
        numbers = head_numbers(head)
        block = row_block(u.shape[-1], u.element_size())
        logprob_backward_kernel[(rows,)](
            u,
            token_ids.contiguous(),
            *scores,
            g_logp.to(torch.float32).contiguous(),
            scores.logp if g_entropy is None else g_entropy.to(torch.float32).contiguous(),
            out,
            *strides,
            out.stride(-2),
            per_batch,
            numbers.scale,
            numbers.softcap,
            numbers.chain,
            numbers.signed_chain,
            **numbers.flags,
            HAS_ENTROPY=g_entropy is not None,
            IN_PLACE=out.data_ptr() == u.data_ptr(),
            V=u.shape[-1],
            **block.constexprs,
            num_warps=block.warps,
        )


def narrowed(tile: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """(M, V) of type `dtype`, at most as wide, whose rows lie in the first bytes of the rows of `tile` (M, V)."""
    return tile.view(dtype)[:, : tile.shape[1]]


class Exponentials(NamedTuple):
    """What a softmax with row sums s came to: d loss / d raw logits = -g chain / s * e, for d loss / d logp = g."""

    logp: torch.Tensor  # (M,) float32
    entropy: torch.Tensor  # (M,) float32
    total: torch.Tensor  # (M,) float32, s; NaN where the row must be done again
    e: torch.Tensor  # (M, V)


def softmax_once(
    tile: torch.Tensor,  # (M, V) float32 raw logits, contiguous; used up
    token_ids: torch.Tensor,  # (M,) int64
    head: HeadOptions,
    offset: torch.Tensor,  # (M,) float32: estimates of the tokens' log-probabilities
    dtype: torch.dtype,
) -> Exponentials:
    """Exponentials of type `dtype` in the bytes of `tile`: one read and one write."""
    rows, vocab = tile.shape
    logp, entropy, total = (torch.empty(rows, dtype=torch.float32, device=tile.device) for _ in range(3))
    out = Exponentials(logp, entropy, total, narrowed(tile, dtype))
    if rows:
        numbers = head_numbers(head)
        block = row_block(vocab, 4)
        softmax_once_kernel[(rows,)](
            tile,
            token_ids.contiguous(),
            offset,
            *out,
            tile.stride(0),
            out.e.stride(0),
            numbers.scale,
            numbers.softcap,
            numbers.chain,
            **numbers.flags,
            V=vocab,
            **block.constexprs,
            num_warps=block.warps,
        )
    return out
