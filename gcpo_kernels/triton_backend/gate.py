"""
Which of several ways to the same numbers is taken, by device and by the size of the output layer.

Every way is right everywhere. A default, which nothing measured, may be overruled by a table of measurements, which
`python -m bench.tune --gate FILE` writes: the file that GCPO_KERNELS_GATE names, else `gate.json` beside this module.
An entry:

    {"device": "NVIDIA H200", "operation": "loss", "hidden": 1536, "vocab": 151936, "kernel": "epilogue"}

`device` is the beginning of the device's name, so that all of its variants are meant.
"""

import functools
import json
import os
import warnings
from pathlib import Path
from typing import Any

import torch

VARIABLE = "GCPO_KERNELS_GATE"
PATH = Path(__file__).with_name("gate.json")
# By operation, the default first. "one_read": the vendor's product, then one pass over float32 logits; "two_reads": two
# passes, which need no estimate of log-probabilities; "epilogue": no pass, the exponentials are taken in a product of
# our own. "product": scoring by a product of our own that stores nothing; "slices": the vendor's, a slice of the
# vocabulary at a time.
KERNELS = {"loss": ("one_read", "two_reads", "epilogue"), "scoring": ("product", "slices")}
# Devices that entries may name. All of them multiply tiles that descriptors bring into shared memory.
DEVICES = ("NVIDIA H100", "NVIDIA H200", "NVIDIA H800", "NVIDIA GH200", "NVIDIA B100", "NVIDIA B200", "NVIDIA GB200")
Key = tuple[str, str, int, int]


def choose(operation: str, device: torch.device, hidden: int, vocab: int) -> str:
    """The kernel for an operation of KERNELS with a (vocab, hidden) weight."""
    if device.type == "cpu":
        return KERNELS[operation][0]
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    known = next((known for known in DEVICES if name.startswith(known)), None)
    if known is None:
        # Without tensor memory descriptors a product of our own has little chance.
        return "slices" if operation == "scoring" else KERNELS[operation][0]
    return _table(_path()).get((known, operation, hidden, vocab), KERNELS[operation][0])


def _path() -> str:
    return os.environ.get(VARIABLE) or str(PATH)


@functools.cache
def _table(path: str) -> dict[Key, str]:
    """The entries of a file, without those that mean nothing here: one warning for all of these."""
    if not Path(path).is_file():
        if path != str(PATH):
            warnings.warn(f"{VARIABLE} names no file, got {path!r}: kernels are chosen by default.", stacklevel=3)
        return {}
    try:
        entries = json.loads(Path(path).read_text())["entries"]
        found = {k: e["kernel"] for e in entries if (k := _key(e)) is not None}
    except (OSError, OverflowError, ValueError, KeyError, TypeError) as error:
        warnings.warn(f"{path} is not a table of kernels ({error}): kernels are chosen by default.", stacklevel=3)
        return {}
    ignored = [e for e in entries if _key(e) is None]
    if ignored:
        warnings.warn(
            f"{path} has {len(ignored)} entries that are ignored, because they name an unknown device, operation or "
            f"kernel; the first is {ignored[0]}.",
            stacklevel=3,
        )
    return found


def _key(entry: dict[str, Any]) -> Key | None:
    operation = entry["operation"]
    if entry["device"] not in DEVICES or entry["kernel"] not in KERNELS.get(operation, ()):
        return None
    return entry["device"], operation, int(entry["hidden"]), int(entry["vocab"])
