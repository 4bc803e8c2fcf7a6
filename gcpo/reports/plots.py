"""Plots of runs, each drawn into an axis: what `gcpo demo` saves as a picture and `gcpo report` puts on a page."""

import io
import itertools
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gcpo.causal.account import SECONDS
from gcpo.run.records import Run

COLORS = ("tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple", "tab:brown", "tab:pink", "tab:olive")
BASELINE = "tab:gray"  # of GRPO, as in the plots of `gcpo study`
# How many times its median a metric must reach for its axis to be logarithmic.
_SPIKE = 10

Draw = Callable[[Axes, Sequence[Run]], None]


def rewards(axis: Axes, runs: Sequence[Run]) -> None:
    """Mean reward of each step, faint, and smoothed over nine steps."""
    for run, color in _colored(runs):
        steps, values = run.series("reward")
        axis.plot(steps, values, color=color, alpha=0.3, linewidth=1)
        axis.plot(steps, smooth(values), color=color, label=run.name)


def curves(*keys: str, from_zero: bool = False) -> Draw:
    """
    A function that draws metrics over steps, on a logarithmic axis where a spike would flatten the rest.

    Args:
        keys: one metric, or two of which the second is dashed.
        from_zero: whether a linear axis begins at 0.
    """

    def draw(axis: Axes, runs: Sequence[Run]) -> None:
        for run, color in _colored(runs):
            for key, style in zip(keys, ("-", "--"), strict=False):
                steps, values = run.series(key)
                label = run.name if len(keys) == 1 else f"{run.name}, {_NAMES[key]}"
                if values:
                    axis.plot(steps, values, color=color, label=label, linewidth=1.2, linestyle=style)
        if not _log_if_spiked(axis) and from_zero:
            axis.set_ylim(bottom=0)

    return draw


_NAMES = {
    "kl": "to the reference",
    "gcpo/kl_causal": "to the causal reference",
    "completions/mean_length": "completions",
    "gcpo/colliders/mean_length": "colliders",
}
reference_kls, causal_kls = curves("kl"), curves("gcpo/kl_causal")
both_kls = curves("kl", "gcpo/kl_causal")
step_times = curves("step_time", from_zero=True)
gradient_norms = curves("grad_norm")
lengths = curves("completions/mean_length", "gcpo/colliders/mean_length")


def weights(axis: Axes, runs: Sequence[Run]) -> None:
    """Upsilon over steps: its mean, a band of one standard deviation, and a fainter one from its least to its most."""
    for run, color in _colored(runs):
        steps, mean = run.series("gcpo/upsilon/mean")
        if not mean:
            continue
        axis.plot(steps, mean, color=color, label=run.name)
        bounds = [run.values(f"gcpo/upsilon/{name}") for name in ("min", "max", "std")]
        if all(len(values) == len(steps) for values in bounds):
            low, high, std = bounds
            axis.fill_between(steps, low, high, color=color, alpha=0.12, linewidth=0)
            below, above = zip(*((m - s, m + s) for m, s in zip(mean, std, strict=True)), strict=True)
            axis.fill_between(steps, below, above, color=color, alpha=0.25, linewidth=0)


def weight_histogram(axis: Axes, runs: Sequence[Run]) -> None:
    """How Upsilon is distributed at each logged step, from samples: a column per step, dark where many are."""
    groups = [group for run in runs for group in run.samples]
    points = [(g["step"], c["upsilon"]) for g in groups for c in g["candidates"] if c.get("upsilon") is not None]
    if points:
        steps, values = zip(*points, strict=True)
        axis.hist2d(steps, values, bins=(min(len(set(steps)), 60), 30), cmap="Blues", cmin=1)


def cosine_against_reward(axis: Axes, runs: Sequence[Run]) -> None:
    """Every sampled candidate: its cosine, Upsilon / alpha, over its reward; from the second half of the steps."""
    for run, color in _colored(runs):
        pairs = cosines_and_rewards(run)
        if pairs:
            cosines, scores = zip(*pairs, strict=True)
            axis.scatter(scores, cosines, s=8, alpha=0.35, color=color, label=run.name, linewidths=0)


