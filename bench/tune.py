"""
Sweeps of what the kernels choose, each value checked against float64 and timed beside the present choice and the floor:
which kernels the linear loss and scoring take, rows of a tile, slices of scoring, blocks of our own product and the
order of its tiles, blocks of the token loss and of the passes over a tile.

    python -m bench.tune --out runs/tune.json          # on a GPU
    python -m bench.tune --sweep "order of tiles" --case scoring/N=16384
    python -m bench.tune --gate runs/gate.json         # which kernels, for GCPO_KERNELS_GATE=runs/gate.json
    python -m bench.tune --device cpu --case N=1024    # tiles of the torch backend

Nothing else is changed: sizes that win go into the sources by hand, with their before and after.
"""

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from tqdm import tqdm

from bench import measure, run
from bench.baselines import IMPLEMENTATIONS
from bench.clocks import Clocks
from bench.environment import device_name
from bench.files import write_json
from bench.gate import Gate, outcome
from bench.memory import extra_memory
from bench.registry import LEAVES, Case, cases, make_tensors, tiny_cases
from gcpo.run.table import markdown
from gcpo_kernels import torch_backend
from gcpo_kernels.triton_backend import gate

OURS = IMPLEMENTATIONS[0]


@dataclass(frozen=True)
class Setting:
    """A value of a sweep: what it is called, and what replaces which attribute of which object while it runs."""

    name: str
    replacements: tuple[tuple[Any, str, Any], ...] = field(default=())

    def applied(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def with_setting(*given: Any) -> Any:
            with ExitStack() as stack:
                for target, name, value in self.replacements:
                    stack.enter_context(mock.patch.object(target, name, value))
                return function(*given)

        return with_setting


def tile_rows(case: Case) -> Iterator[Setting]:
    """Tokens per tile, of either backend; those that fill a tile no better than fewer are left out."""
    counts = (256, 512, 1024, 1536, 2048, 2816, 3072, 3584, 4096, 5632, 8192)
    for rows in [n for n in counts if n < case.rows] + [case.rows]:
        yield Setting(f"{rows} rows a tile", ((_tiles(case), "rows", lambda self, *given, rows=rows: rows),))


def _tiles(case: Case) -> type:
    if case.dtype == torch.float32:
        return torch_backend.TorchTiles
    from gcpo_kernels.triton_backend.linear import TritonTiles

    return TritonTiles


def cpu_blocks(case: Case) -> Iterator[Setting]:
    """Entries of a tile that are handled at a time."""
    for power in range(14, 23, 2):
        sizes = torch_backend._BLOCK_ELEMENTS | {"cpu": 1 << power}
        yield Setting(f"2**{power} entries a block", ((torch_backend, "_BLOCK_ELEMENTS", sizes),))


def kernels(case: Case) -> Iterator[Setting]:
    """The ways that the gate chooses from."""
    operation = _OPERATIONS[case.op]
    for name in gate.KERNELS[operation]:
        yield Setting(name, (_taking(operation, name),))


def _taking(operation: str, kernel: str) -> tuple[Any, str, Any]:
    def choose(asked: str, *rest: Any) -> str:
        return kernel if asked == operation else gate.KERNELS[asked][0]

    return gate, "choose", choose


def product_blocks(case: Case) -> Iterator[Setting]:
    """Of our own product, where it copies by descriptor."""
    from gcpo_kernels.triton_backend import product

    operation = _OPERATIONS[case.op]
    taking = _taking(operation, "epilogue" if operation == "loss" else "product")
    # Each is compiled, which takes seconds: the likeliest first, and none that spills registers.
    wide = (
        (128, 256, 64, 4, 4),
        (128, 256, 64, 4, 2),
        (128, 256, 64, 3, 2),
        (128, 256, 128, 2, 4),
        (128, 256, 64, 3, 1),
    )
    for m, n, k, stages, parts in (*wide, (256, 128, 64, 4, 4), (128, 128, 64, 4, 4)):
        blocks = product.Blocks(m, n, k, 8, stages, parts)
        name = f"blocks of {m} x {n} x {k}, {stages} stages, {parts} parts"
        yield Setting(name, (taking, (product, "tma_blocks", lambda device, blocks=blocks: blocks)))


def tile_order(case: Case) -> Iterator[Setting]:
    """
    Of our own product, where it copies by descriptor: blocks of rows that belong together; and for scoring how many
    hidden states are scored at a time, of which the processors read all for each block of columns if they belong
    together.
    """
    from gcpo_kernels.triton_backend import linear, product

    operation = _OPERATIONS[case.op]
    taking = _taking(operation, "epilogue" if operation == "loss" else "product")
    blocks_of = product.tma_blocks

    def grouped(device: torch.device, group: int) -> product.Blocks | None:
        blocks = blocks_of(device)
        return None if blocks is None else blocks._replace(group=group)

    for group in (0, 8, 16, 32):
        ordered = (taking, (product, "tma_blocks", partial(grouped, group=group)))
        name = f"{group} blocks of rows together" if group else "all rows together"
        if operation == "loss":
            yield Setting(name, ordered)
            continue
        fewer = [rows for rows in (2048, 4096, 8192) if rows < case.rows and group == 0]
        for rows in (*fewer, case.rows):
            chosen = (linear, "_SCORED_BYTES", rows * case.hidden * case.dtype.itemsize)
            yield Setting(f"{name}, {rows} at a time", (*ordered, chosen))


def scoring_slices(case: Case) -> Iterator[Setting]:
    from gcpo_kernels.triton_backend import linear

    taking = _taking("scoring", "slices")
    for rows in (1024, 2048, 4096, 8192):
        for vocab in (2048, 4096, 8192, 16_384):
            replacements = (taking, (linear, "_SLICE_ROWS", rows), (linear, "_SLICE_VOCAB", vocab))
            yield Setting(f"slices of {rows} x {vocab}", replacements)


def token_blocks(case: Case) -> Iterator[Setting]:
    from gcpo_kernels.triton_backend import token_loss

    for blocks in (1, 2, 4, 8):
        for block_t in (128, 256, 512, 1024):
            if blocks * block_t <= case.tokens:
                choice = lambda b, t, by_sequence, chosen=(blocks, block_t): chosen  # noqa: E731
                yield Setting(f"{blocks} programs x {block_t} tokens", ((token_loss, "blocking", choice),))


def tile_passes(case: Case) -> Iterator[Setting]:
    from gcpo_kernels.triton_backend import logprob

    for lanes in (128, 256, 512):
        for depth in (1, 2, 4, 8):
            block = lambda vocab, itemsize, sizes=(depth, lanes): logprob.Shape(*sizes, 16 // itemsize)  # noqa: E731
            yield Setting(f"{lanes} threads, {depth} vectors each", ((logprob, "row_block", block),))


Sweep = Callable[[Case], Iterator[Setting]]
KERNELS = "kernels"
_OPERATIONS = {"linear_loss": "loss", "scoring": "scoring"}  # of `bench.registry` to those of the gate


def sweeps(device: torch.device, tiny: bool = False) -> Sequence[tuple[Case, str, Sweep]]:
    """What is swept where: the first case of a kind stands for the others."""
    known = tiny_cases(device) if tiny else cases(device)
    linear = [
        c for c in known if c.op == "linear_loss" and (c.objective, c.logits, c.masked) == ("grpo", "peaked", "none")
    ]
    scoring = [c for c in known if c.op == "scoring"]
    tokens = [c for c in known if c.op == "token_loss" and c.objective == "gcpo"]
    if device.type == "cpu":
        return [(c, "rows of a tile", tile_rows) for c in linear] + [(c, "blocks", cpu_blocks) for c in linear]
    found: list[tuple[Case, str, Sweep]] = [(c, "order of tiles", tile_order) for c in (*scoring[:4], *linear[:1])]
    found += [(c, "blocks of our own product", product_blocks) for c in (*scoring[1:2], *linear[1:2])]
    found += [(c, KERNELS, kernels) for c in (*linear[:4], *scoring[:4])]
    found += [(c, "rows of a tile", tile_rows) for c in linear[:4]]
    found += [(c, "passes over a tile", tile_passes) for c in linear[1:2]]
    found += [(c, "slices", scoring_slices) for c in scoring[:4]]
    return found + [(c, "blocks", token_blocks) for c in tokens]


def sweep(case: Case, settings: list[Setting], device: torch.device, seconds: float) -> list[dict[str, Any]]:
    """Time of each setting, the present choice first; what is wrong or does not run says so."""
    x = make_tensors(case, device)
    for name in LEAVES.get(case.op, ()):
        x[name].requires_grad_()
    floor, factors = measure.floor_runner(case, x)
    runners = {"floor": floor}
    found: list[dict[str, Any]] = []
    check = Gate(case, x)
    function = OURS.bind(case)
    for setting in [Setting("as it is"), *settings]:
        plain = measure.runner(lambda: function(case, x), case, x)
        backward = None if plain.backward is None else setting.applied(plain.backward)
        r = measure.Runner(setting.applied(plain.forward), backward)
        entry: dict[str, Any] = {"setting": setting.name}
        try:
            verdict = check.check(OURS, setting.applied(outcome)(lambda: function(case, x), case, x))
            entry["problem"] = verdict.problem
            entry["memory_bytes"] = extra_memory(r, device)
        except Exception as error:  # too many registers, too little memory: the other settings go on
            entry["problem"] = f"{type(error).__name__}: {error}".splitlines()[0]
        if not entry["problem"]:
            runners[setting.name] = r
        found.append(entry)
        run.free(device)
    del check
    run.free(device)
    measure.alternate(runners, device, seconds)
    amount = measure.work(case, x)
    for entry in found:
        if entry["setting"] in runners:
            entry["times"] = measure.times(runners[entry["setting"]], floor, factors, amount)
    return found


def table(case: Case, what: str, found: list[dict[str, Any]]) -> str:
    phase = "both" if case.with_gradient else "forward"
    cells = [["setting", "ms", "to floor", "extra memory"]]
    for entry in found:
        if "times" not in entry:
            cells.append([entry["setting"], entry["problem"], "", ""])
            continue
        took, memory = entry["times"][phase], entry.get("memory_bytes")
        beside = "" if memory is None else f"{memory / 2**20:,.1f} MiB"
        cells.append([entry["setting"], f"{took['median']:.3f}", f"{took['to_floor']:.3f}x", beside])
    return "\n".join(["", f"### {what}: `{case.key}`", "", *markdown(cells)])


def gate_table(results: list[dict[str, Any]], name: str) -> dict[str, Any]:
    """
    What `gcpo_kernels.triton_backend.gate` reads: of each sweep of kernels the fastest that is right, or the default
    where that is as good.
    """
    known = next((device for device in gate.DEVICES if name.startswith(device)), None)
    entries = []
    for result in results if known else ():
        if result["sweep"] != KERNELS:
            continue
        phase = "both" if result["op"] == "linear_loss" else "forward"
        timed = {e["setting"]: e["times"][phase]["median"] for e in result["settings"] if "times" in e}
        timed.pop("as it is", None)
        operation = _OPERATIONS[result["op"]]
        if timed:
            fastest, default = min(timed, key=lambda kernel: timed[kernel]), gate.KERNELS[operation][0]
            as_good = timed.get(default, math.inf) <= 1.01 * timed[fastest]
            entries.append(
                {
                    "device": known,
                    "operation": operation,
                    "hidden": result["hidden"],
                    "vocab": result["vocab"],
                    "kernel": default if as_good else fastest,
                    "milliseconds": timed,
                    "case": result["key"],
                }
            )
    return {"entries": entries}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", help="default: an accelerator where there is one")
    parser.add_argument("--case", nargs="+", metavar="TEXT", help="only cases whose name has one of these in it")
    parser.add_argument("--sweep", nargs="+", metavar="TEXT", help="only sweeps whose name has one of these in it")
    parser.add_argument("--tiny", action="store_true", help="cases so small that their times say nothing")
    parser.add_argument("--seconds", type=float, default=0.3, help="of timing, per setting")
    parser.add_argument("--budget", type=float, help="seconds after which no further sweep is begun")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--gate", type=Path, help="table of kernels to write; without --out only kernels are swept")
    args = parser.parse_args(argv)
    device = torch.device(args.device or run.default_device())
    run.check_device(device)
    began = time.perf_counter()
    results: list[dict[str, Any]] = []
    about = {"environment": run.environment(device)}
    with Clocks(device) as clocks:
        for case, what, make in tqdm(sweeps(device, args.tiny), file=sys.stderr, disable=None):
            late = args.budget is not None and time.perf_counter() - began > args.budget
            if late or (args.case and not any(text in case.key for text in args.case)):
                continue
            if args.sweep and not any(text in what for text in args.sweep):
                continue
            if args.gate is not None and args.out is None and what != KERNELS:
                continue
            start = time.time()
            found = sweep(case, list(make(case)), device, args.seconds)
            print(table(case, what, found), flush=True)
            seen = clocks.during(start, time.time())
            sizes = {"op": case.op, "hidden": case.hidden, "vocab": case.vocab}
            results.append({"key": case.key, "sweep": what, **sizes, "settings": found, "clocks": seen})
            if args.out is not None:  # after each, so that an end by a limit leaves what was measured
                write_json(about | {"sweeps": results}, args.out)
            if args.gate is not None:
                write_json(gate_table(results, device_name(device)) | about, args.gate)
    return 0


if __name__ == "__main__":
    sys.exit(main())
