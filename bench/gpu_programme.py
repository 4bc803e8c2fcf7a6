"""
Everything that a GPU is asked for, in two runs that together take thirteen minutes of one device.

    python -m bench.gpu_programme --out runs/gpu --run first      # 8 minutes at most
    python -m bench.gpu_programme --out runs/gpu --run second --failed test_lengths test_strides    # 5 at most
    python -m bench.gpu_programme --out runs/dry --dry_run        # both, at tiny sizes on the CPU

The first says what the device can do, whether the kernels are right on it, where their time goes, and how they do
beside their peers. The second, after repairs, repeats the tests that failed, and goes on to tuning, training steps,
sizes beyond 2**31 elements, and small kernels.

What is found is one archive, `first.tar.gz` or `second.tar.gz` in the folder of `--out`: written after each part, and
while one runs, so that a run that is cut off leaves what it had. A part that fails, hangs or is killed leaves its log,
and lets the others run; one whose packages are not installed is skipped, and says so.
"""

import argparse
import signal
import sys
from pathlib import Path

from bench.gpu_parts import BUSY, LIMITS, Options, parts
from bench.parts import run_parts

WORK = Path("runs") / "gpu_programme"


def main(argv: list[str] | None = None) -> int:
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.run is None and not args.dry_run:
        parser.error("--run must be first or second, unless there is --dry_run")
    flags = choice_flags(args)
    if args.only or args.without:  # a wrong name is said now, not minutes later
        from bench.run import parser as of_kernels

        of_kernels(parser.prog).parse_args(flags)
    options = Options(args.dry_run, tuple(args.failed), tuple(flags))
    runs = [args.run] if args.run else list(LIMITS)
    chosen = {run: [p for p in parts(run, options) if args.parts is None or p.name in args.parts] for run in runs}
    known = sorted({p.name for run in runs for p in parts(run, options)})
    if unknown := [name for name in args.parts or [] if name not in known]:
        parser.error(f"--parts: {', '.join(unknown)} not among {', '.join(known)}")
    # Whoever ends the programme ends the part that runs, and the archive is written once more.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    codes = []
    for run in runs:
        name = f"dry-{run}" if args.dry_run else run
        archive = args.out / f"{name}.tar.gz"
        codes.append(
            run_parts(chosen[run], args.work / name, archive, args.limit or LIMITS[run] * (BUSY if args.dry_run else 1))
        )
        print(f"written to {archive}", flush=True)
    return max(codes)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the archives")
    parser.add_argument("--run", choices=list(LIMITS), help="which of the two")
    parser.add_argument(
        "--work", type=Path, default=WORK, metavar="DIR", help="folder of what is packed; default %(default)s"
    )
    parser.add_argument("--parts", nargs="+", metavar="PART", help="these parts instead of all")
    parser.add_argument("--failed", nargs="+", metavar="NAME", default=[], help="tests that the second run repeats")
    parser.add_argument("--limit", type=float, help="seconds for a run; default 480 and 300")
    parser.add_argument("--dry_run", action="store_true", help="tiny sizes, on the CPU: says nothing about a GPU")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these implementations, by their names in bench.run")
    parser.add_argument("--without", nargs="+", metavar="NAME", help="all implementations but these")
    parser.add_argument("--compile", action="store_true", help="torch.compile, and what compiles inside, take part too")
    return parser


def choice_flags(args: argparse.Namespace) -> list[str]:
    """For `bench.run`. Compiling every shape takes longer than the rest, so that it is not done unasked."""
    flags = [] if args.compile else ["--no_compile"]
    # Others take seconds to import, which a dry run has no use for.
    only = args.only or (["gcpo", "eager PyTorch"] if args.dry_run and not args.without else [])
    flags += ["--only", *only] if only else []
    return flags + (["--without", *args.without] if args.without else [])


if __name__ == "__main__":
    sys.exit(main())
