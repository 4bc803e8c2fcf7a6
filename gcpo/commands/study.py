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

from gcpo.run.inputs import argument_errors, check_model, one_line
from gcpo.run.table import show
from gcpo.study.definitions import NAMES, STUDIES, Arm
from gcpo.study.perform import perform, write
from gcpo.study.scale import BEDS, PRESETS, SEED_LISTS, StudyScale
from gcpo.study.workbench import Workbench


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
        check_arms(args.arms, names)
        workers = default_workers(scale) if args.workers is None else args.workers
        if workers < 1:
            raise ValueError(f"`--workers` must be at least 1, got {workers}.")
        bench = Workbench(scale, args.work_dir)
        for name in names:
            bench.check(STUDIES[name].only(args.arms).arms if name in STUDIES else [Arm(name)])
        args.output_dir.mkdir(parents=True, exist_ok=True)
        for name in names:
            began = time.perf_counter()
            done = perform(name, bench, args.quick, args.arms, workers)
            show(done.title, done.cells, done.note)
            write(done, name, bench, args.output_dir, shlex.join(["gcpo", "study", *flags]))
            print(f"{args.output_dir / name}.csv, .md, .png, .json   {time.perf_counter() - began:.0f} s\n")
    return 0


def default_workers(scale: StudyScale) -> int:
    """A process for each core, at most four, where runs are of a small model of ours; one for a model of the user's."""
    return min(4, os.cpu_count() or 1) if scale.model is None else 1


def parser() -> argparse.ArgumentParser:
    """The flags of `gcpo study`."""
    parser = argparse.ArgumentParser(
        prog="gcpo study",
        description="Trains several arms from one model, with the same seeds, and tabulates held-out scores and paired "
        "differences with 95% intervals over seeds. Runs that were done are not done again: the same command goes on "
        "where it was stopped, and studies share runs. Without --model_name_or_path, a small model of ours: --bed.",
    )
    add = parser.add_argument
    add("study", nargs="+", choices=[*NAMES, "all"], metavar="STUDY", help=f"{', '.join(NAMES)}, or all")
    add("--bed", choices=BEDS, default="tiny", help="task and starting model: the demo's, or one that integrates")
    add(
        "--arms",
        nargs="+",
        metavar="ARM",
        help="compare these, by the names of the table, with what they are paired with (default: all)",
    )
    add(
        "--workers",
        type=int,
        help="processes that share runs and cores (default: a core each, at most 4; 1 with --model)",
    )
    add("--quick", action="store_true", help="smaller runs and fewer seeds: minutes, and wide intervals")
    add("--output_dir", type=Path, default=Path("runs/studies"), help="for tables and plots")
    add("--work_dir", type=Path, default=Path("runs/studies"), help="for the starting model and the runs")
    add("--config", type=Path, help="YAML file of trainer options (GCPOConfig), which every arm gets")
    # The rest are fields of StudyScale.
    lists = ", ".join(f"{name} ({' '.join(map(str, seeds))})" for name, seeds in SEED_LISTS.items())
    add("--seeds", nargs="+", help=f"numbers, or the name of a list: {lists} (default: the bed's)")
    add("--steps", type=int, help="training steps of a run (default, of this and what follows: the bed's)")
    add("--model_name_or_path", dest="model", help="train this model instead of the demo's")
    add("--dataset_name", dest="dataset", help="reasoning_gym:NAME, a path, or a name on the hub (default: the demo's)")
    add("--reward_funcs", dest="reward", help="as in `gcpo train`, one; the task's own for reasoning_gym:NAME")
    add("--prompts_per_step", type=int, help="prompts of a step")
    add("--num_generations", type=int, help="candidates per prompt")
    add("--completion_tokens", type=int, help="most tokens of a completion")
    add("--held_out", dest="num_held_out", type=int, help="prompts to measure on")
    return parser


def make_scale(args: argparse.Namespace) -> StudyScale:
    """How much to do, from the flags."""
    flags = {item.name: getattr(args, item.name, None) for item in fields(StudyScale)}
    given: dict[str, Any] = {name: value for name, value in flags.items() if value is not None}
    if "seeds" in given:
        given["seeds"] = parse_seeds(given["seeds"])
    for name, value in given.items():
        if isinstance(value, int) and value < 1:
            raise ValueError(f"`--{'held_out' if name == 'num_held_out' else name}` must be at least 1, got {value}.")
    scale = replace(PRESETS[args.bed, args.quick], **given)
    if scale.model is not None:
        if scale.bed != "tiny":
            raise ValueError("`--bed` has a model of its own: no `--model_name_or_path`.")
        check_model(scale.model)
        if scale.dataset is None:
            raise ValueError("`--dataset_name` is missing: with a model of yours, a study needs its prompts.")
    if args.config is not None:
        options = read_options(args.config)
        scale = replace(scale, options=options)
    return scale


# Options that a study sets by itself, run by run, and the flag that changes them.
_OF_THE_STUDY = {
    "seed": "--seeds",
    "output_dir": "--work_dir",
    "max_steps": "--steps",
    "num_generations": "--num_generations",
    "per_device_train_batch_size": "--prompts_per_step",
    "max_completion_length": "--completion_tokens",
    "logging_steps": None,
}


def read_options(path: Path) -> dict[str, Any]:
    """Options that every arm gets, from a YAML file."""
    try:
        options = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"`--config` must be a YAML file, got {str(path)!r}: {one_line(str(error))}") from error
    if not isinstance(options, dict):
        raise ValueError(f"`--config` must be a YAML file of options, got {type(options).__name__}.")
    for name in _OF_THE_STUDY.keys() & options.keys():
        flag = _OF_THE_STUDY[name]
        advice = f"use `{flag}`" if flag else "tables need every step"
        raise ValueError(f"`--config` must not hold {name!r}, which a study sets by itself: {advice}.")
    return options


def parse_seeds(given: list[str]) -> tuple[int, ...]:
    """Seeds from numbers, or the name of a list of them."""
    if len(given) == 1 and given[0] in SEED_LISTS:
        return SEED_LISTS[given[0]]
    wanted = f"`--seeds` must be different numbers from 0 to 2**32 - 1, or one of {', '.join(SEED_LISTS)}, got"
    seeds = tuple(int(text) if text.isdecimal() else -1 for text in given)
    if not all(0 <= seed < 2**32 for seed in seeds) or len(set(seeds)) < len(seeds):
        raise ValueError(f"{wanted} {' '.join(given)!r}.")
    return seeds


def check_arms(given: list[str] | None, studies: list[str]) -> None:
    """Refuse arms that a study does not have, before anything is trained."""
    if given is not None and "samples" in studies:
        raise ValueError("`--arms` must not be given for `samples`, which has no arms.")
    for name in studies if given is not None else []:
        STUDIES[name].only(given)
