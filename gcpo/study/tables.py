"""What a study shows: its table as text, the conclusion from it, and a plot."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from gcpo.reports.intervals import Interval, elbow, holm, interval
from gcpo.study.budget import Budget
from gcpo.study.definitions import Study

# Metrics that are shown with their interval, each a comparison with 0.
WITH_INTERVALS = ("upsilon_reward_correlation", "push_reward_correlation", "collider_gain")
SCORES = {"pass_at_1": "pass@1", "mean_score": "score"}


@dataclass
class Row:
    """
    One arm over its seeds.

    Attributes:
        name: of the arm.
        score: on held-out prompts.
        difference: of its score from the arm that it is paired with, seed by seed; None for that arm itself.
        against: that arm's name.
        metrics: by heading.
    """

    name: str
    score: Interval
    difference: Interval | None = None
    against: str = ""
    metrics: dict[str, Interval] = field(default_factory=dict)


def make_rows(study: Study, results: dict[str, list[dict[str, Any]]]) -> list[Row]:
    """Rows of a study from its results, for each arm's name a list over its seeds: the first ones of the study's."""
    rows = []
    for arm in study.arms:
        scores = [result[study.score] for result in results[arm.name]]
        row = Row(arm.name, interval(scores))
        if arm.against is not None:
            others = [result[study.score] for result in results[arm.against]][: len(scores)]  # the same seeds
            row.difference = interval([a - b for a, b in zip(scores, others, strict=True)])
            row.against = arm.against
        for key, heading in study.columns.items():
            values = [result["metrics"][key] for result in results[arm.name] if key in result["metrics"]]
            if values:
                row.metrics[heading] = interval(values)
        rows.append(row)
    return rows


def as_cells(study: Study, rows: list[Row]) -> list[list[str]]:
    """The table as text, headings first."""
    varied = len({row.score.count for row in rows}) > 1
    headings = [*(["seeds"] if varied else []), *study.columns.values()]
    cells = [["arm", f"{SCORES[study.score]}, held out", "difference", "from", *headings]]
    for row in rows:
        gap = row.difference
        difference = "" if gap is None else f"{gap.mean:+.3f} ± {gap.half_text}"
        metrics = [str(row.score.count)] if varied else []
        for key, heading in study.columns.items():
            value = row.metrics.get(heading)
            if value is None:
                metrics.append("")
            elif key in WITH_INTERVALS:
                metrics.append(f"{value.mean:+.3f} ± {value.half_text}")
            else:
                metrics.append(f"{value.mean:.3g}")
        cells.append([row.name, str(row.score), difference, row.against, *metrics])
    return cells


def conclude(rows: list[Row]) -> str:
    """
    Which differences an interval over seeds tells from 0, and how many were tested: one in twenty is chance. Empty
    where there are none.
    """
    tested = [(row, row.difference) for row in rows if row.difference is not None]
    if not tested:
        return ""
    apart = [f"{row.name} from {row.against} ({gap.mean:+.3f})" for row, gap in tested if gap.excludes_zero]
    if not apart:
        counts = seed_counts([row for row, _ in tested])
        return f"None of the {len(tested)} differences can be told from 0 with {counts} seeds."
    held = holm([gap.p_value for _, gap in tested])
    return (
        f"{len(apart)} of {len(tested)} differences have an interval that leaves out 0: {'; '.join(apart)}. "
        f"By chance alone one in twenty would. After Holm's correction for {len(tested)} comparisons, {sum(held)} of "
        f"them {'remains' if sum(held) == 1 else 'remain'}."
    )


def seed_counts(rows: list[Row]) -> str:
    """How many seeds arms have, in words."""
    return " or ".join(map(str, sorted({row.score.count for row in rows})))


def budget_cells(results: list[dict[str, dict[str, float]]], grid: list[Budget]) -> tuple[list[list[str]], list[str]]:
    """The table of `samples` as text, headings first, and the names of the elbows, one per estimator and group size."""
    means = {
        b.name: {k: interval([r[b.name][k] for r in results]) for k in ("variance", "error", "seconds")} for b in grid
    }
    elbows = []
    for family in dict.fromkeys((b.estimator, b.n) for b in grid):
        # With L = 1 the projection cancels: there is nothing that could vary.
        members = [b.name for b in grid if (b.estimator, b.n) == family and not (b.estimator != "sampled" and b.L == 1)]
        at = elbow([means[m]["seconds"].mean for m in members], [means[m]["variance"].mean for m in members])
        elbows += [] if at is None else [members[at]]
    cells = [["estimator", "variance of Upsilon", "error to the reference", "seconds", ""]]
    for name, mean in means.items():
        variance, error, seconds = mean["variance"], mean["error"], mean["seconds"]
        texts = f"{variance.mean:.2e} ± {variance.half:.1e}", f"{error.mean:.4f} ± {error.half:.4f}"
        cells.append([name, *texts, f"{seconds.mean:.3f} ± {seconds.half:.3f}", "elbow" if name in elbows else ""])
    return cells, elbows


def plot(path: Path, study: Study, rows: list[Row], title: str) -> None:
    """Scores with their intervals, an arm below the other, and their differences beside them."""
    figure = Figure(figsize=(11, 0.5 * len(rows) + 2.2), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for k, row in enumerate(rows):
        color = "tab:gray" if row.name.startswith("GRPO") else "tab:blue"
        for axis, value in ((left, row.score), (right, row.difference)):
            if value is not None:
                # matplotlib draws no bar for NaN, the half width of a single seed.
                axis.errorbar(value.mean, k, xerr=value.half, fmt="o", color=color, capsize=3)
    left.set_yticks(range(len(rows)), [row.name for row in rows])
    left.invert_yaxis()
    left.set_xlabel(f"{SCORES[study.score]}, held out")
    right.axvline(0.0, color="black", linewidth=0.8)
    right.set_xlabel("difference from its pair")
    for axis in (left, right):
        axis.grid(alpha=0.3)
    figure.suptitle(f"{title}\n95% intervals over {seed_counts(rows)} seeds", fontsize="medium")
    figure.savefig(path, dpi=120)


def correlations(study: Study, rows: list[Row]) -> dict[str, list[tuple[str, Interval]]]:
    """Of each correlation with the reward that a study shows, by its heading: the arms that have it."""
    found: dict[str, list[tuple[str, Interval]]] = {}
    for key, heading in study.columns.items():
        arms = [(row.name, row.metrics[heading]) for row in rows if heading in row.metrics]
        if key.endswith("_reward_correlation") and arms:
            found[heading] = arms
    return found


def plot_correlations(path: Path, study: Study, rows: list[Row], title: str) -> None:
    """Of each arm, the correlations with the reward within groups, with their intervals."""
    shown = correlations(study, rows)
    names = [row.name for row in rows if any(row.name == name for arms in shown.values() for name, _ in arms)]
    figure = Figure(figsize=(11, 0.45 * len(names) + 2.2), layout="constrained")
    for axis, (heading, arms) in zip(
        figure.subplots(1, len(shown), sharey=True, squeeze=False)[0], shown.items(), strict=True
    ):
        for name, value in arms:
            axis.errorbar(value.mean, names.index(name), xerr=value.half, fmt="o", color="tab:blue", capsize=3)
        axis.axvline(0.0, color="black", linewidth=0.8)
        axis.set_yticks(range(len(names)), names)
        axis.set_xlabel(f"correlation within groups:\n{heading}")
        axis.grid(alpha=0.3)
    axis.invert_yaxis()
    figure.suptitle(f"{title}\nWhat the weights and the second KL favour; 95% intervals over seeds", fontsize="medium")
    figure.savefig(path, dpi=120)


def plot_budgets(path: Path, results: list[dict[str, dict[str, float]]], grid: list[Budget], elbows: list[str]) -> None:
    """Variance of Upsilon over seconds, a line for each estimator and group size, its elbow marked."""
    figure = Figure(figsize=(8, 5.5), layout="constrained")
    axis = figure.subplots()
    colors = {"loo": "tab:blue", "scored": "tab:orange", "sampled": "tab:green"}
    markers = dict(zip(sorted({b.n for b in grid}), "os^Dv", strict=False))
    families: dict[tuple[str, int], list[tuple[float, float, str]]] = {}
    for budget in grid:
        points = families.setdefault((budget.estimator, budget.n), [])
        seconds, variance = (interval([r[budget.name][k] for r in results]).mean for k in ("seconds", "variance"))
        if variance > 0:
            points.append((seconds, variance, budget.name))
    for (estimator, n), points in families.items():
        style: dict[str, Any] = {"marker": markers[n], "color": colors[estimator], "label": f"{estimator}, n = {n}"}
        points.sort()
        axis.plot([p[0] for p in points], [p[1] for p in points], **style)
        for seconds, variance, name in points:
            if name in elbows:
                axis.plot(seconds, variance, marker="o", markersize=16, markerfacecolor="none", color="black")
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlabel("seconds that an estimate adds to a rollout")
    axis.set_ylabel("variance of Upsilon over fresh colliders and samples")
    axis.set_title("Estimator budgets; rings: elbows", fontsize="medium")
    axis.grid(alpha=0.3)
    axis.legend(fontsize="small")
    figure.savefig(path, dpi=120)
