"""Every Triton kernel compiles for every target without a GPU, and needs no more there than it may."""

import ast
import re
import runpy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

import torch
import triton
import triton.language as tl
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

import gcpo_kernels
from gcpo_kernels import targets
from gcpo_kernels.options import KINDS
from gcpo_kernels.testing import make_linear_inputs, make_representations, make_token_inputs
from gcpo_kernels.triton_backend import (
    causal,
    causal_kernels,
    common,
    linear,
    logprob,
    logprob_kernels,
    product,
    product_kernels,
    scale,
    token_kernels,
    token_loss,
)

ROOT = Path(__file__).resolve().parents[1]
MODULES = (causal, causal_kernels, common, linear, logprob_kernels, product_kernels, scale, token_kernels)
DOCUMENT = ROOT / "docs" / "kernels.md"
BEGIN, END = "<!-- begin: python -m gcpo_kernels.targets -->", "<!-- end -->"
# What an assembler makes of a kernel is its version's: the table holds for the pinned one, and Triton 3.6's spills 8
# bytes of two specimens.
PINNED = f"triton=={triton.__version__}" in (ROOT / "constraints.txt").read_text().split()
STACK_LIMIT = 0 if PINNED else 8
SHARED_LIMIT = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}

pytestmark = pytest.mark.skipif(
    bool(triton.knobs.runtime.interpret), reason="kernels cannot be compiled under TRITON_INTERPRET=1"
)


@pytest.mark.hazard(11, 30)
@pytest.mark.parametrize("target", targets.TARGETS)
@pytest.mark.parametrize("label", [specimen.label for specimen in targets.specimens()])
def test_compiles(label: str, target: str) -> None:
    """No spills, no offset computed in 32 bits; shared memory for more than one program at a time, but for products.
    Seen in fla#1080, Liger#51, Liger#231."""
    specimen = next(x for x in targets.specimens() if x.label == label)
    if target not in specimen.targets:
        pytest.skip(f"not launched on {target}")
    report = targets.compile_for(specimen, targets.TARGETS[target])
    assert report.stack <= STACK_LIMIT
    assert report.narrow_offsets == ()
    at_a_time = 1 if specimen.kernel is product_kernels.product_kernel else 4
    assert report.shared <= SHARED_LIMIT[target] // at_a_time
    assert report.registers <= 255


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize(
    "size",
    ["sequence, 128", "sequence, 128, aligned", "sequence, 1024", "token, 128", "token, 128, aligned", "token, 512"],
)
def test_a_kl_clip_spills_nothing(size: str, target: str) -> None:
    """Two more sums and another floor of p', in rows of any length; long ones of a multiple of 16 are specimens."""
    specimen = targets.find(f"token_loss ({size})", HAS_KL_CLIP=True)
    assert specimen is not None
    assert targets.compile_for(specimen, targets.TARGETS[target]).stack <= STACK_LIMIT


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_kinds_of_losses_spill_nothing(kind: str, target: str) -> None:
    """With a kl_clip and a ratio per sequence, with weights of the causal term and a corrected KL and without."""
    flags = {"HAS_KL_CLIP": True, "HAS_DELTA": kind == "clipped", "KIND": KINDS.index(kind)}
    for label in (f"token_loss (sequence, 1024, {kind}, weighted, corrected)", "token_loss (sequence, 1024, kl_clip)"):
        specimen = targets.find(label, **flags)
        assert specimen is not None
        assert targets.compile_for(specimen, targets.TARGETS[target]).stack <= STACK_LIMIT, label


@dataclass(frozen=True)
class Limits:
    """What a kernel may need on sm_90. None: no limit."""

    instructions: float | None = None  # an element
    exps: float | None = None  # an element
    load_bits: int | None = None  # the widest load has at least these
    narrower_loads: int | None = None  # how many may have fewer: a row's own numbers
    on_tensor_cores: bool = False  # products there, operands and output through TMA
    flags: dict[str, Any] = field(default_factory=dict)  # other compile-time arguments than the specimen's


