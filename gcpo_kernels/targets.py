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
        return {n: 1 for n in self.kernel.arg_names if n in ("stride_u_v", "stride_z_h", "stride_ctx_h", "stride_h")}


_INTEGERS = {"B", "T", "L", "n", "m", "rows", "rows_per_batch", "first_v", "whole_v"}
_ALL_INPUTS = ("HAS_OLD", "HAS_REF", "HAS_QUERY", "HAS_CAUSAL", "HAS_IS", "HAS_CONTEXT", "HAS_WEIGHTS", "HAS_DELTA")


def specimens() -> list[Specimen]:
    """Every kernel, with every entry of its block table, and its costliest combination of flags."""
    found = []
    for by_sequence in (False, True):
        shapes = [(1, 100), (1, 512), (4, 4096), (4, 100_000)]
        for blocks, block_t in sorted({token_loss.blocking(b, t, by_sequence) for b, t in shapes}):
            level = "sequence" if by_sequence else "token"
            sizes = {"BLOCKS": blocks, "BLOCK_T": block_t, "BY_SEQUENCE": by_sequence}
            label = f"{level}, {blocks} x {block_t}"
            found += [
                Specimen(
                    f"token_loss ({label})",
                    token_loss.token_loss_kernel,
                    {**dict.fromkeys(_ALL_INPUTS, True), **sizes},
                    {"mask_ptr": "*u8"},
                ),
                Specimen(
                    f"token_loss_backward ({label})",
                    token_loss.token_loss_backward_kernel,
                    {"BY_COUNT": True, "HAS_CAUSAL": True, **sizes},
                    {"mask_ptr": "*u8"},
                ),
            ]
            if not by_sequence:
                flags = {"DIVIDE_BY": 0, "ITEMS_ON_DEVICE": False, "BLOCKS": blocks, "BLOCK_B": 1024 // blocks}
                found.append(Specimen(f"token_loss_finish ({blocks})", token_loss.token_loss_finish_kernel, flags))
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
    wide = [(n, 3584, element) for element in ("*bf16", "*fp32") for n in (8, 16, 64)]
    for candidates, hidden, element in [(8, 64, "*bf16"), (8, 576, "*bf16"), *wide]:
        narrow = element == "*bf16"
        forward = causal.tiling(candidates, hidden, causal.TILE_BYTES // (2 if narrow else 4))
        backward = causal.tiling(candidates, hidden, causal.TILE_ELEMENTS)
        flags = {"HAS_INDEX": True, "HAS_MASK": True, "LEAVE_ONE_OUT": True}
        types = {"z_ptr": element, "ctx_ptr": element, "index_ptr": "*i64", "samples": "i32"}
        label = f"n {candidates}, H {hidden}" + ("" if narrow else ", float32")
        found += [
            Specimen(f"causal_weights ({label})", causal.causal_weights_kernel, {**flags, **forward}, types),
            Specimen(
                f"causal_weights_backward ({label})",
                causal.causal_weights_backward_kernel,
                {**flags, **backward, "NEED_CONTEXT": True, "SIMILARITY": causal.EUCLIDEAN},
                {**types, "d_z_ptr": element, "d_ctx_ptr": element},
            ),
        ]
        if narrow:
            found.append(
                Specimen(f"leave_one_out ({label})", causal.leave_one_out_kernel, backward, {"z_ptr": element})
            )
    finish = {"SIMILARITY": causal.EUCLIDEAN, "BLOCKS": 28}
    finish |= dict(zip(("B_TILE", "ROW_TILE"), causal.FINISH_TILE, strict=True))
    found.append(Specimen("causal_weights_finish", causal.causal_weights_finish_kernel, finish))
    return found


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
    source = ASTSource(specimen.kernel, signature, constexprs)
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