def cosines_and_rewards(run: Run) -> list[tuple[float, float]]:
    """Upsilon / alpha and reward, summed over reward functions, of the samples of the second half of the steps."""
    alpha = run.config.get("alpha") or 1.0
    steps = sorted({group["step"] for group in run.samples})
    late = set(steps[len(steps) // 2 :])
    return [
        (candidate["upsilon"] / alpha, sum(value or 0.0 for value in candidate["rewards"].values()))
        for group in run.samples
        if group["step"] in late
        for candidate in group["candidates"]
        if candidate.get("upsilon") is not None
    ]


def phases(axis: Axes, runs: Sequence[Run]) -> None:
    """Where a step's time goes: medians of each phase, a bar for each run; the rest is the optimizer and the loop."""
    for place, run in enumerate(runs):
        left, found = 0.0, phase_seconds(run)
        for phase, color in zip((*SECONDS, "rest"), (*COLORS[1:], "lightgray"), strict=True):
            seconds = found.get(phase, 0.0)
            axis.barh(place, seconds, left=left, color=color, label=phase if place == 0 else None)
            left += seconds
    axis.set_yticks(range(len(runs)), [run.name for run in runs])
    axis.invert_yaxis()
    axis.set_xlabel("seconds of a step")


def phase_seconds(run: Run) -> dict[str, float]:
    """Median seconds of each phase, and of what is left of a step; the first step, which warms up, is left out."""
    settled = Run(run.name, run.config, run.log[1:] or run.log)
    medians = {phase: settled.median(f"gcpo/seconds/{phase}") or 0.0 for phase in SECONDS}
    total = settled.median("step_time")
    return medians if total is None else medians | {"rest": max(0.0, total - sum(medians.values()))}


def save_overview(runs: Sequence[Run], path: Path) -> None:
    """Rewards, KLs, the causal weight and step times over steps, as a PNG."""
    figure = Figure(figsize=(10, 7), layout="constrained")
    panels: list[tuple[str, Draw]] = [
        ("Reward (mean of a batch)", rewards),
        ("KL divergence per token (k3)", both_kls),
        ("Causal weight of the advantages, Upsilon", weights),
        ("Seconds per step", step_times),
    ]
    for axis, (title, draw) in zip(figure.subplots(2, 2).flat, panels, strict=True):
        draw(axis, runs)
        _finish(axis, title)
    figure.savefig(path, dpi=120)


def as_svg(draw: Draw, runs: Sequence[Run], x_label: str = "step", y_label: str = "") -> str | None:
    """A plot as an `<svg>` element; None where nothing was drawn."""
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "gcpo", "font.size": 9}):
        figure = Figure(figsize=(5.2, 3.1), layout="constrained")
        axis = figure.subplots()
        draw(axis, runs)
        if not axis.has_data():
            return None
        _finish(axis, "", x_label, y_label)
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def smooth(values: list[float], window: int = 9) -> list[float]:
    """Means over a window around each value, narrower at the ends."""
    half = window // 2
    return [statistics.fmean(values[max(0, k - half) : k + half + 1]) for k in range(len(values))]


def _finish(axis: Axes, title: str, x_label: str = "step", y_label: str = "") -> None:
    if title:
        axis.set_title(title)
    if not axis.get_xlabel():
        axis.set_xlabel(x_label)
    axis.set_ylabel(y_label)
    axis.grid(alpha=0.3)
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize="small")


def _log_if_spiked(axis: Axes) -> bool:
    """
    Make the axis of a metric that is never negative logarithmic where its largest value would flatten the rest, and say
    whether it was. Zeros are then at the bottom edge.
    """
    values = [np.asarray(line.get_ydata(), dtype=float) for line in axis.get_lines()]
    positive = [value for value in np.concatenate(values or [np.empty(0)]).tolist() if value > 0]
    median = statistics.median(positive) if positive else 0.0
    if not positive or max(positive) <= _SPIKE * median:
        return False
    axis.set_yscale("log", nonpositive="clip")
    axis.set_ylim(
        bottom=max(min(positive), median / 1000) / 1.5
    )  # a KL that is zero but for rounding is no decade more
    return True


def _colored(runs: Sequence[Run]) -> list[tuple[Run, str]]:
    """Every run with its color: the first without the causal terms, GRPO's, is gray, and no other."""
    causal = ("gcpo/upsilon/mean", "gcpo/kl_causal")
    baseline = next((run for run in runs if not any(map(run.values, causal))), None)
    others = itertools.cycle(COLORS)
    return [(run, BASELINE if run is baseline else next(others)) for run in runs]
