"""What is compiled ahead of time: every kernel, as its launcher would make it. See targets.py."""

import math
from dataclasses import dataclass, field, replace
from typing import Any

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from gcpo_kernels.options import KINDS
from gcpo_kernels.triton_backend import causal, logprob, product, scale, token_loss

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
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
        threads: as many as that, in warps as wide as the target's, in place of `num_warps`.
    """

    label: str
    kernel: Any
    constexprs: dict[str, Any] = field(hash=False)
    types: dict[str, str] = field(default_factory=dict, hash=False)
    num_warps: int = 4  # of 32 threads
    ones: tuple[str, ...] = ()
    divisible: tuple[str, ...] = ()
    num_stages: int | None = None  # None: Triton's default
    stream: tuple[str, ...] = ()
    tile: tuple[str, ...] = ("BLOCK_M", "BLOCK_N")
    targets: tuple[str, ...] = tuple(TARGETS)
    threads: int | None = None

    def warps(self, target: GPUTarget) -> int:
        return self.num_warps if self.threads is None else max(1, self.threads // target.warp_size)

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


_INTEGERS = {"B", "T", "L", "M", "BLOCKS", "n", "m", "parts", "rows", "rows_per_batch", "first_v", "whole_v"}
_PRODUCT_TYPES = {"ids_ptr": "*i64", "rows_ptr": "*i32"}
# The token loss as it is for the clipped losses without the options that came with the others.
_CLIPPED = {"HAS_KAPPA_WEIGHTS": False, "BIAS_CORRECTION": False, "KIND": 0}
_ALL_INPUTS = ("HAS_OLD", "HAS_REF", "HAS_QUERY", "HAS_CAUSAL", "HAS_IS", "HAS_CONTEXT", "HAS_WEIGHTS", "HAS_DELTA")


def specimens() -> list[Specimen]:
    """Every kernel, with every entry of its block table, and its costliest combination of flags."""
    return [*_token_loss(), *_on_logits(), *_products(), *_causal_weights()]


def _token_loss() -> list[Specimen]:
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
            flags = {
                **dict.fromkeys(_ALL_INPUTS, True),
                **_CLIPPED,
                "HAS_KL_CLIP": False,
                "ADV_BY_TOKEN": True,
                "ALIGNED_T": aligned,
            }
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
            **_CLIPPED,
            **{"HAS_KL_CLIP": False, "ADV_BY_TOKEN": True, "BY_SEQUENCE": False, "BLOCK_T": 512},
            **{"ALIGNED_T": aligned, "L_INNERMOST": innermost, "BLOCK_L": 4},
        }
        kernel = token_loss.token_loss_kernel
        ones, divisible = _common_layout(kernel, ("stride_ctx_t",) if innermost else ("stride_ctx_l",))
        divisible = divisible if aligned else ()
        types = {"mask_ptr": "*u8"}
        found.append(Specimen(f"token_loss (token, 512, {label})", kernel, constexprs, types, 4, ones, divisible))
    for parts in (1, 2, 4, 8, 16, 32, 64):
        constexprs = {
            "DIVIDE_BY": 0,
            "ITEMS_ON_DEVICE": False,
            "HAS_KL_CLIP": False,
            "HAS_KAPPA_WEIGHTS": False,
            "BLOCK_P": parts,
            "BLOCK_B": max(16, 1024 // parts),
        }
        found.append(Specimen(f"token_loss_finish ({parts})", token_loss.token_loss_finish_kernel, constexprs))
    more = {"HAS_KAPPA_WEIGHTS": True, "HAS_KL_CLIP": True}
    all_sums = Specimen("token_loss_finish (64, all sums)", token_loss.token_loss_finish_kernel, constexprs | more)
    return [*found, all_sums, *_other_losses()]


def _other_losses() -> list[Specimen]:
    """
    In the common layout: every kind of policy term with the weights of the causal term and the corrected KL, and the
    clipped one with a kl_clip.
    """
    found = []
    kernel = token_loss.token_loss_kernel
    ones, divisible = _common_layout(kernel, ("stride_ctx_t",))
    for by_sequence in (False, True):
        block_t = token_loss.blocking(4, 4096, by_sequence)[1]
        for index, kind in enumerate(KINDS):
            flags = {"HAS_KL_CLIP": False, "ADV_BY_TOKEN": True, "ALIGNED_T": True, "L_INNERMOST": True, "BLOCK_L": 4}
            constexprs = {**dict.fromkeys(_ALL_INPUTS, True), **flags, "HAS_DELTA": kind == "clipped", "KIND": index}
            constexprs |= {"HAS_KAPPA_WEIGHTS": True, "BIAS_CORRECTION": True}
            constexprs |= {"BLOCK_T": block_t, "BY_SEQUENCE": by_sequence}
            label = f"token_loss ({'sequence' if by_sequence else 'token'}, {block_t}, {kind}, weighted, corrected)"
            warps = token_loss.warps(block_t, crowded=True)
            found.append(Specimen(label, kernel, constexprs, {"mask_ptr": "*u8"}, warps, ones, divisible))
        clip = {**constexprs, **_CLIPPED, "HAS_DELTA": True, "HAS_KL_CLIP": True}
        label = f"token_loss ({'sequence' if by_sequence else 'token'}, {block_t}, kl_clip)"
        found.append(Specimen(label, kernel, clip, {"mask_ptr": "*u8"}, warps, ones, divisible))
    return found


def _common_layout(kernel: Any, outer: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """
    (strides that are 1, arguments that divide by 16): of contiguous tensors that torch allocated, whose rows are
    multiples of 16 long. `outer`: strides whose name says innermost, but that are not.
    """
    strides = [name for name in kernel.arg_names if name.startswith("stride_")]
    ones = tuple(name for name in strides if name.endswith(("_t", "_l")) and name not in outer)
    rows = [name for name in strides if name.endswith("_b") and name != "stride_w_b"]
    divisible = (*rows, *(name for name in outer if name == "stride_ctx_l"))
    return ones, divisible


def _causal_weights() -> list[Specimen]:
    """Few candidates, a tile's, and more than a tile holds; the finishing kernel of the longest rows."""
    found = []
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
    tile = causal.COEFFICIENTS_TILE
    found.append(Specimen("coefficients", causal.coefficients_kernel, tile, {"mask_ptr": "*u8"}, num_warps=1))
    return found


def _on_logits() -> list[Specimen]:
    """Passes over logits, with the costliest head; of a large vocabulary that is a multiple of 16, and of others."""
    found = []
    for vocab in (1000, 4096, 151_936):
        block = logprob.row_block(vocab, 4)
        options: dict[str, Any] = {"num_warps": block.warps, "threads": block.lanes, "stream": ("u_ptr",)}
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
                    dict.fromkeys(("x_ref", "w_ref", "e_ref"), f"*{dtype}") | _PRODUCT_TYPES,
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


def find(label: str, types: dict[str, str] | None = None, **constexprs: Any) -> Specimen | None:
    """The specimen of that label, with other types and compile-time arguments if given; None if there is none."""
    for x in specimens():
        if x.label == label:
            return replace(x, types={**x.types, **(types or {})}, constexprs={**x.constexprs, **constexprs})
    return None
