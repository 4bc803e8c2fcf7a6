"""
What the processor will execute, read from a kernel's machine code (SASS): instructions, exponentials and loads an
element, and whether products run on the tensor cores and through the tensor memory accelerator (TMA).

No GPU is needed: nvdisasm comes with Triton. The counts are of instructions issued, predicated ones among them.
"""

import re
import subprocess
import tempfile
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import triton

_WIDTHS = {"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128, "256": 256}


@dataclass(frozen=True)
class Instruction:
    opcode: str  # with its modifiers, LDG.E.128
    target: int | None  # where a branch goes, an index into the list of instructions
    always: bool  # carries no predicate

    def is_a(self, *names: str) -> bool:
        return self.opcode.split(".")[0] in names


@dataclass(frozen=True)
class Counts:
    """
    Of one kernel. "An element" is one that the inner loop streams or, for a product, one of its output: there the
    loop over k is left out, and what remains is the epilogue.
    """

    elements: float | None  # a thread's in one turn of the inner loop, or in one tile; None if there is neither
    instructions: float | None  # an element
    exps: float | None  # an element
    loads: tuple[tuple[int, int], ...]  # (bits, how many) of the inner loop, or of the kernel if there is none
    hgmma: int  # warp-group products
    tma_loads: int
    tma_stores: int

    @property
    def widest_load(self) -> int:
        """Bits a thread; 0 without loads."""
        return max((bits for bits, _ in self.loads), default=0)


def tool(name: str) -> Path:
    """A program that comes with Triton."""
    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name


def run_on(cubin: bytes, name: str, *flags: str) -> str:
    """The output of one of those programs on a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        run = subprocess.run([tool(name), *flags, file.name], capture_output=True, text=True, check=True)
    return run.stdout


def parse(text: str) -> list[Instruction]:
    """The instructions that `nvdisasm -c -ndf` prints, in order. Labels become indices."""
    labels: dict[str, int] = {}
    found: list[tuple[str, str | None, bool]] = []
    for line in text.splitlines():
        label = re.match(r"(\.L_\w+):", line)
        if label:
            labels[label[1]] = len(found)
        code = re.match(r"\s+/\*[0-9a-f]+\*/\s+\{?\s*(@!?U?P\w+\s+)?([A-Z][\w.]*)(.*)", line)
        if code:
            goes = re.search(r"\((\.L_\w+)\)", code[3]) if code[2].split(".")[0] == "BRA" else None
            found.append((code[2], goes[1] if goes else None, code[1] is None))
    return [Instruction(op, labels[goes] if goes else None, always) for op, goes, always in found]


def loops(code: list[Instruction]) -> list[range]:
    """From the target of each backward branch to the branch. One to itself is no loop: such a branch ends a kernel."""
    return [range(x.target, i + 1) for i, x in enumerate(code) if x.target is not None and x.target < i]


def count(code: list[Instruction], stream_bytes: int | None, tile_elements: float | None = None) -> Counts:
    """
    What `code` does per element.

    Args:
        stream_bytes: what the inner loop loads for one element, of all pointers together; None if it streams nothing.
        tile_elements: a thread's elements of the output tile, where the kernel is a product.
    """
    where: list[int] = list(range(len(code)))
    elements = None
    if any(x.is_a("HGMMA") for x in code):
        where, elements = _outside_the_product(code), tile_elements
    elif stream_bytes is not None:
        loop = _streaming(code)
        if loop is not None:
            where, elements = list(loop), sum(_width(code[i]) for i in loop) / (8 * stream_bytes)
    exps = sum(code[i].opcode.startswith("MUFU.EX2") for i in where)
    loads = Counter(bits for i in where if (bits := _width(code[i])))
    return Counts(
        elements=elements,
        instructions=len(where) / elements if elements else None,
        exps=exps / elements if elements else None,
        loads=tuple(sorted(loads.items(), reverse=True)),
        hgmma=sum(x.is_a("HGMMA") for x in code),
        tma_loads=sum(x.is_a("UTMALDG") for x in code),
        tma_stores=sum(x.is_a("UTMASTG") for x in code),
    )


def _width(x: Instruction) -> int:
    """Bits that a thread loads from global memory, 0 for any other instruction."""
    if not x.is_a("LDG", "LDGSTS"):
        return 0
    return next((_WIDTHS[part] for part in x.opcode.split(".")[1:] if part in _WIDTHS), 32)


def _streaming(code: list[Instruction]) -> range | None:
    """
    The loop that loads most in a turn; of two, the shorter: a masked tail may load as much as the main part. None in a
    kernel that holds its whole row at once.
    """
    every = loops(code)
    inner = [x for x in every if not any(y != x and y.start >= x.start and y.stop <= x.stop for y in every)]
    loading = [x for x in inner if any(_width(code[i]) for i in x)]
    return max(loading, key=lambda x: (sum(_width(code[i]) for i in x), -len(x)), default=None)


def _outside_the_product(code: list[Instruction]) -> list[int]:
    """
    The loop over tiles (or the kernel, if each program makes one tile) without the loop over k. Triton flattens the two
    into one loop, in which the epilogue is skipped until k is done: so the loop over k is found as the shortest way
    from a product back to itself, and the epilogue as the shortest ways from its exponentials, where there are any.
    That leaves out branches that few tiles take.
    """
    ways = [way for i, x in enumerate(code) if x.is_a("HGMMA") if (way := _shortest_cycle(code, i))]
    shortest: list[int] = min(ways, key=len, default=[])
    over_k = set(shortest)
    around: set[int] = set()
    for i, x in enumerate(code):
        if x.opcode.startswith("MUFU.EX2") and i not in over_k and i not in around:
            around |= set(_shortest_cycle(code, i) or ())
    if around:
        return sorted(around - over_k)
    loops_around = [x for x in loops(code) if any(code[i].is_a("HGMMA") for i in x)]
    outer = max(loops_around, key=len, default=range(len(code)))
    if over_k and over_k.issuperset(outer):
        outer = range(len(code))
    return [i for i in outer if i not in over_k]


def _shortest_cycle(code: list[Instruction], start: int) -> list[int] | None:
    """Instructions of the shortest way from one back to itself, None if there is none."""
    came: dict[int, int] = {}
    waiting = deque([start])
    while waiting:
        at = waiting.popleft()
        for after in _successors(code, at):
            if after == start:
                way = [at]
                while at != start:
                    at = came[at]
                    way.append(at)
                return way
            if after not in came:
                came[after] = at
                waiting.append(after)
    return None


def _successors(code: list[Instruction], at: int) -> Iterator[int]:
    x = code[at]
    if x.target is not None:
        yield x.target
    ends = x.always and (x.target is not None or x.is_a("EXIT", "RET"))
    if not ends and at + 1 < len(code):
        yield at + 1
