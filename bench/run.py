"""
The kernels beside what would be used instead of them: checked against float64, timed, and held against the floor.

    python -m bench.run                       # every group, on the GPU if there is one
    python -m bench.run --quick --device cpu  # three minutes on two cores
    python -m bench.run --group linear --case N=4096 --device cpu --without "eager PyTorch" --no_compile

Every implementation gets the same tensors and is checked before it is timed. The exit code is 1 if one of this
project's functions fails the check, or is slower than in the file of `--compare`.
"""

import argparse
import gc
import json
import os
import shlex
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

# Implementations leave very different holes in the memory: without this, one pays for another's. Read when CUDA starts.
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

import torch
from tqdm import tqdm

from bench import measure, report
from bench.baselines import Choice, Implementation, add_choice, chosen
from bench.clocks import Clocks
from bench.environment import check_device, default_device, environment, free
from bench.gate import Gate, outcome
from bench.memory import extra_memory, memory_method
from bench.registry import GROUPS, LEAVES, Case, Tensors, cases, make_tensors, tiny_cases

SECONDS = {"quick": 0.5, "cpu": 5.0, "other": 0.5}  # of timing, per implementation


def main(argv: list[str] | None = None, prog: str = "python -m bench.run") -> int:
    """Run the benchmark; the exit code. `prog`: how it was called."""
    args = parser(prog).parse_args(argv)
    device = torch.device(args.device or default_device())
    check_device(device)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    listed = tiny_cases(device) if args.tiny else cases(device, args.quick)
    wanted = [c for c in listed if c.group in (args.group or GROUPS)]
    if args.case:
        wanted = [c for c in wanted if any(text in c.key for text in args.case)]
    if args.list or not wanted:
        print("\n".join(c.key for c in wanted) if wanted else "no case has all that `--group` and `--case` ask for")
        return 0 if wanted else 2
    warnings.filterwarnings("ignore")
    seconds = args.seconds or SECONDS["quick" if args.quick else "cpu" if device.type == "cpu" else "other"]
    old = json.loads(args.compare.read_text()) if args.compare else None  # `--out` may write to the same file
    given = sys.argv[1:] if argv is None else argv
    about = {"environment": environment(device), "command": shlex.join([*prog.split(), *given])}
    result = {}
    for result in run_all(wanted, device, seconds, args.budget, chosen(args)):
        result |= about
        if args.out is not None:  # after each case: an end by a limit leaves what was measured
            report.write(result, args.out)
    print(report.table(result))
    if args.out is not None and not args.no_plots:
        report.draw(result, args.out)
    if args.out is not None:
        print(f"\nwritten to {args.out}")
    failed = report.failures(result)
    for line in failed:
        print(f"FAILED {line}")
    slower = report.regressions(old, result, args.tolerance) if old is not None else []
    for line in slower:
        print(f"SLOWER {line}")
    return 1 if failed or slower else 0


def parser(prog: str) -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--device", help="cpu, cuda, cuda:1, ...; default: an accelerator where there is one")
    p.add_argument("--group", nargs="+", choices=GROUPS, help="these groups of operations instead of all")
    p.add_argument("--case", nargs="+", metavar="TEXT", help="only cases whose name has one of these in it")
    add_choice(p)
    p.add_argument("--quick", action="store_true", help="few small cases")
    p.add_argument("--tiny", action="store_true", help="cases so small that their times say nothing")
    p.add_argument("--list", action="store_true", help="print the names of the cases, and run none")
    p.add_argument("--out", type=Path, metavar="DIR", help="write kernels.json, kernels.md and plots to this folder")
    p.add_argument("--no_plots", action="store_true", help="leave the plots to `python -m bench.report`")
    p.add_argument("--compare", type=Path, metavar="OLD.json", help="say where a ratio to the floor has grown since")
    p.add_argument("--tolerance", type=float, default=0.1, help="growth of a ratio that `--compare` lets pass")
    p.add_argument("--seconds", type=float, help="of timing, per implementation and case")
    p.add_argument("--budget", type=float, help="seconds after which no case and no round is begun")
    p.add_argument("--threads", type=int, help="CPU threads of PyTorch")
    return p


def run_all(
    wanted: list[Case],
    device: torch.device,
    seconds: float,
    budget: float | None = None,
    choice: Choice = Choice(),  # noqa: B008
) -> Iterator[dict[str, Any]]:
    """What is known after each case; in the end of all. Those that the budget leaves out are named."""
    began = time.perf_counter()
    deadline = None if budget is None else began + budget
    result: dict[str, Any] = {"memory_method": memory_method(device), "cases": [], "left_out": []}
    total = sum(len(choice.of(c)) + 1 for c in wanted)
    with tqdm(total=total, unit="step", file=sys.stderr, disable=None) as bar, Clocks(device) as clocks:
        for case in wanted:
            if deadline is not None and time.perf_counter() > deadline:
                result["left_out"].append(case.key)
                bar.update(len(choice.of(case)) + 1)
            else:
                bar.set_description(case.key)
                result["cases"].append(run_case(case, device, seconds, choice, deadline, bar))
            for entry in result["cases"]:  # of those before too: what was seen of the last may come late
                entry["clocks"] = clocks.during(*entry["timed"])
            yield result | {"seconds": time.perf_counter() - began}


