"""`gcpo bench`: the benchmarks of a checkout."""

import sys
from pathlib import Path

from gcpo.run.inputs import argument_errors


def run(flags: list[str]) -> int:
    """Run the benchmarks; the exit code."""
    root = Path(__file__).resolve().parents[2]
    if not (root / "bench" / "run.py").exists():
        print(
            "gcpo bench: error: the benchmarks are not installed with the packages: run this from a checkout.",
            file=sys.stderr,
        )
        return 2
    sys.path.insert(0, str(root))  # a script finds only what is installed
    with argument_errors():
        from bench.run import main
    return main(flags, "gcpo bench")
