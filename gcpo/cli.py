"""The command `gcpo`: finds a subcommand's module in `gcpo.commands`, and imports what that one needs and no more."""

import difflib
import os
import sys
from importlib import import_module
from typing import NoReturn

from gcpo import __version__
from gcpo.run.inputs import ArgumentsError, argument_errors
from gcpo.run.leaving import leave

DEBUG = "GCPO_DEBUG"
# Each is a module of `gcpo.commands` with a function `run(flags) -> exit code`.
COMMANDS = {
    "train": "train a model with GCPO: the flags and YAML files of `trl grpo`, and GCPO's own",
    "plan": "what a step will cost beside GRPO's, from a model's config and the flags of `gcpo train`",
    "eval": "measure a model's pass@1 and pass@k, with standard errors",
    "study": "what each part of the method does: arms, seeds, a table with intervals",
    "diagnose": "read a run's log and name what is wrong with it, and the option to change",
    "report": "one HTML page of plots and samples from runs",
    "demo": "train a tiny model and watch its reward rise",
    "bench": "the kernels beside their peers: checked against float64, timed, held against the floor",
    "doctor": "print versions and the device, and check the kernels on this machine",
}


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
        with argument_errors():
            command = import_module(f"gcpo.commands.{name}")
        return command.run(flags)
    except KeyboardInterrupt:
        print(f"gcpo {name}: interrupted", file=sys.stderr)
        return 130
    except ArgumentsError as error:
        if os.environ.get(DEBUG):
            raise
        return _fail(f"gcpo {name}", f"{error}\n{DEBUG}=1 shows where this was raised.")


def entry() -> NoReturn:
    """The process `gcpo`: runs the command, and ends."""
    code = main()
    if "LOCAL_RANK" in os.environ:  # one of those that accelerate or torchrun started
        leave(code)
    sys.exit(code)


def usage() -> str:
    """The text of `gcpo --help`."""
    width = max(map(len, COMMANDS))
    commands = "\n".join(f"  {name:<{width}}  {text}" for name, text in COMMANDS.items())
    return (
        "usage: gcpo COMMAND [flags]\n\n"
        "Group Causal Policy Optimization (arXiv 2508.05428) on top of TRL.\n\n"
        f"commands:\n{commands}\n\n"
        f"`gcpo COMMAND --help` lists the flags of a command. {DEBUG}=1 shows where an error was raised."
    )


def _fail(prog: str, message: str) -> int:
    print(f"{prog}: error: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    entry()
