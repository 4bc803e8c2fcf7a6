"""The command `gcpo study`."""

import os

# Read when torch is loaded: threads that spin while they wait slow each other down.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import argparse
import json
import platform
import shlex
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import transformers
import trl
import yaml

from gcpo.run.inputs import argument_errors, check_model
from gcpo.run.progress import progress_bar
from gcpo.run.redaction import redacted
from gcpo.study import budget, tables
from gcpo.study.definitions import NAMES, STUDIES
from gcpo.study.workbench import Scale, Workbench

DEMO = Scale(steps=32, seeds=(0, 1, 2, 3), num_held_out=256)
QUICK = Scale(steps=20, seeds=(0, 1, 2), warm_target=0.25)


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
    add("--seeds", type=int, nargs="+", help=f"seeds (default: {len(DEMO.seeds)} of them, --quick: {len(QUICK.seeds)})")
    add("--steps", type=int, help=f"training steps of a run (default: {DEMO.steps}, --quick: {QUICK.steps})")
    add("--output_dir", type=Path, default=Path("runs/studies"), help="for tables and plots")
    add("--work_dir", type=Path, default=Path("runs/studies"), help="for the starting model and the runs")
    add("--model_name_or_path", help="train this model instead of the demo's")
    add("--dataset_name", help="reasoning_gym:NAME, a path, or a name on the hub (default: the demo's task)")
    add("--reward_funcs", help="as in `gcpo train`, one; the task's own for reasoning_gym:NAME")
    add("--config", type=Path, help="YAML file of trainer options (GCPOConfig), which every arm gets")
    add("--prompts_per_step", type=int, help=f"prompts of a step (default: {DEMO.prompts_per_step})")
    add("--num_generations", type=int, help=f"candidates per prompt (default: {DEMO.num_generations})")
    add("--completion_tokens", type=int, help=f"most tokens of a completion (default: {DEMO.completion_tokens})")
    add("--held_out", type=int, help=f"prompts to measure on (default: {DEMO.num_held_out})")
    return parser


def run(flags: list[str]) -> int:
    """Run the command; its exit code."""
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
            run_study(name, bench, args.output_dir, args.quick, shlex.join(["gcpo", "study", *flags]))
    return 0


def make_scale(args: argparse.Namespace) -> Scale:
    """How much to do, from the flags."""
    scale = QUICK if args.quick else DEMO
    given = {
        "steps": args.steps,
        "seeds": tuple(args.seeds) if args.seeds else None,
        "model": args.model_name_or_path and check_model(args.model_name_or_path),
        "dataset": args.dataset_name,
        "reward": args.reward_funcs,
        "prompts_per_step": args.prompts_per_step,
        "num_generations": args.num_generations,
        "completion_tokens": args.completion_tokens,
        "num_held_out": args.held_out,
    }
    for name, value in given.items():
        if isinstance(value, int) and value < 1:
            raise ValueError(f"`--{name}` must be at least 1, got {value}.")
    scale = replace(scale, **{name: value for name, value in given.items() if value is not None})
    if scale.model is not None and scale.dataset is None:
        raise ValueError("`--dataset_name` is missing: with a model of yours, a study needs its prompts.")
    if args.config is not None:
        options = yaml.safe_load(args.config.read_text(encoding="utf-8"))
        if not isinstance(options, dict):
            raise ValueError(f"`--config` must be a YAML file of options, got {type(options).__name__}.")
        scale = replace(scale, options=options)
    return scale


def run_study(name: str, bench: Workbench, folder: Path, quick: bool, command: str) -> None:
    """Do what is left of a study, print its table, and write its CSV, Markdown, PNG and JSON."""
    began = time.perf_counter()
    seeds = bench.scale.seeds
    if name == "samples":
        title = "samples: what does a steadier Upsilon cost?"
        grid = budget.budgets(quick)
        with progress_bar(len(grid) * len(seeds), name, "budget", leave=False) as bar:
            measured = [budget.measure(bench, seed, quick, bar.update) for seed in seeds]
        cells, elbows = tables.budget_cells(measured, grid)
        note = f"± are 95% intervals over {len(seeds)} seeds, each with prompts and candidates of its own. " + (
            f"Elbows: {'; '.join(elbows)}." if elbows else "No curve has an elbow."
        )
        tables.plot_budgets(folder / f"{name}.png", measured, grid, elbows)
        raw: Any = measured
    else:
        study = STUDIES[name]
        title = f"{name}: {study.question}"
        results: dict[str, list[dict[str, Any]]] = {arm.name: [] for arm in study.arms}
        left = sum(not bench.done(arm, seed) for arm in study.arms for seed in seeds)
        with progress_bar(left * bench.scale.steps, name, "step", leave=False) as bar:
            bench.tick = bar.update
            bar.set_description(f"{name}: starting model")
            before = bench.before()
            # Seed by seed: what was interrupted leaves whole pairs.
            for seed in seeds:
                for arm in study.arms:
                    bar.set_description(f"{name}: {arm.name}, seed {seed}")
                    results[arm.name].append(bench.run(arm, seed))
        rows = tables.make_rows(study, results)
        cells = tables.as_cells(study, rows)
        start = before["mean_score" if study.score == "mean_score" else "pass_at_1"]
        start = before["open_ended"] if name == "transfer" else start
        note = (
            f"{tables.conclude(study, rows)} Before training: {start:.3f}. ± are 95% intervals over {len(seeds)} seeds "
            f"(Student's t) of {bench.scale.steps} steps each, all from one model; other columns are means."
        )
        tables.plot(folder / f"{name}.png", study, rows, title)
        # Per-prompt results stay with the runs.
        kept = ("folder", "pass_at_1", "mean_score", "metrics")
        raw = {arm: [{key: result[key] for key in kept} for result in done] for arm, done in results.items()}
    tables.show(title, cells, note)
    environment = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "trl": trl.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
    }
    note += f"\n\n`{redacted(command)}`, torch {environment['torch']}, {environment['threads']} CPU threads."
    tables.write(folder, name, title, cells, note)
    scale = redacted(asdict(bench.scale))
    summary = {"command": redacted(command), "scale": scale, "environment": environment, "results": raw}
    (folder / f"{name}.json").write_text(json.dumps(summary, indent=1) + "\n")
    print(f"{folder / name}.csv, .md, .png, .json   {time.perf_counter() - began:.0f} s\n")
