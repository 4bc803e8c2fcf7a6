"""Peak memory of one run of an implementation."""

import ctypes
import gc
from pathlib import Path

import torch

from bench.measure import Runner

MEMORY_METHODS = {
    "cuda": "the caching allocator's peak of one run, beyond what was allocated before it and what it returns",
    "cpu": "the process's peak resident memory during one run, beyond what was resident before it and what it returns",
    "": "not measured on this device",
}


def memory_method(device: torch.device) -> str:
    if device.type == "cpu" and not Path("/proc/self/clear_refs").exists():
        return MEMORY_METHODS[""]
    return MEMORY_METHODS.get(device.type, MEMORY_METHODS[""])


def extra_memory(r: Runner, device: torch.device) -> int | None:
    """Peak bytes of one run beyond its inputs and what it returns. None where that cannot be measured."""
    if r.before is not None:
        r.before()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        returned = _run_bytes(r)
        return max(0, torch.cuda.max_memory_allocated(device) - before - returned)
    if memory_method(device) == MEMORY_METHODS[""]:
        return None
    _trim()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = _resident("VmRSS")
    returned = _run_bytes(r)
    return max(0, _resident("VmHWM") - before - returned)


def _run_bytes(r: Runner) -> int:
    """Run, and count what is returned and was not there before."""
    out = r.forward()
    gradients = () if r.backward is None else r.backward(out)
    kept = {t.untyped_storage().data_ptr(): t for t in (out, *gradients)}
    return sum(t.numel() * t.element_size() for at, t in kept.items() if at not in r.inputs)


def _trim() -> None:
    """Give freed memory back to the system, so that using it again is seen."""
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except OSError:  # another libc
        return


def _resident(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) << 10
    raise RuntimeError(f"no {name} in /proc/self/status")
