"""
Time, and the floors that it is held against.

On a CUDA device, time is the device's own (events), each run behind a flushed L2 cache and behind a short sleep of the
device, which lets the host run ahead: what is timed is the work, not Python. Elsewhere it is the wall clock. Rounds
alternate between implementations, so that a clock that slows down, or a busy machine, meets all alike; a ratio to the
floor is the median over rounds of the ratio within a round.
"""

import gc
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from bench.registry import LEAVES, Case, Tensors

FLUSH_BYTES = {"cuda": 256 << 20, "cpu": 128 << 20}  # more than the last-level cache
COPY_BYTES = {"cuda": 1 << 30, "cpu": 128 << 20}
PHASES = ("forward", "backward", "both")
MIN_ROUNDS, MAX_ROUNDS = 3, 100
# What takes less than SHORT seconds is timed SHORT_ROUNDS times at least: with fewer, one slow run moves the quartiles.
SHORT, SHORT_ROUNDS = 0.1, 20


@dataclass(frozen=True)
class Work:
    """
    What any implementation must do, forward and backward.

    Products: 2 N H V flops forward and 4 N H V backward, N the unmasked tokens. Bytes: every input read once, every
    output and gradient written once; a loss with a gradient also leaves its derivative behind in the forward and reads
    it in the backward (of logits, it reads the logits again instead).
    """

    flops: tuple[int, int] = (0, 0)
    bytes: tuple[int, int] = (0, 0)

    @property
    def kind(self) -> str:
        return "flops" if any(self.flops) else "bytes"

    def of(self, phase: str) -> int:
        amounts = self.flops if self.kind == "flops" else self.bytes
        return {"forward": amounts[0], "backward": amounts[1], "both": sum(amounts)}[phase]


def work(case: Case, x: Tensors) -> Work:
    if case.op == "causal_weights":
        size = sum(t.numel() * t.element_size() for t in (x["z"], x["context_z"]))
        return Work(bytes=(size + 4 * case.rows, 0))
    rows = int(x["mask"].sum()) if "mask" in x else case.rows
    product = 2 * rows * case.hidden * case.vocab
    if case.op == "scoring":
        return Work(flops=(product, 0))
    if case.op == "linear_loss":
        return Work(flops=(product, 2 * product))
    if case.op == "logits_loss":
        size = case.dtype.itemsize * case.vocab
        return Work(bytes=(rows * size, (rows + case.rows) * size))
    names = ("logp", "old_logp", "ref_logp", "mask", "query_logp", "context_logp")
    read = sum(x[name].numel() * x[name].element_size() for name in names if name in x)
    return Work(bytes=(read + 4 * case.rows, 8 * case.rows))


@dataclass
class Runner:
    """One implementation, ready to be timed."""

    forward: Callable[[], Any]
    backward: Callable[[Any], Any] | None = None
    before: Callable[[], None] | None = None  # not timed
    inputs: frozenset[int] = frozenset()  # where its inputs are stored
    samples: list[tuple[float, float]] = field(default_factory=list)  # seconds of forward and backward
    host: list[float] = field(default_factory=list)  # seconds until the calls have returned


def runner(run: Callable[[], torch.Tensor], case: Case, x: Tensors, destroys: Sequence[str] = ()) -> Runner:
    """That of an implementation; `destroys` names tensors that its backward overwrites."""

    def without_gradient() -> torch.Tensor:
        with torch.no_grad():
            return run()

    inputs = frozenset(t.untyped_storage().data_ptr() for t in x.values())
    before = None
    if destroys:
        kept = {name: x[name].detach().clone() for name in destroys}

        def before() -> None:
            with torch.no_grad():
                for name, values in kept.items():
                    x[name].copy_(values)

    if not case.with_gradient:
        return Runner(without_gradient, before=before, inputs=inputs)
    leaves = [x[name] for name in LEAVES[case.op]]
    return Runner(run, lambda loss: torch.autograd.grad(loss, leaves), before, inputs)


