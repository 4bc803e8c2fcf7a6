"""
Ahead-of-time compilation of every Triton kernel, with no GPU: what each needs on each target, as a table.

`python -m gcpo_kernels.targets` prints the table of docs/kernels.md. A kernel that spills registers, or computes an
offset in 32 bits, is a bug that a test finds here before a GPU does; so is one that needs more instructions an element
than it may.
"""

import functools
import re
from dataclasses import dataclass
from typing import Any

import triton
from triton.backends.compiler import GPUTarget

from gcpo_kernels import sass
from gcpo_kernels.specimens import TARGETS, Specimen, specimens
from gcpo_kernels.specimens import find as find

COUNTED = "sm_90"  # whose instructions are counted


@dataclass(frozen=True)
class Report:
    """What a compiled kernel needs."""

    registers: int  # a thread's
    stack: int  # bytes of local memory a thread, spills included
    shared: int  # bytes a program
    narrow_offsets: tuple[str, ...]  # lines that add a 32-bit offset to a pointer


@functools.cache
def compiled(specimen: Specimen, target: GPUTarget) -> Any:
    """The specimen as Triton compiles it for a target."""
    options = {"num_warps": specimen.warps(target)}
    if specimen.num_stages is not None:
        options["num_stages"] = specimen.num_stages
    return triton.compile(specimen.source(), target=target, options=options)


@functools.cache
def compile_for(specimen: Specimen, target: GPUTarget) -> Report:
    """Compile, and read what came out."""
    found = compiled(specimen, target)
    if target.backend == "cuda":
        usage = sass.run_on(found.asm["cubin"], "cuobjdump", "--dump-resource-usage")
        registers, stack = _number(r"REG:(\d+)", usage), _number(r"STACK:(\d+)", usage) + _number(r"LOCAL:(\d+)", usage)
    else:
        usage = found.asm["amdgcn"]
        registers = _number(r"\.vgpr_count:\s+(\d+)", usage)
        stack = _number(r"\.private_segment_fixed_size:\s+(\d+)", usage)
    return Report(registers, stack, found.metadata.shared, narrow_offsets(found.asm["ttir"]))


@functools.cache
def count(specimen: Specimen) -> sass.Counts:
    """What its machine code for `COUNTED` does per element."""
    code = sass.parse(sass.run_on(compiled(specimen, TARGETS[COUNTED]).asm["cubin"], "nvdisasm", "-c", "-ndf"))
    return sass.count(code, specimen.stream_bytes(), specimen.tile_elements())


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


def table() -> str:
    """Markdown: registers a thread and shared bytes a program, by kernel and target, and what sm_90 executes."""
    heads = [f"{name}: registers / shared bytes" for name in TARGETS]
    heads += [f"{COUNTED}: instructions, exps an element", "widest load", "HGMMA", "TMA loads / stores"]
    lines = ["| kernel | warps | " + " | ".join(heads) + " |", "|---|---|" + "---|" * len(heads)]
    for specimen in specimens():
        cells = [f"`{specimen.label}`", str(specimen.num_warps)]
        cells += [_needs(specimen, target) for target in TARGETS] + _executes(specimen)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _needs(specimen: Specimen, target: str) -> str:
    if target not in specimen.targets:
        return ""
    report = compile_for(specimen, TARGETS[target])
    return f"{report.registers} / {report.shared}" + (f", stack {report.stack}" if report.stack else "")


def _executes(specimen: Specimen) -> list[str]:
    if COUNTED not in specimen.targets:
        return [""] * 4
    found = count(specimen)
    per_element = "" if found.instructions is None else f"{found.instructions:.1f}, {found.exps:.1f}"
    tma = f"{found.tma_loads} / {found.tma_stores}" if found.tma_loads or found.tma_stores else ""
    return [per_element, str(found.widest_load or ""), str(found.hgmma or ""), tma]


if __name__ == "__main__":
    print(table())
