"""
What a GPU did while something was timed: clocks, power, temperature, and why its clocks were held back.

A process of `nvidia-smi` looks several times a second; nothing is read from it while something is timed. Where there is
no such program, or the device is no NVIDIA GPU, every field is None.
"""

import contextlib
import itertools
import os
import re
import shutil
import statistics
import subprocess
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import torch

INTERVAL = 0.2  # seconds between two looks
# Older drivers know the last field by its older name.
_REASONS = ("clocks_event_reasons.active", "clocks_throttle_reasons.active")
_FIELDS = ("timestamp", "clocks.sm", "clocks.mem", "power.draw", "temperature.gpu")
# Bits of the mask, as NVML has them. That the device was idle for a moment is no reason of interest.
_BITS = {
    0x2: "application clocks",
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x10: "sync boost",
    0x20: "temperature (software)",
    0x40: "temperature (hardware)",
    0x80: "power brake",
    0x100: "display clocks",
}


@dataclass(frozen=True)
class Look:
    """One line of the sampler; what a device does not say is None."""

    at: float
    sm_mhz: float | None
    memory_mhz: float | None
    power_w: float | None
    temperature_c: float | None
    reasons: int


class Clocks:
    """The sampler of one device, from `with` to its end."""

    def __init__(self, device: torch.device):
        self._query = _query(device)
        self._process: subprocess.Popen[bytes] | None = None
        self._rest = b""
        self.looks: list[Look] = []

    def __enter__(self) -> "Clocks":
        if self._query:
            # Line by line, where there is what makes it so: a program may keep back a page of what it writes to a pipe.
            by_line = [tool, "-oL"] if (tool := shutil.which("stdbuf")) else []
            words = [*by_line, *self._query, f"--loop-ms={int(INTERVAL * 1000)}"]
            self._process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
            assert self._process.stdout is not None
            # A pipe, and no file: the sampler ends when nobody holds the other end, however this process ends.
            os.set_blocking(self._process.stdout.fileno(), False)
        return self

    def __exit__(self, *error: object) -> None:
        if self._process is not None:
            self._process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):  # a program may hang in a driver
                self._process.wait(5.0)
            self._read()
            self._process.stdout.close()  # type: ignore[union-attr]
            self._process = None

    def during(self, start: float, end: float) -> dict[str, Any]:
        """
        What was seen between two times, in seconds since the epoch. Looks carry their own time, and may arrive late:
        ask again at the end for what was measured last.
        """
        self._read()
        looks = [look for look in self.looks if start <= look.at <= end]

        def seen(name: str) -> list[float]:
            return [value for look in looks if (value := getattr(look, name)) is not None]

        sm, memory, power, heat = (seen(name) for name in ("sm_mhz", "memory_mhz", "power_w", "temperature_c"))
        mask = 0
        for look in looks:
            mask |= look.reasons
        return {
            "looks": len(looks),
            "sm_mhz": statistics.median(sm) if sm else None,
            "sm_mhz_min": min(sm, default=None),
            "memory_mhz": statistics.median(memory) if memory else None,
            "power_w": statistics.median(power) if power else None,
            "power_w_max": max(power, default=None),
            "temperature_c": max(heat, default=None),
            "held_back_by": [text for bit, text in _BITS.items() if mask & bit] if looks else None,
        }

    def _read(self) -> None:
        if self._process is None or self._process.stdout is None:
            return
        while chunk := _available(self._process.stdout.fileno()):
            self._rest += chunk
        *lines, self._rest = self._rest.split(b"\n")
        self.looks += [look for line in lines if (look := parse(line.decode(errors="replace"))) is not None]


def _available(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 1 << 16)
    except BlockingIOError:
        return b""


def parse(line: str) -> Look | None:
    """A line of comma-separated values; None for anything else."""
    cells = [cell.strip() for cell in line.split(",")]
    if len(cells) != len(_FIELDS) + 1:
        return None
    try:
        at = datetime.strptime(cells[0], "%Y/%m/%d %H:%M:%S.%f").timestamp()
    except ValueError:
        return None
    sm, memory, power, heat = (float(c) if re.fullmatch(r"\d+(\.\d+)?", c) else None for c in cells[1:-1])
    mask = int(cells[-1], 16) if re.fullmatch(r"0x[0-9a-fA-F]+", cells[-1]) else 0
    return Look(at, sm, memory, power, heat, mask)


def _query(device: torch.device) -> list[str]:
    """The command that samples the device; [] where nothing can."""
    program = shutil.which("nvidia-smi")
    if device.type != "cuda" or program is None:
        return []
    # By its identity first: the numbers of nvidia-smi are not those of CUDA_VISIBLE_DEVICES.
    identity = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    for which, reasons in itertools.product([f"GPU-{identity}", str(device.index or 0)], _REASONS):
        fields = ",".join([*_FIELDS, reasons])
        words = [program, f"--id={which}", f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
        try:
            once = subprocess.run(words, capture_output=True, text=True, timeout=20)
        except (OSError, subprocess.TimeoutExpired):
            return []
        if once.returncode == 0 and parse(once.stdout.strip()) is not None:
            return words
    return []


def describe(seen: dict[str, Any] | None) -> str:
    """In words; "" where nothing was seen."""
    if not seen or seen["sm_mhz"] is None:
        return ""
    parts = [f"SM clock {seen['sm_mhz']:,.0f} MHz (least {seen['sm_mhz_min']:,.0f})"]
    for name, unit, form in (("memory_mhz", "MHz", "memory {:,.0f}"), ("power_w", "W", "{:.0f}")):
        if seen[name] is not None:
            parts.append(f"{form.format(seen[name])} {unit}")
    if seen["temperature_c"] is not None:
        parts.append(f"at most {seen['temperature_c']:.0f} °C")
    held = ", ".join(seen["held_back_by"] or []) or "nothing"
    return ", ".join(parts) + f"; held back by: {held}"
