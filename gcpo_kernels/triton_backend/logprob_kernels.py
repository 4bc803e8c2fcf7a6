"""Kernels of the passes over logits: scores, gradient, and both in one read. See logprob.py."""

import triton
import triton.language as tl

from gcpo_kernels.triton_backend.common import LN_2, LOG2_E, expm1, head_logit, power_of_two

# Stands for -inf in the running maximum, so that a block of -inf logits does not make NaN.
_LOWEST = tl.constexpr(-1.0e30)
# How far, in powers of two, a row's sum may lie from 1 before `softmax_once` gives it up: 28 nats. Within, float32 and
# bfloat16 keep every digit of exponentials, sums and row scales.
OFFSET_LIMIT = tl.constexpr(40.0)


@triton.jit
def _positions(DEPTH: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr):
    """Positions in a block, [DEPTH, LANES, VEC]; 64 bits, because v * stride passes 2**31 in transposed logits."""
    vectors = tl.arange(0, DEPTH)[:, None, None] * LANES + tl.arange(0, LANES)[None, :, None]
    return (vectors * VEC + tl.arange(0, VEC)[None, None, :]).to(tl.int64)


@triton.jit
def _lane_sums(x):
    """[DEPTH, LANES, VEC] -> [LANES]: sums within a thread."""
    return tl.sum(tl.sum(x, axis=2), axis=0)


@triton.jit
def _fold(z, top, total, dot, k):
    """Running maximum, sum of 2**y and sum of 2**y y per lane, y = (z - top) k, with one more block of z."""
    new_top = tl.maximum(top, tl.max(tl.max(z, axis=2), axis=0))
    e, y = power_of_two((z - new_top[None, :, None]) * k)
    down = (top - new_top) * k
    keep = tl.exp2(down)
    dot = (dot + total * down) * keep + _lane_sums(e * y)
    total = total * keep + _lane_sums(e)
    return new_top, total, dot


