"""`gcpo study`: does the experiments, and shows a table of each."""

import os

# Read when torch is loaded: threads that spin while they wait slow each other down.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import argparse
import shlex
import time
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import yaml

from gcpo.run.inputs import argument_errors, check_model
from gcpo.run.table import show
from gcpo.study.definitions import NAMES
from gcpo.study.perform import perform, write
from gcpo.study.workbench import StudyScale, Workbench

DEMO = StudyScale(steps=32, seeds=(0, 1, 2, 3), num_held_out=256)
QUICK = StudyScale(steps=20, seeds=(0, 1, 2), warm_target=0.25)


def run(flags: list[str]) -> int:
    """Do the studies and print their tables; the exit code."""
    args = parser().parse_args(flags)
    names = list(NAMES) if "all" in args.study else list(dict.fromkeys(args.study))
    with argument_errors():
        scale = make_scale(args)
        if scale.model is not None and scale.reward is None and "transfer" in names:
            raise ValueError(
                "`--reward_funcs` is missing: with a model of yours, `transfer` needs an open-ended reward."
            )
        args.output_dir.mkdir(parents=True, exist_ok=True)
        bench = Workbench(scale, args.work_dir)
        for name in names:
            began = time.perf_counter()
            done = perform(name, bench, args.quick)
            show(done.title, done.cells, done.note)
            write(done, name, bench, args.output_dir, shlex.join(["gcpo", "study", *flags]))
            print(f"{args.output_dir / name}.csv, .md, .png, .json   {time.perf_counter() - began:.0f} s\n")
    return 0


def parser() -> argparse.ArgumentParser:
    """The flags of `gcpo study`."""
    parser = argparse.ArgumentParser(
        prog="gcpo study",
        description="Trains several arms from one model, with the same seeds, and tabulates held-out scores and paired "
        "differences with 95%% intervals over seeds. Runs that were done are not done again: the same command goes on "
        "where it was stopped, and studies share runs. Without --model_name_or_path, the demo's model.",
    )
    add = parser.add_argument
    add("study", nargs="+", choices=[*NAMES, "all"], metavar="STUDY", help=f"{', '.join(NAMES)}, or all")
    add("--quick", action="store_true", help="smaller runs and three seeds: minutes, and wide intervals")
    add("--output_dir", type=Path, default=Path("runs/studies"), help="for tables and plots")
    add("--work_dir", type=Path, default=Path("runs/studies"), help="for the starting model and the runs")
    add("--config", type=Path, help="YAML file of trainer options (GCPOConfig), which every arm gets")
    # The rest are fields of StudyScale.
    add("--seeds", type=int, nargs="+", help=f"seeds (default: {len(DEMO.seeds)} of them, --quick: {len(QUICK.seeds)})")
    add("--steps", type=int, help=f"training steps of a run (default: {DEMO.steps}, --quick: {QUICK.steps})")
    add("--model_name_or_path", dest="model", help="train this model instead of the demo's")
    add("--dataset_name", dest="dataset", help="reasoning_gym:NAME, a path, or a name on the hub (default: the demo's)")
    add("--reward_funcs", dest="reward", help="as in `gcpo train`, one; the task's own for reasoning_gym:NAME")
    add("--prompts_per_step", type=int, help=f"prompts of a step (default: {DEMO.prompts_per_step})")
    add("--num_generations", type=int, help=f"candidates per prompt (default: {DEMO.num_generations})")
    add("--completion_tokens", type=int, help=f"most tokens of a completion (default: {DEMO.completion_tokens})")
    add("--held_out", dest="num_held_out", type=int, help=f"prompts to measure on (default: {DEMO.num_held_out})")
    return parser


def make_scale(args: argparse.Namespace) -> StudyScale:
    """How much to do, from the flags."""
    flags = {item.name: getattr(args, item.name, None) for item in fields(StudyScale)}
    given: dict[str, Any] = {
        name: tuple(value) if name == "seeds" else value for name, value in flags.items() if value is not None
    }
    for name, value in given.items():
        if isinstance(value, int) and value < 1:
            raise ValueError(f"`--{'held_out' if name == 'num_held_out' else name}` must be at least 1, got {value}.")
    scale = replace(QUICK if args.quick else DEMO, **given)
    if scale.model is not None:
        check_model(scale.model)
        if scale.dataset is None:
            raise ValueError("`--dataset_name` is missing: with a model of yours, a study needs its prompts.")
    if args.config is not None:
        options = yaml.safe_load(args.config.read_text(encoding="utf-8"))
        if not isinstance(options, dict):
            raise ValueError(f"`--config` must be a YAML file of options, got {type(options).__name__}.")
        scale = replace(scale, options=options)
    return scale
