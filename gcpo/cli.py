"""The command `gcpo`: picks a subcommand, and imports what that one needs and no more."""

import argparse
import difflib
import os
import sys
from collections.abc import Callable
from pathlib import Path

from gcpo import __version__
from gcpo.commands import eval as eval_command
from gcpo.run.inputs import ArgumentsError, argument_errors

DEBUG = "GCPO_DEBUG"


def main(argv: list[str] | None = None) -> int:
    """
    Run a command.

    Args:
        argv: command and flags; those of the process when None.

    Returns:
        The exit code: 0, 1 where a check failed, 2 for wrong arguments, 130 after Ctrl-C.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if argv else 2
    if argv[0] == "--version":
        print(f"gcpo {__version__}")
        return 0
    name, flags = argv[0], argv[1:]
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        return _fail("gcpo", f"unknown command {name!r}{hint}; there are {', '.join(COMMANDS)}")
    try:
        return COMMANDS[name][0](flags)
    except KeyboardInterrupt:
        print(f"gcpo {name}: interrupted", file=sys.stderr)
        return 130
    except ArgumentsError as error:
        if os.environ.get(DEBUG):
            raise
        return _fail(f"gcpo {name}", f"{error}\n{DEBUG}=1 shows where this was raised.")


def usage() -> str:
    """The text of `gcpo --help`."""
    width = max(map(len, COMMANDS))
    commands = "\n".join(f"  {name:<{width}}  {text}" for name, (_, text) in COMMANDS.items())
    return (
        "usage: gcpo COMMAND [flags]\n\n"
        "Group Causal Policy Optimization (arXiv 2508.05428) on top of TRL.\n\n"
        f"commands:\n{commands}\n\n"
        f"`gcpo COMMAND --help` lists the flags of a command. {DEBUG}=1 shows where an error was raised."
    )


def _fail(prog: str, message: str) -> int:
    print(f"{prog}: error: {message}", file=sys.stderr)
    return 2


def _train(flags: list[str]) -> int:
    with argument_errors():
        from gcpo.commands.train import prepare, train
    run = prepare(flags)
    return run if isinstance(run, int) else train(*run)


def _doctor(flags: list[str]) -> int:
    argparse.ArgumentParser(prog="gcpo doctor", description=COMMANDS["doctor"][1]).parse_args(flags)
    with argument_errors():
        from gcpo.commands.doctor import run
    return run()


def _demo(flags: list[str]) -> int:
    with argument_errors():
        from gcpo.commands import demo

        parser = argparse.ArgumentParser(prog="gcpo demo", description=COMMANDS["demo"][1])
        demo.add_arguments(parser)
        demo.run(parser.parse_args(flags))
    return 0


def _eval(flags: list[str]) -> int:
    return eval_command.run(flags)


def _study(flags: list[str]) -> int:
    with argument_errors():
        from gcpo.commands.study import run
    return run(flags)


def _plan(flags: list[str]) -> int:
    with argument_errors():
        from gcpo.commands.plan import run
    return run(flags)


def _diagnose(flags: list[str]) -> int:
    from gcpo.reports.diagnose import main as run

    return run(flags)


def _report(flags: list[str]) -> int:
    with argument_errors():
        from gcpo.reports.report import main as run
    return run(flags)


def _bench(flags: list[str]) -> int:
    root = Path(__file__).resolve().parents[1]
    if not (root / "bench" / "run.py").exists():
        return _fail("gcpo bench", "the benchmarks are not installed with the packages: run this from a checkout.")
    sys.path.insert(0, str(root))  # of the repository; a script finds only what is installed
    with argument_errors():
        from bench.run import main as run
    return run(flags, "gcpo bench")


COMMANDS: dict[str, tuple[Callable[[list[str]], int], str]] = {
    "train": (_train, "train a model with GCPO: the flags and YAML files of `trl grpo`, and GCPO's own"),
    "plan": (_plan, "what a step will cost beside GRPO's, from a model's config and the flags of `gcpo train`"),
    "eval": (_eval, "measure a model's pass@1 and pass@k, with standard errors"),
    "study": (_study, "what each part of the method does: arms, seeds, a table with intervals"),
    "diagnose": (_diagnose, "read a run's log and name what is wrong with it, and the option to change"),
    "report": (_report, "one HTML page of plots and samples from runs"),
    "demo": (_demo, "train a tiny model and watch its reward rise"),
    "bench": (_bench, "the kernels beside their peers: checked against float64, timed, held against the floor"),
    "doctor": (_doctor, "print versions and the device, and check the kernels on this machine"),
}

if __name__ == "__main__":
    sys.exit(main())
