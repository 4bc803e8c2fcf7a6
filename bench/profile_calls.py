"""
Where the time of a call goes, kernel by kernel: of `linear_gcpo_loss` and `linear_logprob` at the shapes that
neighbours publish, of `gcpo_loss` and `causal_weights` at sizes where memory decides.

    python -m bench.profile_calls --out runs/profile_calls.json
    python -m bench.profile_calls --device cpu --tiny

"wall" is a call among others of its kind; "host" is how long the host takes to launch it. Where they are alike, the
device waits for the host. The file is written after each call.
"""

import argparse
import itertools
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from bench import measure
from bench.baselines import IMPLEMENTATIONS
from bench.clocks import Clocks, describe
from bench.environment import check_device, default_device, environment, free
from bench.files import write_json
from bench.registry import LEAVES, Case, cases, make_tensors, tiny_cases

OURS = IMPLEMENTATIONS[0]
WARM, CALLS = 2, 3
KERNELS = 20  # that are listed, the longest first


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", help="default: an accelerator where there is one")
    parser.add_argument("--tiny", action="store_true", help="one shape so small that its times say nothing")
    parser.add_argument("--budget", type=float, help="seconds after which no further call is begun")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args(argv)
    device = torch.device(args.device or default_device())
    check_device(device)
    began = time.perf_counter()
    result: dict[str, Any] = {"environment": environment(device), "calls": [], "left_out": []}
    with Clocks(device) as clocks:
        for case in profiled(device, args.tiny):
            if args.budget is not None and time.perf_counter() - began > args.budget:
                result["left_out"].append(case.key)
                continue
            try:
                entry = profile_call(case, device)
            except torch.OutOfMemoryError as error:
                entry = {"key": case.key, "timed": (0.0, 0.0), "problem": str(error).splitlines()[0]}
            free(device)
            result["calls"].append(entry)
            for call in result["calls"]:  # of those before too: what was seen of the last may come late
                call["clocks"] = clocks.during(*call["timed"])
            print(show(entry), flush=True)
            if args.out is not None:
                write_json(result, args.out)
    return 0 if not any("problem" in call for call in result["calls"]) else 1


def profiled(device: torch.device, tiny: bool) -> list[Case]:
    """The token loss in two sizes, the causal weights in one; a loss and a scoring of each published shape in turns."""
    listed = tiny_cases(device) if tiny else cases(device)
    known = [c for c in listed if (c.objective, c.logits, c.masked) == ("grpo", "peaked", "none")]
    count = 1 if device.type == "cpu" else 4
    small = [c for c in listed if c.op == "token_loss" and c.objective == "gcpo" and (tiny or c.rows >= 1 << 20)]
    small = small[:2] + [c for c in listed if c.op == "causal_weights"][:1]
    by_op = [[c for c in known if c.op == op][:count] for op in ("linear_loss", "scoring")]
    return small + list(itertools.chain.from_iterable(zip(*by_op, strict=True)))


def profile_call(case: Case, device: torch.device) -> dict[str, Any]:
    x = make_tensors(case, device)
    for name in LEAVES.get(case.op, ()):
        x[name].requires_grad_()
    run = OURS.bind(case)
    r = measure.runner(lambda: run(case, x), case, x)

    def call() -> None:
        out = r.forward()
        if r.backward is not None:
            r.backward(out)

    for _ in range(WARM):
        call()
    measure.synchronize(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    started, start = time.time(), time.perf_counter()
    for _ in range(CALLS):
        call()
    host = (time.perf_counter() - start) / CALLS
    measure.synchronize(device)
    wall = (time.perf_counter() - start) / CALLS
    ended = time.time()
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    with profile(activities=activities) as seen:
        call()
        measure.synchronize(device)
    work = measure.work(case, x)
    return {
        "key": case.key,
        "wall_ms": wall * 1e3,
        "host_ms": host * 1e3,
        "calls": CALLS,
        "per_second": work.of("both") / wall,
        "counts": work.kind,
        "peak_bytes": peak,
        "timed": (started, ended),
        "kernels": kernels(seen, device),
    }


def kernels(seen: profile, device: torch.device) -> list[dict[str, Any]]:
    """What ran, the longest first: kernels on a GPU; on a CPU, torch's operators without what they call."""
    field = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    events = sorted(seen.key_averages(), key=lambda event: -getattr(event, field))
    return [
        {"name": event.key[:160], "ms": getattr(event, field) / 1e3, "count": event.count}
        for event in events[:KERNELS]
        if getattr(event, field) > 0
    ]


def show(entry: dict[str, Any]) -> str:
    if "problem" in entry:
        return f"{entry['key']}: {entry['problem']}"
    scale, unit = {"flops": (1e12, "TFLOP/s"), "bytes": (1e9, "GB/s")}[entry["counts"]]
    rate = f"{entry['per_second'] / scale:.4g} {unit}"
    times = f"wall {entry['wall_ms']:.3f} ms, host {entry['host_ms']:.3f} ms, {rate}"
    lines = [f"{entry['key']}: {times}", describe(entry["clocks"])]
    lines += [f"  {kernel['ms']:9.3f} ms {kernel['count']:5d} x  {kernel['name'][:110]}" for kernel in entry["kernels"]]
    return "\n".join(line for line in lines if line)


if __name__ == "__main__":
    sys.exit(main())