def run_case(
    case: Case,
    device: torch.device,
    seconds: float,
    choice: Choice = Choice(),  # noqa: B008
    deadline: float | None = None,
    bar: Any = None,
) -> dict[str, Any]:
    """Check, measure the memory of, and time every implementation of a case; or a `problem` that stopped all of it."""
    entry: dict[str, Any] = {
        "key": case.key,
        "op": case.op,
        "group": case.group,
        "model": case.model,
        "batch": case.batch,
        "tokens": case.tokens,
        "hidden": case.hidden,
        "vocab": case.vocab,
        "contexts": case.contexts,
        "dtype": str(case.dtype).removeprefix("torch."),
        "objective": case.objective,
        "logits": case.logits,
        "masked": case.masked,
        "results": [],
        "timed": (0.0, 0.0),  # from when to when, in seconds since the epoch
    }
    try:
        x, floor, factors, runners = _checked(case, device, choice, entry["results"], bar)
        start = time.time()
        measure.alternate({"floor": floor} | runners, device, seconds, deadline)
        entry["timed"] = (start, time.time())
        amount = measure.work(case, x)
        for row in entry["results"]:
            if row["name"] in runners:
                row["times"] = measure.times(runners[row["name"]], floor, factors, amount)
        entry["floor"] = floor_entry(floor, factors, amount)
    except Exception as error:  # too little memory for the tensors, a device that is lost: the other cases go on
        entry["problem"] = f"{type(error).__name__}: {error}".strip().splitlines()[0]
    if bar is not None:
        bar.update()
    return entry


def _checked(
    case: Case, device: torch.device, choice: Choice, results: list[dict[str, Any]], bar: Any
) -> tuple[Tensors, measure.Runner, tuple[float, float], dict[str, measure.Runner]]:
    """
    Fill `results` with all but times; the tensors, the floor with its factors, and runners of those that passed, by
    name.
    """
    # Modules, which live on, are left out of every later collection: there is one after each implementation.
    gc.collect()
    gc.freeze()
    x = make_tensors(case, device)
    for name in LEAVES.get(case.op, ()):
        x[name].requires_grad_()
    runners: dict[str, measure.Runner] = {}
    gate = Gate(case, x)
    for implementation in choice.of(case):
        row = {"name": implementation.name, "ours": implementation.ours, "computes_less": implementation.computes_less}
        row["approximate"] = implementation.approximate
        row |= qualify(implementation, case, x, gate, runners)
        results.append(row)
        free(device)
        if bar is not None:
            bar.update()
    del gate
    free(device)
    rows = {row["name"]: row for row in results}
    for name in list(runners):
        try:
            rows[name]["memory_bytes"] = extra_memory(runners[name], device)
        except torch.OutOfMemoryError:
            rows[name] |= {"status": "out of memory"}
            del runners[name]
        free(device)
    return x, *measure.floor_runner(case, x), runners


def qualify(
    implementation: Implementation, case: Case, x: Tensors, gate: Gate, runners: dict[str, measure.Runner]
) -> dict[str, Any]:
    """Run once and check; a runner for those that pass."""
    device = next(iter(x.values())).device
    if reason := implementation.missing(case, device):
        return {"status": "missing", "reason": reason}
    try:
        run = implementation.bind(case)
        r = measure.runner(lambda: run(case, x), case, x, implementation.destroys)
        got = outcome(lambda: run(case, x), case, x)
        if r.before is not None:  # what is compared must survive the restoring of what was overwritten
            got = replace(got, gradients={name: g.clone() for name, g in got.gradients.items()})
            r.before()
        verdict = gate.check(implementation, got)
    except torch.OutOfMemoryError:
        return {"status": "out of memory"}
    except Exception as error:  # whatever another library raises, the others go on
        return {"status": "error", "reason": f"{type(error).__name__}: {error}".strip().splitlines()[0]}
    if verdict.problem:
        return {"status": "wrong", "reason": verdict.problem, "errors": verdict.errors}
    runners[implementation.name] = r
    return {"status": "ok", "errors": verdict.errors}


def floor_entry(floor: measure.Runner, factors: tuple[float, float], amount: measure.Work) -> dict[str, Any]:
    entry: dict[str, Any] = {"kind": "bare matrix products" if amount.kind == "flops" else "a large copy"}
    forward = [first * factors[0] for first, _ in floor.samples]
    backward = [(second if floor.backward is not None else first) * factors[1] for first, second in floor.samples]
    phases = {"forward": forward, "backward": backward, "both": [a + b for a, b in zip(forward, backward, strict=True)]}
    for phase, samples in phases.items():
        if amount.of(phase):
            entry[phase] = measure.summary(samples) | {
                amount.kind: amount.of(phase),
                "per_second": amount.of(phase) / (measure.summary(samples)["median"] / 1e3),
            }
    return entry


if __name__ == "__main__":
    sys.exit(main())
