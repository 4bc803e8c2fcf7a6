"""
Predicted times on an H100 and an H200, from bytes, instructions, launches and the fill of waves. None is measured.

`python -m bench.predict` prints the table of docs/kernels.md. Instructions are counted in machine code
(`gcpo_kernels.targets`); rates are assumptions (`bench/cards.py`). What may not overlap is taken not to, so a GPU
should be no slower: where it is, something is not understood. The latency of loads that depend on each other, which
counts in kernels of few programs, is not in it. Where a result of such a card is kept in bench/results, its times stand
beside.
"""

import functools
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from bench.cards import CARDS, Card, cycles, one_pass, own_product, product, traffic
from bench.registry import MODELS, PUBLISHED, Case
from bench.report import FILE, RESULTS
from gcpo_kernels import sass, targets
from gcpo_kernels.triton_backend.tiling import tile_rows, wave_fill


@dataclass(frozen=True)
class Counted:
    """A specimen whose instructions are counted, with what differs from it where it is launched."""

    label: str
    types: dict[str, str] = field(default_factory=dict)
    flags: dict[str, bool] = field(default_factory=dict)


_PLAIN = {"HAS_SOFTCAP": False}
KERNELS = {
    "forward": Counted("logprob_forward (V 151936)", flags=_PLAIN),
    "backward": Counted("logprob_backward (V 151936)", flags=_PLAIN | {"HAS_ENTROPY": False}),
    "forward, half": Counted("logprob_forward (V 151936)", {"u_ptr": "*bf16"}, _PLAIN),
    "backward, half": Counted("logprob_backward (V 151936)", {"u_ptr": "*bf16"}, _PLAIN | {"HAS_ENTROPY": False}),
    "one read": Counted("softmax_once (V 151936)", flags=_PLAIN),
    "epilogue": Counted("product (store, sm_90)"),
    "epilogue, scoring": Counted("product (score, sm_90)"),
}


@functools.cache
def counts(name: str) -> sass.Counts | None:
    """Of one of KERNELS; None if there is no such kernel: then what needs it is left out."""
    wanted = KERNELS[name]
    specimen = targets.find(wanted.label, wanted.types, **wanted.flags)
    return None if specimen is None else targets.count(specimen)


def heights(tokens: int, rows: int) -> list[int]:
    """Of every tile; the last may be lower."""
    return [min(rows, tokens - first) for first in range(0, tokens, rows)]


# ---------------------------------------------------------------------------------------------------------------------
# Operations
# ---------------------------------------------------------------------------------------------------------------------


# By variant: of KERNELS; and two estimates, bytes of hidden states and of their gradients that are gathered, scaled and
# scattered, by N H, and launches a tile.
_NEEDS = {"two reads": ("forward", "backward"), "one read": ("one read",), "epilogue": ("epilogue",)}
_AROUND = {"two reads": (14, 7), "one read": (14, 13), "epilogue": (14, 14)}


def linear_loss(n: int, h: int, v: int, card: Card, how: str, found: list[sass.Counts], rows: int) -> dict[str, float]:
    """Seconds by part of `linear_gcpo_loss` with both gradients, in tiles of that many rows."""
    tiles = heights(n, rows)
    again = len(tiles) - 1
    parts: dict[str, float] = {}
    if how == "epilogue":
        parts["logits"] = sum(own_product(m, v, h, found[0], card) for m in tiles)
    else:
        parts["logits"] = product(n, v, h, card) + card.exposed_store * 4 * n * v / card.copy
        moved = (4, 6) if how == "two reads" else (6,)
        parts["passes"] = sum(one_pass(n * v, b, x, card) for b, x in zip(moved, found, strict=True))
    parts["dX"] = sum(product(m, h, v, card) / wave_fill(m, h, card.sms) for m in tiles)
    parts["dW"] = product(v, h, n, card) + card.exposed_sum * again * 8 * v * h / card.copy
    parts["cast"] = 6 * v * h / card.copy if again else 0.0
    around, launches = _AROUND[how]
    parts["around"] = around * n * h / card.copy
    parts["launches"] = (launches * len(tiles) + 10) * card.launch
    return parts


_SLICE_ROWS, _SLICE_VOCAB = 2048, 4096


def scoring_in_slices(n: int, h: int, v: int, card: Card, found: sass.Counts) -> float:
    """Seconds of `linear_logprob` without gradient: slices that stay in the L2 cache, one after the other."""
    seconds, slices = 0.0, 0
    for m in heights(n, _SLICE_ROWS):
        for w in heights(v, _SLICE_VOCAB):
            seconds += product(m, w, h, card) / wave_fill(m, w, card.sms)
            seconds += m * w * max(4 / card.cache, cycles(found, card) / (card.sms * card.clock)) + 2 * card.launch
            slices += 1
    return max(seconds, slices * card.host)


def scoring_in_product(n: int, h: int, v: int, card: Card, found: sass.Counts) -> float:
    """Seconds of one product that stores a maximum and two sums a row and block of columns, and of combining them."""
    return own_product(n, v, h, found, card) + 12 * n * (v / 256) / (card.stream * card.copy) + 3 * card.launch


# ---------------------------------------------------------------------------------------------------------------------
# Rows
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    what: str
    at: str
    how: str
    times: dict[str, tuple[float, float]]  # card: (floor, prediction), seconds
    key: str = ""  # of the case that measures it, and which of its phases
    phase: str = ""