LIMITS = {
    "logprob_forward (V 151936)": Limits(15, 1.1, 128, 0, flags={"HAS_SOFTCAP": False}),
    "logprob_backward (V 151936)": Limits(15, 1.1, 128, 0, flags={"HAS_SOFTCAP": False}),
    "softmax_once (V 151936)": Limits(15, 1.1, 128, 0, flags={"HAS_SOFTCAP": False}),
    "product (store, sm_90)": Limits(9, 1.1, on_tensor_cores=True),
    "token_loss (token, 512, aligned)": Limits(load_bits=128),
    "token_loss_backward (token, 512, aligned)": Limits(load_bits=128),
}


@pytest.mark.skipif(not PINNED, reason="the limits are of the pinned version of Triton")
@pytest.mark.parametrize("label", LIMITS)
def test_limits(label: str) -> None:
    """What a kernel must not lose: an element's instructions and exponentials, wide loads, tensor cores and TMA."""
    limits = LIMITS[label]
    specimen = targets.find(label, **limits.flags)
    assert specimen is not None, f"no specimen {label}"
    found = targets.count(specimen)
    assert targets.compile_for(specimen, targets.TARGETS["sm_90"]).stack == 0
    for limit, value in ((limits.instructions, found.instructions), (limits.exps, found.exps)):
        assert limit is None or (value is not None and value <= limit), found
    if limits.load_bits is not None:
        assert found.widest_load >= limits.load_bits, found
        narrower = sum(times for bits, times in found.loads if bits < limits.load_bits)
        assert limits.narrower_loads is None or narrower <= limits.narrower_loads, found
    if limits.on_tensor_cores:
        assert min(found.hgmma, found.tma_loads, found.tma_stores) > 0, found


def sources() -> dict[str, str]:
    return {path.name: path.read_text() for path in (ROOT / "gcpo_kernels" / "triton_backend").glob("*.py")}


def launched_kernels(source: str) -> set[str]:
    """Names of what is launched, kernel[grid](...), in a source."""
    return {
        node.func.value.id
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript) and isinstance(node.func.value, ast.Name)
    }


def test_no_kernel_is_forgotten() -> None:
    """What is launched, what is named a kernel, and what the specimens hold are the same."""
    launched = set().union(*(launched_kernels(source) for source in sources().values()))
    named = {
        name
        for module in MODULES
        for name, x in vars(module).items()
        if isinstance(x, JITFunction) and name.endswith("_kernel")
    }
    compiled = {specimen.kernel.__name__ for specimen in targets.specimens()}
    assert launched == named == compiled
    assert len(launched) >= 8


def test_every_block_size_is_compiled() -> None:
    """Specimens cover whatever the launchers may choose."""
    chosen = {
        (blocks, block_t, level)
        for level in (False, True)
        for b in (1, 511, 512, 4096)
        for t in (1, 128, 129, 256, 512, 513, 1025, 2048, 4096, 8192, 8193, 100_000)
        for blocks, block_t in [token_loss.blocking(b, t, level)]
    }
    sizes = {(block_t, level, aligned) for _, block_t, level in chosen for aligned in (False, True)}
    for kernel in (token_loss.token_loss_kernel, token_loss.token_loss_backward_kernel):
        kernels = [s for s in targets.specimens() if s.kernel is kernel]
        keys = ("BLOCK_T", "BY_SEQUENCE", "ALIGNED_T")
        assert {tuple(s.constexprs[key] for key in keys) for s in kernels} == sizes
        for s in kernels:
            crowded = any(s.constexprs.get(key) for key in ("HAS_KAPPA_WEIGHTS", "BIAS_CORRECTION", "HAS_KL_CLIP"))
            assert s.num_warps == token_loss.warps(s.constexprs["BLOCK_T"], crowded), s.label
    finishing = [s for s in targets.specimens() if s.kernel is token_loss.token_loss_finish_kernel]
    parts = {s.constexprs["BLOCK_P"] for s in finishing}
    assert parts == {triton.next_power_of_2(blocks) for blocks, _, _ in chosen}


def test_blocks_of_products_are_compiled() -> None:
    """Each entry of the table, with a store and without."""
    tables = (product.HOPPER_BLOCKS, product.BLACKWELL_BLOCKS, product.POINTER_BLOCKS, product.FLOAT32_BLOCKS)
    found = [s for s in targets.specimens() if s.kernel is product_kernels.product_kernel]
    for blocks in tables:
        held = [s for s in found if blocks.constexprs.items() <= s.constexprs.items()]
        assert {s.constexprs["SCORE"] for s in held} == {False, True}
        assert {(s.num_warps, s.num_stages) for s in held} == {(blocks.warps, blocks.stages)}


