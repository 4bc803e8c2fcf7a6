"""What is read from machine code, on planted kernels whose counts are known by construction."""

from typing import Any

import pytest

pytest.importorskip("triton")

import torch
import triton
import triton.language as tl
from triton.runtime.jit import mangle_type
from triton.tools.tensor_descriptor import TensorDescriptor

from gcpo_kernels import targets

pytestmark = pytest.mark.skipif(
    bool(triton.knobs.runtime.interpret), reason="kernels cannot be compiled under TRITON_INTERPRET=1"
)


@triton.jit
def copy_kernel(x_ptr, y_ptr, T, stride_t, BLOCK: tl.constexpr, EXP: tl.constexpr, STRIDED: tl.constexpr):
    for first in range(0, T, BLOCK):
        at = (first + tl.arange(0, BLOCK)).to(tl.int64)
        x = tl.load(x_ptr + (at * stride_t if STRIDED else at))
        tl.store(y_ptr + at, tl.exp2(x) if EXP else x)


@triton.jit
def held_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(y_ptr + at, tl.load(x_ptr + at) * 2.0)


@triton.jit
def product_kernel(
    x_ptr,  # (M, H) bfloat16
    w_ptr,  # (V, H) bfloat16
    y_ptr,  # (M, V) bfloat16: exp2 of x @ w.T
    V,
    H,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    m = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    n = tl.arange(0, BLOCK_N).to(tl.int64)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first in range(0, H, BLOCK_K):
        h = first + tl.arange(0, BLOCK_K)
        x = tl.load(x_ptr + m[:, None] * H + h[None, :])
        w = tl.load(w_ptr + n[:, None] * H + h[None, :])
        acc = tl.dot(x, w.T, acc)
    tl.store(y_ptr + m[:, None] * V + n[None, :], tl.exp2(acc).to(tl.bfloat16))


@triton.jit
def tma_product_kernel(
    x_desc,  # of (M, H), blocks [BLOCK_M, BLOCK_K]
    w_desc,  # of (V, H), blocks [BLOCK_N, BLOCK_K]
    y_desc,  # of (M, V), blocks [BLOCK_M, BLOCK_N]
    tiles,
    H,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    FLATTEN: tl.constexpr,
):
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=FLATTEN):
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for k in range(tl.cdiv(H, BLOCK_K)):
            x = x_desc.load([tile * BLOCK_M, k * BLOCK_K])
            w = w_desc.load([0, k * BLOCK_K])
            acc = tl.dot(x, w.T, acc)
        y_desc.store([tile * BLOCK_M, 0], tl.exp2(acc).to(tl.bfloat16))


def planted_copy(exp: bool = False, strided: bool = False, **rest: Any) -> targets.Specimen:
    constexprs = {"BLOCK": 1024, "EXP": exp, "STRIDED": strided}
    return targets.Specimen("copy", copy_kernel, constexprs, stream=("x_ptr",), **rest)


def planted_tma_product(flatten: bool) -> targets.Specimen:
    constexprs = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "FLATTEN": flatten}
    blocks = {"x_desc": (128, 64), "w_desc": (128, 64), "y_desc": (128, 128)}
    # The names that Triton gives to descriptors that are made on the host.
    types = {
        name: mangle_type(TensorDescriptor.from_tensor(torch.zeros(block, dtype=torch.bfloat16), list(block)))
        for name, block in blocks.items()
    }
    assert types["x_desc"] == "tensordesc<bf16[128, 64]>"
    types |= {"tiles": "i32", "H": "i32"}
    return targets.Specimen("tma product", tma_product_kernel, constexprs, types, num_stages=3, divisible=("H",))


def test_wide_loads_are_counted() -> None:
    """Of a copy in 1,024 floats a turn, 4 warps: 8 elements a thread, in loads of 128 bits."""
    found = targets.count(planted_copy())
    assert found.widest_load == 128
    assert found.loads == ((128, found.elements / 4),)
    assert found.elements % 8 == 0  # a turn, or several that the assembler unrolled
    assert found.exps == 0 and found.hgmma == found.tma_loads == found.tma_stores == 0
    assert 0.5 <= found.instructions <= 4  # a load and a store for four elements, a loop around them


def test_exps_are_counted() -> None:
    plain, found = targets.count(planted_copy()), targets.count(planted_copy(exp=True))
    assert found.exps == 1
    assert found.instructions > plain.instructions + 0.9  # it, and a smaller share of the loop
    assert found.widest_load == 128


def test_scalar_loads_are_seen() -> None:
    """A stride that is known only at run time leaves one element a load; so does a pointer to halves, of 16 bits."""
    found = targets.count(planted_copy(strided=True))
    assert [bits for bits, _ in found.loads] == [32]
    assert found.elements == found.loads[0][1]
    assert targets.count(planted_copy(strided=True, ones=("stride_t",))).widest_load == 128
    halves = targets.count(planted_copy(strided=True, types={"x_ptr": "*bf16"}))
    assert [bits for bits, _ in halves.loads] == [16]
    assert halves.elements == halves.loads[0][1]


def test_without_a_loop_nothing_is_per_element() -> None:
    specimen = targets.Specimen("held", held_kernel, {"BLOCK": 1024}, stream=("x_ptr",))
    found = targets.count(specimen)
    assert found.elements is found.instructions is found.exps is None
    assert found.loads == ((128, 2),)


def test_a_product_is_seen() -> None:
    types = {"x_ptr": "*bf16", "w_ptr": "*bf16", "y_ptr": "*bf16", "V": "i32", "H": "i32"}
    constexprs = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64}
    specimen = targets.Specimen("product", product_kernel, constexprs, types, divisible=("V", "H"))
    found = targets.count(specimen)
    assert found.hgmma > 0 and found.tma_loads == found.tma_stores == 0
    assert found.elements == 128 * 128 / (32 * 4)
    assert found.exps == 1


@pytest.mark.parametrize("flatten", [False, True])
def test_tensor_descriptors_are_seen(flatten: bool) -> None:
    """The epilogue is apart from the loop over k, also where Triton makes one loop of the two."""
    specimen = planted_tma_product(flatten)
    found = targets.count(specimen)
    assert min(found.hgmma, found.tma_loads, found.tma_stores) > 0
    assert found.exps == 1
    assert 2 <= found.instructions <= 8
    for target in targets.TARGETS.values():  # the others read through pointers
        targets.compile_for(specimen, target)
