"""
Kernels of the leave-one-out mean and the causal weights (eq. 11): sums are float32, and memory is read once.

A program has one block of the hidden dimension of one prompt. The prompt's candidates are the rows of its tile, so
that their sum needs no second read, and the next samples of all candidates are on their way while one is added. Upsilon
takes sums over the whole hidden dimension: the programs leave their parts, and a second launch adds them, in a fixed
order. A group larger than the tile is read slice after slice, once more for its sum.

Zbar_i - Zprime_i is linear in the context samples: sample s = l m + j has the coefficient
    coefficient(i, s) = [l = 0] / count(i, 0) - 1 / (contexts that hold a sample * count(i, l)),
which without a mask is ([l = 0] - 1 / L) / m. Forward and backward are sums with these.
"""

import triton
import triton.language as tl

# Of a loop over samples: one is added while the next three are read, as asynchronous copies to shared memory where the
# processor has them. Loads to registers would not stay so far ahead: the assembler moves them next to their use.
SAMPLE_STAGES = tl.constexpr(4)


@triton.jit
def _load_z(z_tensor, p, i, h, n, HAS_INDEX: tl.constexpr, H: tl.constexpr):
    """z of candidates i of prompt p, [N_TILE, BLOCK_H]: rows of z, or those of hidden states that an index names."""
    z_ptr, index_ptr, stride_p, stride_n, stride_t, stride_h = z_tensor
    rows = z_ptr + p * stride_p + i * stride_n  # [N_TILE]
    if HAS_INDEX:
        rows += tl.load(index_ptr + p * n + i, mask=i < n, other=0) * stride_t
    inside = (i < n)[:, None] & (h < H)[None, :]
    return tl.load(rows[:, None] + (h * stride_h)[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _group_sum(z_tensor, p, h, n, HAS_INDEX: tl.constexpr, H: tl.constexpr, N_TILE: tl.constexpr):
    """Sum over a prompt's candidates, slice after slice, [BLOCK_H]."""
    total = tl.zeros(h.shape, tl.float32)
    for i0 in range(0, n, N_TILE):
        i = i0 + tl.arange(0, N_TILE).to(tl.int64)
        total += tl.sum(_load_z(z_tensor, p, i, h, n, HAS_INDEX, H), axis=0)
    return total


@triton.jit
def _coefficients(coefficients_ptr, row, exists, s, samples, m, HAS_MASK: tl.constexpr):
    """Of sample s of the candidates in `row`, and whose sample is there, both [N_TILE]."""
    if HAS_MASK:
        # NaN marks a sample that is not there: it is not read. One with a coefficient of 0 is: it may be NaN.
        c = tl.load(coefficients_ptr + (row * samples + s), mask=exists, other=float("nan"))
        there = c == c
        c = tl.where(there, c, 0.0)
    else:
        there = exists
        contexts = (samples // m).to(tl.float32)
        c = (tl.where(s < m, 1.0, 0.0) - 1.0 / contexts) * (1.0 / m.to(tl.float32))
        c += tl.zeros(exists.shape, tl.float32)
    return c, there


@triton.jit
def _samples_at(l, m0, L, m, BLOCK_M: tl.constexpr):
    """Places of samples m0 and on of contexts l, [BLOCK_L, BLOCK_M], and which there are."""
    j = (m0 + tl.arange(0, BLOCK_M)).to(tl.int64)
    return l[:, None] * m + j[None, :], (l < L)[:, None] & (j < m)[None, :]


@triton.jit
def _samples_of(mask_ptr, l, L, m, BLOCK_M: tl.constexpr):
    """How many samples contexts l hold, [BLOCK_L]."""
    count = tl.zeros(l.shape, tl.float32)
    for m0 in range(0, m, BLOCK_M):
        at, inside = _samples_at(l, m0, L, m, BLOCK_M)
        count += tl.sum((tl.load(mask_ptr + at, mask=inside, other=0) != 0).to(tl.float32), axis=1)
    return count


@triton.jit(do_not_specialize=["L", "m"])
def coefficients_kernel(
    mask_ptr,  # (P * n, L, m), contiguous
    out_ptr,  # (P * n, L * m) float32: receives the coefficients, NaN where a sample is not there
    L,
    m,
    BLOCK_L: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """One program for each candidate. Without a sample of its first context a candidate has none."""
    first_sample = tl.program_id(0).to(tl.int64) * L * m
    filled = 0.0  # contexts that hold a sample
    first = 0.0  # samples of the first context
    for l0 in range(0, L, BLOCK_L):
        l = (l0 + tl.arange(0, BLOCK_L)).to(tl.int64)
        count = _samples_of(mask_ptr + first_sample, l, L, m, BLOCK_M)
        filled += tl.sum((count > 0.0).to(tl.float32), axis=0)
        first += tl.sum(tl.where(l == 0, count, 0.0), axis=0)
    for l0 in range(0, L, BLOCK_L):
        l = (l0 + tl.arange(0, BLOCK_L)).to(tl.int64)
        count = _samples_of(mask_ptr + first_sample, l, L, m, BLOCK_M)
        c = (tl.where(l == 0, 1.0, 0.0) - 1.0 / tl.maximum(filled, 1.0)) / tl.maximum(count, 1.0)
        c = tl.where(first > 0.0, c, float("nan"))
        for m0 in range(0, m, BLOCK_M):
            at, inside = _samples_at(l, m0, L, m, BLOCK_M)
            keep = tl.load(mask_ptr + first_sample + at, mask=inside, other=0) != 0
            tl.store(out_ptr + first_sample + at, tl.where(keep, c[:, None], float("nan")), mask=inside)


@triton.jit
def _load_target(
    z_tensor,
    ctx_tensor,
    p,
    i,  # [N_TILE]
    h,  # [BLOCK_H]
    group,  # [BLOCK_H], sum over candidates; not used where they are one slice
    n,
    samples,
    m,
    HAS_INDEX: tl.constexpr,
    HAS_MASK: tl.constexpr,
    LEAVE_ONE_OUT: tl.constexpr,
    ONE_SLICE: tl.constexpr,
    H: tl.constexpr,
):
    """z and t = Zbar - Zprime + zbar of candidates i, both [N_TILE, BLOCK_H] and 0 beyond H."""
    ctx_ptr, coefficients_ptr, stride_p, stride_n, stride_l, stride_m, stride_h = ctx_tensor
    z = _load_z(z_tensor, p, i, h, n, HAS_INDEX, H)
    rows = ctx_ptr + (i * stride_n)[:, None] + (h * stride_h)[None, :]  # [N_TILE, BLOCK_H]
    t = tl.zeros(z.shape, tl.float32)
    offset = p * stride_p
    j = 0  # of sample s = l m + j: counting is cheaper than a division
    for s in tl.range(0, samples, num_stages=SAMPLE_STAGES):
        c, there = _coefficients(coefficients_ptr, p * n + i, i < n, s, samples, m, HAS_MASK)
        x = tl.load(rows + offset, mask=there[:, None] & (h < H)[None, :], other=0.0)  # [N_TILE, BLOCK_H]
        t += c[:, None] * x.to(tl.float32)
        j += 1
        offset += tl.where(j == m, stride_l - (m - 1).to(tl.int64) * stride_m, stride_m)
        j = tl.where(j == m, 0, j)
    # The threads exchange rows for this sum, so it comes after the first samples have been asked for.
    if ONE_SLICE:
        group = tl.sum(z, axis=0)
    if LEAVE_ONE_OUT:
        t += (group[None, :] - z) * (1.0 / (n - 1).to(tl.float32))
    else:
        t += (group * (1.0 / n.to(tl.float32)))[None, :]
    return z, tl.where((h < H)[None, :], t, 0.0)


@triton.jit
def _similarity(cosine, SIMILARITY: tl.constexpr):
    """s(c), and its derivative in c: `group.similarity_of_cosine`."""
    s = cosine
    slope = 1.0
    if SIMILARITY != 0:
        distance2 = 2.0 - 2.0 * cosine
        distance2 = tl.where(distance2 < 0.0, 0.0, distance2)
        if SIMILARITY == 2:
            s = tl.exp(-0.5 * distance2)
            slope = s
        else:
            distance = tl.sqrt(distance2)
            s = 1.0 / (1.0 + distance)
            slope = tl.where(distance > 0.0, s * s / tl.where(distance > 0.0, distance, 1.0), 0.0)
    return s, slope


@triton.jit
def _cosine(dot, z2, t2):
    """The cosine within its bounds, |z||t| or the floor in its place, and whether it is the floor."""
    norm = tl.sqrt(z2) * tl.sqrt(t2)
    floored = norm < 1e-8
    norm = tl.where(floored, 1e-8, norm)
    cosine = dot / norm
    return tl.where(cosine > 1.0, 1.0, tl.where(cosine < -1.0, -1.0, cosine)), norm, floored


@triton.jit(do_not_specialize=["n", "samples", "m", "rows"])
def causal_weights_kernel(
    z_ptr,  # (P, n, H), or hidden states (P, n, T, H) with an index
    index_ptr,  # (P * n,) int64
    ctx_ptr,  # (P, n, L, m, H)
    coefficients_ptr,  # (P * n, L * m) float32
    parts_ptr,  # (3, blocks of H, P * n) float32: z.t, |z|^2, |t|^2
    stride_z_p,
    stride_z_n,
    stride_z_t,
    stride_z_h,
    stride_ctx_p,
    stride_ctx_n,
    stride_ctx_l,
    stride_ctx_m,
    stride_ctx_h,
    n,
    samples,  # L * m
    m,
    rows,  # P * n
    HAS_INDEX: tl.constexpr,
    HAS_MASK: tl.constexpr,
    LEAVE_ONE_OUT: tl.constexpr,
    ONE_SLICE: tl.constexpr,  # n <= N_TILE
    H: tl.constexpr,
    N_TILE: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    n, rows = n.to(tl.int64), rows.to(tl.int64)
    z_tensor = (z_ptr, index_ptr, stride_z_p, stride_z_n, stride_z_t, stride_z_h)
    ctx_tensor = (ctx_ptr, coefficients_ptr, stride_ctx_p, stride_ctx_n, stride_ctx_l, stride_ctx_m, stride_ctx_h)
    blocks = tl.cdiv(H, BLOCK_H)
    p = pid // blocks
    block = pid % blocks
    h = block * BLOCK_H + tl.arange(0, BLOCK_H)  # [BLOCK_H]
    group = tl.zeros([BLOCK_H], tl.float32)
    if not ONE_SLICE:
        group = _group_sum(z_tensor, p, h, n, HAS_INDEX, H, N_TILE)
    for i0 in range(0, N_TILE if ONE_SLICE else n, N_TILE):
        i = i0 + tl.arange(0, N_TILE).to(tl.int64)
        z, t = _load_target(
            z_tensor,
            ctx_tensor,
            p,
            i,
            h,
            group,
            n,
            samples,
            m,
            HAS_INDEX,
            HAS_MASK,
            LEAVE_ONE_OUT,
            ONE_SLICE,
            H,
        )
        at = parts_ptr + block * rows + p * n + i  # [N_TILE]
        tl.store(at, tl.sum(z * t, axis=1), mask=i < n)
        tl.store(at + blocks * rows, tl.sum(z * z, axis=1), mask=i < n)
        tl.store(at + 2 * blocks * rows, tl.sum(t * t, axis=1), mask=i < n)


@triton.jit(do_not_specialize=["rows"])
def causal_weights_finish_kernel(
    parts_ptr,  # (3, BLOCKS, P * n) float32
    upsilon_ptr,  # (P * n,) float32
    saved_ptr,  # (3, P * n) float32: z.t, |z|^2, |t|^2
    rows,  # P * n
    alpha,
    SIMILARITY: tl.constexpr,
    BLOCKS: tl.constexpr,
    B_TILE: tl.constexpr,
    ROW_TILE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROW_TILE + tl.arange(0, ROW_TILE)  # [ROW_TILE]
    rows = rows.to(tl.int64)
    dot = tl.zeros([B_TILE, ROW_TILE], tl.float32)
    z2 = tl.zeros([B_TILE, ROW_TILE], tl.float32)
    t2 = tl.zeros([B_TILE, ROW_TILE], tl.float32)
    for b0 in range(0, BLOCKS, B_TILE):
        b = b0 + tl.arange(0, B_TILE).to(tl.int64)
        inside = (b < BLOCKS)[:, None] & (row < rows)[None, :]
        at = parts_ptr + b[:, None] * rows + row[None, :]  # [B_TILE, ROW_TILE]
        dot += tl.load(at, mask=inside, other=0.0)
        z2 += tl.load(at + BLOCKS * rows, mask=inside, other=0.0)
        t2 += tl.load(at + 2 * BLOCKS * rows, mask=inside, other=0.0)
    dot_sum, z2_sum, t2_sum = tl.sum(dot, axis=0), tl.sum(z2, axis=0), tl.sum(t2, axis=0)
    cosine, _, _ = _cosine(dot_sum, z2_sum, t2_sum)
    s, _ = _similarity(cosine, SIMILARITY)
    tl.store(upsilon_ptr + row, alpha * s, mask=row < rows)
    tl.store(saved_ptr + row, dot_sum, mask=row < rows)
    tl.store(saved_ptr + rows + row, z2_sum, mask=row < rows)
    tl.store(saved_ptr + 2 * rows + row, t2_sum, mask=row < rows)


@triton.jit
def _load_slopes(g_ptr, saved_ptr, row, exists, rows, alpha, SIMILARITY: tl.constexpr):
    """
    Of candidates in `row`, [N_TILE] each: what the gradient of the cosine is multiplied by, 1 / (|z||t|), and the
    cosine over |z|^2 and over |t|^2. d cosine / d t = z / (|z||t|) - cosine t / |t|^2, and so for z; under the floor
    the norms are constants.
    """
    dot = tl.load(saved_ptr + row, mask=exists, other=0.0)
    z2 = tl.load(saved_ptr + rows + row, mask=exists, other=0.0)
    t2 = tl.load(saved_ptr + 2 * rows + row, mask=exists, other=0.0)
    cosine, norm, floored = _cosine(dot, z2, t2)
    _, slope = _similarity(cosine, SIMILARITY)
    g = tl.load(g_ptr + row, mask=exists, other=0.0) * alpha * slope
    pull_z = tl.where(floored, 0.0, cosine / tl.where(z2 > 0.0, z2, 1.0))
    pull_t = tl.where(floored, 0.0, cosine / tl.where(t2 > 0.0, t2, 1.0))
    return g, 1.0 / norm, pull_z, pull_t


@triton.jit(do_not_specialize=["n", "samples", "m", "rows"])
def causal_weights_backward_kernel(
    g_ptr,  # (P * n,) float32
    z_ptr,
    index_ptr,
    ctx_ptr,
    coefficients_ptr,
    saved_ptr,  # (3, P * n)
    d_z_ptr,  # (P, n, H), contiguous
    d_ctx_ptr,  # (P, n, L, m, H), contiguous
    stride_z_p,
    stride_z_n,
    stride_z_t,
    stride_z_h,
    stride_ctx_p,
    stride_ctx_n,
    stride_ctx_l,
    stride_ctx_m,
    stride_ctx_h,
    n,
    samples,
    m,
    rows,
    alpha,
    NEED_CONTEXT: tl.constexpr,
    HAS_INDEX: tl.constexpr,
    HAS_MASK: tl.constexpr,
    LEAVE_ONE_OUT: tl.constexpr,
    SIMILARITY: tl.constexpr,
    ONE_SLICE: tl.constexpr,
    H: tl.constexpr,
    N_TILE: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    n, rows = n.to(tl.int64), rows.to(tl.int64)
    z_tensor = (z_ptr, index_ptr, stride_z_p, stride_z_n, stride_z_t, stride_z_h)
    ctx_tensor = (ctx_ptr, coefficients_ptr, stride_ctx_p, stride_ctx_n, stride_ctx_l, stride_ctx_m, stride_ctx_h)
    blocks = tl.cdiv(H, BLOCK_H)
    p = pid // blocks
    h = (pid % blocks) * BLOCK_H + tl.arange(0, BLOCK_H)  # [BLOCK_H]
    group = tl.zeros([BLOCK_H], tl.float32)
    d_target_sum = tl.zeros([BLOCK_H], tl.float32)
    if not ONE_SLICE:
        group = _group_sum(z_tensor, p, h, n, HAS_INDEX, H, N_TILE)
    # zbar carries the gradient of every target to every candidate: its sum must be known before any d_z is, which
    # takes a pass of its own where the candidates are not one slice.
    for last in tl.static_range(1 if ONE_SLICE else 0, 2):
        for i0 in range(0, N_TILE if ONE_SLICE else n, N_TILE):
            i = i0 + tl.arange(0, N_TILE).to(tl.int64)
            row = p * n + i
            z, t = _load_target(
                z_tensor,
                ctx_tensor,
                p,
                i,
                h,
                group,
                n,
                samples,
                m,
                HAS_INDEX,
                HAS_MASK,
                LEAVE_ONE_OUT,
                ONE_SLICE,
                H,
            )
            g, inverse, pull_z, pull_t = _load_slopes(g_ptr, saved_ptr, row, i < n, rows, alpha, SIMILARITY)
            d_target = g[:, None] * (inverse[:, None] * z - pull_t[:, None] * t)  # [N_TILE, BLOCK_H]
            d_target = tl.where((i < n)[:, None], d_target, 0.0)
            if ONE_SLICE or last == 0:
                d_target_sum += tl.sum(d_target, axis=0)
            if last == 1:
                d_z = g[:, None] * (inverse[:, None] * t - pull_z[:, None] * z)
                if LEAVE_ONE_OUT:
                    d_z += (d_target_sum[None, :] - d_target) * (1.0 / (n - 1).to(tl.float32))
                else:
                    d_z += (d_target_sum * (1.0 / n.to(tl.float32)))[None, :]
                inside = (i < n)[:, None] & (h < H)[None, :]
                at = row[:, None] * H + h[None, :]  # [N_TILE, BLOCK_H]
                tl.store(d_z_ptr + at, d_z.to(d_z_ptr.dtype.element_ty), mask=inside)
                if NEED_CONTEXT:
                    at = row[:, None] * samples * H + h[None, :]
                    for s in range(0, samples):
                        c, there = _coefficients(coefficients_ptr, row, i < n, s, samples, m, HAS_MASK)
                        d = tl.where(there[:, None], c[:, None] * d_target, 0.0)
                        tl.store(d_ctx_ptr + at, d.to(d_ctx_ptr.dtype.element_ty), mask=inside)
                        at += H


@triton.jit(do_not_specialize=["n"])
def leave_one_out_kernel(
    z_ptr,  # (P, n, H)
    out_ptr,  # (P, n, H), contiguous
    stride_p,
    stride_n,
    stride_h,
    n,
    ONE_SLICE: tl.constexpr,
    H: tl.constexpr,
    N_TILE: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """mean_{k != i} z_k; the map is symmetric, so that this is its own backward."""
    pid = tl.program_id(0).to(tl.int64)
    n = n.to(tl.int64)
    z_tensor = (z_ptr, z_ptr, stride_p, stride_n, 0, stride_h)
    blocks = tl.cdiv(H, BLOCK_H)
    p = pid // blocks
    h = (pid % blocks) * BLOCK_H + tl.arange(0, BLOCK_H)  # [BLOCK_H]
    group = tl.zeros([BLOCK_H], tl.float32)
    if not ONE_SLICE:
        group = _group_sum(z_tensor, p, h, n, False, H, N_TILE)
    for i0 in range(0, N_TILE if ONE_SLICE else n, N_TILE):
        i = i0 + tl.arange(0, N_TILE).to(tl.int64)
        z = _load_z(z_tensor, p, i, h, n, False, H)
        if ONE_SLICE:
            group = tl.sum(z, axis=0)
        mean = (group[None, :] - z) * (1.0 / (n - 1).to(tl.float32))
        at = (p * n + i)[:, None] * H + h[None, :]  # [N_TILE, BLOCK_H]
        inside = (i < n)[:, None] & (h < H)[None, :]
        tl.store(out_ptr + at, mean.to(out_ptr.dtype.element_ty), mask=inside)
