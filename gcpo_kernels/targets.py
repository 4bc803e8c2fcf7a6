"""
Ahead-of-time compilation of every Triton kernel, with no GPU: what each needs on each target, as a table.

`python -m gcpo_kernels.targets` prints the table of docs/kernels.md. A kernel that spills registers, or computes an
offset in 32 bits, is a bug that a test finds here before a GPU does; so is one that needs more instructions an element
than it may.
"""

import functools
import math
import re
from dataclasses import dataclass, field, replace
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from gcpo_kernels import sass
from gcpo_kernels.triton_backend import causal, logprob, product, scale, token_loss

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


COUNTED = "sm_90"  # whose instructions are counted

_BITS = {"i1": 8, "u8": 8, "i8": 8, "fp16": 16, "bf16": 16, "i32": 32, "fp32": 32, "i64": 64, "fp64": 64}


@dataclass(frozen=True)
class Specimen:
    """
    One kernel with one choice of its compile-time arguments, as a launcher would make it.

    Attributes:
        types: of arguments; the rest follow from their names. Of a tensor descriptor: "tensordesc<bf16[128, 64]>".
        ones: strides that are 1, beside those that always are: Triton compiles them in.
        divisible: strides and lengths that Triton would find divisible by 16, and compile in as such. Pointers are
            without being named, as torch's allocations are aligned.
        stream: pointers that the inner loop reads, each once for an element; none if it streams nothing.
        tile: compile-time arguments whose product is the size of a program's output, if it makes a matrix product.
        targets: where it is launched; the others do not compile it.
    """

    label: str
    kernel: Any
    constexprs: dict[str, Any] = field(hash=False)
    types: dict[str, str] = field(default_factory=dict, hash=False)
    num_warps: int = 4
    ones: tuple[str, ...] = ()
    divisible: tuple[str, ...] = ()
    num_stages: int | None = None  # None: Triton's default
    stream: tuple[str, ...] = ()
    tile: tuple[str, ...] = ("BLOCK_M", "BLOCK_N")
    targets: tuple[str, ...] = tuple(TARGETS)

    def source(self) -> ASTSource:
        """What Triton compiles."""
        constexprs = {**self.constexprs, **self.unit_strides()}
        signature = {n: "constexpr" if n in constexprs else t for n, t in self.signature().items()}
        return ASTSource(self.kernel, signature, constexprs, self._attributes(signature))

    def _attributes(self, signature: dict[str, str]) -> dict[tuple[int], list[list[Any]]]:
        names = self.kernel.arg_names
        unspecialized = {names[x] if isinstance(x, int) else x for x in self.kernel.do_not_specialize}
        wrong = [n for n in self.divisible if n in unspecialized or signature.get(n, "fp32").startswith("fp")]
        if wrong:
            raise ValueError(f"{self.label}: Triton does not compile in that {wrong} are divisible by 16.")
        aligned = {n for n, kind in signature.items() if kind.startswith("*")} - unspecialized
        return {(names.index(n),): [["tt.divisibility", 16]] for n in names if n in aligned.union(self.divisible)}

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

    def stream_bytes(self) -> int | None:
        """What the inner loop reads for one element."""
        types = self.signature()
        return sum(_BITS[types[name].removeprefix("*")] for name in self.stream) // 8 or None

    def tile_elements(self) -> float | None:
        """A thread's elements of a program's output tile."""
        sizes = [self.constexprs[name] for name in self.tile if name in self.constexprs]
        return math.prod(sizes) / (32 * self.num_warps) if len(sizes) == len(self.tile) else None


_INTEGERS = {"B", "T", "L", "M", "n", "m", "parts", "rows", "rows_per_batch", "first_v", "whole_v"}
_PRODUCT_TYPES = {"ids_ptr": "*i64", "rows_ptr": "*i32"}
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
    found += _on_logits() + _products()
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


def _on_logits() -> list[Specimen]:
    """Passes over logits, with the costliest head; of a large vocabulary that is a multiple of 16, and of others."""
    found = []
    for vocab in (1000, 4096, 151_936):
        block = logprob.row_block(vocab, 4)
        options = {"num_warps": block.warps, "stream": ("u_ptr",)}
        head = {"HAS_SOFTCAP": True, "NEGATIVE": False, "V": vocab, **block.constexprs}
        rows = () if vocab % 16 else ("stride_u_b", "stride_u_t")
        found += [
            Specimen(
                f"logprob_forward (V {vocab})",
                logprob.logprob_forward_kernel,
                {"FIRST": False, "LAST": True, **head},
                {"ids_ptr": "*i64"},
                divisible=rows,
                **options,
            ),
            Specimen(
                f"logprob_backward (V {vocab})",
                logprob.logprob_backward_kernel,
                {"HAS_ENTROPY": True, "IN_PLACE": True, **head},
                {"ids_ptr": "*i64", "d_ptr": "*bf16"},
                divisible=(*rows, "stride_d") if rows else (),
                **options,
            ),
            Specimen(
                f"softmax_once (V {vocab})",
                logprob.softmax_once_kernel,
                head,
                {"ids_ptr": "*i64", "e_ptr": "*bf16"},
                divisible=("stride_u", "stride_e") if rows else (),
                **options,
            ),
        ]
    return found


