"""
What the floors and the linear kernels stand on, on the device at hand: whether the vendor's products add into a float32
matrix in place, how fast memory is copied, and how fast products of several heights of a tile are.

    python -m bench.foundations --out runs/foundations.json
    python -m bench.foundations --device cpu --tiny

The file is written after each measurement. Products that a device does not offer are named with the reason.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench import measure
from bench.clocks import Clocks, describe
from bench.environment import check_device, default_device, environment, free
from bench.files import write_json
from bench.registry import MODELS, PUBLISHED

HEIGHTS = (1024, 1536, 2048, 3072, 3584, 4096, 5632, 8192)  # tokens of a tile
COPY_BYTES = {"cuda": 2 << 30, "cpu": 64 << 20}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", help="default: an accelerator where there is one")
    parser.add_argument("--tiny", action="store_true", help="one shape so small that its times say nothing")
    parser.add_argument("--seconds", type=float, default=0.05, help="of timing, per product")
    parser.add_argument("--budget", type=float, help="seconds after which no further shape is begun")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args(argv)
    device = torch.device(args.device or default_device())
    check_device(device)
    began = time.perf_counter()
    shapes = [(64, 97)] if args.tiny else [MODELS[model] for _, model in PUBLISHED]
    heights = (16,) if args.tiny else HEIGHTS
    result: dict[str, Any] = {"environment": environment(device)}

    def keep() -> None:
        if args.out is not None:
            write_json(result, args.out)

    result["addmm"] = adds_in_place(device)
    print(f"addmm(out_dtype=float32, out=self): {result['addmm']}", flush=True)
    keep()
    result["products"], result["left_out"] = [], []
    with Clocks(device) as clocks:
        result["copy"] = copy_rate(device, args.seconds, args.tiny)
        print(f"copy: {result['copy']['gb_per_second']:,.0f} GB/s", flush=True)
        for hidden, vocab in shapes:
            for rows in heights:
                if args.budget is not None and time.perf_counter() - began > args.budget:
                    result["left_out"].append([rows, hidden, vocab])
                    continue
                result["products"].append(product_rates(device, rows, hidden, vocab, args.seconds))
                for entry in (result["copy"], *result["products"]):  # what was seen of the last may come late
                    entry["clocks"] = clocks.during(*entry["timed"])
                print(line(result["products"][-1]), flush=True)
                keep()
    keep()
    return 0 if result["addmm"].get("right", True) else 1


def adds_in_place(device: torch.device) -> dict[str, Any]:
    """Whether bfloat16 operands are added into a float32 matrix in place, and how exactly; or why that is not there."""
    generator = torch.Generator(device).manual_seed(0)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device)

    a, b, kept = noise(256, 72).bfloat16(), noise(72, 1003).bfloat16(), noise(256, 1003)
    want = kept.double() + a.double() @ b.double()
    place = kept.data_ptr()
    try:
        torch.addmm(kept, a, b, out_dtype=torch.float32, out=kept)
    except (RuntimeError, TypeError) as error:
        return {"missing": reason(error)}
    far = ((kept - want).norm() / want.norm()).item()
    same = kept.data_ptr() == place
    return {"same_storage": same, "relative_error": far, "right": same and far < 1e-5}


def copy_rate(device: torch.device, seconds: float, tiny: bool) -> dict[str, Any]:
    size = 1 << 20 if tiny else COPY_BYTES.get(device.type, COPY_BYTES["cuda"])
    source = torch.randn(size // 4, device=device)
    target = torch.empty_like(source)
    start = time.time()
    r = measure.Runner(lambda: target.copy_(source))
    measure.alternate({"copy": r}, device, seconds)
    found = measure.summary([first for first, _ in r.samples])
    rate = 2 * size / found["median"] / 1e6
    return {"bytes": 2 * size, "ms": found, "gb_per_second": rate, "timed": (start, time.time())}


def product_rates(device: torch.device, rows: int, hidden: int, vocab: int, seconds: float) -> dict[str, Any]:
    """TFLOP/s of the products of a tile (M, V), with random operands: a device's power depends on what they hold."""
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    generator = torch.Generator(device).manual_seed(0)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=dtype)

    x, weight, tile = noise(rows, hidden), noise(vocab, hidden), noise(rows, vocab)
    d_weight = torch.zeros(vocab, hidden, device=device)
    products: dict[str, Callable[[], torch.Tensor]] = {
        "logits": lambda: x @ weight.T,
        "logits, float32 out": lambda: torch.mm(x, weight.T, out_dtype=torch.float32),
        "to hidden": lambda: tile @ weight,
        "to weight": lambda: tile.T @ x,
        "to weight, added in float32": lambda: torch.addmm(d_weight, tile.T, x, out_dtype=torch.float32, out=d_weight),
    }
    runners: dict[str, measure.Runner] = {}
    missing: dict[str, str] = {}
    for name, product in products.items():
        try:
            product()
            runners[name] = measure.Runner(product)
        except (RuntimeError, TypeError) as error:  # too little memory, or not offered for this type or device
            missing[name] = reason(error)
    start = time.time()
    measure.alternate(runners, device, seconds)
    timed = (start, time.time())
    found = {name: measure.summary([first for first, _ in r.samples]) for name, r in runners.items()}
    flops = 2 * rows * hidden * vocab
    free(device)
    return {
        "rows": rows,
        "hidden": hidden,
        "vocab": vocab,
        "dtype": str(dtype).removeprefix("torch."),
        "ms": found,
        "tflops": {name: flops / took["median"] / 1e9 for name, took in found.items()},
        "missing": missing,
        "timed": timed,
    }


def reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".strip().splitlines()[0][:160]


def line(entry: dict[str, Any]) -> str:
    rates = ", ".join(f"{name} {rate:,.4g}" for name, rate in entry["tflops"].items())
    seen = describe(entry["clocks"])
    return f"M={entry['rows']} H={entry['hidden']} V={entry['vocab']}, TFLOP/s: {rates}" + (f"; {seen}" if seen else "")


if __name__ == "__main__":
    sys.exit(main())
