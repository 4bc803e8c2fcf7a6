"""
Ahead-of-time compilation of every Triton kernel, with no GPU: what each needs on each target, as a table.

`python -m gcpo_kernels.targets` prints the table of docs/kernels.md. A kernel that spills registers, or computes an
offset in 32 bits, is a bug that a test finds here before a GPU does.
"""

import re
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from gcpo_kernels.triton_backend import causal, logprob, token_loss

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


@dataclass(frozen=True)
class Specimen:
    """One kernel with one choice of its compile-time arguments, as a launcher would make it."""

    label: str
    kernel: Any
    constexprs: dict[str, Any]
    types: dict[str, str] = field(default_factory=dict)  # of arguments; the rest follow from their names
    num_warps: int = 4
    ones: tuple[str, ...] = ()  # strides that are 1
    divisible: tuple[str, ...] = ()  # pointers and strides that divide by 16

    def signature(self) -> dict[str, str]:
        """Triton's type of every argument."""
        types = {}
        for name in self.kernel.arg_names:
            if name in self.constexprs:
                types[name] = "constexpr"
            elif name in self.types:
                types[name] = self.types[name]
            elif name.endswith("_ptr"):
                types[name] = "*fp32"
            else:
                types[name] = "i32" if name.startswith("stride_") or name in _INTEGERS else "fp32"
        return types

    def unit_strides(self) -> dict[str, Any]:
        """Innermost strides are 1 in practice; Triton then compiles them in."""
        ones = ("stride_u_v", "stride_z_h", "stride_ctx_h", "stride_h", *self.ones)
        return {n: 1 for n in self.kernel.arg_names if n in ones}

    def attributes(self) -> dict[tuple[int, ...], list]:
        """What Triton would find out about the arguments of a launch, as it writes that down."""
        names = self.kernel.arg_names
        return {(names.index(name),): [["tt.divisibility", 16]] for name in self.divisible}


_INTEGERS = {"B", "T", "L", "BLOCKS", "n", "m", "rows", "rows_per_batch", "first_v", "whole_v"}
_ALL_INPUTS = ("HAS_OLD", "HAS_REF", "HAS_QUERY", "HAS_CAUSAL", "HAS_IS", "HAS_CONTEXT", "HAS_WEIGHTS", "HAS_DELTA")


def specimens() -> list[Specimen]:
    """Every kernel, with every entry of its block table, and its costliest combination of flags."""
    found = token_specimens()
    for vocab in (1000, 4096, 151_936):
        sizes = {"V": vocab, "BLOCK_V": logprob.block_v(vocab)}
        found += [
            Specimen(
                f"logprob_forward (V {vocab})",
                logprob.logprob_forward_kernel,
                {"HAS_SOFTCAP": True, "FIRST": False, "LAST": True, **sizes},
                {"ids_ptr": "*i64"},
                num_warps=8,
            ),
            Specimen(
                f"logprob_backward (V {vocab})",
                logprob.logprob_backward_kernel,
                {"HAS_SOFTCAP": True, "HAS_ENTROPY": True, **sizes},
                {"ids_ptr": "*i64", "d_ptr": "*bf16"},
                num_warps=8,
            ),
        ]
    for hidden in (64, 576, 3584):
        flags = {
            "HAS_INDEX": True,
            "HAS_MASK": True,
            "LEAVE_ONE_OUT": True,
            "SIMILARITY": causal.EUCLIDEAN,
            "H": hidden,
            "BLOCK_H": causal.block_h(hidden),
        }
        types = {"z_ptr": "*bf16", "ctx_ptr": "*bf16", "index_ptr": "*i64"}
        written = {"d_z_ptr": "*bf16", "d_ctx_ptr": "*bf16"}
        sizes = {"H": hidden, "BLOCK_H": causal.block_h(hidden)}
        found += [
            Specimen(f"causal_weights (H {hidden})", causal.causal_weights_kernel, flags, types),
            Specimen(
                f"causal_weights_backward (H {hidden})",
                causal.causal_weights_backward_kernel,
                {**flags, "NEED_CONTEXT": True},
                {**types, **written},
            ),
            Specimen(f"leave_one_out (H {hidden})", causal.leave_one_out_kernel, sizes, {"z_ptr": "*bf16"}),
        ]
    return found