def test_every_tile_of_causal_weights_is_compiled() -> None:
    sizes = [causal.TILE_BYTES // 2, causal.TILE_BYTES // 4]  # of elements of two and of four bytes
    for kernel, elements in (
        (causal.causal_weights_kernel, sizes),
        (causal.causal_weights_backward_kernel, [causal.TILE_ELEMENTS]),
        (causal.leave_one_out_kernel, [causal.TILE_ELEMENTS]),
    ):
        keys = ("ONE_SLICE", "N_TILE", "BLOCK_H")
        held = {tuple(s.constexprs[key] for key in keys) for s in targets.specimens() if s.kernel is kernel}
        chosen = [causal.tiling(n, 10**6, size) for n in (1, 8, 9, 16, 17, 10**6) for size in elements]
        assert held >= {tuple(tile[key] for key in keys) for tile in chosen}, kernel.__name__


def vector_accesses(specimen: targets.Specimen) -> tuple[int, int, int]:
    """Loads of 128 bits, stores of 128 bits, and loads of 8 bits, that a specimen's PTX for sm_90 has."""
    ptx = targets.compiled(specimen, targets.TARGETS["sm_90"]).asm["ptx"]
    patterns = (r"ld\.global\S*\.v4\.b32", r"st\.global\S*\.v4\.b32", r"ld\.global\S*\.b8")
    return tuple(len(re.findall(pattern, ptx)) for pattern in patterns)  # type: ignore[return-value]


def test_contiguous_rows_are_read_in_whole_words() -> None:
    """
    Four tokens of float32 at a time: seven inputs of one value a token, four contexts (of a token, or of four tokens),
    two outputs; and four of the mask's bytes. A ratio per sequence reads logp once more, in its own pass. Where a
    thread has two tokens it reads half as much at a time.
    """
    kernels = (token_loss.token_loss_kernel, token_loss.token_loss_backward_kernel)
    common = [s for s in targets.specimens() if s.kernel in kernels and s.divisible and "corrected" not in s.label]
    common = [s for s in common if s.num_warps == token_loss.warps(s.constexprs["BLOCK_T"])]
    found = {s.label: vector_accesses(s) for s in common}
    assert len(found) == 10
    for label, (loads, stores, bytes_read) in found.items():
        assert (stores, bytes_read) == (2, 0), label
        if "backward" in label:
            assert loads == 2, label
        else:
            assert loads == (12 if "sequence" in label else 11), label


@triton.jit
def narrow_kernel(x_ptr, T, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    offsets = row * T + tl.arange(0, BLOCK)
    tl.store(x_ptr + offsets, tl.load(x_ptr + offsets) + 1.0)


@triton.jit
def wide_kernel(x_ptr, T, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    offsets = row * T + tl.arange(0, BLOCK)
    tl.store(x_ptr + offsets, tl.load(x_ptr + offsets) + 1.0)


@triton.jit
def greedy_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    """Holds more at once than a warp has registers for, and reads all of it in a later loop."""
    offsets = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offsets)
    y = tl.load(y_ptr + offsets)
    total = tl.zeros([BLOCK], tl.float32)
    for k in range(0, n):
        scale = tl.load(y_ptr + k)
        total = total * scale + tl.exp(x * scale) + y
    tl.store(x_ptr + offsets, total + x)


def planted(kernel: JITFunction, num_warps: int = 4, **constexprs: int) -> targets.Specimen:
    return targets.Specimen(kernel.__name__, kernel, constexprs, num_warps=num_warps)


def test_what_is_not_specialized_is_not_divisible() -> None:
    for name in ("rows_per_batch", "scale"):
        specimen = targets.Specimen("wrong", logprob.logprob_forward_kernel, {"V": 8}, divisible=(name,))
        with pytest.raises(ValueError, match=name):
            specimen.source()


def test_specimens_with_other_flags_are_others() -> None:
    label = "logprob_forward (V 151936)"
    with_softcap, plain = targets.find(label), targets.find(label, HAS_SOFTCAP=False)
    assert with_softcap is not None and plain is not None and with_softcap != plain
    assert targets.count(with_softcap).exps == targets.count(plain).exps + 1  # a softcap's tanh
    assert targets.find("nothing") is None


def test_a_planted_narrow_offset_is_found() -> None:
    for target in targets.TARGETS.values():
        assert targets.compile_for(planted(narrow_kernel, BLOCK=128), target).narrow_offsets
        assert targets.compile_for(planted(wide_kernel, BLOCK=128), target).narrow_offsets == ()


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_a_planted_spill_is_found(target: str) -> None:
    block = 8192 if target != "gfx942" else 16384
    assert targets.compile_for(planted(greedy_kernel, num_warps=1, BLOCK=block), targets.TARGETS[target]).stack > 0


@pytest.mark.hazard(11, 12, 18)
def test_sources_use_one_axis_and_64_bits() -> None:
    """Every program id is axis 0 and widened at once; no atomics: sums have one order.
    Seen in fla#1080, triton#3299, triton#7181."""
    found = 0
    for name, source in sources().items():
        assert "atomic" not in source, name
        ids = re.findall(r"tl\.program_id\((.*?)\)(\.to\(tl\.int64\))?", source)
        assert all(axis == "0" and widened for axis, widened in ids), name
        counts = re.findall(r"tl\.num_programs\((.*?)\)(\.to\(tl\.int64\))?", source)
        assert all(axis == "0" and widened for axis, widened in counts), name
        assert source.count("program_id(") == len(ids), name
        found += len(ids)
    assert found >= 7


def test_signatures_name_every_argument() -> None:
    """A Specimen's types follow from names: every argument that is neither is a float."""
    for specimen in targets.specimens():
        floats = {name for name, kind in specimen.signature().items() if kind == "fp32"}
        known = {"beta", "kappa", "epsilon_low", "epsilon_high", "delta", "log_floor", "divisor", "alpha", "kl_clip"}
        known |= {"tau_pos", "tau_neg"}
        assert floats <= known | {"scale", "softcap", "chain", "signed_chain"}, specimen.label
        assert isinstance(ASTSource(specimen.kernel, specimen.signature(), specimen.constexprs).signature, dict)


@pytest.mark.skipif(not PINNED, reason="the table is of the pinned version of Triton")
def test_the_committed_table_is_current() -> None:
    text = DOCUMENT.read_text()
    committed = text.split(BEGIN)[1].split(END)[0].strip()
    assert committed == targets.table().strip(), "run python -m gcpo_kernels.targets and paste its table"


@pytest.mark.hazard(30)
@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU, other tensors have a Triton backend")
def test_an_explicit_request_does_not_fall_back() -> None:
    """Without the interpreter Triton does not run on CPU tensors: asking for it raises (Liger#51)."""
    heads, rest = make_linear_inputs(2, 3), make_representations(2, 3)
    head = {key: heads[key] for key in ("hidden", "weight", "token_ids")}
    index = torch.zeros(6, dtype=torch.int64)
    calls = {
        "gcpo_loss": make_token_inputs(2, 3),
        "linear_gcpo_loss": heads,
        "linear_logprob": head,
        "selective_logprob": {"logits": torch.zeros(2, 5), "token_ids": torch.zeros(2, dtype=torch.int64)},
        "causal_weights": rest,
        "causal_weights_from_hidden": {
            "hidden": torch.zeros(6, 2, 9),
            "last_index": index,
            "context_z": rest["context_z"],
        },
        "leave_one_out_mean": {"z": rest["z"]},
    }
    for name, arguments in calls.items():
        with pytest.raises(ValueError, match="`backend`"):
            getattr(gcpo_kernels, name)(**arguments, backend="triton")
    assert gcpo_kernels.available_backends("cpu") == ("torch",)


def test_the_interpreters_tests_say_why_they_are_skipped() -> None:
    """Triton 3.6 compiles every kernel, and its interpreter fails with NumPy 2.4."""
    why_not = runpy.run_path(str(ROOT / "tests" / "triton" / "conftest.py"))["why_not"]
    assert "NumPy 2.4" in why_not(True, "3.6.0", "2.4.6")
    assert why_not(True, "3.6.0", "2.3.5") == why_not(True, "3.7.1", "2.4.6") == ""
    assert "TRITON_INTERPRET=1" in why_not(False, "3.7.1", "2.4.6")
