"""Launches of leave-one-out means and causal weights (eq. 11). The kernels are in causal_kernels.py."""

from typing import NamedTuple

import torch
import triton

from gcpo_kernels.triton_backend.causal_kernels import (
    causal_weights_backward_kernel,
    causal_weights_finish_kernel,
    causal_weights_kernel,
    coefficients_kernel,
    leave_one_out_kernel,
)

COSINE, EUCLIDEAN, GAUSSIAN = 0, 1, 2
_SIMILARITY = {"cosine": COSINE, "euclidean": EUCLIDEAN, "gaussian": GAUSSIAN}
# Bytes of a sample in the forward's tile. Two or three are on their way at any time, so that a processor with three
# programs has 48 KB in flight; 1/132 of 4.3 TB/s takes some 30 KB. Larger tiles would be fewer programs.
TILE_BYTES = 8192
TILE_ELEMENTS = 2048  # of the backward's tile, where gradients take registers too
COEFFICIENTS_TILE = {"BLOCK_L": 16, "BLOCK_M": 8}  # contexts and samples
FINISH_TILE = (16, 32)  # blocks and candidates that one program of the finishing kernel loads at once


def tiling(candidates: int, hidden: int, elements: int) -> dict[str, int]:
    """N_TILE candidates by BLOCK_H of the hidden dimension: the tile, of at most `elements`, of one program."""
    n_tile = 8 if candidates <= 8 else 16
    one_slice = candidates <= n_tile
    if not one_slice:  # the loop over slices takes registers too
        elements //= 2
    block_h = min(elements // n_tile, max(16, triton.next_power_of_2(hidden)))
    return {"ONE_SLICE": one_slice, "H": hidden, "N_TILE": n_tile, "BLOCK_H": block_h}


def coefficients(context_mask: torch.Tensor) -> torch.Tensor:
    """
    Each sample's coefficient in Zbar_i - Zprime_i, (P * n, L * m) float32, from (P, n, L, m); NaN: not there. One
    launch.
    """
    p, n, l, m = context_mask.shape
    out = torch.empty(p * n, l * m, dtype=torch.float32, device=context_mask.device)
    mask = context_mask.contiguous()
    mask = mask.view(torch.uint8) if mask.dtype == torch.bool else mask
    coefficients_kernel[(p * n,)](mask, out, l, m, **COEFFICIENTS_TILE, num_warps=1)
    return out


class CausalArguments(NamedTuple):
    z: torch.Tensor  # (P, n, H), or (P, n, T, H) with an index
    row_index: torch.Tensor | None  # (P, n) int64, which of the T rows
    context_z: torch.Tensor  # (P, n, L, m, H)
    context_mask: torch.Tensor | None  # (P, n, L, m)
    alpha: float
    baseline: str
    similarity: str


def _arguments(x: CausalArguments) -> tuple[list, list, dict[str, bool]]:
    """Pointers, sizes and flags, as forward and backward take them."""
    p, n, l, m = x.context_z.shape[:4]
    strides = x.z.stride()
    if x.row_index is None:
        strides = (*strides[:2], 0, strides[2])
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
    }
    return pointers, [*strides, *x.context_z.stride(), n, l * m, m, p * n], flags


def causal_weights_forward(x: CausalArguments) -> tuple[torch.Tensor, torch.Tensor]:
    """Upsilon (P, n) float32, and what the backward needs, (3, P * n): two launches, one more with a mask."""
    p, n, _, _, hidden = x.context_z.shape
    upsilon = torch.empty(p, n, dtype=torch.float32, device=x.z.device)
    saved = torch.empty(3, p * n, dtype=torch.float32, device=x.z.device)
    if p * n:
        pointers, sizes, flags = _arguments(x)
        tile = tiling(n, hidden, TILE_BYTES // x.context_z.element_size())
        blocks = triton.cdiv(hidden, tile["BLOCK_H"])
        parts = torch.empty(3, blocks, p * n, dtype=torch.float32, device=x.z.device)
        if blocks:
            causal_weights_kernel[(p * blocks,)](*pointers, parts, *sizes, **flags, **tile, num_warps=4)
        causal_weights_finish_kernel[(triton.cdiv(p * n, FINISH_TILE[1]),)](
            parts,
            upsilon,
            saved,
            p * n,
            x.alpha,
            SIMILARITY=_SIMILARITY[x.similarity],
            BLOCKS=blocks,
            B_TILE=FINISH_TILE[0],
            ROW_TILE=FINISH_TILE[1],
            num_warps=4,
        )
    return upsilon, saved


def causal_weights_backward(
    g: torch.Tensor, x: CausalArguments, saved: torch.Tensor, need_context: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients in the rows of z, (P, n, H), and in context_z (empty if not needed): one launch, two with a mask."""
    p, n, l, m, hidden = x.context_z.shape
    d_z = torch.empty(p, n, hidden, dtype=x.z.dtype, device=x.z.device)
    shape = (p, n, l, m, hidden) if need_context else (0,)
    d_context = torch.empty(shape, dtype=x.context_z.dtype, device=x.z.device)
    if p * n * hidden:
        pointers, sizes, flags = _arguments(x)
        tile = tiling(n, hidden, TILE_ELEMENTS)
        causal_weights_backward_kernel[(p * triton.cdiv(hidden, tile["BLOCK_H"]),)](
            g.to(torch.float32).contiguous(),
            *pointers,
            saved,
            d_z,
            d_context if need_context else d_z,
            *sizes,
            x.alpha,
            NEED_CONTEXT=need_context,
            SIMILARITY=_SIMILARITY[x.similarity],
            **flags,
            **tile,
            num_warps=4,
        )
    return d_z, d_context


def leave_one_out(z: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """(P, n, H) means of the others, of type `dtype`: one launch."""
    p, n, hidden = z.shape
    out = torch.empty(z.shape, dtype=dtype, device=z.device)
    if out.numel():
        tile = tiling(n, hidden, TILE_ELEMENTS)
        leave_one_out_kernel[(p * triton.cdiv(hidden, tile["BLOCK_H"]),)](z, out, *z.stride(), n, **tile, num_warps=4)
    return out
