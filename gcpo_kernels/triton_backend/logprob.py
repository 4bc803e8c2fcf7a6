"""
Log-probability, entropy and their gradients from a tile of logits, (M, V): one program per token, vocabulary by blocks.

The forward reads the tile once, with a running maximum, and may go on from another tile of the same tokens, so that a
vocabulary can be scored slice by slice; the backward reads it once more and writes the gradient, in place or elsewhere.
Between raw logits u and the softmax stand softcap(scale * u) / temperature.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from gcpo_kernels.options import HeadOptions
from gcpo_kernels.triton_backend.common import expm1

# Stands for -inf in the running maximum, so that a block of -inf logits does not make NaN.
_LOWEST = tl.constexpr(-1.0e30)


@triton.jit
def _tanh(x):
    """tanh and its slope."""
    # exp of a negative argument only: no overflow at either end.
    e = tl.exp(-2.0 * tl.abs(x))
    r = 1.0 / (1.0 + e)
    y = (1.0 - e) * r
    y = tl.where(x < 0, -y, tl.where(x >= 0, y, x))
    # 1 - e loses its digits as x goes to 0: its series, to 1e-8 of it. 1 - y * y would as y goes to 1.
    x2 = x * x
    y = tl.where(x2 < 0.0225, x - x * x2 * (1.0 / 3 - x2 * (2.0 / 15 - x2 * (17.0 / 315))), y)
    return y, 4.0 * e * r * r


@triton.jit
def _logit(u, scale, softcap, inverse_temperature, HAS_SOFTCAP: tl.constexpr):
    """The logit, and the softcap's slope at it."""
    z = u * scale
    slope = tl.full(z.shape, 1.0, tl.float32)
    if HAS_SOFTCAP:
        y, slope = _tanh(z / softcap)
        z = softcap * y
    return z * inverse_temperature, slope


