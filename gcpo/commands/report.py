"""`gcpo report`: writes one HTML page about one or several runs."""

import argparse
from pathlib import Path

from gcpo.reports.report import make_page
from gcpo.run.inputs import argument_errors
from gcpo.run.records import read_runs


def run(flags: list[str]) -> int:
    """Write the page; the exit code."""
    args = parser().parse_args(flags)
    with argument_errors():
        runs = read_runs(args.run)
        page = make_page(runs, args.title, args.prompts)
        output = args.output or _folder_of(args.run) / "report.html"
        output.write_text(page, encoding="utf-8")
    print(f"{len(runs)} runs, {len(page) / 1024:.0f} KiB: {output}")
    return 0


def parser() -> argparse.ArgumentParser:
    """The flags of `gcpo report`."""
    parser = argparse.ArgumentParser(
        prog="gcpo report",
        description="One self-contained HTML page of plots, samples and a diagnosis. A run's samples are written with "
        "`log_completions`; a folder of runs stands for those in it.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("run", nargs="+", metavar="RUN", help="output folders of runs, or trainer_state.json files")
    add("--output", type=Path, help="file to write; default: report.html in RUN, or where several are given, here")
    add("--title", default="GCPO report", help="of the page")
    add("--prompts", type=int, default=4, help="prompts to show, of the first and the last log")
    return parser


def _folder_of(runs: list[str]) -> Path:
    """The one run's, or folder of runs'; the current one for several."""
    path = Path(runs[0] if len(runs) == 1 else ".")
    return path if path.is_dir() else path.parent
