"""
Leave-one-out means and causal weights (eq. 11): every representation is read once from memory, sums are float32.

Zbar_i - Zprime_i is linear in the context samples: sample (l, j) has the coefficient
    coefficient(i, l, j) = [l = 0] / count(i, 0) - 1 / (contexts that hold a sample * count(i, l)),
which without a mask is ([l = 0] - 1 / L) / m. Forward and backward are sums with these.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

COSINE, EUCLIDEAN, GAUSSIAN = 0, 1, 2
_SIMILARITY = {"cosine": COSINE, "euclidean": EUCLIDEAN, "gaussian": GAUSSIAN}


@triton.jit
def _z_row(z_ptr, index_ptr, p, k, n, stride_p, stride_n, stride_t, HAS_INDEX: tl.constexpr):
    """Where candidate k of prompt p starts: a row of z, or the row of hidden states that `index` names."""
    at = z_ptr + p * stride_p + k * stride_n
    if HAS_INDEX:
        at += tl.load(index_ptr + p * n + k) * stride_t
    return at


@triton.jit
def _group_sum(z_ptr, index_ptr, p, h, inside, n, stride_p, stride_n, stride_t, stride_h, HAS_INDEX: tl.constexpr):
    """Sum over a prompt's candidates of one block of the hidden dimension."""
    total = tl.zeros(h.shape, tl.float32)
    for k in range(0, n):
        at = _z_row(z_ptr, index_ptr, p, k, n, stride_p, stride_n, stride_t, HAS_INDEX)
        total += tl.load(at + h * stride_h, mask=inside, other=0.0).to(tl.float32)
    return total


@triton.jit
def _target(
    z,  # [BLOCK_H], of candidate i
    group,  # [BLOCK_H], sum over candidates
    row,  # p * n + i
    h,
    inside,
    n,
    ctx_ptr,  # of candidate i
    coefficients_ptr,  # (P * n, L * m)
    L,
    m,
    stride_ctx_l,
    stride_ctx_m,
    stride_ctx_h,
    HAS_MASK: tl.constexpr,
    LEAVE_ONE_OUT: tl.constexpr,
):
    """t_i = Zbar_i - Zprime_i + zbar for one block of the hidden dimension."""
    if LEAVE_ONE_OUT:
        t = (group - z) / (n - 1).to(tl.float32)
    else:
        t = group / n.to(tl.float32)
    for s in range(0, L * m):
        l = s // m
        at = ctx_ptr + l * stride_ctx_l + (s % m) * stride_ctx_m
        if HAS_MASK:
            c = tl.load(coefficients_ptr + row * (L * m) + s)
            # NaN marks a sample that is not there: it is not read. One with a coefficient of 0 is: it may be NaN.
            there = inside & (tl.zeros(h.shape, tl.float32) + c == c)
            t += tl.where(c == c, c, 0.0) * tl.load(at + h * stride_ctx_h, mask=there, other=0.0).to(tl.float32)
        else:
            c = (tl.where(l == 0, 1.0, 0.0) - 1.0 / L.to(tl.float32)) / m.to(tl.float32)
            t += c * tl.load(at + h * stride_ctx_h, mask=inside, other=0.0).to(tl.float32)
    return t


@triton.jit
def _similarity(cosine, SIMILARITY: tl.constexpr):
    """s(c), and its derivative in c: `reference.similarity_of_cosine`."""
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


