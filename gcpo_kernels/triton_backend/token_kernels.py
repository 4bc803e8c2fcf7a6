"""Kernels of the token loss: the pass over the tokens, the sum of its parts, the backward. See token_loss.py."""

import triton
import triton.language as tl

from gcpo_kernels import maths
from gcpo_kernels.triton_backend.common import CISPO, CLIPPED, at_least, token_objective

LOG2_E = tl.constexpr(1.4426950408889634)
# What the pass leaves for each block of tokens; with a kl_clip kl_clipped and kl_causal_clipped too; with weights of
# the causal term, last, how many tokens have one that is not 0.
N_SUMS = tl.constexpr(7)  # count, loss, kl, kl_causal, proj_clamped, clip_low, clip_high
MOST_BLOCKS = tl.constexpr(64)  # programs per sequence
LOWEST_LOG = tl.constexpr(maths.LOWEST_LOG)
AGREEMENT = tl.constexpr(maths.AGREEMENT)


@triton.jit
def _exp(x):
    """exp(x), or 0 below the smallest normal number: two instructions in place of the five of `tl.exp`."""
    return tl.exp2(x * LOG2_E)


@triton.jit
def _log_proj(
    ctx_ptr,  # of the row
    t,  # [BLOCK_T]
    inside,  # [BLOCK_T]
    query,  # [BLOCK_T]
    stride_ctx_t,
    stride_ctx_l,
    weights_ptr,  # of the row
    stride_w_l,
    L,
    log_floor,
    HAS_WEIGHTS: tl.constexpr,
    FLOOR_AT_QUERY: tl.constexpr,
    BLOCK_L: tl.constexpr,  # divides L
):
    """
    log p' of a block of tokens and whether it was clamped: `maths.project`, with a running maximum over blocks of
    contexts. Contexts are read as a tile, so that neighbours in memory are read together, whichever axis is innermost.
    """
    first = ctx_ptr + t[:, None] * stride_ctx_t
    top = tl.full(query.shape, -1.0e30, tl.float32)  # finite: where every probability is 0, nothing becomes NaN
    a = tl.zeros(query.shape, tl.float32)  # this and the mean relative to the maximum
    mean = tl.zeros(query.shape, tl.float32)
    for l0 in range(0, L, BLOCK_L):
        l = l0 + tl.arange(0, BLOCK_L)  # [BLOCK_L]
        b = tl.load(first + l[None, :] * stride_ctx_l, mask=inside[:, None], other=0.0).to(tl.float32)
        is_a = (l == 0)[None, :]
        if HAS_WEIGHTS:
            weight = tl.load(weights_ptr + l * stride_w_l).to(tl.float32)[None, :]
            b = tl.where(is_a | (weight != 0.0), b, -1.0e30)  # its scores do not matter, NaN included
        else:
            weight = 1.0 / L.to(tl.float32)
        new_top = tl.maximum(top, tl.max(b, axis=1))
        scale = _exp(top - new_top)
        e = _exp(b - new_top[:, None])  # [BLOCK_T, BLOCK_L]
        a = a * scale + tl.sum(tl.where(is_a, e, 0.0), axis=1)
        mean = mean * scale + tl.sum(weight * e, axis=1)
        top = new_top
    largest = tl.maximum(top, query)
    # The difference first: with one context it is exactly 0, and p' exactly the query's probability.
    difference = a - mean
    if FLOOR_AT_QUERY:
        difference = tl.where(tl.abs(difference) <= a * AGREEMENT, 0.0, difference)
    total = difference * _exp(top - largest) + _exp(query - largest)
    raw = tl.where(total <= 0.0, -float("inf"), largest + tl.log(total))
    if FLOOR_AT_QUERY:
        # By the difference: the rounding of a logarithm would put a p' that is the query's on either side of it.
        clamped = tl.where(query < log_floor, difference < 0.0, raw < log_floor) | (raw > 0.0)
        log_floor = tl.where(query < log_floor, at_least(query, LOWEST_LOG), log_floor)
    else:
        clamped = (raw < log_floor) | (raw > 0.0)
    return tl.where(raw < log_floor, log_floor, tl.where(raw > 0.0, 0.0, raw)), clamped


