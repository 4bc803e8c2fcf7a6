"""Doing a study: the runs that are left of it, and the table, the plot and the files that come of them."""

import csv
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gcpo.run.machine import environment
from gcpo.run.progress import progress_bar
from gcpo.run.redaction import redacted
from gcpo.run.table import markdown
from gcpo.study import budget, tables
from gcpo.study.definitions import STUDIES
from gcpo.study.workbench import Workbench


@dataclass
class Done:
    """
    What came of a study.

    Attributes:
        title: its name and question.
        cells: its table as text, headings first.
        note: what the table says, and what its numbers are.
        results: of each arm and seed, as JSON takes it.
        plot: writes its plot to a file.
    """

    title: str
    cells: list[list[str]]
    note: str
    results: Any
    plot: Callable[[Path], None]


def perform(name: str, bench: Workbench, quick: bool) -> Done:
    """Do what is left of a study. `quick` concerns `samples`, whose grid is not part of the workbench's scale."""
    return _perform_samples(bench, quick) if name == "samples" else _perform_arms(name, bench)


def _perform_samples(bench: Workbench, quick: bool) -> Done:
    seeds, grid = bench.scale.seeds, budget.budgets(quick)
    with progress_bar(len(grid) * len(seeds), "samples", "budget", leave=False) as bar:
        measured = [budget.measure(bench, seed, quick, bar.update) for seed in seeds]
    cells, elbows = tables.budget_cells(measured, grid)
    note = f"± are 95% intervals over {len(seeds)} seeds, each with prompts and candidates of its own. " + (
        f"Elbows: {'; '.join(elbows)}." if elbows else "No curve has an elbow."
    )
    title = "samples: what does a steadier Upsilon cost?"
    return Done(title, cells, note, measured, lambda path: tables.plot_budgets(path, measured, grid, elbows))


def _perform_arms(name: str, bench: Workbench) -> Done:
    study, scale = STUDIES[name], bench.scale
    title = f"{name}: {study.question}"
    results: dict[str, list[dict[str, Any]]] = {arm.name: [] for arm in study.arms}
    left = sum(not bench.done(arm, seed) for arm in study.arms for seed in scale.seeds)
    with progress_bar(left * scale.steps, name, "step", leave=False) as bar:
        bench.tick = bar.update
        bar.set_description(f"{name}: starting model")
        before = bench.before()
        # Seed by seed: what was interrupted leaves whole pairs.
        for seed in scale.seeds:
            for arm in study.arms:
                bar.set_description(f"{name}: {arm.name}, seed {seed}")
                results[arm.name].append(bench.run(arm, seed))
    rows = tables.make_rows(study, results)
    start = before["open_ended" if name == "transfer" else study.score]
    note = (
        f"{tables.conclude(rows)} Before training: {start:.3f}. ± are 95% intervals over {len(scale.seeds)} seeds "
        f"(Student's t) of {scale.steps} steps each, all from one model; other columns are means."
    )
    # Per-prompt results stay with the runs.
    kept = ("folder", "pass_at_1", "mean_score", "metrics")
    shown = {arm: [{key: result[key] for key in kept} for result in found] for arm, found in results.items()}
    cells = tables.as_cells(study, rows)
    return Done(title, cells, note, shown, lambda path: tables.plot(path, study, rows, title))


def write(done: Done, name: str, bench: Workbench, folder: Path, command: str) -> None:
    """Write NAME.csv, NAME.png, NAME.md, which shows the plot beside the table, and NAME.json."""
    command, place = redacted(command), environment()
    done.plot(folder / f"{name}.png")
    with (folder / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(done.cells)
    note = f"{done.note}\n\n`{command}`, torch {place['torch']}, {place['threads']} CPU threads."
    lines = [f"# {done.title}", "", *markdown(done.cells), "", note, "", f"![{name}]({name}.png)", ""]
    (folder / f"{name}.md").write_text("\n".join(lines), encoding="utf-8")
    scale = redacted(asdict(bench.scale))
    summary = {"command": command, "scale": scale, "environment": place, "results": done.results}
    (folder / f"{name}.json").write_text(json.dumps(summary, indent=1) + "\n")