@triton.jit(do_not_specialize=["n", "L", "m"])
def causal_weights_kernel(
    z_ptr,  # (P, n, H), or hidden states (P, n, T, H) with an index
    index_ptr,  # (P * n,) int64
    ctx_ptr,  # (P, n, L, m, H)
    coefficients_ptr,  # (P * n, L * m) float32
    upsilon_ptr,  # (P * n,) float32
    saved_ptr,  # (3, P * n) float32: z.t, |z|^2, |t|^2
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
    L,
    m,
    alpha,
    HAS_INDEX: tl.constexpr,
    HAS_MASK: tl.constexpr,
    LEAVE_ONE_OUT: tl.constexpr,
    SIMILARITY: tl.constexpr,
    H: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    rows = tl.num_programs(0).to(tl.int64)
    n, L, m = n.to(tl.int64), L.to(tl.int64), m.to(tl.int64)
    p = row // n
    i = row % n
    ctx_ptr += p * stride_ctx_p + i * stride_ctx_n
    own = _z_row(z_ptr, index_ptr, p, i, n, stride_z_p, stride_z_n, stride_z_t, HAS_INDEX)
    dot = tl.zeros([BLOCK_H], tl.float32)
    z2 = tl.zeros([BLOCK_H], tl.float32)
    t2 = tl.zeros([BLOCK_H], tl.float32)
    for h0 in range(0, H, BLOCK_H):
        h = h0 + tl.arange(0, BLOCK_H).to(tl.int64)  # [BLOCK_H]
        inside = h < H
        group = _group_sum(z_ptr, index_ptr, p, h, inside, n, stride_z_p, stride_z_n, stride_z_t, stride_z_h, HAS_INDEX)
        z = tl.load(own + h * stride_z_h, mask=inside, other=0.0).to(tl.float32)
        t = _target(
            z,
            group,
            row,
            h,
            inside,
            n,
            ctx_ptr,
            coefficients_ptr,
            L,
            m,
            stride_ctx_l,
            stride_ctx_m,
            stride_ctx_h,
            HAS_MASK,
            LEAVE_ONE_OUT,
        )
        dot += tl.where(inside, z * t, 0.0)
        z2 += z * z
        t2 += tl.where(inside, t * t, 0.0)
    dot_sum = tl.sum(dot)
    z2_sum = tl.sum(z2)
    t2_sum = tl.sum(t2)
    norm = tl.sqrt(z2_sum) * tl.sqrt(t2_sum)
    cosine = dot_sum / tl.where(norm < 1e-8, 1e-8, norm)
    cosine = tl.where(cosine > 1.0, 1.0, tl.where(cosine < -1.0, -1.0, cosine))
    s, _ = _similarity(cosine, SIMILARITY)
    tl.store(upsilon_ptr + row, alpha * s)
    tl.store(saved_ptr + row, dot_sum)
    tl.store(saved_ptr + rows + row, z2_sum)
    tl.store(saved_ptr + 2 * rows + row, t2_sum)


@triton.jit(do_not_specialize=["n", "L", "m", "rows"])
def causal_weights_backward_kernel(
    g_ptr,  # (P * n,) float32
    z_ptr,
    index_ptr,
    ctx_ptr,
    coefficients_ptr,
    saved_ptr,  # (3, P * n)
    d_z_ptr,  # (P, n, H), contiguous; read back as float32 scratch between the two loops
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
    L,
    m,
    rows,
    alpha,
    NEED_CONTEXT: tl.constexpr,
    HAS_INDEX: tl.constexpr,
    HAS_MASK: tl.constexpr,
    LEAVE_ONE_OUT: tl.constexpr,
    SIMILARITY: tl.constexpr,
    H: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    n, L, m, rows = n.to(tl.int64), L.to(tl.int64), m.to(tl.int64), rows.to(tl.int64)
    blocks = tl.cdiv(H, BLOCK_H)
    p = pid // blocks
    h = (pid % blocks) * BLOCK_H + tl.arange(0, BLOCK_H)  # [BLOCK_H]
    inside = h < H
    group = _group_sum(z_ptr, index_ptr, p, h, inside, n, stride_z_p, stride_z_n, stride_z_t, stride_z_h, HAS_INDEX)
    d_target_sum = tl.zeros([BLOCK_H], tl.float32)
    # Twice over the candidates: zbar carries the gradient of every target to every candidate, so that its sum must be
    # known before any d_z is.
    for second in tl.static_range(0, 2):
        for i in range(0, n):
            row = p * n + i
            own = _z_row(z_ptr, index_ptr, p, i, n, stride_z_p, stride_z_n, stride_z_t, HAS_INDEX)
            z = tl.load(own + h * stride_z_h, mask=inside, other=0.0).to(tl.float32)
            t = _target(
                z,
                group,
                row,
                h,
                inside,
                n,
                ctx_ptr + p * stride_ctx_p + i * stride_ctx_n,
                coefficients_ptr,
                L,
                m,
                stride_ctx_l,
                stride_ctx_m,
                stride_ctx_h,
                HAS_MASK,
                LEAVE_ONE_OUT,
            )
            dot = tl.load(saved_ptr + row)
            z2 = tl.load(saved_ptr + rows + row)
            t2 = tl.load(saved_ptr + 2 * rows + row)
            norm = tl.sqrt(z2) * tl.sqrt(t2)
            floored = norm < 1e-8
            norm = tl.where(floored, 1e-8, norm)
            cosine = dot / norm
            cosine = tl.where(cosine > 1.0, 1.0, tl.where(cosine < -1.0, -1.0, cosine))
            _, slope = _similarity(cosine, SIMILARITY)
            g = tl.load(g_ptr + row) * alpha * slope
            # d cosine / d t = z / (|z||t|) - cosine t / |t|^2; under the floor the norms are constants.
            pull = tl.where(floored, 0.0, cosine / tl.where(t2 > 0.0, t2, 1.0))
            d_target = g * (z / norm - pull * t)
            if second == 0:
                d_target_sum += d_target
                if NEED_CONTEXT:
                    for s in range(0, L * m):
                        if HAS_MASK:
                            c = tl.load(coefficients_ptr + row * (L * m) + s)
                        else:
                            c = (tl.where(s // m == 0, 1.0, 0.0) - 1.0 / L.to(tl.float32)) / m.to(tl.float32)
                        at = d_ctx_ptr + (row * (L * m) + s) * H + h
                        d = tl.where(c == c, c * d_target, 0.0)
                        tl.store(at, d.to(d_ctx_ptr.dtype.element_ty), mask=inside)
            else:
                pull = tl.where(floored, 0.0, cosine / tl.where(z2 > 0.0, z2, 1.0))
                d = g * (t / norm - pull * z)
                if LEAVE_ONE_OUT:
                    d += (d_target_sum - d_target) / (n - 1).to(tl.float32)
                else:
                    d += d_target_sum / n.to(tl.float32)
                tl.store(d_z_ptr + row * H + h, d.to(d_z_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["n"])
def leave_one_out_kernel(
    z_ptr,  # (P, n, H)
    out_ptr,  # (P, n, H), contiguous
    stride_p,
    stride_n,
    stride_h,
    n,
    H: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """mean_{k != i} z_k; the map is symmetric, so that this is its own backward."""
    pid = tl.program_id(0).to(tl.int64)
    n = n.to(tl.int64)
    blocks = tl.cdiv(H, BLOCK_H)
    p = pid // blocks
    h = (pid % blocks) * BLOCK_H + tl.arange(0, BLOCK_H)  # [BLOCK_H]
    inside = h < H
    group = _group_sum(z_ptr, z_ptr, p, h, inside, n, stride_p, stride_n, 0, stride_h, False)
    for i in range(0, n):
        z = tl.load(z_ptr + p * stride_p + i * stride_n + h * stride_h, mask=inside, other=0.0).to(tl.float32)
        mean = (group - z) / (n - 1).to(tl.float32)
        tl.store(out_ptr + (p * n + i) * H + h, mean.to(out_ptr.dtype.element_ty), mask=inside)


def block_h(hidden: int) -> int:
    return min(512, max(16, triton.next_power_of_2(hidden)))


def coefficients(context_mask: torch.Tensor) -> torch.Tensor:
    """Each sample's coefficient in Zbar_i - Zprime_i, (P * n, L * m) float32, from (P, n, L, m); NaN: not there."""
    keep = context_mask.bool()
    count = keep.sum(dim=3)  # (P, n, L)
    filled = (count > 0).sum(dim=2, dtype=torch.float32)  # (P, n); of integers, 1 / filled would have the default type
    first = torch.zeros_like(count, dtype=torch.float32)
    first[:, :, 0] = 1
    c = first - 1.0 / filled.clamp(min=1).unsqueeze(-1)
    c = torch.where((count[:, :, :1] > 0), c / count.clamp(min=1), math.nan)
    return torch.where(keep, c.unsqueeze(-1), math.nan).flatten(0, 1).flatten(1).contiguous()


class CausalArguments(NamedTuple):
    z: torch.Tensor  # (P, n, H), or (P, n, T, H) with an index
    row_index: torch.Tensor | None  # (P, n) int64, which of the T rows
    context_z: torch.Tensor  # (P, n, L, m, H)
    context_mask: torch.Tensor | None  # (P, n, L, m)
    alpha: float
    baseline: str
    similarity: str


def _arguments(x: CausalArguments) -> tuple[list, dict]:
    n, l, m, hidden = x.context_z.shape[1:]
    strides = x.z.stride()
    z_strides = (
        (strides[0], strides[1], strides[2], strides[3]) if x.row_index is not None else (*strides[:2], 0, strides[2])
    )
    pointers = [
        x.z,
        x.z if x.row_index is None else x.row_index.contiguous(),
        x.context_z,
        x.z if x.context_mask is None else coefficients(x.context_mask),
    ]
    flags = {
        "HAS_INDEX": x.row_index is not None,
        "HAS_MASK": x.context_mask is not None,
        "LEAVE_ONE_OUT": x.baseline == "loo",
        "SIMILARITY": _SIMILARITY[x.similarity],
        "H": hidden,
        "BLOCK_H": block_h(hidden),
    }
    return [pointers, [*z_strides, *x.context_z.stride(), n, l, m]], flags


def causal_weights_forward(x: CausalArguments) -> tuple[torch.Tensor, torch.Tensor]:
    """Upsilon (P, n) float32, and what the backward needs, (3, P * n): one launch."""
    p, n = x.context_z.shape[:2]
    upsilon = torch.empty(p, n, dtype=torch.float32, device=x.z.device)
    saved = torch.empty(3, p * n, dtype=torch.float32, device=x.z.device)
    if p * n:
        (pointers, sizes), flags = _arguments(x)
        causal_weights_kernel[(p * n,)](*pointers, upsilon, saved, *sizes, x.alpha, **flags, num_warps=4)
    return upsilon, saved


def causal_weights_backward(
    g: torch.Tensor, x: CausalArguments, saved: torch.Tensor, need_context: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients in the rows of z, (P, n, H), and in context_z (empty if not needed): one launch."""
    p, n, l, m, hidden = x.context_z.shape
    d_z = torch.empty(p, n, hidden, dtype=x.z.dtype, device=x.z.device)
    shape = (p, n, l, m, hidden) if need_context else (0,)
    d_context = torch.empty(shape, dtype=x.context_z.dtype, device=x.z.device)
    if p * n * hidden:
        (pointers, sizes), flags = _arguments(x)
        causal_weights_backward_kernel[(p * triton.cdiv(hidden, flags["BLOCK_H"]),)](
            g.to(torch.float32).contiguous(),
            *pointers,
            saved,
            d_z,
            d_context if need_context else d_z,
            *sizes,
            p * n,
            x.alpha,
            NEED_CONTEXT=need_context,
            **flags,
            num_warps=4,
        )
    return d_z, d_context


def leave_one_out(z: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """(P, n, H) means of the others, of type `dtype`: one launch."""
    p, n, hidden = z.shape
    out = torch.empty(z.shape, dtype=dtype, device=z.device)
    if out.numel():
        block = block_h(hidden)
        leave_one_out_kernel[(p * triton.cdiv(hidden, block),)](
            z, out, *z.stride(), n, H=hidden, BLOCK_H=block, num_warps=4
        )
    return out
