"""Kernels of the product with a softmax in its epilogue, and of what is left of it afterwards. See product.py."""

import triton
import triton.language as tl

from gcpo_kernels.triton_backend.common import LN_2, LOG2_E, at_most, expm1, head_logit, power_of_two
from gcpo_kernels.triton_backend.logprob_kernels import log_unshifted, near_one, whole_shift


@triton.jit
def _halves(x, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The left and right half of a tile."""
    return tl.split(tl.permute(tl.reshape(x, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)))


@triton.jit
def _parts(x, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SUBTILES: tl.constexpr):
    """A tile's columns in 1, 2 or 4 parts. With `else`, because what follows a return would be compiled too."""
    if SUBTILES == 1:
        return (x,)
    else:
        left, right = _halves(x, BLOCK_M, BLOCK_N)
        if SUBTILES == 2:
            return left, right
        else:
            return _halves(left, BLOCK_M, BLOCK_N // 2) + _halves(right, BLOCK_M, BLOCK_N // 2)


@triton.jit
def _merge(top, total, dot, other_top, other_total, other_dot, k):
    """Largest z, sum and entropy sum of rows, with those of more of their columns."""
    new_top = tl.maximum(top, other_top)
    down = (top - new_top) * k
    other_down = (other_top - new_top) * k
    dot = (dot + total * down) * tl.exp2(down) + (other_dot + other_total * other_down) * tl.exp2(other_down)
    total = total * tl.exp2(down) + other_total * tl.exp2(other_down)
    return new_top, total, dot


@triton.jit
def _epilogue(
    acc,  # [BLOCK_M, BLOCK_N] float32
    n0,
    token,  # [BLOCK_M]
    holds_targets,  # whether the tile has the target of any of its rows
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
    """
    Of a part of a tile: e = 2**y with the softcap's slope, and of its rows the largest z, the sums of 2**y and 2**y y.

    To score, y = k (z - largest z). To store, y = k z + shift, multiplied and added in one rounding: large logits keep
    their digits whatever the shift was rounded to, because it is the same for all of a row, the target included.
    """
    n = n0 + tl.arange(0, BLOCK_N)
    k = chain * LOG2_E
    if HAS_BIAS:
        acc += tl.load(bias_ptr + n.to(tl.int64), mask=n < V, other=0.0).to(tl.float32)[None, :]
    if holds_targets:
        target = tl.sum(tl.where(n[None, :] == token[:, None], acc, 0.0), axis=1)
        tl.store(target_ptr, target, mask=(token >= n0) & (token < n0 + BLOCK_N) & (token < V) & inside)
    z, slope = head_logit(acc, scale, softcap, HAS_SOFTCAP, NEGATIVE)
    WHOLE: tl.constexpr = V % BLOCK_N == 0  # then a part is inside the vocabulary, or it is not here
    if SCORE:
        if not WHOLE:
            z = tl.where(n[None, :] < V, z, -float("inf"))
        top = tl.maximum(tl.max(z, axis=1), -1.0e30)  # finite, so that a row of -inf does not make NaN
        y = (z - top[:, None]) * k
    else:
        top = shift
        y = tl.fma(z, k, shift[:, None])
    e, y = power_of_two(y)
    if not SCORE and not WHOLE:
        e = tl.where(n[None, :] < V, e, 0.0)
    total = tl.sum(e, axis=1)
    dot = tl.sum(e * y, axis=1)
    if HAS_SOFTCAP:
        e = e * slope
    return e, top, total, dot


@triton.jit
def _row_of(m, inside, rows_ptr, GATHER: tl.constexpr):
    """The rows that a program's m-th ones are, 64 bits wide: of the list, or themselves."""
    row = m
    if GATHER:
        row = tl.load(rows_ptr + (1 + m), mask=inside, other=0).to(tl.int64)
    return row


@triton.jit
def _place_of(tile, down, columns, GROUP: tl.constexpr):
    """
    Row and column of blocks that a program's tile is, of (down, columns) of them. Rows run fastest: the hidden states
    stay in the L2 cache, and a block of the weight is read from memory once. With GROUP only so many blocks of rows
    belong together, and the weight is read once for each group.
    """
    if GROUP == 0:
        row = tile % down
        column = tile // down
    else:
        first = tile // (GROUP * columns) * GROUP
        height = tl.minimum(down - first, GROUP)
        within = tile - first * columns
        row = first + within % height
        column = within // height
    return row, column


@triton.jit(do_not_specialize=["M"])
def product_kernel(
    x_ref,  # (M, H): a descriptor of [BLOCK_M, BLOCK_K] with TMA, else a pointer, as the next two
    w_ref,  # (V, H): of [BLOCK_N, BLOCK_K]
    e_ref,  # (M, V): of [BLOCK_M, BLOCK_N // SUBTILES]; receives E unless SCORE
    bias_ptr,  # (V,)
    ids_ptr,  # (M,) int64
    shift_ptr,  # (M,) float32: of a row's exponents, see `_epilogue`; unless SCORE
    rows_ptr,  # (1 + M,) int32: how many rows, and which; with GATHER
    target_ptr,  # (M,) float32: receives the target's raw logit, if it is in [0, V)
    tops_ptr,  # (PARTS, M) float32: of each block of columns the largest z; with SCORE
    sums_ptr,  # (PARTS, M) float32: sum of 2**y
    dots_ptr,  # (PARTS, M) float32: sum of 2**y y
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
    GROUP: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    start = tl.program_id(0).to(tl.int64)
    count = M
    if GATHER:
        count = tl.load(rows_ptr)
    down = tl.cdiv(count, BLOCK_M)
    columns = tl.cdiv(V, BLOCK_N)
    tiles = down * columns
    for tile in tl.range(start.to(tl.int32), tiles, PROGRAMS, flatten=TMA):
        row_block, block = _place_of(tile, down, columns, GROUP)
        m0 = row_block * BLOCK_M
        n0 = block * BLOCK_N
        m = m0 + tl.arange(0, BLOCK_M)
        inside = m < count
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        if TMA:
            for h0 in range(0, H, BLOCK_K):
                acc = tl.dot(x_ref.load([m0, h0]), w_ref.load([n0, h0]).T, acc, input_precision="ieee")
            row = m.to(tl.int64)
        else:
            row = _row_of(m.to(tl.int64), inside, rows_ptr, GATHER)
            n = (n0 + tl.arange(0, BLOCK_N)).to(tl.int64)
            x_rows = x_ref + row * stride_x
            w_rows = w_ref + n * stride_w
            for h0 in range(0, H, BLOCK_K):
                h = (h0 + tl.arange(0, BLOCK_K)).to(tl.int64)
                there = (h < H)[None, :]
                x = tl.load(x_rows[:, None] + h[None, :], mask=inside[:, None] & there, other=0.0)  # [BLOCK_M, BLOCK_K]
                w = tl.load(
                    w_rows[:, None] + h[None, :], mask=(n < V)[:, None] & there, other=0.0
                )  # [BLOCK_N, BLOCK_K]
                acc = tl.dot(x, w.T, acc, input_precision="ieee")
        token = tl.load(ids_ptr + row, mask=inside, other=-1)
        # Most tiles hold no row's target: the branch is the same for all threads.
        holds_targets = tl.max(((token >= n0) & (token < n0 + BLOCK_N)).to(tl.int32), axis=0) > 0
        given = tl.zeros([BLOCK_M], tl.float32)
        if not SCORE:
            given = tl.load(shift_ptr + row, mask=inside, other=0.0)
        # A part of the columns at a time: its exponentials take the registers of the part before.
        parts = _parts(acc, BLOCK_M, BLOCK_N, SUBTILES)
        WIDTH: tl.constexpr = BLOCK_N // SUBTILES
        top = tl.full([BLOCK_M], -1.0e30, tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        dot = tl.zeros([BLOCK_M], tl.float32)
        for j in tl.static_range(SUBTILES):
            n1 = n0 + j * WIDTH
            if n1 < V:
                e, part_top, part_total, part_dot = _epilogue(
                    parts[j],
                    n1,
                    token,
                    holds_targets,
                    given,
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
                    top, total, dot = _merge(top, total, dot, part_top, part_total, part_dot, chain * LOG2_E)
                else:
                    total += part_total
                    dot += part_dot
                    if TMA:
                        e_ref.store([m0, n1], e.to(e_ref.dtype))
                    else:
                        column = (n1 + tl.arange(0, WIDTH)).to(tl.int64)
                        e_at = e_ref + row[:, None] * stride_e + column[None, :]
                        tl.store(e_at, e.to(e_ref.dtype.element_ty), mask=inside[:, None] & (column < V)[None, :])
        at = block.to(tl.int64) * M + m
        if SCORE:
            tl.store(tops_ptr + at, top, mask=inside)
        tl.store(sums_ptr + at, total, mask=inside)
        tl.store(dots_ptr + at, dot, mask=inside)


@triton.jit(do_not_specialize=["M", "parts"])
def combine_scores_kernel(
    tops_ptr,  # (parts, M) float32: from `product_kernel`, as the next three
    sums_ptr,  # (parts, M)
    dots_ptr,  # (parts, M)
    target_ptr,  # (M,)
    ids_ptr,  # (M,) int64
    rows_ptr,  # (1 + M,) int32; with GATHER
    logp_ptr,  # (M,) float32; with GATHER: receives the shift that makes a row's sum of exponentials about 1
    entropy_ptr,  # (M,) float32; not with GATHER
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
        top = tl.full([BLOCK_M], -1.0e30, tl.float32)
        s = tl.zeros([BLOCK_M], tl.float32)
        dot = tl.zeros([BLOCK_M], tl.float32)
        for p0 in range(0, parts, BLOCK_P):
            p = (p0 + part).to(tl.int64)
            at = p[:, None] * M + m[None, :]  # [BLOCK_P, BLOCK_M]
            there = (p < parts)[:, None] & inside[None, :]
            tops = tl.load(tops_ptr + at, mask=there, other=-1.0e30)
            sums = tl.load(sums_ptr + at, mask=there, other=0.0)
            dots = tl.load(dots_ptr + at, mask=there, other=0.0)
            highest = tl.max(tops, axis=0)
            down = (tops - highest[None, :]) * k
            moved = tl.exp2(down)
            added = tl.sum(sums * moved, axis=0)
            weighted = tl.sum((dots + sums * down) * moved, axis=0)
            top, s, dot = _merge(top, s, dot, highest, added, weighted, k)
        if GATHER:
            tl.store(logp_ptr + row, -top * k - tl.floor(tl.log2(s) + 0.5), mask=inside)
        else:
            token = tl.load(ids_ptr + row, mask=inside, other=-1)
            valid = (token >= 0) & (token < V)
            z = tl.load(target_ptr + row, mask=inside & valid, other=0.0)
            z, _ = head_logit(z, scale, softcap, HAS_SOFTCAP, NEGATIVE)
            log_s = tl.log(s)
            logp = (z - top) * chain - log_s
            tl.store(logp_ptr + row, tl.where(valid, logp, float("nan")), mask=inside)
            tl.store(entropy_ptr + row, log_s - dot * LN_2 / s, mask=inside)


@triton.jit(do_not_specialize=["M", "parts"])
def combine_exponentials_kernel(
    sums_ptr,  # (parts, M) float32: from `product_kernel`, as the next two
    dots_ptr,  # (parts, M)
    target_ptr,  # (M,)
    ids_ptr,  # (M,) int64
    shift_ptr,  # (M,) float32: as `product_kernel` had it
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
        shift = tl.load(shift_ptr + row, mask=inside, other=0.0)
        target = tl.load(target_ptr + row, mask=valid, other=0.0)
        z, slope = head_logit(target, scale, softcap, HAS_SOFTCAP, NEGATIVE)
        y = tl.fma(z, chain * LOG2_E, shift)
        # The whole part of the target's y goes into the sum, which is about 2**y / p: p may be close to 1.
        whole = tl.where(y > -1.0e9, tl.floor(y + 0.5), 0.0)
        logp = at_most((y - whole) * LN_2 - log_unshifted(s, whole), 0.0)  # the sum has rounded the target's part
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
    found = tl.program_id(0).to(tl.int64)  # 0
    for m0 in range(0, M, BLOCK):
        m = (m0 + tl.arange(0, BLOCK)).to(tl.int64)
        total = tl.load(total_ptr + m, mask=m < M, other=0.0)
        bad = (total != total).to(tl.int32)
        tl.store(rows_ptr + (found + tl.cumsum(bad, axis=0)), m.to(tl.int32), mask=bad != 0)
        found += tl.sum(bad, axis=0)
    tl.store(rows_ptr, found.to(tl.int32))


@triton.jit
def target_logits_kernel(
    x_ptr,  # (M, H)
    w_ptr,  # (V, H)
    bias_ptr,  # (V,)
    ids_ptr,  # (M,) int64
    offset_ptr,  # (M,) float32: an estimate of each token's log-probability
    shift_ptr,  # (M,) float32: receives the row's shift, with which the target's y is that estimate
    stride_x,
    stride_w,
    scale,
    softcap,
    chain,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    NEGATIVE: tl.constexpr,
    V: tl.constexpr,
    H: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """
    Shifts for `product_kernel`, from a dot product a row. It rounds otherwise than the product does: close to the
    target's logit is enough, because the product's own logit of the target is what log-probabilities are made of.
    """
    row = tl.program_id(0).to(tl.int64)
    token = tl.load(ids_ptr + row)
    here = (token >= 0) & (token < V)
    acc = tl.zeros([BLOCK_H], tl.float32)
    for h0 in range(0, H, BLOCK_H):
        h = (h0 + tl.arange(0, BLOCK_H)).to(tl.int64)
        x = tl.load(x_ptr + row * stride_x + h, mask=h < H, other=0.0).to(tl.float32)
        acc += x * tl.load(w_ptr + token * stride_w + h, mask=here & (h < H), other=0.0).to(tl.float32)
    u = tl.sum(acc, axis=0)
    if HAS_BIAS:
        u += tl.load(bias_ptr + token, mask=here, other=0.0).to(tl.float32)
    z, _ = head_logit(u, scale, softcap, HAS_SOFTCAP, NEGATIVE)
    tl.store(shift_ptr + row, whole_shift(tl.load(offset_ptr + row)) - z * (chain * LOG2_E))