@triton.jit
def _fold(x, LANES: tl.constexpr, ALIGNED_T: tl.constexpr):
    """[BLOCK_T] to [LANES] sums of what one thread holds, so that running sums need few registers."""
    if ALIGNED_T:
        return tl.sum(tl.reshape(x, [LANES, x.numel // LANES]), axis=1)
    return tl.sum(tl.reshape(x, [x.numel // LANES, LANES]), axis=0)


@triton.jit
def _tokens_of(pid, T, BLOCKS, BLOCK_T: tl.constexpr, ALIGNED_T: tl.constexpr):
    """The row of a program, and its part of the row's tokens: [start, end)."""
    # Programs are fewer than 2**31, and a 32-bit division is a fraction of a 64-bit one.
    row = pid.to(tl.int32) // BLOCKS
    part = (pid.to(tl.int32) - row * BLOCKS).to(tl.int64)
    if ALIGNED_T:
        T = T // 16 * 16  # the same, but now the compiler knows, and reads whole words
    share = tl.cdiv(tl.cdiv(T, BLOCKS), BLOCK_T) * BLOCK_T
    start = part * share
    return row.to(tl.int64), start, tl.minimum(start + share, T)


@triton.jit(do_not_specialize=["T", "B", "L", "BLOCKS"])
def token_loss_kernel(
    logp_ptr,  # (B, T)
    mask_ptr,  # (B, T)
    adv_ptr,  # (B, T), or (B,) with stride_adv_t = 0
    old_ptr,  # (B, T)
    ref_ptr,  # (B, T)
    query_ptr,  # (B, T)
    causal_ptr,  # (B, T)
    is_ptr,  # (B, T), or per sequence with stride_is_t = 0
    ctx_ptr,  # (B, T, L)
    weights_ptr,  # (B, L), or (L,) with stride_w_b = 0
    d_logp_ptr,  # (B, T) float32, contiguous
    d_causal_ptr,  # (B, T) float32, contiguous
    sequence_ptr,  # (B,) float32: with a ratio per sequence, what each of its tokens adds to d_logp
    sums_ptr,  # (N_SUMS and more, see there, B, BLOCKS) float32
    stride_logp_b,
    stride_logp_t,
    stride_mask_b,
    stride_mask_t,
    stride_adv_b,
    stride_adv_t,
    stride_old_b,
    stride_old_t,
    stride_ref_b,
    stride_ref_t,
    stride_query_b,
    stride_query_t,
    stride_causal_b,
    stride_causal_t,
    stride_is_b,
    stride_is_t,
    stride_ctx_b,
    stride_ctx_t,
    stride_ctx_l,
    stride_w_b,
    stride_w_l,
    B,
    T,
    L,
    BLOCKS,  # programs per sequence
    beta,
    kappa,
    epsilon_low,
    epsilon_high,
    delta,
    log_floor,
    kl_clip,
    # What came later is last: where arguments lie is part of the machine code of calls that do without.
    kappa_weights_ptr,  # (B, T), or per sequence with stride_kappa_t = 0
    stride_kappa_b,
    stride_kappa_t,
    tau_pos,
    tau_neg,
    HAS_OLD: tl.constexpr,
    HAS_REF: tl.constexpr,
    HAS_QUERY: tl.constexpr,
    HAS_CAUSAL: tl.constexpr,
    HAS_IS: tl.constexpr,
    HAS_CONTEXT: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    HAS_KAPPA_WEIGHTS: tl.constexpr,
    HAS_DELTA: tl.constexpr,
    HAS_KL_CLIP: tl.constexpr,
    BIAS_CORRECTION: tl.constexpr,
    KIND: tl.constexpr,
    ADV_BY_TOKEN: tl.constexpr,
    BY_SEQUENCE: tl.constexpr,
    ALIGNED_T: tl.constexpr,  # 16 divides T
    L_INNERMOST: tl.constexpr,  # contexts of a token lie side by side, and BLOCK_L divides strides of rows and tokens
    BLOCK_T: tl.constexpr,
    BLOCK_L: tl.constexpr,  # divides L
):
    if L_INNERMOST:
        stride_ctx_b = stride_ctx_b // BLOCK_L * BLOCK_L
        stride_ctx_t = stride_ctx_t // BLOCK_L * BLOCK_L
    LANES: tl.constexpr = max(1, BLOCK_T // 4)
    pid = tl.program_id(0).to(tl.int64)
    row, start, end = _tokens_of(pid, T, 1 if BY_SEQUENCE else BLOCKS, BLOCK_T, ALIGNED_T)
    first_out = row * (T // 16 * 16 if ALIGNED_T else T)
    logp_ptr += row * stride_logp_b
    mask_ptr += row * stride_mask_b
    old_ptr += row * stride_old_b
    block = tl.arange(0, BLOCK_T)
    contexts = L.to(tl.int64)

    n = tl.zeros([LANES], tl.float32)
    sequence_log_ratio = 0.0
    if BY_SEQUENCE:
        ratio_sum = tl.zeros([LANES], tl.float32)
        for t0 in range(start, end, BLOCK_T):
            t = t0 + block  # [BLOCK_T]
            inside = t < end
            keep = tl.load(mask_ptr + t * stride_mask_t, mask=inside, other=0) != 0
            logp = tl.load(logp_ptr + t * stride_logp_t, mask=inside, other=0.0).to(tl.float32)
            old = logp  # its difference is 0, or NaN where logp is: a constant would hide that
            if HAS_OLD:
                old = tl.load(old_ptr + t * stride_old_t, mask=inside, other=0.0).to(tl.float32)
            ratio_sum += _fold(tl.where(keep, logp - old, 0.0), LANES, ALIGNED_T)
            n += _fold(keep.to(tl.float32), LANES, ALIGNED_T)
        count = tl.maximum(tl.sum(n), 1.0)
        sequence_log_ratio = tl.sum(ratio_sum) / count

    sum_loss = tl.zeros([LANES], tl.float32)
    sum_kl = tl.zeros([LANES], tl.float32)
    sum_causal = tl.zeros([LANES], tl.float32)
    sum_clamped = tl.zeros([LANES], tl.float32)
    sum_low = tl.zeros([LANES], tl.float32)
    sum_high = tl.zeros([LANES], tl.float32)
    sum_ratio = tl.zeros([LANES], tl.float32)
    if HAS_KL_CLIP:
        sum_kl_clipped = tl.zeros([LANES], tl.float32)
        sum_causal_clipped = tl.zeros([LANES], tl.float32)
    if HAS_KAPPA_WEIGHTS:
        sum_counted = tl.zeros([LANES], tl.float32)
    for t0 in range(start, end, BLOCK_T):
        t = t0 + block  # [BLOCK_T]
        inside = t < end
        keep = tl.load(mask_ptr + t * stride_mask_t, mask=inside, other=0) != 0
        # What is read under the mask would be read one by one. Whatever stands where it is 0, NaN included, goes
        # through the arithmetic instead, and every result is selected by `keep`. Only contexts are left unread, where
        # a word holds those of one token.
        logp = tl.load(logp_ptr + t * stride_logp_t, mask=inside, other=0.0).to(tl.float32)
        if ADV_BY_TOKEN:
            adv = tl.load(adv_ptr + row * stride_adv_b + t * stride_adv_t, mask=inside, other=0.0).to(tl.float32)
        else:
            adv = tl.zeros([BLOCK_T], tl.float32) + tl.load(adv_ptr + row * stride_adv_b).to(tl.float32)
        old = logp
        if HAS_OLD:
            old = tl.load(old_ptr + t * stride_old_t, mask=inside, other=0.0).to(tl.float32)
        if BY_SEQUENCE:
            log_ratio = tl.zeros([BLOCK_T], tl.float32) + sequence_log_ratio
        else:
            log_ratio = logp - old
        ref = logp
        if HAS_REF:
            ref = tl.load(ref_ptr + row * stride_ref_b + t * stride_ref_t, mask=inside, other=0.0).to(tl.float32)
        causal = logp
        if HAS_CAUSAL:
            causal_at = causal_ptr + row * stride_causal_b + t * stride_causal_t
            causal = tl.load(causal_at, mask=inside, other=0.0).to(tl.float32)
        log_proj = logp
        clamped = keep
        counted = keep
        kappa_here = kappa
        if HAS_KAPPA_WEIGHTS:
            kappa_at = kappa_weights_ptr + row * stride_kappa_b + t * stride_kappa_t
            kappa_weight = tl.load(kappa_at, mask=inside, other=0.0).to(tl.float32)
            kappa_here = kappa * kappa_weight
            counted = keep & (kappa_weight != 0.0)
        if HAS_CONTEXT:
            query = old
            if HAS_QUERY:
                query_at = query_ptr + row * stride_query_b + t * stride_query_t
                query = tl.load(query_at, mask=inside, other=0.0).to(tl.float32)
            log_proj, clamped = _log_proj(
                ctx_ptr + row * stride_ctx_b,
                t,
                counted if L_INNERMOST else inside,
                query,
                stride_ctx_t,
                stride_ctx_l,
                weights_ptr + row * stride_w_b,
                stride_w_l,
                contexts,
                log_floor,
                HAS_WEIGHTS,
                HAS_KL_CLIP,
                BLOCK_L,
            )
        is_ratio = tl.full([BLOCK_T], 1.0, tl.float32)
        if HAS_IS:
            is_ratio = tl.load(is_ptr + row * stride_is_b + t * stride_is_t, mask=inside, other=0.0).to(tl.float32)
        loss, d_ratio, d_logp, d_causal, kl, kl_causal, ratio, kl_beyond, causal_beyond = token_objective(
            logp,
            log_ratio,
            adv,
            is_ratio,
            ref,
            log_proj,
            causal,
            beta,
            kappa_here,
            epsilon_low,
            epsilon_high,
            delta,
            kl_clip,
            tau_pos,
            tau_neg,
            KIND,
            HAS_DELTA,
            HAS_REF,
            HAS_CONTEXT,
            HAS_KL_CLIP,
            BIAS_CORRECTION,
        )
        if not HAS_CAUSAL:
            d_logp += d_causal
        if not BY_SEQUENCE:
            d_logp += d_ratio
        out = first_out + t
        tl.store(d_logp_ptr + out, tl.where(keep, d_logp, 0.0), mask=inside)
        if HAS_CAUSAL:
            tl.store(d_causal_ptr + out, tl.where(keep, d_causal, 0.0), mask=inside)
        if not BY_SEQUENCE:
            n += _fold(keep.to(tl.float32), LANES, ALIGNED_T)
        sum_loss += _fold(tl.where(keep, loss, 0.0), LANES, ALIGNED_T)
        if HAS_REF:
            sum_kl += _fold(tl.where(keep, kl, 0.0), LANES, ALIGNED_T)
            if HAS_KL_CLIP:
                sum_kl_clipped += _fold((keep & kl_beyond).to(tl.float32), LANES, ALIGNED_T)
        if HAS_CONTEXT:
            sum_causal += _fold(tl.where(counted, kl_causal, 0.0), LANES, ALIGNED_T)
            sum_clamped += _fold((counted & clamped).to(tl.float32), LANES, ALIGNED_T)
            if HAS_KL_CLIP:
                sum_causal_clipped += _fold((counted & causal_beyond).to(tl.float32), LANES, ALIGNED_T)
            if HAS_KAPPA_WEIGHTS:
                sum_counted += _fold(counted.to(tl.float32), LANES, ALIGNED_T)
        if KIND == CLIPPED:
            sum_low += _fold((keep & (ratio < 1.0 - epsilon_low) & (adv < 0)).to(tl.float32), LANES, ALIGNED_T)
            sum_high += _fold((keep & (ratio > 1.0 + epsilon_high) & (adv > 0)).to(tl.float32), LANES, ALIGNED_T)
        elif KIND == CISPO:
            sum_high += _fold((keep & (ratio > epsilon_high) & (adv > 0)).to(tl.float32), LANES, ALIGNED_T)
        if BY_SEQUENCE:
            sum_ratio += _fold(tl.where(keep, d_ratio, 0.0), LANES, ALIGNED_T)

    # All at once: every reduction of a single sum would wait for all warps. `join` appends an axis, so the first pair
    # to be joined lies furthest apart in the end.
    even = tl.join(tl.join(n, sum_clamped), tl.join(sum_kl, sum_high))  # [LANES, 2, 2]
    odd = tl.join(tl.join(sum_loss, sum_low), tl.join(sum_causal, sum_ratio))
    sums = tl.reshape(tl.sum(tl.join(even, odd), axis=0), [8])
    which = tl.arange(0, 8)
    tl.store(sums_ptr + which * (B.to(tl.int64) * BLOCKS) + pid, sums, mask=which < N_SUMS)
    if HAS_KL_CLIP:
        clipped = tl.sum(tl.join(sum_kl_clipped, sum_causal_clipped), axis=0)  # [2]
        more = N_SUMS + tl.arange(0, 2)
        tl.store(sums_ptr + more * (B.to(tl.int64) * BLOCKS) + pid, clipped)
    if HAS_KAPPA_WEIGHTS:
        last = N_SUMS + 2 if HAS_KL_CLIP else N_SUMS
        tl.store(sums_ptr + last * (B.to(tl.int64) * BLOCKS) + pid, tl.sum(sum_counted))
    if BY_SEQUENCE:
        tl.store(sequence_ptr + row, tl.sum(sum_ratio) / count)


@triton.jit(do_not_specialize=["B", "BLOCKS"])
def token_loss_finish_kernel(
    sums_ptr,  # (N_SUMS and more, see there, B, BLOCKS)
    items_ptr,  # (1,): num_items_in_batch, where it is a tensor
    loss_ptr,  # ()
    out_ptr,  # (N_OUT,), or two more
    B,
    BLOCKS,
    divisor,
    DIVIDE_BY: tl.constexpr,
    ITEMS_ON_DEVICE: tl.constexpr,
    HAS_KL_CLIP: tl.constexpr,
    HAS_KAPPA_WEIGHTS: tl.constexpr,
    BLOCK_P: tl.constexpr,  # at least BLOCKS
    BLOCK_B: tl.constexpr,
):
    step = B.to(tl.int64) * BLOCKS
    rows = tl.arange(0, BLOCK_B)
    parts = tl.arange(0, BLOCK_P).to(tl.int64)
    loss = tl.zeros([BLOCK_B], tl.float32)
    total = tl.zeros([BLOCK_B], tl.float32)
    kl = tl.zeros([BLOCK_B], tl.float32)
    kl_causal = tl.zeros([BLOCK_B], tl.float32)
    clamped = tl.zeros([BLOCK_B], tl.float32)
    low = tl.zeros([BLOCK_B], tl.float32)
    high = tl.zeros([BLOCK_B], tl.float32)
    if HAS_KL_CLIP:
        kl_clipped = tl.zeros([BLOCK_B], tl.float32)
        causal_clipped = tl.zeros([BLOCK_B], tl.float32)
    if HAS_KAPPA_WEIGHTS:
        counted = tl.zeros([BLOCK_B], tl.float32)
    for b0 in range(0, B, BLOCK_B):
        b = (b0 + rows).to(tl.int64)
        inside = (b < B)[:, None] & (parts[None, :] < BLOCKS)
        at = sums_ptr + b[:, None] * BLOCKS + parts[None, :]  # [BLOCK_B, BLOCK_P]
        n = tl.sum(tl.load(at, mask=inside, other=0.0), axis=1)
        row_loss = tl.sum(tl.load(at + step, mask=inside, other=0.0), axis=1)
        if DIVIDE_BY == 0:
            row_loss = row_loss / tl.maximum(n, 1.0)
        loss += row_loss
        total += n
        kl += tl.sum(tl.load(at + 2 * step, mask=inside, other=0.0), axis=1)
        kl_causal += tl.sum(tl.load(at + 3 * step, mask=inside, other=0.0), axis=1)
        clamped += tl.sum(tl.load(at + 4 * step, mask=inside, other=0.0), axis=1)
        low += tl.sum(tl.load(at + 5 * step, mask=inside, other=0.0), axis=1)
        high += tl.sum(tl.load(at + 6 * step, mask=inside, other=0.0), axis=1)
        if HAS_KL_CLIP:
            kl_clipped += tl.sum(tl.load(at + 7 * step, mask=inside, other=0.0), axis=1)
            causal_clipped += tl.sum(tl.load(at + 8 * step, mask=inside, other=0.0), axis=1)
        if HAS_KAPPA_WEIGHTS:
            last = 9 if HAS_KL_CLIP else 7
            counted += tl.sum(tl.load(at + last * step, mask=inside, other=0.0), axis=1)
    count = tl.maximum(tl.sum(total), 1.0)
    count_causal = count
    if HAS_KAPPA_WEIGHTS:
        count_causal = tl.maximum(tl.sum(counted), 1.0)
    denominator = count
    if DIVIDE_BY == 0:
        denominator = tl.maximum(B * 1.0, 1.0)
    elif DIVIDE_BY == 2:
        denominator = divisor
        if ITEMS_ON_DEVICE:
            denominator = tl.load(items_ptr).to(tl.float32)
        denominator = tl.maximum(denominator, 1.0)
    tl.store(loss_ptr, tl.sum(loss) / denominator)
    tl.store(out_ptr, 1.0 / denominator)
    tl.store(out_ptr + 1, tl.sum(kl) / count)
    tl.store(out_ptr + 2, tl.sum(kl_causal) / count_causal)
    tl.store(out_ptr + 3, tl.sum(clamped) / count_causal)
    tl.store(out_ptr + 4, tl.sum(low) / count)
    tl.store(out_ptr + 5, tl.sum(high) / count)
    if HAS_KL_CLIP:
        tl.store(out_ptr + 6, tl.sum(kl_clipped) / count)
        tl.store(out_ptr + 7, tl.sum(causal_clipped) / count_causal)


@triton.jit(do_not_specialize=["T", "BLOCKS"])
def token_loss_backward_kernel(
    grad_ptr,  # (): upstream gradient
    d_logp_ptr,  # (B, T) float32
    d_causal_ptr,  # (B, T) float32
    sequence_ptr,  # (B,) float32
    sums_ptr,  # (N_SUMS and more, B, BLOCKS): the counts come first
    out_ptr,  # (N_OUT,), or two more
    mask_ptr,  # (B, T)
    stride_mask_b,
    stride_mask_t,
    grad_logp_ptr,  # (B, T), contiguous
    grad_causal_ptr,  # (B, T), contiguous
    T,
    BLOCKS,  # programs per sequence
    BY_COUNT: tl.constexpr,  # divide by each sequence's own count too
    BY_SEQUENCE: tl.constexpr,
    HAS_CAUSAL: tl.constexpr,
    ALIGNED_T: tl.constexpr,  # 16 divides T
    BLOCK_T: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    row, start, end = _tokens_of(pid, T, 1 if BY_SEQUENCE else BLOCKS, BLOCK_T, ALIGNED_T)
    first_out = row * (T // 16 * 16 if ALIGNED_T else T)
    scale = tl.load(grad_ptr).to(tl.float32) * tl.load(out_ptr)
    if BY_COUNT:
        parts = tl.arange(0, MOST_BLOCKS)
        n = tl.sum(tl.load(sums_ptr + row * BLOCKS + parts, mask=parts < BLOCKS, other=0.0))
        scale = scale / tl.maximum(n, 1.0)
    for t0 in range(start, end, BLOCK_T):
        t = t0 + tl.arange(0, BLOCK_T)  # [BLOCK_T]
        inside = t < end
        at = first_out + t
        d = tl.load(d_logp_ptr + at, mask=inside, other=0.0)
        if BY_SEQUENCE:
            keep = tl.load(mask_ptr + row * stride_mask_b + t * stride_mask_t, mask=inside, other=0) != 0
            d += tl.where(keep, tl.load(sequence_ptr + row), 0.0)
        # 0 at masked tokens whatever the scale is, as autograd's `where` has it.
        grad = tl.where(d == 0.0, 0.0, d * scale)
        tl.store(grad_logp_ptr + at, grad.to(grad_logp_ptr.dtype.element_ty), mask=inside)
        if HAS_CAUSAL:
            d = tl.load(d_causal_ptr + at, mask=inside, other=0.0)
            grad = tl.where(d == 0.0, 0.0, d * scale)
            tl.store(grad_causal_ptr + at, grad.to(grad_causal_ptr.dtype.element_ty), mask=inside)
