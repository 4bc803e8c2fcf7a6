"""Doing a study: the runs that are left of it, and the table, the plot and the files that come of them."""

import csv
import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from gcpo.run.machine import environment
from gcpo.run.progress import progress_bar
from gcpo.run.quiet import quiet
from gcpo.run.records import read_run
from gcpo.run.redaction import redacted
from gcpo.run.table import markdown
from gcpo.study import budget, tables
from gcpo.study.definitions import STUDIES, Arm, Study
from gcpo.study.scale import StudyScale
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
        seconds: of training, by the runs' logs; 0 for what trains nothing.
        plots: each writes a plot to a file, by what its name has behind the study's.
    """

    title: str
    cells: list[list[str]]
    note: str
    results: Any
    seconds: float
    plots: dict[str, Callable[[Path], None]]


def perform(name: str, bench: Workbench, quick: bool, arms: Sequence[str] | None = None, workers: int = 1) -> Done:
    """
    Do what is left of a study.

    Args:
        quick: concerns `samples`, whose grid is not part of the workbench's scale.
        arms: names of those to compare, with those that they are paired with. None: all of them.
        workers: processes that share the runs.
    """
    if name == "samples":
        return _perform_samples(bench, quick)
    return _perform_arms(name, STUDIES[name].only(arms), bench, workers)


def _perform_samples(bench: Workbench, quick: bool) -> Done:
    seeds, grid = bench.scale.seeds, budget.budgets(quick)
    with progress_bar(len(grid) * len(seeds), "samples", "budget", leave=False) as bar:
        measured = [budget.measure(bench, seed, quick, bar.update) for seed in seeds]
    cells, elbows = tables.budget_cells(measured, grid)
    note = f"± are 95% intervals over {len(seeds)} seeds, each with prompts and candidates of its own. " + (
        f"Elbows: {'; '.join(elbows)}." if elbows else "No curve has an elbow."
    )
    title = "samples: what does a steadier Upsilon cost?"
    return Done(title, cells, note, measured, 0.0, {"": lambda path: tables.plot_budgets(path, measured, grid, elbows)})


def _perform_arms(name: str, study: Study, bench: Workbench, workers: int) -> Done:
    scale = bench.scale
    title = f"{name}: {study.question}"
    notes = [_prepare(name, study, bench)]
    study = replace(study, arms=tuple(map(bench.resolved, study.arms)))
    # Seed by seed: what was interrupted leaves whole pairs.
    runs = [(arm, seed) for seed in scale.seeds for arm in study.arms if seed in arm.seeds_of(scale.seeds)]
    left = bench.left(runs)
    with progress_bar(len(left) * scale.steps, name, "step", leave=False) as bar:
        if workers > 1 and left:
            _share(left, bench, workers, lambda: bar.update(scale.steps))
        bench.tick = bar.update
        results: dict[str, list[dict[str, Any]]] = {arm.name: [] for arm in study.arms}
        for arm, seed in runs:
            bar.set_description(f"{name}: {arm.name}, seed {seed}")
            results[arm.name].append(bench.run(arm, seed))
    rows = tables.make_rows(study, results)
    seconds = sum(sum(read_run(result["folder"]).values("step_time")) for found in results.values() for result in found)
    before = bench.before()["open_ended" if name == "transfer" else study.score]
    notes += [
        tables.conclude(rows),
        f"Before training: {before:.3f}.",
        f"± are 95% intervals over {tables.seed_counts(rows)} seeds (Student's t) of {scale.steps} steps each, "
        "all from one model; columns without ± are means.",
        f"{len(runs)} runs, {seconds:,.0f} s of training.",
    ]
    # Per-prompt results stay with the runs.
    kept = ("folder", "pass_at_1", "mean_score", "metrics")
    shown = {arm: [{key: result[key] for key in kept} for result in found] for arm, found in results.items()}
    cells = tables.as_cells(study, rows)
    plots = {"": lambda path: tables.plot(path, study, rows, title)}
    if tables.correlations(study, rows):
        plots["-correlations"] = lambda path: tables.plot_correlations(path, study, rows, title)
    return Done(title, cells, " ".join(filter(None, notes)), shown, seconds, plots)


def _prepare(name: str, study: Study, bench: Workbench) -> str:
    """Make the starting model, and say, before anything is compared, whether its colliders are worth anything."""
    with quiet():
        _ = bench.start
    if not study.asks_of_colliders:
        return ""
    texts = []
    for how, gain in bench.collider_gains().items():
        better = "better" if gain.mean > 0 else "worse"
        verdict = better if gain.excludes_zero else "not to be told from"
        texts.append(f"colliders drawn {how} are {verdict} {'than ' if gain.excludes_zero else ''}candidates ")
        texts[-1] += f"({gain.mean:+.3f} ± {gain.half_text})"
    text = f"At the start, {' and '.join(texts)}, over {gain.count} batches of prompts."
    print(f"{name}: {text}", flush=True)
    return text


def _share(runs: list[tuple[Arm, int]], bench: Workbench, workers: int, tick: Callable[[], None]) -> None:
    """Do runs in processes of their own. Those that are scaled by another run come after it."""
    threads = max(1, torch.get_num_threads() // workers)
    first = [run for run in runs if run[0].scaled_by is None]
    then = [run for run in runs if run[0].scaled_by is not None]
    # Fresh processes: forked ones would share the locks of libraries that have threads.
    context, prepare = multiprocessing.get_context("spawn"), (bench.scale, bench.folder, threads)
    pool = ProcessPoolExecutor(workers, context, _begin, prepare)
    try:
        for part in (first, then):
            for done in as_completed([pool.submit(_do, *run) for run in part]):
                done.result()  # raises what the run raised, also that its process is gone
                tick()
    except BrokenProcessPool as error:
        raise ValueError(
            f"`--workers` {workers}: a process was ended from outside, perhaps for lack of memory. Lower it; the same "
            "command goes on with the runs that are left."
        ) from error
    except BaseException:
        for process in multiprocessing.active_children():
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


_bench: Workbench | None = None  # of a process that does runs


def _begin(scale: StudyScale, folder: Path, threads: int) -> None:
    global _bench
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever waits for this process ends it
    threading.Thread(target=_end_with, args=(multiprocessing.parent_process(),), daemon=True).start()
    torch.set_num_threads(threads)
    _bench = Workbench(scale, folder)


def _end_with(parent: Any) -> None:
    """End this process when the one that asked for it is gone, however it went."""
    parent.join()
    os._exit(1)


def _do(arm: Arm, seed: int) -> None:
    assert _bench is not None
    _bench.run(arm, seed)


def write(done: Done, name: str, bench: Workbench, folder: Path, command: str) -> None:
    """Write NAME.csv, NAME.png, NAME.md, which shows the plot beside the table, and NAME.json."""
    command, place = redacted(command), environment()
    for suffix, plot in done.plots.items():
        plot(folder / f"{name}{suffix}.png")
    with (folder / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(done.cells)
    note = f"{done.note}\n\n`{command}`, torch {place['torch']}, {place['threads']} CPU threads."
    lines = [f"# {done.title}", "", *markdown(done.cells), "", note, ""]
    for suffix in done.plots:
        lines += [f"![{name}{suffix}]({name}{suffix}.png)", ""]
    (folder / f"{name}.md").write_text("\n".join(lines), encoding="utf-8")
    scale = redacted(asdict(bench.scale))
    summary = {"command": command, "scale": scale, "environment": place}
    summary |= {"train_seconds": round(done.seconds), "results": done.results}
    (folder / f"{name}.json").write_text(json.dumps(summary, indent=1) + "\n")
