"""What the benchmarks measure by: rounds, device time, memory, clocks."""

import stat
import sys
import time
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench import clocks, measure, memory

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small buffer to flush."""
    monkeypatch.setattr(measure, "FLUSH_BYTES", {"cpu": 1 << 16, "cuda": 1 << 16})


def pretend(monkeypatch: pytest.MonkeyPatch, takes: dict[str, float]) -> dict[str, measure.Runner]:
    """Runners that take so many seconds of a clock of their own."""
    now = [0.0]
    monkeypatch.setattr(measure, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    return {name: measure.Runner(lambda s=s: now.__setitem__(0, now[0] + s)) for name, s in takes.items()}


def test_what_is_short_is_timed_twenty_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """However little time it was given; the number of samples is in what is written."""
    runners = pretend(monkeypatch, {"floor": 0.01, "90 ms": 0.09, "1 ms": 0.001, "300 ms": 0.3, "9 s": 9.0})
    measure.alternate(runners, CPU, seconds=0.3)
    counts = {name: len(r.samples) for name, r in runners.items()}
    assert counts == {"floor": 100, "90 ms": 20, "1 ms": 100, "300 ms": 3, "9 s": 1}
    found = measure.times(runners["90 ms"], runners["floor"], (1.0, 0.0), measure.Work(flops=(1, 0)))
    assert found["forward"]["samples"] == 20


def test_no_round_begins_after_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    for deadline, rounds in ((-1.0, 1), (0.35, 4)):
        runners = pretend(monkeypatch, {"floor": 0.01, "90 ms": 0.09})
        measure.alternate(runners, CPU, seconds=0.3, deadline=deadline)
        assert [len(r.samples) for r in runners.values()] == [rounds, rounds]


def test_rounds_alternate_and_slow_ones_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    now = [0.0]
    takes = {"floor": 1.0, "quick": 2.0, "slow": 9.0, "endless": 500.0}
    monkeypatch.setattr(measure, "MIN_ROUNDS", 2)
    monkeypatch.setattr(measure, "MAX_ROUNDS", 20)
    monkeypatch.setattr(measure, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def make(name: str) -> measure.Runner:
        def forward() -> None:
            order.append(name)
            now[0] += takes[name]

        return measure.Runner(forward)

    runners = {name: make(name) for name in takes}
    measure.alternate(runners, CPU, seconds=10.0)
    counts = {name: len(r.samples) for name, r in runners.items()}
    assert counts == {"floor": 5, "quick": 5, "slow": 2, "endless": 1}
    assert order[:4] == list(takes) and order[4:7] == ["floor", "quick", "slow"]
    amount = measure.Work(flops=(100, 0))
    found = measure.times(runners["quick"], runners["floor"], (0.5, 0.0), amount)["forward"]
    assert found["to_floor"] == 4.0 and found["median"] == 2000.0 and found["per_second"] == 50.0


def test_extra_memory_counts_temporaries_and_not_results() -> None:
    size = 32 << 20

    def with_temporary() -> torch.Tensor:
        temporary = torch.ones(size // 4)
        return temporary[:1024].clone()

    mebibyte = 1 << 20
    seen = [memory.extra_memory(measure.Runner(f), CPU) for f in (with_temporary, lambda: torch.ones(size // 4))]
    if seen[0] is None:
        pytest.skip("the peak of resident memory cannot be reset here")
    assert seen[1] is not None
    assert abs(seen[0] - size) < 4 * mebibyte
    assert seen[1] < 4 * mebibyte


def test_device_time_excludes_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CUDA device: a flush and a sleep before the first event, one event after each phase."""
    order: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool):
            self.at = 0

        def record(self) -> None:
            self.at = len(order)
            order.append("event")

        def elapsed_time(self, later: "Event") -> float:
            return later.at - self.at

    cycles: list[int] = []
    fake = SimpleNamespace(
        Event=Event,
        _sleep=lambda n: (order.append("sleep"), cycles.append(n)),
        synchronize=lambda: order.append("wait"),
    )
    monkeypatch.setattr(torch, "cuda", fake)
    clock = object.__new__(measure._Clock)
    clock.device = SimpleNamespace(type="cuda")  # type: ignore[assignment]
    clock.flush = SimpleNamespace(zero_=lambda: order.append("flush"))  # type: ignore[assignment]
    r = measure.Runner(lambda: order.append("forward"), lambda out: order.append("backward"))
    r.before = lambda: order.append("before")
    clock.time(r)
    assert order == ["before", "flush", "sleep", "event", "forward", "event", "backward", "event", "wait"]
    assert r.samples == [(2e-3, 2e-3)] and len(r.host) == 1 and cycles == [int(2e9 * 2e-4)]


