"""
Sweeps of the sizes that the kernels choose, each value checked against float64 and timed beside the present choice and
the floor: rows of a tile, slices of scoring, blocks of the token loss, blocks and warps of the passes over a tile.

    python -m bench.tune --out runs/tune.json          # on a GPU
    python -m bench.tune --device cpu --case N=1024    # tiles of the torch backend

Nothing is changed: what wins goes into the sources by hand, with its before and after.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from tqdm import tqdm

from bench import measure, run
from bench.baselines import IMPLEMENTATIONS
from bench.clocks import Clocks
from bench.files import write_json
from bench.gate import Gate, outcome
from bench.memory import extra_memory
from bench.registry import LEAVES, Case, cases, make_tensors, tiny_cases
from gcpo_kernels import torch_backend

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


class _Warps:
    """A kernel whose launches have another number of warps."""

    def __init__(self, kernel: Any, warps: int):
        self.kernel, self.warps = kernel, warps

    def __getitem__(self, grid: Any) -> Callable[..., Any]:
        launch = self.kernel[grid]
        return lambda *a, **k: launch(*a, **(k | {"num_warps": self.warps}))


def tile_rows(case: Case) -> Iterator[Setting]:
    """Tokens per tile, of either backend; those that fill a tile no better than fewer are left out."""
    counts = (256, 512, 1024, 1536, 2048, 2816, 3072, 3584, 4096, 5632, 8192)
    for rows in [n for n in counts if n < case.rows] + [case.rows]:
        yield Setting(f"{rows} rows a tile", ((_tiles(case), "rows", lambda self, vocab=None, rows=rows: rows),))


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


def scoring_slices(case: Case) -> Iterator[Setting]:
    from gcpo_kernels.triton_backend import linear

    for rows in (1024, 2048, 4096, 8192):
        for vocab in (2048, 4096, 8192, 16_384):
            replacements = ((linear, "_SLICE_ROWS", rows), (linear, "_SLICE_VOCAB", vocab))
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

    for block in (1024, 2048, 4096, 8192):
        for warps in (4, 8, 16):
            kernels = tuple(
                (logprob, name, _Warps(getattr(logprob, name), warps))
                for name in ("logprob_forward_kernel", "logprob_backward_kernel")
            )
            block_v = (logprob, "block_v", lambda vocab, block=block: block)
            yield Setting(f"{block} entries, {warps} warps", (block_v, *kernels))


Sweep = Callable[[Case], Iterator[Setting]]


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
    found: list[tuple[Case, str, Sweep]] = [(c, "rows of a tile", tile_rows) for c in linear[:4]]
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
    gate = Gate(case, x)
    function = OURS.bind(case)
    for setting in [Setting("as it is"), *settings]:
        plain = measure.runner(lambda: function(case, x), case, x)
        backward = None if plain.backward is None else setting.applied(plain.backward)
        r = measure.Runner(setting.applied(plain.forward), backward)
        entry: dict[str, Any] = {"setting": setting.name}
        try:
            verdict = gate.check(OURS, setting.applied(outcome)(lambda: function(case, x), case, x))
            entry["problem"] = verdict.problem
            entry["memory_bytes"] = extra_memory(r, device)
        except Exception as error:  # too many registers, too little memory: the other settings go on
            entry["problem"] = f"{type(error).__name__}: {error}".splitlines()[0]
        if not entry["problem"]:
            runners[setting.name] = r
        found.append(entry)
        run.free(device)
    del gate
    run.free(device)
    measure.alternate(runners, device, seconds)
    amount = measure.work(case, x)
    for entry in found:
        if entry["setting"] in runners:
            entry["times"] = measure.times(runners[entry["setting"]], floor, factors, amount)
    return found


def table(case: Case, what: str, found: list[dict[str, Any]]) -> str:
    phase = "both" if case.with_gradient else "forward"
    lines = ["", f"### {what}: `{case.key}`", "", "| setting | ms | to floor | extra memory |", "|---|---|---|---|"]
    for entry in found:
        if "times" not in entry:
            lines.append(f"| {entry['setting']} | {entry['problem']} | | |")
            continue
        took, memory = entry["times"][phase], entry.get("memory_bytes")
        beside = "" if memory is None else f"{memory / 2**20:,.1f} MiB"
        lines.append(f"| {entry['setting']} | {took['median']:.3f} | {took['to_floor']:.3f}x | {beside} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", help="default: an accelerator where there is one")
    parser.add_argument("--case", nargs="+", metavar="TEXT", help="only cases whose name has one of these in it")
    parser.add_argument("--tiny", action="store_true", help="cases so small that their times say nothing")
    parser.add_argument("--seconds", type=float, default=0.3, help="of timing, per setting")
    parser.add_argument("--budget", type=float, help="seconds after which no further sweep is begun")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args(argv)
    device = torch.device(args.device or run.default_device())
    run.check_device(device)
    began = time.perf_counter()
    results: list[dict[str, Any]] = []
    with Clocks(device) as clocks:
        for case, what, make in tqdm(sweeps(device, args.tiny), file=sys.stderr, disable=None):
            late = args.budget is not None and time.perf_counter() - began > args.budget
            if late or (args.case and not any(text in case.key for text in args.case)):
                continue
            start = time.time()
            found = sweep(case, list(make(case)), device, args.seconds)
            print(table(case, what, found), flush=True)
            seen = clocks.during(start, time.time())
            results.append({"key": case.key, "sweep": what, "settings": found, "clocks": seen})
            if args.out is not None:  # after each, so that an end by a limit leaves what was measured
                write_json({"environment": run.environment(device), "sweeps": results}, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
