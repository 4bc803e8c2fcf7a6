"""
The product hidden @ weight.T with a softmax in its epilogue: what a row needs of its logits, without a pass over them.

Two kinds. Without a store (`SCORE`) each tile leaves its rows' largest logit, sum of exponentials and entropy sum, and
one small kernel combines the tiles: log-probabilities cost the product and nothing of size (N, V). With a store, each
tile writes E = exp(logit - c) in the operands' type, c known beforehand from an estimate of the token's log-probability
or from a pass without a store: what `softmax_once` makes of logits, while they are in registers.

Both can run over a list of rows that is made on the device: rows whose estimate was too far off are done again so,
without the host knowing whether there are any.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton

from gcpo_kernels.options import HeadOptions
from gcpo_kernels.triton_backend.logprob import Exponentials, head_numbers
from gcpo_kernels.triton_backend.product_kernels import (
    combine_exponentials_kernel,
    combine_scores_kernel,
    product_kernel,
    redo_list_kernel,
    target_logits_kernel,
)


class Blocks(NamedTuple):
    """A block table entry of `product_kernel`."""

    m: int
    n: int
    k: int
    warps: int
    stages: int
    subtiles: int = 1
    group: int = 0  # blocks of rows that belong together, see `_place_of`; 0: all of them

    @property
    def constexprs(self) -> dict[str, int]:
        blocks = {"BLOCK_M": self.m, "BLOCK_N": self.n, "BLOCK_K": self.k}
        return blocks | {"SUBTILES": self.subtiles, "GROUP": self.group}


HOPPER_BLOCKS = Blocks(128, 256, 64, warps=8, stages=3, subtiles=4)
BLACKWELL_BLOCKS = Blocks(128, 128, 64, warps=4, stages=2, subtiles=4)
POINTER_BLOCKS = Blocks(128, 128, 32, warps=8, stages=3, subtiles=4)  # half types by pointers: 48 KB of shared memory
FLOAT32_BLOCKS = Blocks(64, 32, 16, warps=4, stages=2)  # without tensor cores, because TF32 would lose digits
COMBINE_ROWS, COMBINE_PARTS = 32, 32
TARGET_BLOCK = 1024
LIST_BLOCK = 1024


def tma_blocks(device: torch.device) -> Blocks | None:
    """For a device that copies tiles by descriptor and multiplies them from shared memory; None for others."""
    if device.type != "cuda" or torch.version.hip is not None:
        return None
    return {9: HOPPER_BLOCKS, 10: BLACKWELL_BLOCKS}.get(torch.cuda.get_device_capability(device)[0])


def choose_blocks(*matrices: torch.Tensor) -> tuple[Blocks, bool]:
    """
    The blocks for a product of these, and whether by descriptors, which want rows 16 bytes apart or a multiple of that,
    from an aligned start.
    """
    blocks = tma_blocks(matrices[0].device)
    aligned = all(x.data_ptr() % 16 == 0 and x.stride(0) * x.element_size() % 16 == 0 for x in matrices)
    if blocks is not None and aligned and matrices[0].element_size() == 2:
        return blocks, True
    return (FLOAT32_BLOCKS if matrices[0].dtype == torch.float32 else POINTER_BLOCKS), False


def num_programs(device: torch.device) -> int:
    """Multiprocessors of the device: a product's programs stay, and take one tile after the other."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 3 if device.type == "cpu" else 128