@triton.jit(do_not_specialize=["rows_per_batch", "first_v", "whole_v"])
def logprob_forward_kernel(
    u_ptr,  # (B, T, V) logits; row r is [r // rows_per_batch, r % rows_per_batch]
    ids_ptr,  # (B * T,) int64, contiguous
    logp_ptr,  # (B * T,) float32
    entropy_ptr,  # (B * T,) float32
    peak_ptr,  # (B * T,) float32: the largest logit
    total_ptr,  # (B * T,) float32: sum of exp(logit - peak)
    stride_u_b,
    stride_u_t,
    stride_u_v,
    rows_per_batch,
    scale,
    softcap,
    inverse_temperature,
    first_v,  # which of the whole vocabulary the tile's first column is
    whole_v,  # size of the whole vocabulary
    HAS_SOFTCAP: tl.constexpr,
    FIRST: tl.constexpr,  # no tile came before: nothing to go on from
    LAST: tl.constexpr,  # no tile comes after: finish
    V: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    u_ptr += (row // rows_per_batch) * stride_u_b + (row % rows_per_batch) * stride_u_t
    block = tl.arange(0, BLOCK_V).to(tl.int64)  # v * stride passes 2**31 in transposed logits
    top = tl.full([BLOCK_V], _LOWEST, tl.float32)  # per lane: merged after the loop, so that the loop has no reduction
    total = tl.zeros([BLOCK_V], tl.float32)  # sum of exp(z - top)
    dot = tl.zeros([BLOCK_V], tl.float32)  # sum of exp(z - top) (z - top)
    for v0 in range(0, V, BLOCK_V):
        v = v0 + block  # [BLOCK_V]
        u = tl.load(u_ptr + v * stride_u_v, mask=v < V, other=-float("inf")).to(tl.float32)
        z, _ = _logit(u, scale, softcap, inverse_temperature, HAS_SOFTCAP)
        z = tl.where(v < V, z, -float("inf"))  # a softcap, or a negative scale, would make padding finite
        new_top = tl.where(z > top, z, top)
        keep = tl.exp(top - new_top)
        e = tl.exp(z - new_top)
        dot = (dot + total * (top - new_top)) * keep + tl.where(e > 0.0, e * (z - new_top), tl.where(e == e, 0.0, e))
        total = total * keep + e
        top = new_top
    peak = tl.max(top, axis=0)
    if not FIRST:
        before = tl.load(peak_ptr + row)
        peak = tl.where(before > peak, before, peak)
    lane = tl.exp(top - peak)
    s = tl.sum(total * lane, axis=0)
    weighted = tl.sum((dot + total * (top - peak)) * lane, axis=0)
    token = tl.load(ids_ptr + row)
    valid = (token >= 0) & (token < whole_v)
    here = (token >= first_v) & (token < first_v + V)
    u = tl.load(u_ptr + (token - first_v) * stride_u_v, mask=here, other=0.0).to(tl.float32)
    target, _ = _logit(u, scale, softcap, inverse_temperature, HAS_SOFTCAP)
    if not FIRST:
        before_total = tl.load(total_ptr + row)
        shift = tl.exp(before - peak)
        weighted += (tl.load(entropy_ptr + row) + before_total * (before - peak)) * shift
        s += before_total * shift
        target = tl.where(here, target, tl.load(logp_ptr + row))
    tl.store(peak_ptr + row, peak)
    tl.store(total_ptr + row, s)
    if LAST:
        log_s = tl.log(s)
        # Never through log-sum-exp = peak + log(s): next to a large peak it would lose the digits of log(s).
        tl.store(logp_ptr + row, tl.where(valid, (target - peak) - log_s, float("nan")))
        tl.store(entropy_ptr + row, log_s - weighted / s)
    else:
        tl.store(logp_ptr + row, target)
        tl.store(entropy_ptr + row, weighted)


@triton.jit(do_not_specialize=["rows_per_batch"])
def logprob_backward_kernel(
    u_ptr,  # (B, T, V) logits
    ids_ptr,  # (B * T,) int64
    logp_ptr,  # (B * T,)
    entropy_ptr,  # (B * T,)
    peak_ptr,  # (B * T,)
    total_ptr,  # (B * T,)
    g_logp_ptr,  # (B * T,) float32
    g_entropy_ptr,  # (B * T,) float32
    d_ptr,  # (B * T, V) gradient in u, contiguous; may be u itself where types agree
    stride_u_b,
    stride_u_t,
    stride_u_v,
    rows_per_batch,
    scale,
    softcap,
    inverse_temperature,
    HAS_SOFTCAP: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    V: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    u_ptr += (row // rows_per_batch) * stride_u_b + (row % rows_per_batch) * stride_u_t
    d_ptr += row * V
    token = tl.load(ids_ptr + row)
    logp = tl.load(logp_ptr + row)
    peak = tl.load(peak_ptr + row)
    log_s = tl.log(tl.load(total_ptr + row))
    g = tl.load(g_logp_ptr + row)
    chain = scale * inverse_temperature
    hit = -expm1(logp)  # 1 - p at the target, without the cancellation as p -> 1
    g_entropy = 0.0
    entropy = 0.0
    if HAS_ENTROPY:
        g_entropy = tl.load(g_entropy_ptr + row)
        entropy = tl.load(entropy_ptr + row)
    for v0 in range(0, V, BLOCK_V):
        v = v0 + tl.arange(0, BLOCK_V).to(tl.int64)  # [BLOCK_V]
        u = tl.load(u_ptr + v * stride_u_v, mask=v < V, other=0.0).to(tl.float32)
        z, slope = _logit(u, scale, softcap, inverse_temperature, HAS_SOFTCAP)
        log_p = (z - peak) - log_s
        p = tl.exp(log_p)
        d = g * tl.where(v == token, hit, -p)
        if HAS_ENTROPY:
            d -= g_entropy * tl.where(p > 0.0, p * (log_p + entropy), 0.0)
        d = tl.where((g == 0.0) & (g_entropy == 0.0), 0.0, d * slope * chain)
        tl.store(d_ptr + v, d.to(d_ptr.dtype.element_ty), mask=v < V)


def block_v(vocab: int) -> int:
    return min(4096, max(128, triton.next_power_of_2(vocab)))


def _rows(u: torch.Tensor) -> tuple[int, int, tuple[int, int, int]]:
    """(rows, rows per batch, strides) of (M, V) or (B, T, V)."""
    if u.dim() == 2:
        return u.shape[0], max(u.shape[0], 1), (0, *u.stride())  # type: ignore[return-value]
    return u.shape[0] * u.shape[1], max(u.shape[1], 1), u.stride()  # type: ignore[return-value]


def _head(head: HeadOptions) -> tuple[float, float, float]:
    return head.logit_scale, head.logit_softcap or 1.0, 1.0 / head.temperature


class RowScores(NamedTuple):
    """Of each row, float32, of token_ids' shape; the last two are for the backward."""

    logp: torch.Tensor  # NaN for an id outside [0, V)
    entropy: torch.Tensor
    peak: torch.Tensor
    total: torch.Tensor


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
    Scores of each row. Between slices of a vocabulary they are unfinished, the target's logit (0 if it is in none so
    far) for logp and sum of exp(z - peak) (z - peak) for the entropy; those of the last one are final, if `finish`.
    """
    rows, per_batch, strides = _rows(u)
    whole_v = u.shape[-1] if whole_v is None else whole_v
    scores = so_far
    if scores is None:
        scores = RowScores(*(torch.empty(token_ids.shape, dtype=torch.float32, device=u.device) for _ in range(4)))
    if rows:
        logprob_forward_kernel[(rows,)](
            u,
            token_ids.contiguous(),
            *scores,
            *strides,
            per_batch,
            *_head(head),
            first_v,
            whole_v,
            HAS_SOFTCAP=head.logit_softcap is not None,
            FIRST=so_far is None,
            LAST=finish and first_v + u.shape[-1] == whole_v,
            V=u.shape[-1],
            BLOCK_V=block_v(u.shape[-1]),
            num_warps=8,
        )
    return scores


def logprob_backward(
    u: torch.Tensor,  # as in the forward
    token_ids: torch.Tensor,
    head: HeadOptions,
    scores: RowScores,  # from the forward
    g_logp: torch.Tensor,  # (M,) or (B, T)
    g_entropy: torch.Tensor | None,
    out: torch.Tensor,  # (M, V) or (B, T, V), contiguous: receives the gradient in u
) -> None:
    rows, per_batch, strides = _rows(u)
    if rows:
        logprob_backward_kernel[(rows,)](
            u,
            token_ids.contiguous(),
            *scores,
            g_logp.to(torch.float32).contiguous(),
            scores.logp if g_entropy is None else g_entropy.to(torch.float32).contiguous(),
            out,
            *strides,
            per_batch,
            *_head(head),
            HAS_SOFTCAP=head.logit_softcap is not None,
            HAS_ENTROPY=g_entropy is not None,
            V=u.shape[-1],
            BLOCK_V=block_v(u.shape[-1]),
            num_warps=8,
        )
