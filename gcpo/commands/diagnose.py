"""`gcpo diagnose`: names what is wrong with a run, from its log."""

import argparse
import json
from dataclasses import asdict, fields

from gcpo.reports.diagnose import Finding, Limits, answer_about_loss, diagnose
from gcpo.run.inputs import argument_errors
from gcpo.run.records import Run, read_runs


def run(flags: list[str]) -> int:
    """Print what is wrong; 0 where nothing was found, 1 where something was."""
    args = parser().parse_args(flags)
    with argument_errors():
        found = [(run, diagnose(run, Limits(overhead=args.overhead))) for run in read_runs(args.run)]
    if args.json:
        print(json.dumps({run.name: [asdict(finding) for finding in findings] for run, findings in found}, indent=1))
    else:
        for run, findings in found:
            print(as_text(run, findings))
    return int(any(findings for _, findings in found))


def parser() -> argparse.ArgumentParser:
    """The flags of `gcpo diagnose`."""
    parser = argparse.ArgumentParser(
        prog="gcpo diagnose",
        description="Names what is wrong with a run, from its log. Exit code 1 if anything is.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("run", nargs="+", metavar="RUN", help="output folder of a run, or its trainer_state.json")
    parser.add_argument("--overhead", type=float, default=Limits.overhead, help="planned step time over GRPO's part")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def as_text(run: Run, findings: list[Finding]) -> str:
    """What the command prints about a run."""
    lines = [f"{run.name}: {len(run.log)} logged steps", f"  {answer_about_loss(run)}"]
    if not findings:
        lines.append(f"  Nothing is wrong by {len(fields(Limits))} limits.")
    for finding in findings:
        lines += [f"  ! {finding.name}: {finding.number}", f"      {finding.change}"]
    return "\n".join(lines)