@triton.jit(do_not_specialize=["rows_per_batch", "first_v", "whole_v"])
def logprob_forward_kernel(
    u_ptr,  # (B, T, V) raw logits; row r is [r // rows_per_batch, r % rows_per_batch]
    ids_ptr,  # (B * T,) int64, contiguous
    logp_ptr,  # (B * T,) float32
    entropy_ptr,  # (B * T,) float32
    peak_ptr,  # (B * T,) float32: the largest z, see `head_logit`
    total_ptr,  # (B * T,) float32: sum of exp(chain (z - peak))
    stride_u_b,
    stride_u_t,
    stride_u_v,
    rows_per_batch,
    scale,
    softcap,
    chain,
    first_v,  # which of the whole vocabulary the first column is
    whole_v,  # size of the whole vocabulary
    HAS_SOFTCAP: tl.constexpr,
    NEGATIVE: tl.constexpr,
    FIRST: tl.constexpr,  # no slice came before: nothing to go on from
    LAST: tl.constexpr,  # no slice comes after: finish
    V: tl.constexpr,
    DEPTH: tl.constexpr,
    LANES: tl.constexpr,
    VEC: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    u_ptr += (row // rows_per_batch) * stride_u_b + (row % rows_per_batch) * stride_u_t
    BLOCK: tl.constexpr = DEPTH * LANES * VEC
    WHOLE: tl.constexpr = V // BLOCK * BLOCK  # blocks up to here need no mask
    k = chain * LOG2_E
    v = _positions(DEPTH, LANES, VEC)
    top = tl.full([LANES], _LOWEST, tl.float32)
    total = tl.zeros([LANES], tl.float32)
    dot = tl.zeros([LANES], tl.float32)
    for v0 in range(0, WHOLE, BLOCK):
        u = tl.load(u_ptr + (v0 + v) * stride_u_v).to(tl.float32)  # [DEPTH, LANES, VEC]
        z, _ = head_logit(u, scale, softcap, HAS_SOFTCAP, NEGATIVE)
        top, total, dot = _fold(z, top, total, dot, k)
    if WHOLE < V:
        u = tl.load(u_ptr + (WHOLE + v) * stride_u_v, mask=WHOLE + v < V, other=0.0).to(tl.float32)
        z, _ = head_logit(u, scale, softcap, HAS_SOFTCAP, NEGATIVE)
        top, total, dot = _fold(tl.where(WHOLE + v < V, z, -float("inf")), top, total, dot, k)
    peak = tl.max(top, axis=0)
    if not FIRST:
        before = tl.load(peak_ptr + row)
        peak = tl.where(before > peak, before, peak)
    down = (top - peak) * k
    lane = tl.exp2(down)
    s = tl.sum(total * lane, axis=0)
    weighted = tl.sum((dot + total * down) * lane, axis=0) * LN_2
    token = tl.load(ids_ptr + row)
    valid = (token >= 0) & (token < whole_v)
    here = (token >= first_v) & (token < first_v + V)
    u = tl.load(u_ptr + (token - first_v) * stride_u_v, mask=here, other=0.0).to(tl.float32)
    target, _ = head_logit(u, scale, softcap, HAS_SOFTCAP, NEGATIVE)
    target = tl.where(here, target, 0.0)
    if not FIRST:
        before_total = tl.load(total_ptr + row)
        shift = tl.exp2((before - peak) * k)
        weighted += (tl.load(entropy_ptr + row) + before_total * ((before - peak) * chain)) * shift
        s += before_total * shift
        target = tl.where(here, target, tl.load(logp_ptr + row))
    tl.store(peak_ptr + row, peak)
    tl.store(total_ptr + row, s)
    if LAST:
        log_s = tl.log(s)
        # Never through log-sum-exp = peak + log(s): next to a large peak it would lose the digits of log(s).
        tl.store(logp_ptr + row, tl.where(valid, (target - peak) * chain - log_s, float("nan")))
        tl.store(entropy_ptr + row, log_s - weighted / s)
    else:
        tl.store(logp_ptr + row, target)
        tl.store(entropy_ptr + row, weighted)


@triton.jit
def _backward_block(u, peak, log2_s, k, g, g_entropy, entropy, scale, softcap, HAS_SOFTCAP, NEGATIVE, HAS_ENTROPY):
    """The gradient in a block of raw logits, as if the target were not among them."""
    z, slope = head_logit(u, scale, softcap, HAS_SOFTCAP, NEGATIVE)
    p, y = power_of_two((z - peak) * k - log2_s)
    d = -g * p
    if HAS_ENTROPY:
        d -= g_entropy * (p * (y * LN_2 + entropy))
    if HAS_SOFTCAP:
        d = d * slope
    return tl.where((g == 0.0) & (g_entropy == 0.0), 0.0, d)


@triton.jit(do_not_specialize=["rows_per_batch"])
def logprob_backward_kernel(
    u_ptr,  # (B, T, V) raw logits
    ids_ptr,  # (B * T,) int64
    logp_ptr,  # (B * T,)
    entropy_ptr,  # (B * T,)
    peak_ptr,  # (B * T,)
    total_ptr,  # (B * T,)
    g_logp_ptr,  # (B * T,) float32
    g_entropy_ptr,  # (B * T,) float32
    d_ptr,  # (B * T, V) gradient in u; a row may lie in the first bytes of the same row of u
    stride_u_b,
    stride_u_t,
    stride_u_v,
    stride_d,
    rows_per_batch,
    scale,
    softcap,
    chain,
    signed_chain,
    HAS_SOFTCAP: tl.constexpr,
    NEGATIVE: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    IN_PLACE: tl.constexpr,
    V: tl.constexpr,
    DEPTH: tl.constexpr,
    LANES: tl.constexpr,
    VEC: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    u_ptr += (row // rows_per_batch) * stride_u_b + (row % rows_per_batch) * stride_u_t
    d_ptr += row * stride_d
    BLOCK: tl.constexpr = DEPTH * LANES * VEC
    WHOLE: tl.constexpr = V // BLOCK * BLOCK
    dtype = d_ptr.dtype.element_ty
    k = chain * LOG2_E
    v = _positions(DEPTH, LANES, VEC)
    token = tl.load(ids_ptr + row)
    here = (token >= 0) & (token < V)
    u_target = tl.load(u_ptr + token * stride_u_v, mask=here, other=0.0).to(tl.float32)
    _, slope = head_logit(u_target, scale, softcap, HAS_SOFTCAP, NEGATIVE)
    logp = tl.load(logp_ptr + row)
    peak = tl.load(peak_ptr + row)
    log2_s = tl.log2(tl.load(total_ptr + row))
    g = tl.load(g_logp_ptr + row) * signed_chain
    g_entropy = 0.0
    entropy = 0.0
    if HAS_ENTROPY:
        g_entropy = tl.load(g_entropy_ptr + row) * signed_chain
        entropy = tl.load(entropy_ptr + row)
    for v0 in range(0, WHOLE, BLOCK):
        u = tl.load(u_ptr + (v0 + v) * stride_u_v).to(tl.float32)
        d = _backward_block(
            u, peak, log2_s, k, g, g_entropy, entropy, scale, softcap, HAS_SOFTCAP, NEGATIVE, HAS_ENTROPY
        )
        if IN_PLACE:  # other threads still read what this one is about to write over
            tl.debug_barrier()
        tl.store(d_ptr + (v0 + v), d.to(dtype))
    if WHOLE < V:
        inside = WHOLE + v < V
        u = tl.load(u_ptr + (WHOLE + v) * stride_u_v, mask=inside, other=0.0).to(tl.float32)
        d = _backward_block(
            u, peak, log2_s, k, g, g_entropy, entropy, scale, softcap, HAS_SOFTCAP, NEGATIVE, HAS_ENTROPY
        )
        if IN_PLACE:
            tl.debug_barrier()
        tl.store(d_ptr + (WHOLE + v), d.to(dtype), mask=inside)
    # The target's own, 1 - p without the cancellation as p -> 1, over what its block wrote.
    d = -g * expm1(logp)
    if HAS_ENTROPY:
        p, y = power_of_two(logp * LOG2_E)
        d -= g_entropy * (p * (y * LN_2 + entropy))
    if HAS_SOFTCAP:
        d = d * slope
    d = tl.where((g == 0.0) & (g_entropy == 0.0), 0.0, d)
    tl.debug_barrier()
    tl.store(d_ptr + token, d.to(dtype), mask=here)


@triton.jit
def whole_shift(offset):
    """What exponents are shifted by, for an estimate `offset` of a token's log-probability: a whole number."""
    return tl.floor(offset * LOG2_E + 0.5)


@triton.jit
def log_unshifted(s, shift):
    """log(s / 2**shift), from the quotient itself where that fits into float32: it may be close to 1."""
    small = tl.abs(shift) <= 60.0
    return tl.log(s * tl.exp2(tl.where(small, -shift, 0.0))) - tl.where(small, 0.0, shift * LN_2)


@triton.jit
def near_one(s):
    """Whether exponentials with this sum kept their digits; false for NaN."""
    return tl.abs(tl.log2(s)) <= OFFSET_LIMIT


@triton.jit
def softmax_once_kernel(
    u_ptr,  # (M, V) raw logits
    ids_ptr,  # (M,) int64
    offset_ptr,  # (M,) float32: an estimate of each token's log-probability
    logp_ptr,  # (M,) float32
    entropy_ptr,  # (M,) float32
    total_ptr,  # (M,) float32: s; NaN where this row has to be done otherwise
    e_ptr,  # (M, V): row r becomes exp(logit - c) times the softcap's slope, and (s p - s) there at the target
    stride_u,
    stride_e,
    scale,
    softcap,
    chain,
    HAS_SOFTCAP: tl.constexpr,
    NEGATIVE: tl.constexpr,
    V: tl.constexpr,
    DEPTH: tl.constexpr,
    LANES: tl.constexpr,
    VEC: tl.constexpr,
):
    """
    With c = logit of the target - offset, the sum s of exp(logit - c) is exp(offset - logp): about 1, so that no
    maximum is needed. The target's logit is subtracted first, where the difference of two large logits is exact, and
    the offset is rounded to a power of two, so that nothing is rounded by it.
    """
    row = tl.program_id(0).to(tl.int64)
    u_ptr += row * stride_u
    e_ptr += row * stride_e
    BLOCK: tl.constexpr = DEPTH * LANES * VEC
    WHOLE: tl.constexpr = V // BLOCK * BLOCK
    dtype = e_ptr.dtype.element_ty
    k = chain * LOG2_E
    v = _positions(DEPTH, LANES, VEC)
    token = tl.load(ids_ptr + row)
    here = (token >= 0) & (token < V)
    offset = tl.load(offset_ptr + row)
    target = tl.load(u_ptr + token, mask=here, other=0.0).to(tl.float32)
    target, target_slope = head_logit(target, scale, softcap, HAS_SOFTCAP, NEGATIVE)
    shift = whole_shift(offset)
    total = tl.zeros([LANES], tl.float32)
    dot = tl.zeros([LANES], tl.float32)
    for v0 in range(0, WHOLE, BLOCK):
        u = tl.load(u_ptr + (v0 + v)).to(tl.float32)  # [DEPTH, LANES, VEC]
        z, slope = head_logit(u, scale, softcap, HAS_SOFTCAP, NEGATIVE)
        e, y = power_of_two((z - target) * k + shift)
        total += _lane_sums(e)
        dot += _lane_sums(e * y)
        if HAS_SOFTCAP:
            e = e * slope
        tl.debug_barrier()  # other threads still read what this one is about to write over
        tl.store(e_ptr + (v0 + v), e.to(dtype))
    if WHOLE < V:
        inside = WHOLE + v < V
        u = tl.load(u_ptr + (WHOLE + v), mask=inside, other=0.0).to(tl.float32)
        z, slope = head_logit(u, scale, softcap, HAS_SOFTCAP, NEGATIVE)
        e, y = power_of_two((tl.where(inside, z, -float("inf")) - target) * k + shift)
        total += _lane_sums(e)
        dot += _lane_sums(e * y)
        if HAS_SOFTCAP:
            e = e * slope
        tl.debug_barrier()
        tl.store(e_ptr + (WHOLE + v), e.to(dtype), mask=inside)
    s = tl.sum(total, axis=0)
    logp = -log_unshifted(s, shift)
    tl.store(logp_ptr + row, logp)
    tl.store(entropy_ptr + row, tl.log(s) - tl.sum(dot, axis=0) * LN_2 / s)
    tl.store(total_ptr + row, tl.where(here & near_one(s), s, float("nan")))
    hit = s * expm1(logp) * target_slope  # s p - s, without the cancellation as p -> 1
    tl.debug_barrier()
    tl.store(e_ptr + token, hit.to(dtype), mask=here)
