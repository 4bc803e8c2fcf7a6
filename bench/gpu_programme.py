"""
Everything that a GPU is asked for, in one go of ten minutes: checks, tests, kernels, step overhead, fidelity, tuning,
sanitizer.

    python -m bench.gpu_programme --out runs/gpu

A part that fails or runs over its limit leaves its log and lets the others run. `summary.json` is written after each.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PYTHON = sys.executable


@dataclass(frozen=True)
class Part:
    """
    Attributes:
        name: also of its log.
        command: {out} stands for the folder.
        limit: seconds.
        needs: a file of the repository, or a program on PATH, without which it is skipped.
    """

    name: str
    command: tuple[str, ...]
    limit: float
    needs: str = ""


def _pytest(name: str, limit: float, *words: str, needs: str = "tests/gpu") -> Part:
    report = f"--junitxml={{out}}/{name}.xml"
    return Part(
        name, (PYTHON, "-m", "pytest", "tests/gpu", "-q", "-p", "no:cacheprovider", report, *words), limit, needs
    )


# In order of what is missed most if time runs out.
PARTS = (
    Part("doctor", (PYTHON, "-m", "gcpo.cli", "doctor"), 60),
    _pytest("tests", 110, "-m", "gpu and not slow"),
    Part(
        "kernels",
        (PYTHON, "-m", "bench.run", "--device", "cuda", "--out", "{out}", "--budget", "190"),
        250,
        "bench/run.py",
    ),
    Part(
        "step_overhead",
        (
            *(PYTHON, "-m", "bench.step_overhead", "--model", "1.5b", "--dtype", "bfloat16", "--steps", "2"),
            *("--completion_tokens", "256", "--collider_tokens", "64", "--out", "{out}/step_overhead_1.5b.json"),
            *("--only", "GCPO, defaults", "full contexts", "all of these off"),
        ),
        120,
        "bench/step_overhead.py",
    ),
    _pytest("sanitizer", 60, "-k", "sanitizer and memcheck", needs="compute-sanitizer"),
    Part("tune", (PYTHON, "-m", "bench.tune", "--out", "{out}/tune.json", "--budget", "60"), 90, "bench/tune.py"),
    _pytest("large_tests", 90, "-m", "gpu and slow", "-k", "not sanitizer"),
    Part(
        "fidelity",
        (
            *(PYTHON, "-m", "bench.fidelity", "--prompts", "1", "--samples", "8"),
            *("--out", "{out}/fidelity.json"),
        ),
        60,
        "bench/fidelity.py",
    ),
)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for logs, results, summary")
    parser.add_argument("--limit", type=float, default=570.0, help="seconds for everything")
    names = [part.name for part in PARTS]
    parser.add_argument("--only", nargs="+", choices=names, help="these parts instead of all")
    args = parser.parse_args(argv)
    chosen = [part for part in PARTS if args.only is None or part.name in args.only]
    return run_parts(chosen, args.out, args.limit)


def run_parts(parts: list[Part], out: Path, limit: float) -> int:
    """Run them one after the other; 1 unless all that ran went well."""
    out.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    done: list[dict[str, Any]] = []
    for part in parts:
        left = limit - (time.monotonic() - began)
        done.append(run_part(part, out, min(part.limit, left)))
        last = done[-1]
        print(f"{last['name']:<14} {last['status']:<10} {last['seconds']:6.1f} s  {last['last_line']}", flush=True)
        summary = {"seconds": time.monotonic() - began, "parts": done}
        (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    return 0 if all(part["status"] in ("ok", "skipped") for part in done) else 1


def run_part(part: Part, out: Path, limit: float) -> dict[str, Any]:
    entry: dict[str, Any] = {"name": part.name, "status": "skipped", "seconds": 0.0, "last_line": ""}
    if part.needs and not (ROOT / part.needs).exists() and shutil.which(part.needs, path=_path()) is None:
        return entry | {"last_line": f"{part.needs} is not here"}
    if limit < 5:
        return entry | {"status": "no time", "last_line": "nothing is left of the limit"}
    command = [word.replace("{out}", str(out.resolve())) for word in part.command]
    log = out / f"{part.name}.log"
    began = time.monotonic()
    environment = os.environ | {"PATH": _path(), "PYTHONUNBUFFERED": "1", "PYTHONPATH": str(ROOT)}
    with log.open("w") as file:
        file.write(" ".join(command) + "\n")
        file.flush()
        try:
            # A session of its own, so that what it started ends with it.
            process = subprocess.Popen(
                command, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT, env=environment, start_new_session=True
            )
        except OSError as error:
            return entry | {"status": "failed", "last_line": str(error)}
        try:
            code: int | None = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        if code is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    status = "ok" if code == 0 else "too long" if code is None else "failed"
    seconds = time.monotonic() - began
    return entry | {"status": status, "code": code, "seconds": seconds, "last_line": lines[-1][:160] if lines else ""}


def _path() -> str:
    """The tools of the CUDA toolkit are often installed, and not on PATH."""
    return os.environ.get("PATH", "") + os.pathsep + "/usr/local/cuda/bin"


if __name__ == "__main__":
    sys.exit(main())
