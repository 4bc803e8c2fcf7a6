"""`gcpo demo`: trains a tiny model with GRPO and with GCPO, and shows both side by side."""

import os

# Read when torch is loaded. Threads that spin while they wait, the default, slow each other down many times over as
# soon as anything else runs on the machine.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from gcpo.causal.account import SECONDS, TOKENS
from gcpo.demo.compare import PRESETS, compare
from gcpo.run.inputs import argument_errors
from gcpo.run.table import show


def run(flags: list[str]) -> int:
    """Run the demo and print its table; the exit code."""
    args = parser().parse_args(flags)
    settings = PRESETS[args.model, args.quick]
    given = {"task": args.task, "steps": args.steps}
    settings = replace(settings, **{name: value for name, value in given.items() if value is not None})
    with argument_errors():
        result = compare(args.model, settings, args.seed, args.output_dir)
    print_table(result)
    print(f"\nNumbers: {args.output_dir / 'demo.json'}   Plot: {args.output_dir / 'demo.png'}")
    print(f"A page with samples: gcpo report {args.output_dir}")
    return 0


def parser() -> argparse.ArgumentParser:
    """The flags of `gcpo demo`."""
    parser = argparse.ArgumentParser(prog="gcpo demo", description="train a tiny model and watch its reward rise")
    add = parser.add_argument
    add("--quick", action="store_true", help="about a minute instead of about four")
    add(
        "--model",
        choices=("tiny", "smollm2"),
        default="tiny",
        help="tiny: 0.7M parameters, made on the spot. smollm2: SmolLM2-135M-Instruct, a few steps",
    )
    add("--task", help="a reasoning-gym task with short answers (default: one that suits the model)")
    add("--steps", type=int, help="training steps of each method")
    add("--seed", type=int, default=0, help="of the data, the model, the batches and the sampling")
    add("--output_dir", type=Path, default=Path("runs/demo"), help="for the plot, the JSON, the model")
    return parser


def print_table(result: dict[str, Any]) -> None:
    """Print what `gcpo.demo.compare.compare` returns."""
    settings, evaluations, summary = result["settings"], result["evaluations"], result["summary"]
    columns, before = list(evaluations.values()), evaluations["before"]
    methods = [summary[name] for name in ("GRPO", "GCPO")]
    rows = [["", "before", "GRPO", "GCPO"]]
    for key, label in (("pass_at_1", "pass@1, held out"), ("mean_score", "score, held out")):
        rows.append([label, *(f"{column[key]:.3f} ± {column[key + '_se']:.3f}" for column in columns)])
    last = f"reward, last {methods[0]['last_reward_steps']} steps"
    rows.append([last, "", *(f"{method['last_reward']:.3f}" for method in methods)])
    sections = [len(rows) - 1]
    rows.append(["seconds per step", "", *(_number(method["step_seconds"]) for method in methods)])
    for phase in SECONDS:
        label = "loss and gradient" if phase == "loss" else phase
        rows.append([f"  {label}", "", *(_number(method["seconds"][phase]) for method in methods)])
    sections.append(len(rows) - 1)
    for name in TOKENS:
        counts = [method["tokens"][name] for method in methods]
        if any(counts):
            rows.append([f"tokens {name.replace('_', ', ')}", "", *(_number(count, ",.0f") for count in counts)])
    notes = [
        f"pass@1: {before['num_prompts']} prompts that training never sees, {before['num_samples']} samples each at "
        "temperature 1; ± is the standard error over prompts."
    ]
    if summary["overhead"]:
        notes.append(f"A step of GCPO takes {summary['overhead']:.2f} times one of GRPO (medians).")
    notes.append("One seed of a tiny problem: another seed can put either method ahead.")
    title = f"{settings['task']}, {settings['steps']} steps, seed {result['seed']}"
    show(title, rows, *notes, sections=sections)


def _number(value: float | None, form: str = ".3f") -> str:
    # Nothing for a phase that a method does not have.
    return format(value, form) if value else ""