def floor_runner(case: Case, x: Tensors) -> tuple[Runner, tuple[float, float]]:
    """
    What the floor is measured by, and the factors from its time to the case's, forward and backward: the bare matrix
    products of the vendor's library at the case's shape, or a large copy, scaled by bytes.
    """
    device = next(iter(x.values())).device
    amount = work(case, x)
    if amount.kind == "bytes":
        size = COPY_BYTES.get(device.type, COPY_BYTES["cuda"])
        source = torch.ones(size // 4, device=device)
        target = torch.empty_like(source)
        factors = tuple(amount.of(phase) / (2 * size) for phase in PHASES[:2])
        return Runner(lambda: target.copy_(source)), factors  # type: ignore[return-value]
    keep = x["mask"] if "mask" in x else torch.ones_like(x["token_ids"], dtype=torch.bool)
    hidden, weight = x["hidden"].detach()[keep], x["weight"].detach()
    # All logits in one product, unless they would fill the memory.
    step = max(1, min(len(hidden), int(0.1 * memory_bytes(device)) // (case.vocab * case.dtype.itemsize)))
    logits = torch.empty(step, case.vocab, dtype=case.dtype, device=device)
    d_hidden, d_weight = (torch.empty_like(t) if case.with_gradient else None for t in (hidden, weight))

    def forward() -> None:
        for part in hidden.split(step):
            torch.mm(part, weight.T, out=logits[: len(part)])

    def backward(_: None) -> None:
        assert d_hidden is not None and d_weight is not None
        for start, part in zip(range(0, len(hidden), step), hidden.split(step), strict=True):
            block = logits[: len(part)]
            torch.mm(block, weight, out=d_hidden[start : start + len(part)])
            torch.mm(block.T, part, out=d_weight) if start == 0 else d_weight.addmm_(block.T, part)

    return Runner(forward, backward if case.with_gradient else None), (1.0, 1.0)


def memory_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    import psutil

    return psutil.virtual_memory().total


def synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


class _Clock:
    """Times one run."""

    def __init__(self, device: torch.device):
        self.device = device
        self.flush = torch.empty(FLUSH_BYTES.get(device.type, FLUSH_BYTES["cuda"]) // 4, device=device)

    def time(self, r: Runner) -> None:
        if r.before is not None:
            r.before()
        self.flush.zero_()
        (self._events if self.device.type == "cuda" else self._wall)(r)

    def _wall(self, r: Runner) -> None:
        synchronize(self.device)
        start = time.perf_counter()
        out = r.forward()
        synchronize(self.device)
        middle = end = time.perf_counter()
        if r.backward is not None:
            _kept = r.backward(out)  # freed after the clock has stopped
            synchronize(self.device)
            end = time.perf_counter()
        r.samples.append((middle - start, end - middle))
        r.host.append(end - start)

    def _events(self, r: Runner) -> None:
        first, second, third = (torch.cuda.Event(enable_timing=True) for _ in range(3))
        # About 2 GHz: twice as long as the host needed the last time, within reason.
        torch.cuda._sleep(int(2e9 * min(max(2 * (r.host[-1] if r.host else 0.0), 2e-4), 5e-3)))
        first.record()
        start = time.perf_counter()
        out = r.forward()
        second.record()
        _kept = None if r.backward is None else r.backward(out)
        third.record()
        r.host.append(time.perf_counter() - start)
        torch.cuda.synchronize()
        r.samples.append((first.elapsed_time(second) / 1e3, second.elapsed_time(third) / 1e3))


def alternate(runners: dict[str, Runner], device: torch.device, seconds: float, deadline: float | None = None) -> None:
    """
    Time every runner, in rounds. One leaves after `seconds` of its own and the rounds that it needs; the floor, named
    "floor", stays until the last has left. After the deadline, by `time.perf_counter`, the round that runs is the last.
    """
    clock = _Clock(device)
    spent = dict.fromkeys(runners, 0.0)
    active = list(runners)
    gc.collect()
    gc.disable()
    try:
        if device.type != "cpu":  # memory that the allocator has to fetch first, and how long the host takes
            for r in runners.values():
                clock.time(r)
                r.samples.clear()
        for _ in range(MAX_ROUNDS):
            for name in active:
                began = time.perf_counter()
                clock.time(runners[name])
                spent[name] += time.perf_counter() - began
            active = [name for name in active if name == "floor" or not _done(runners[name], spent[name], seconds)]
            late = deadline is not None and time.perf_counter() > deadline
            if late or active in ([], ["floor"]):
                break
    finally:
        gc.enable()


def _done(r: Runner, spent: float, seconds: float) -> bool:
    """SHORT_ROUNDS of what is short; of what is not, three, unless even those would take far too long."""
    short = statistics.median(map(sum, r.samples)) < SHORT
    if len(r.samples) >= (SHORT_ROUNDS if short else MIN_ROUNDS):
        return spent >= seconds
    return not short and spent >= 10 * seconds


def summary(samples: Sequence[float]) -> dict[str, float | int]:
    """Median, quartiles and number, in milliseconds."""
    if len(samples) == 1:
        low = middle = high = samples[0]
    else:
        low, middle, high = statistics.quantiles(samples, n=4, method="inclusive")
    return {"median": middle * 1e3, "low": low * 1e3, "high": high * 1e3, "samples": len(samples)}


def times(r: Runner, floor: Runner, factors: tuple[float, float], amount: Work) -> dict[str, Any]:
    """Per phase: times, what is achieved of flops or bytes a second, and the ratio to the floor."""
    found: dict[str, Any] = {}
    for phase in PHASES if r.backward is not None else PHASES[:1]:
        mine = [_pick(sample, phase) for sample in r.samples]
        least = [_scaled(sample, factors, phase, floor.backward is None) for sample in floor.samples]
        ratios = [a / b for a, b in zip(mine, least, strict=False) if b > 0]
        found[phase] = summary(mine) | {
            "per_second": amount.of(phase) / statistics.median(mine),
            "to_floor": statistics.median(ratios) if ratios else math.nan,
        }
    found["host_ms"] = statistics.median(r.host) * 1e3
    return found


def _pick(sample: tuple[float, float], phase: str) -> float:
    return {"forward": sample[0], "backward": sample[1], "both": sum(sample)}[phase]


def _scaled(sample: tuple[float, float], factors: tuple[float, float], phase: str, one: bool) -> float:
    """The floor of a phase; `one`: the floor's forward, a copy, stands for both phases."""
    parts = (sample[0] * factors[0], (sample[0] if one else sample[1]) * factors[1])
    return _pick(parts, phase)