def _products() -> list[Specimen]:
    """The product with a softmax in its epilogue, as devices launch it, and the small kernels after it."""
    hidden, vocab = 1536, 151_936
    found = []
    for score in (False, True):
        kind = "score" if score else "store"
        flags = {"NEGATIVE": False, "SCORE": score, "V": vocab, "H": hidden, "PROGRAMS": 132}
        by_descriptor = (("sm_90", product.HOPPER_BLOCKS), ("sm_100", product.BLACKWELL_BLOCKS))
        for target, blocks in by_descriptor:
            for head in (False, True):
                # The store's descriptor takes the place of a pointer that is not read when there is none.
                widths = {"x_ref": (blocks.m, blocks.k), "w_ref": (blocks.n, blocks.k)}
                widths["e_ref"] = (blocks.m, blocks.k if score else blocks.n // blocks.subtiles)
                found.append(
                    Specimen(
                        f"product ({kind}, {target}{', bias, softcap' if head else ''})",
                        product.product_kernel,
                        {"HAS_BIAS": head, "HAS_SOFTCAP": head, "GATHER": False, "TMA": True}
                        | flags
                        | blocks.constexprs,
                        {name: f"tensordesc<bf16[{m}, {k}]>" for name, (m, k) in widths.items()} | _PRODUCT_TYPES,
                        num_warps=blocks.warps,
                        num_stages=blocks.stages,
                        divisible=("stride_x", "stride_w", "stride_e"),
                        targets=(target,),
                    )
                )
        for dtype, blocks in (("bf16", product.POINTER_BLOCKS), ("fp32", product.FLOAT32_BLOCKS)):
            found.append(
                Specimen(
                    f"product ({kind}, rows of a list, {dtype})",
                    product.product_kernel,
                    {"HAS_BIAS": True, "HAS_SOFTCAP": True, "GATHER": True, "TMA": False} | flags | blocks.constexprs,
                    {name: f"*{dtype}" for name in ("x_ref", "w_ref", "e_ref")} | _PRODUCT_TYPES,
                    num_warps=blocks.warps,
                    num_stages=blocks.stages,
                    divisible=("stride_x", "stride_w", "stride_e"),
                )
            )
        flags = {"HAS_SOFTCAP": True, "NEGATIVE": False, "GATHER": True, "V": vocab}
        flags |= {"BLOCK_M": product.COMBINE_ROWS, "BLOCK_P": product.COMBINE_PARTS}
        kernel = product.combine_scores_kernel if score else product.combine_exponentials_kernel
        found.append(Specimen(f"combine ({kind})", kernel, flags, {**_PRODUCT_TYPES, "e_ptr": "*bf16"}))
    sizes = {"V": vocab, "H": hidden, "BLOCK_H": product.TARGET_BLOCK}
    return [
        *found,
        Specimen("redo_list", product.redo_list_kernel, {"BLOCK": product.LIST_BLOCK}, _PRODUCT_TYPES),
        Specimen(
            "target_logits",
            product.target_logits_kernel,
            {"HAS_BIAS": True, "HAS_SOFTCAP": True, "NEGATIVE": False, **sizes},
            {"x_ptr": "*bf16", "w_ptr": "*bf16", **_PRODUCT_TYPES},
        ),
        Specimen("scale", scale.scale_kernel, {"BLOCK": scale.BLOCK}, {"x_ptr": "*bf16"}),
    ]


@dataclass(frozen=True)
class Report:
    """What a compiled kernel needs."""

    registers: int  # a thread's
    stack: int  # bytes of local memory a thread, spills included
    shared: int  # bytes a program
    narrow_offsets: tuple[str, ...]  # lines that add a 32-bit offset to a pointer


@functools.cache
def _compiled(specimen: Specimen, target: GPUTarget) -> Any:
    options = {"num_warps": specimen.num_warps}
    if specimen.num_stages is not None:
        options["num_stages"] = specimen.num_stages
    return triton.compile(specimen.source(), target=target, options=options)


@functools.cache
def compile_for(specimen: Specimen, target: GPUTarget) -> Report:
    """Compile, and read what came out."""
    compiled = _compiled(specimen, target)
    if target.backend == "cuda":
        usage = sass.run_on(compiled.asm["cubin"], "cuobjdump", "--dump-resource-usage")
        registers, stack = _number(r"REG:(\d+)", usage), _number(r"STACK:(\d+)", usage) + _number(r"LOCAL:(\d+)", usage)
    else:
        usage = compiled.asm["amdgcn"]
        registers = _number(r"\.vgpr_count:\s+(\d+)", usage)
        stack = _number(r"\.private_segment_fixed_size:\s+(\d+)", usage)
    return Report(registers, stack, compiled.metadata.shared, narrow_offsets(compiled.asm["ttir"]))


@functools.cache
def count(specimen: Specimen) -> sass.Counts:
    """What its machine code for `COUNTED` does per element."""
    code = sass.parse(sass.run_on(_compiled(specimen, TARGETS[COUNTED]).asm["cubin"], "nvdisasm", "-c", "-ndf"))
    return sass.count(code, specimen.stream_bytes(), specimen.tile_elements())


def find(label: str, types: dict[str, str] | None = None, **constexprs: Any) -> Specimen | None:
    """The specimen of that label, with other types and compile-time arguments if given; None if there is none."""
    for x in specimens():
        if x.label == label:
            return replace(x, types={**x.types, **(types or {})}, constexprs={**x.constexprs, **constexprs})
    return None


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
