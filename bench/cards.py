"""
What is assumed of an H100 and an H200, and how long one product or one pass over memory then takes.

What may not overlap is taken not to.
"""

import math
from dataclasses import dataclass

from gcpo_kernels import sass


@dataclass(frozen=True)
class Card:
    """What is assumed of a GPU. An estimate is nobody's publication, and on the side of the slower."""

    name: str
    flops: float  # bfloat16 products of this size a second
    copy: float  # bytes a second that a copy moves, read and written together
    cache: float  # bytes a second from the L2 cache, estimate
    sms: int = 132  # data sheet, SXM
    lanes: int = 128  # instructions of one thread a cycle an SM: four schedulers of a warp each
    exps: int = 16  # exponentials a cycle an SM (CUDA programming guide, arithmetic throughput of 9.0)
    clock: float = 1.75e9  # estimate, under load; the data sheet's boost is 1.98
    issue: float = 0.75  # share of issue slots that a loop without products fills, estimate
    stream: float = 0.92  # share of a copy's rate that one pass over memory reaches, estimate
    own_product: float = 0.90  # speed of Triton's product beside the vendor's, estimate
    staging: float = 1200  # cycles a tile that a store's barriers and waits add to its exponentials, estimate
    exposed_store: float = 0.4  # share of a product's output that is not hidden behind it, estimate
    exposed_sum: float = 0.5  # the same of sums that a product reads and writes, estimate
    launch: float = 2e-6  # seconds from a kernel's last instruction to the next one's first, submitted ahead, estimate
    host: float = 45e-6  # seconds of Python for one product and one kernel, estimate


CARDS = (
    # 706 to 738 (CuTe) and 648 to 709 (cuBLAS) in Liger #1370; 3.35 TB/s in the data sheet, copies reach nine tenths.
    Card("H100", flops=700e12, copy=3.0e12, cache=5.0e12),
    # 748 to 791 in Liger #1422; 4.8 TB/s in the data sheet, copies reach nine tenths.
    Card("H200", flops=790e12, copy=4.3e12, cache=5.5e12),
)


def tiled(m: int, n: int, block_m: int, block_n: int, sms: int) -> float:
    """Share of the processors' time that the output of (m, n) in tiles of that size uses."""
    waves = math.ceil(math.ceil(m / block_m) * math.ceil(n / block_n) / sms)
    return m * n / (block_m * block_n) / (waves * sms)


def product(m: int, n: int, k: int, card: Card) -> float:
    """Seconds of m n k multiplications at full speed."""
    return 2 * m * n * k / card.flops


def cycles(found: sass.Counts, card: Card) -> float:
    """An SM's, for one element."""
    assert found.instructions is not None and found.exps is not None
    return max(found.instructions / (card.lanes * card.issue), found.exps / card.exps)


def one_pass(elements: float, bytes_each: float, found: sass.Counts, card: Card) -> float:
    """Seconds of a pass over memory: of traffic or of instructions, whichever takes longer."""
    return elements * max(bytes_each / (card.stream * card.copy), cycles(found, card) / (card.sms * card.clock))


def own_product(m: int, n: int, k: int, found: sass.Counts, card: Card) -> float:
    """
    Seconds of Triton's persistent product in tiles of 128 x 256, whose epilogue nothing hides: its instructions, or its
    exponentials and what a store waits for, whichever takes longer.
    """
    assert found.exps is not None
    main = product(128, 256, k, card) * card.sms * card.clock  # cycles
    waits = 128 * 256 * found.exps / card.exps + (card.staging if found.tma_stores else 0.0)
    epilogue = max(128 * 256 * cycles(found, card), waits)
    fast = product(m, n, k, card) / tiled(m, n, 128, 256, card.sms)
    return fast * (1 + epilogue / main) / card.own_product


def traffic(moved: float, launches: int, card: Card) -> float:
    """Seconds of kernels that only move bytes, launched one after the other."""
    return moved / (card.stream * card.copy) + launches * card.launch