def rows() -> Iterator[Row]:
    """Those whose kernels exist."""
    for n, model in PUBLISHED:
        h, v = MODELS[model]
        case = Case("linear_loss", model, tokens=n // 8, hidden=h, vocab=v, dtype=torch.bfloat16)
        for how, needs in _NEEDS.items():
            found = [x for x in map(counts, needs) if x is not None]
            if len(found) < len(needs):
                continue
            m = tile_rows(n, h, v, CARDS[0].sms, 2 if how == "epilogue" else 4)
            way = f"{how} ({_instructions(found)}), {len(heights(n, m))} x {m} rows"
            times = {
                c.name: (3 * product(n, v, h, c), sum(linear_loss(n, h, v, c, how, found, m).values())) for c in CARDS
            }
            yield Row("`linear_gcpo_loss`, gradients", f"{n} x {h} x {v}", way, times, case.key, "both")
    for n, model in PUBLISHED:
        h, v = MODELS[model]
        case = Case("scoring", model, tokens=n // 8, hidden=h, vocab=v, dtype=torch.bfloat16)
        ways = (("slices", "forward", scoring_in_slices), ("one product", "epilogue, scoring", scoring_in_product))
        for how, needed, seconds in ways:
            if (counted := counts(needed)) is not None:
                times = {c.name: (product(n, v, h, c), seconds(n, h, v, c, counted)) for c in CARDS}
                way = f"{how} ({_instructions([counted])})"
                yield Row("`linear_logprob`, no gradient", f"{n} x {h} x {v}", way, times, case.key, "forward")
    yield from _on_logits(8192, "Qwen2.5-1.5B")
    yield from _in_bytes()


def _on_logits(n: int, model: str) -> Iterator[Row]:
    """`selective_logprob` on bfloat16 logits, as the loss from logits calls it."""
    h, v = MODELS[model]
    case = Case("logits_loss", model, tokens=n // 8, hidden=h, vocab=v, dtype=torch.bfloat16)
    for phase, moved, launches in (("forward", 2, 3), ("backward", 4, 2)):
        found = counts(f"{phase}, half")
        if found is not None:
            times = {
                c.name: (moved * n * v / c.copy, one_pass(n * v, moved, found, c) + launches * c.launch) for c in CARDS
            }
            way = f"bfloat16 ({_instructions([found])})"
            yield Row(f"`selective_logprob` {phase}, and the loss", f"{n} x {v}", way, times, case.key, phase)


def _in_bytes() -> Iterator[Row]:
    """Kernels of which bytes and launches count, with the formulas of docs/kernels.md."""

    def times(moved: float, launches: int, least: int) -> dict[str, tuple[float, float]]:
        return {c.name: (max(moved / c.copy, least * c.launch), traffic(moved, launches, c)) for c in CARDS}

    for n in (16_384, 16_777_216):
        for objective, read in (("grpo", 17), ("gcpo", 21 + 4 * 4)):
            case = Case("token_loss", batch=n // 2048, tokens=2048, objective=objective)
            what = "`gcpo_loss` and its backward"
            yield Row(what, f"N = {n}, {objective}", "3 launches", times((read + 8) * n, 3, 2), case.key, "both")
    for p, candidates, contexts, h in ((64, 8, 8, 3584), (8, 8, 4, 1536)):
        case = Case("causal_weights", "", p, candidates, h, contexts=contexts, dtype=torch.bfloat16)
        at, read = f"P = {p}, n = {candidates}, L = {contexts}, H = {h}", 2 * p * candidates * h * (1 + contexts)
        yield Row("`causal_weights`", at, "2 launches", times(read + 16 * p * candidates, 2, 1), case.key, "forward")
        yield Row("`causal_weights` backward", at, "1 launch", times(2 * read, 1, 1))
        yield Row("`leave_one_out_mean`", at, "1 launch", times(6 * p * candidates * h, 1, 1))


# ---------------------------------------------------------------------------------------------------------------------
# The table
# ---------------------------------------------------------------------------------------------------------------------


def measured(folder: Path = RESULTS) -> dict[str, dict[tuple[str, str], float]]:
    """Seconds by card, case and phase, from the results that are kept of such a card."""
    kept: dict[str, dict[tuple[str, str], float]] = {}
    for path in sorted(folder.glob(f"*/{FILE}")):
        result = json.loads(path.read_text())
        for card in CARDS:
            if card.name in result["environment"]["device"]:
                kept[card.name] = {
                    (entry["key"], phase): found["median"] / 1e3
                    for entry in result["cases"]
                    for row in entry.get("results", [])
                    if row["name"] == "gcpo" and "times" in row
                    for phase, found in row["times"].items()
                    if isinstance(found, dict)
                }
    return kept


def table(folder: Path = RESULTS) -> str:
    """Markdown. Columns of measured times are there for the cards that have any."""
    kept = measured(folder)
    heads = [f"{card.name}: floor | predicted | ratio" for card in CARDS]
    heads += [f"{name}: **measured**" for name in kept]
    lines = ["| operation | at | how | " + " | ".join(heads) + " |"]
    lines.append("|" + "---|" * (lines[0].count("|") - 1))
    for row in rows():
        cells = [row.what, row.at, row.how]
        for floor, seconds in (row.times[card.name] for card in CARDS):
            cells += [_shown(floor), _shown(seconds), f"{seconds / floor:.2f}"]
        for name, times in kept.items():
            found = times.get((row.key, row.phase))
            cells.append("" if found is None else f"{_shown(found)}, {found / row.times[name][1]:.2f} of predicted")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _instructions(found: list[sass.Counts]) -> str:
    return " + ".join(f"{x.instructions:.1f}" for x in found) + " instructions"


def _shown(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-4 else f"{seconds * 1e6:.3g} us"


if __name__ == "__main__":
    print(table())