def test_device_memory_is_the_peak_beyond_inputs_and_results(monkeypatch: pytest.MonkeyPatch) -> None:
    held, peak = [1000], [0]

    def forward() -> torch.Tensor:
        peak[0] = held[0] + 700
        return torch.ones(25)  # 100 bytes

    fake = SimpleNamespace(
        synchronize=lambda: None,
        reset_peak_memory_stats=lambda device: peak.__setitem__(0, held[0]),
        memory_allocated=lambda device: held[0],
        max_memory_allocated=lambda device: peak[0],
    )
    monkeypatch.setattr(torch, "cuda", fake)
    device: Any = SimpleNamespace(type="cuda")
    assert memory.extra_memory(measure.Runner(forward), device) == 600
    gradients = measure.Runner(forward, lambda out: (torch.ones(50), torch.ones(25)))
    assert memory.extra_memory(gradients, device) == 300
    shared = torch.ones(50)  # a gradient written over an input was there before
    inputs = frozenset({shared.untyped_storage().data_ptr()})
    assert memory.extra_memory(measure.Runner(forward, lambda out: (shared,), inputs=inputs), device) == 600


SMI = """#!{python}
import sys, time
from datetime import datetime
if not any(word == "--id=1" for word in sys.argv) or "throttle" not in " ".join(sys.argv):
    sys.exit("no such device, or no such field")
again = any(word.startswith("--loop-ms") for word in sys.argv)
for k in range(1000 if again else 1):
    now = datetime.now().strftime("%Y/%m/%d %H:%M:%S.%f")[:-3]
    print(f"{{now}}, {{1980 - 300 * (k == 1)}}, 2619, [N/A], 61, 0x000000000000000{{5 if k == 1 else 1}}", flush=True)
    time.sleep(0.02)
"""


def test_clocks_of_what_was_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only of that; an older driver's name of a field, a device that is known by its number, and a value it lacks."""
    program = tmp_path / "nvidia-smi"
    program.write_text(SMI.format(python=sys.executable))
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="ab-12"))
    with clocks.Clocks(torch.device("cuda:1")) as sampler:
        start = time.time()
        time.sleep(1.0)
        middle = time.time()
        time.sleep(0.2)
        seen, later = sampler.during(start, middle), sampler.during(middle, time.time())
        process = sampler._process
    assert process is not None and process.poll() is not None
    assert seen["looks"] > 2 and seen["sm_mhz"] == 1980 and seen["sm_mhz_min"] == 1680
    assert seen["memory_mhz"] == 2619 and seen["temperature_c"] == 61 and seen["power_w"] is None
    assert seen["held_back_by"] == ["power cap"] and later["held_back_by"] == []
    words = "SM clock 1,980 MHz (least 1,680), memory 2,619 MHz, at most 61 °C; held back by: power cap"
    assert clocks.describe(seen) == words


def test_clocks_are_none_where_there_is_no_gpu() -> None:
    with clocks.Clocks(CPU) as sampler:
        seen = sampler.during(0.0, time.time())
    assert seen.pop("looks") == 0 and set(seen.values()) == {None}
    assert clocks.describe(seen) == clocks.describe(None) == ""


@pytest.mark.parametrize("line", ["", "a, b, c, d, e, f", "2026/11/26 20:43:00.123, 1980", "No devices were found"])
def test_other_lines_are_no_looks(line: str) -> None:
    assert clocks.parse(line) is None


def test_a_look() -> None:
    at = datetime(2026, 11, 26, 20, 43, 0, 123_000).timestamp()
    line = "2026/11/26 20:43:00.123, 1755, 2619, 684.12, 66, 0x0000000000000024"
    assert clocks.parse(line) == clocks.Look(at, 1755.0, 2619.0, 684.12, 66.0, 0x24)
