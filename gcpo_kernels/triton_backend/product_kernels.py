"""Kernels of the product with a softmax in its epilogue, and of what is left of it afterwards. See product.py."""

import triton
import triton.language as tl

from gcpo_kernels.triton_backend.common import LN_2, LOG2_E, expm1, head_logit, power_of_two
from gcpo_kernels.triton_backend.logprob_kernels import log_unshifted, near_one, whole_shift


@triton.jit
def _halves(x, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The left and right half of a tile."""
    return tl.split(tl.permute(tl.reshape(x, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)))


@triton.jit
def _merge(top, total, dot, peak, s, weighted, k):
    """Largest z, sum and entropy sum of rows, with those of more of their columns."""
    new_top = tl.maximum(top, peak)
    before = (top - new_top) * k
    now = (peak - new_top) * k
    dot = (dot + total * before) * tl.exp2(before) + (weighted + s * now) * tl.exp2(now)
    total = total * tl.exp2(before) + s * tl.exp2(now)
    return new_top, total, dot


@triton.jit
def _epilogue(
    acc,  # [BLOCK_M, BLOCK_N] float32
    n0,
    token,  # [BLOCK_M]
    reference,  # [BLOCK_M]
    shift,  # [BLOCK_M]
    inside,  # [BLOCK_M]
    target_ptr,  # of the rows
    bias_ptr,
    scale,
    softcap,
    chain,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    NEGATIVE: tl.constexpr,
    SCORE: tl.constexpr,
    V: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Of a part of a tile: E, with the softcap's slope, and of its rows the largest z, sum and entropy sum."""
    n = n0 + tl.arange(0, BLOCK_N)
    k = chain * LOG2_E
    if HAS_BIAS:
        acc += tl.load(bias_ptr + n, mask=n < V, other=0.0).to(tl.float32)[None, :]
    # Most tiles hold no row's target: the branch is the same for all threads.
    held = (token >= n0) & (token < n0 + BLOCK_N) & (token < V)
    if tl.max(held.to(tl.int32), axis=0) > 0:
        target = tl.sum(tl.where(n[None, :] == token[:, None], acc, 0.0), axis=1)
        tl.store(target_ptr, target, mask=held & inside)
    z, slope = head_logit(acc, scale, softcap, HAS_SOFTCAP, NEGATIVE)
    if SCORE:
        if n0 + BLOCK_N > V:
            z = tl.where(n[None, :] < V, z, -float("inf"))
        peak = tl.maximum(tl.max(z, axis=1), -1.0e30)  # finite, so that a row of -inf does not make NaN
        e, y = power_of_two((z - peak[:, None]) * k)
    else:
        peak = reference
        e, y = power_of_two((z - reference[:, None]) * k + shift[:, None])
        if n0 + BLOCK_N > V:
            e = tl.where(n[None, :] < V, e, 0.0)
    total = tl.sum(e, axis=1)
    dot = tl.sum(e * y, axis=1)
    if HAS_SOFTCAP:
        e = e * slope
    return e, peak, total, dot


@triton.jit(do_not_specialize=["M"])
def product_kernel(
    x_ref,  # (M, H): a descriptor of [BLOCK_M, BLOCK_K] with TMA, else a pointer, as the next two
    w_ref,  # (V, H): of [BLOCK_N, BLOCK_K]
    e_ref,  # (M, V): of [BLOCK_M, BLOCK_N // SUBTILES]; receives E unless SCORE
    bias_ptr,  # (V,)
    ids_ptr,  # (M,) int64
    reference_ptr,  # (M,) float32: z that is subtracted from all of the row, see `head_logit`
    shift_ptr,  # (M,) float32: what is added after that, in powers of two
    rows_ptr,  # (1 + M,) int32: how many rows, and which; with GATHER
    target_ptr,  # (M,) float32: receives the target's raw logit, if it is in [0, V)
    peaks_ptr,  # (PARTS, M) float32: of each block of columns, the largest z; with SCORE
    sums_ptr,  # (PARTS, M) float32: sum of E, or of exp(chain (z - peak))
    dots_ptr,  # (PARTS, M) float32: sum of E times its logarithm, base 2
    stride_x,
    stride_w,
    stride_e,
    M,
    scale,
    softcap,
    chain,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    NEGATIVE: tl.constexpr,
    SCORE: tl.constexpr,
    GATHER: tl.constexpr,
    TMA: tl.constexpr,
    SUBTILES: tl.constexpr,
    V: tl.constexpr,
    H: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    start = tl.program_id(0).to(tl.int64)
    count = M
    if GATHER:
        count = tl.load(rows_ptr)
    down = tl.cdiv(count, BLOCK_M)
    tiles = down * tl.cdiv(V, BLOCK_N)
    # Rows run fastest: all of x stays in the L2 cache, and a block of the weight is read from memory once.
    for tile in tl.range(start.to(tl.int32), tiles, PROGRAMS, flatten=TMA):
        m0 = (tile % down) * BLOCK_M
        block = tile // down
        n0 = block * BLOCK_N
        m = m0 + tl.arange(0, BLOCK_M)
        inside = m < count
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        if TMA:
            for h0 in range(0, H, BLOCK_K):
                acc = tl.dot(x_ref.load([m0, h0]), w_ref.load([n0, h0]).T, acc)
            row = m.to(tl.int64)
        else:
            if GATHER:
                row = tl.load(rows_ptr + 1 + m, mask=inside, other=0).to(tl.int64)
            else:
                row = m.to(tl.int64)
            n = n0 + tl.arange(0, BLOCK_N)
            h = tl.arange(0, BLOCK_K)
            x_at = x_ref + row[:, None] * stride_x + h[None, :]  # [BLOCK_M, BLOCK_K]
            w_at = w_ref + n.to(tl.int64)[:, None] * stride_w + h[None, :]  # [BLOCK_N, BLOCK_K]
            for h0 in range(0, H, BLOCK_K):
                x = tl.load(x_at + h0, mask=inside[:, None] & (h0 + h < H)[None, :], other=0.0)
                w = tl.load(w_at + h0, mask=(n < V)[:, None] & (h0 + h < H)[None, :], other=0.0)
                acc = tl.dot(x, w.T, acc, input_precision="ieee")
        token = tl.load(ids_ptr + row, mask=inside, other=-1)
        reference = tl.zeros([BLOCK_M], tl.float32)
        shift = tl.zeros([BLOCK_M], tl.float32)
        if not SCORE:
            reference = tl.load(reference_ptr + row, mask=inside, other=0.0)
            shift = tl.load(shift_ptr + row, mask=inside, other=0.0)
        # A part of the columns at a time: its exponentials take the registers of the part before.
        if SUBTILES == 1:
            parts = (acc,)
        else:
            left, right = _halves(acc, BLOCK_M, BLOCK_N)
            parts = (left, right)
            if SUBTILES == 4:
                parts = _halves(left, BLOCK_M, BLOCK_N // 2) + _halves(right, BLOCK_M, BLOCK_N // 2)
        WIDTH: tl.constexpr = BLOCK_N // SUBTILES
        top = tl.full([BLOCK_M], -1.0e30, tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        dot = tl.zeros([BLOCK_M], tl.float32)
        for j in tl.static_range(SUBTILES):
            n1 = n0 + j * WIDTH
            e, peak, s, weighted = _epilogue(
                parts[j],
                n1,
                token,
                reference,
                shift,
                inside,
                target_ptr + row,
                bias_ptr,
                scale,
                softcap,
                chain,
                HAS_BIAS,
                HAS_SOFTCAP,
                NEGATIVE,
                SCORE,
                V,
                WIDTH,
            )
            if SCORE:
                top, total, dot = _merge(top, total, dot, peak, s, weighted, chain * LOG2_E)
            else:
                total += s
                dot += weighted
                if TMA:
                    e_ref.store([m0, n1], e.to(e_ref.dtype))
                else:
                    n = n1 + tl.arange(0, WIDTH)
                    e_at = e_ref + row[:, None] * stride_e + n[None, :]
                    tl.store(e_at, e.to(e_ref.dtype.element_ty), mask=inside[:, None] & (n < V)[None, :])
        at = block.to(tl.int64) * M + m
        if SCORE:
            tl.store(peaks_ptr + at, top, mask=inside)
        tl.store(sums_ptr + at, total, mask=inside)
        tl.store(dots_ptr + at, dot, mask=inside)


@triton.jit
def _row_of(m, inside, rows_ptr, GATHER: tl.constexpr):
    if GATHER:
        return tl.load(rows_ptr + 1 + m, mask=inside, other=0).to(tl.int64)
    return m


@triton.jit(do_not_specialize=["M", "parts"])
def combine_scores_kernel(
    peaks_ptr,  # (parts, M) float32: from `product_kernel`, as the next three
    sums_ptr,  # (parts, M)
    dots_ptr,  # (parts, M)
    target_ptr,  # (M,)
    ids_ptr,  # (M,) int64
    rows_ptr,  # (1 + M,) int32; with GATHER
    first_ptr,  # (M,) float32: receives the log-probability; with GATHER the largest z
    second_ptr,  # (M,) float32: receives the entropy; with GATHER the shift that makes the sum of exponentials about 1
    M,
    parts,
    scale,
    softcap,
    chain,
    HAS_SOFTCAP: tl.constexpr,
    NEGATIVE: tl.constexpr,
    GATHER: tl.constexpr,
    V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """What the tiles of a product without a store say of their rows, put together."""
    count = M
    if GATHER:
        count = tl.load(rows_ptr)
    m0 = tl.program_id(0).to(tl.int64) * BLOCK_M
    if m0 < count:
        m = m0 + tl.arange(0, BLOCK_M)
        inside = m < count
        row = _row_of(m, inside, rows_ptr, GATHER)
        part = tl.arange(0, BLOCK_P)
        k = chain * LOG2_E
        peak = tl.full([BLOCK_M], -1.0e30, tl.float32)
        s = tl.zeros([BLOCK_M], tl.float32)
        dot = tl.zeros([BLOCK_M], tl.float32)
        for p0 in range(0, parts, BLOCK_P):
            p = (p0 + part).to(tl.int64)
            at = p[:, None] * M + m[None, :]  # [BLOCK_P, BLOCK_M]
            there = (p < parts)[:, None] & inside[None, :]
            peaks = tl.load(peaks_ptr + at, mask=there, other=-1.0e30)
            sums = tl.load(sums_ptr + at, mask=there, other=0.0)
            dots = tl.load(dots_ptr + at, mask=there, other=0.0)
            top = tl.max(peaks, axis=0)
            down = (peaks - top[None, :]) * k
            moved = tl.exp2(down)
            added = tl.sum(sums * moved, axis=0)
            weighted = tl.sum((dots + sums * down) * moved, axis=0)
            peak, s, dot = _merge(peak, s, dot, top, added, weighted, k)
        if GATHER:
            tl.store(first_ptr + row, peak, mask=inside)
            tl.store(second_ptr + row, tl.floor(0.5 - tl.log2(s)), mask=inside)
        else:
            token = tl.load(ids_ptr + row, mask=inside, other=-1)
            valid = (token >= 0) & (token < V)
            target = tl.load(target_ptr + row, mask=inside & valid, other=0.0)
            target, _ = head_logit(target, scale, softcap, HAS_SOFTCAP, NEGATIVE)
            log_s = tl.log(s)
            logp = tl.where(valid, (target - peak) * chain - log_s, float("nan"))
            tl.store(first_ptr + row, logp, mask=inside)
            tl.store(second_ptr + row, log_s - dot * LN_2 / s, mask=inside)


@triton.jit(do_not_specialize=["M", "parts"])
def combine_exponentials_kernel(
    sums_ptr,  # (parts, M) float32: from `product_kernel`, as the next two
    dots_ptr,  # (parts, M)
    target_ptr,  # (M,)
    ids_ptr,  # (M,) int64
    reference_ptr,  # (M,) float32: as `product_kernel` had it, and the next one
    shift_ptr,  # (M,)
    rows_ptr,  # (1 + M,) int32; with GATHER
    logp_ptr,  # (M,) float32
    entropy_ptr,  # (M,) float32
    total_ptr,  # (M,) float32: s; without GATHER NaN where the row has to be done again
    e_ptr,  # (M, V): receives s p - s at the target
    stride_e,
    M,
    parts,
    scale,
    softcap,
    chain,
    HAS_SOFTCAP: tl.constexpr,
    NEGATIVE: tl.constexpr,
    GATHER: tl.constexpr,
    V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """What the tiles of a product with a store say of their rows, put together; finishes E."""
    count = M
    if GATHER:
        count = tl.load(rows_ptr)
    m0 = tl.program_id(0).to(tl.int64) * BLOCK_M
    if m0 < count:
        m = m0 + tl.arange(0, BLOCK_M)
        inside = m < count
        row = _row_of(m, inside, rows_ptr, GATHER)
        part = tl.arange(0, BLOCK_P)
        s = tl.zeros([BLOCK_M], tl.float32)
        dot = tl.zeros([BLOCK_M], tl.float32)
        for p0 in range(0, parts, BLOCK_P):
            p = (p0 + part).to(tl.int64)
            at = p[:, None] * M + m[None, :]
            there = (p < parts)[:, None] & inside[None, :]
            s += tl.sum(tl.load(sums_ptr + at, mask=there, other=0.0), axis=0)
            dot += tl.sum(tl.load(dots_ptr + at, mask=there, other=0.0), axis=0)
        token = tl.load(ids_ptr + row, mask=inside, other=-1)
        valid = (token >= 0) & (token < V) & inside
        reference = tl.load(reference_ptr + row, mask=inside, other=0.0)
        shift = tl.load(shift_ptr + row, mask=inside, other=0.0)
        target = tl.load(target_ptr + row, mask=valid, other=0.0)
        z, slope = head_logit(target, scale, softcap, HAS_SOFTCAP, NEGATIVE)
        logp = (z - reference) * chain - log_unshifted(s, shift)
        tl.store(logp_ptr + row, tl.where(valid, logp, float("nan")), mask=inside)
        tl.store(entropy_ptr + row, tl.log(s) - dot * LN_2 / s, mask=inside)
        if not GATHER:
            tl.store(total_ptr + row, tl.where(valid & near_one(s), s, float("nan")), mask=inside)
        else:
            tl.store(total_ptr + row, s, mask=inside)
        hit = s * expm1(logp) * slope
        tl.store(e_ptr + row * stride_e + token, hit.to(e_ptr.dtype.element_ty), mask=valid)


@triton.jit(do_not_specialize=["M"])
def redo_list_kernel(total_ptr, rows_ptr, M, BLOCK: tl.constexpr):
    """rows[0]: how many entries of total (M,) are NaN; then which, in order. One program."""
    found = tl.program_id(0).to(tl.int64).to(tl.int32)
    for m0 in range(0, M, BLOCK):
        m = m0 + tl.arange(0, BLOCK)
        total = tl.load(total_ptr + m, mask=m < M, other=0.0)
        bad = (total != total).to(tl.int32)
        tl.store(rows_ptr + found + tl.cumsum(bad, axis=0), m, mask=bad != 0)
        found += tl.sum(bad, axis=0)
    tl.store(rows_ptr, found)


@triton.jit
def target_logits_kernel(
    x_ptr,  # (M, H)
    w_ptr,  # (V, H)
    bias_ptr,  # (V,)
    ids_ptr,  # (M,) int64
    offset_ptr,  # (M,) float32
    reference_ptr,  # (M,) float32: receives the target's z
    shift_ptr,  # (M,) float32: receives the offset in whole powers of two
    stride_x,
    stride_w,
    scale,
    softcap,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    NEGATIVE: tl.constexpr,
    V: tl.constexpr,
    H: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """
    What `product_kernel` subtracts, from a dot product a row. It rounds otherwise than the product does: close to the
    target's logit is enough, because the product's own logit of the target is what log-probabilities are made of.
    """
    row = tl.program_id(0).to(tl.int64)
    token = tl.load(ids_ptr + row)
    here = (token >= 0) & (token < V)
    acc = tl.zeros([BLOCK_H], tl.float32)
    for h0 in range(0, H, BLOCK_H):
        h = h0 + tl.arange(0, BLOCK_H)
        x = tl.load(x_ptr + row * stride_x + h, mask=h < H, other=0.0).to(tl.float32)
        acc += x * tl.load(w_ptr + token * stride_w + h, mask=here & (h < H), other=0.0).to(tl.float32)
    u = tl.sum(acc, axis=0)
    if HAS_BIAS:
        u += tl.load(bias_ptr + token, mask=here, other=0.0).to(tl.float32)
    z, _ = head_logit(u, scale, softcap, HAS_SOFTCAP, NEGATIVE)
    tl.store(reference_ptr + row, z)
    tl.store(shift_ptr + row, whole_shift(tl.load(offset_ptr + row)))