@dataclass(frozen=True)
class Product:
    """hidden @ weight.T for rows x (M, H), with what the head does to it. All launches, no sync."""

    x: torch.Tensor  # (M, H)
    weight: torch.Tensor  # (V, H), of x's type; rows contiguous, as x's are
    bias: torch.Tensor | None  # (V,)
    token_ids: torch.Tensor  # (M,) int64, contiguous
    head: HeadOptions

    def _empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=self.x.device)

    def _run(
        self,
        e: torch.Tensor | None,
        shift: torch.Tensor | None = None,
        rows: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, ...]:
        """Launch the product; (target, tops, sums, dots) of it. With `e` it stores exponentials there."""
        m, hidden = self.x.shape
        vocab = self.weight.shape[0]
        stored = (self.x, self.weight) if e is None else (self.x, self.weight, e)
        blocks, tma = choose_blocks(*stored)
        if rows is not None and tma:  # descriptors cannot gather rows
            blocks, tma = POINTER_BLOCKS, False
        parts = triton.cdiv(vocab, blocks.n)
        target, sums, dots = self._empty(m), self._empty(parts, m), self._empty(parts, m)
        tops = self._empty(parts, m) if e is None else sums
        anything = self.x if e is None else e
        numbers = head_numbers(self.head)
        tensors: list[Any] = [self.x, self.weight, anything]
        if tma:
            from triton.tools.tensor_descriptor import TensorDescriptor

            widths = [blocks.k, blocks.k, blocks.n // blocks.subtiles if e is not None else blocks.k]
            heights = [blocks.m, blocks.n, blocks.m]
            tensors = [
                TensorDescriptor.from_tensor(x, [height, width])
                for x, height, width in zip(tensors, heights, widths, strict=True)
            ]
        product_kernel[(num_programs(self.x.device),)](
            *tensors,
            self.x if self.bias is None else self.bias,
            self.token_ids,
            target if shift is None else shift,
            self.token_ids if rows is None else rows,
            target,
            tops,
            sums,
            dots,
            self.x.stride(0),
            self.weight.stride(0),
            anything.stride(0),
            m,
            numbers.scale,
            numbers.softcap,
            numbers.chain,
            HAS_BIAS=self.bias is not None,
            **numbers.flags,
            SCORE=e is None,
            GATHER=rows is not None,
            TMA=tma,
            V=vocab,
            H=hidden,
            **blocks.constexprs,
            PROGRAMS=num_programs(self.x.device),
            num_warps=blocks.warps,
            num_stages=blocks.stages,
        )
        return target, tops, sums, dots

    def _combining(self, parts: int, gather: bool) -> tuple[tuple[int], list[Any], dict[str, Any]]:
        """The grid, numbers and flags of the kernels that put tiles together."""
        numbers = head_numbers(self.head)
        flags = {"GATHER": gather, "V": self.weight.shape[0], "BLOCK_M": COMBINE_ROWS, "BLOCK_P": COMBINE_PARTS}
        values = [len(self.x), parts, numbers.scale, numbers.softcap, numbers.chain]
        return (triton.cdiv(len(self.x), COMBINE_ROWS),), values, numbers.flags | flags | {"num_warps": 4}

    def scores(self, rows: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Log-probabilities and entropies, (M,). With `rows` instead the shifts that make these rows' sums about 1, and
        nothing.
        """
        target, tops, sums, dots = self._run(None, rows=rows)
        out = self._empty(len(self.x)), self._empty(len(self.x))
        listed = self.token_ids if rows is None else rows
        grid, values, flags = self._combining(len(sums), rows is not None)
        combine_scores_kernel[grid](tops, sums, dots, target, self.token_ids, listed, *out, *values, **flags)
        return out

    def _store(self, out: Exponentials, shift: torch.Tensor, rows: torch.Tensor | None = None) -> None:
        target, _, sums, dots = self._run(out.e, shift, rows)
        listed = self.token_ids if rows is None else rows
        grid, values, flags = self._combining(len(sums), rows is not None)
        combine_exponentials_kernel[grid](
            sums,
            dots,
            target,
            self.token_ids,
            shift,
            listed,
            out.logp,
            out.entropy,
            out.total,
            out.e,
            out.e.stride(0),
            *values,
            **flags,
        )

    def exponentials(self, offset: torch.Tensor) -> Exponentials:
        """As `softmax_once`, for estimates `offset` (M,) float32 of the log-probabilities; (M, V) is made here."""
        m, hidden = self.x.shape
        e = torch.empty(m, self.weight.shape[0], dtype=self.x.dtype, device=self.x.device)
        out = Exponentials(self._empty(m), self._empty(m), self._empty(m), e)
        shift = self._empty(m)
        numbers = head_numbers(self.head)
        target_logits_kernel[(m,)](
            self.x,
            self.weight,
            self.x if self.bias is None else self.bias,
            self.token_ids,
            offset,
            shift,
            self.x.stride(0),
            self.weight.stride(0),
            numbers.scale,
            numbers.softcap,
            numbers.chain,
            HAS_BIAS=self.bias is not None,
            **numbers.flags,
            V=self.weight.shape[0],
            H=hidden,
            BLOCK_H=min(TARGET_BLOCK, triton.next_power_of_2(hidden)),
            num_warps=4,
        )
        self._store(out, shift)
        return out

    def redo(self, out: Exponentials) -> None:
        """
        Make the rows of `out` whose total is NaN again, in place, whatever their offsets were. The host does not learn
        whether there are any: where there are none, four of five launches leave at once.
        """
        rows = self._empty(1 + len(self.x), dtype=torch.int32)
        redo_list_kernel[(1,)](out.total, rows, len(self.x), BLOCK=LIST_BLOCK, num_warps=4)
        shift, _ = self.scores(rows)
        self._store(out, shift, rows)