def token_specimens() -> list[Specimen]:
    """
    The token loss: rows of any length and any strides, and the common layout, contiguous rows whose length divides by
    16, with the contexts of a token side by side or, last, each context's tokens side by side.
    """
    found = []
    lengths = {False: (100, 4096), True: (100, 4096)}
    for by_sequence, block_t in [(s, token_loss.blocking(4, t, s)[1]) for s, ts in lengths.items() for t in ts]:
        sizes = {"BLOCK_T": block_t, "BY_SEQUENCE": by_sequence}
        label = f"{'sequence' if by_sequence else 'token'}, {block_t}"
        warps = token_loss.warps(block_t)
        for aligned in (False, True):
            contexts = {"L_INNERMOST": aligned, "BLOCK_L": 4 if aligned else 1}
            flags = {**dict.fromkeys(_ALL_INPUTS, True), "ADV_BY_TOKEN": True, "ALIGNED_T": aligned}
            found.append(
                Specimen(
                    f"token_loss ({label}{', aligned' if aligned else ''})",
                    token_loss.token_loss_kernel,
                    {**flags, **contexts, **sizes},
                    {"mask_ptr": "*u8"},
                    warps,
                    *(_common_layout(token_loss.token_loss_kernel, ("stride_ctx_t",)) if aligned else ()),
                )
            )
            flags = {"BY_COUNT": True, "HAS_CAUSAL": True, "ALIGNED_T": aligned}
            found.append(
                Specimen(
                    f"token_loss_backward ({label}{', aligned' if aligned else ''})",
                    token_loss.token_loss_backward_kernel,
                    {**flags, **sizes},
                    {"mask_ptr": "*u8"},
                    warps,
                    *(_common_layout(token_loss.token_loss_backward_kernel, ()) if aligned else ()),
                )
            )
    for aligned, innermost, label in ((True, False, "aligned, by context"), (False, True, "any length")):
        constexprs: dict[str, Any] = {
            **dict.fromkeys(_ALL_INPUTS, True),
            **{"ADV_BY_TOKEN": True, "BY_SEQUENCE": False, "BLOCK_T": 512},
            **{"ALIGNED_T": aligned, "L_INNERMOST": innermost, "BLOCK_L": 4},
        }
        kernel = token_loss.token_loss_kernel
        ones, divisible = _common_layout(kernel, ("stride_ctx_t",) if innermost else ("stride_ctx_l",))
        if not aligned:
            divisible = tuple(name for name in divisible if name.endswith("_ptr"))
        types = {"mask_ptr": "*u8"}
        found.append(Specimen(f"token_loss (token, 512, {label})", kernel, constexprs, types, 4, ones, divisible))
    for parts in (1, 2, 4, 8, 16, 32, 64):
        constexprs = {"DIVIDE_BY": 0, "ITEMS_ON_DEVICE": False, "BLOCK_P": parts, "BLOCK_B": max(16, 1024 // parts)}
        found.append(Specimen(f"token_loss_finish ({parts})", token_loss.token_loss_finish_kernel, constexprs))
    return found


def _common_layout(kernel: Any, outer: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """
    (strides that are 1, arguments that divide by 16): of contiguous tensors that torch allocated, whose rows are
    multiples of 16 long. `outer`: strides whose name says innermost, but that are not.
    """
    strides = [name for name in kernel.arg_names if name.startswith("stride_")]
    ones = tuple(name for name in strides if name.endswith(("_t", "_l")) and name not in outer)
    rows = [name for name in strides if name.endswith("_b") and name != "stride_w_b"]
    pointers = [name for name in kernel.arg_names if name.endswith("_ptr")]
    divisible = (*pointers, *rows, *(name for name in outer if name == "stride_ctx_l"))
    return ones, divisible


@dataclass(frozen=True)
class Report:
    """What a compiled kernel needs."""

    registers: int  # a thread's
    stack: int  # bytes of local memory a thread, spills included
    shared: int  # bytes a program
    narrow_offsets: tuple[str, ...]  # lines that add a 32-bit offset to a pointer


def compile_for(specimen: Specimen, target: GPUTarget) -> Report:
    """Compile, and read what came out."""
    constexprs = {**specimen.constexprs, **specimen.unit_strides()}
    signature = {n: "constexpr" if n in constexprs else t for n, t in specimen.signature().items()}
    source = ASTSource(specimen.kernel, signature, constexprs, specimen.attributes())
    compiled = triton.compile(source, target=target, options={"num_warps": specimen.num_warps})
    if target.backend == "cuda":
        usage = _cubin_resources(compiled.asm["cubin"])
        registers, stack = _number(r"REG:(\d+)", usage), _number(r"STACK:(\d+)", usage) + _number(r"LOCAL:(\d+)", usage)
    else:
        usage = compiled.asm["amdgcn"]
        registers = _number(r"\.vgpr_count:\s+(\d+)", usage)
        stack = _number(r"\.private_segment_fixed_size:\s+(\d+)", usage)
    return Report(registers, stack, compiled.metadata.shared, narrow_offsets(compiled.asm["ttir"]))


def narrow_offsets(ttir: str) -> tuple[str, ...]:
    """
    Lines of TTIR that add to a pointer an offset computed in 32 bits: beyond 2**31 elements it wraps in silence.
    Constants are fine, and so is an offset that is only a lane number.
    """
    lanes = set(re.findall(r"(%\S+) = tt\.make_range", ttir)) | set(re.findall(r"(%\S+) = arith\.constant", ttir))
    lines = []
    for line in ttir.splitlines():
        if "tt.addptr" in line and re.search(r",\s*(tensor<[\dx]*i32>|i32)\s*(loc|$)", line):
            offset = re.search(r"tt\.addptr\s+%\S+,\s+(%[^\s:]+)", line)
            if offset is None or offset.group(1) not in lanes:
                lines.append(line.strip())
    return tuple(lines)


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    assert found is not None, f"{pattern} not in {text[:200]}"
    return int(found.group(1))


def _cubin_resources(cubin: bytes) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        run = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    return run.stdout


def table() -> str:
    """Markdown: registers a thread and shared bytes a program, by kernel and target."""
    lines = [
        "| kernel | warps | " + " | ".join(f"{name}: registers / shared bytes" for name in TARGETS) + " |",
        "|---|---|" + "---|" * len(TARGETS),
    ]
    for specimen in specimens():
        reports = [compile_for(specimen, target) for target in TARGETS.values()]
        cells = [f"{r.registers} / {r.shared}" + (f", stack {r.stack}" if r.stack else "") for r in reports]
        lines.append(f"| `{specimen.label}` | {specimen.num_warps} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
