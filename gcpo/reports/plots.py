"""Plots of runs, each drawn into an axis: what `gcpo demo` saves as a picture and `gcpo report` puts on a page."""

import io
import itertools
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gcpo.causal.account import SECONDS
from gcpo.run.records import Run

COLORS = ("tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple", "tab:brown", "tab:pink")
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


def reference_kls(axis: Axes, runs: Sequence[Run]) -> None:
    """k3 towards the reference."""
    for run, color in _colored(runs):
        _line(axis, run, "kl", color, run.name)
    _log_if_spiked(axis)


def causal_kls(axis: Axes, runs: Sequence[Run]) -> None:
    """k3 towards the causal reference."""
    for run, color in _colored(runs):
        _line(axis, run, "gcpo/kl_causal", color, run.name)
    _log_if_spiked(axis)


def both_kls(axis: Axes, runs: Sequence[Run]) -> None:
    """Both in one axis, the causal one dashed."""
    for run, color in _colored(runs):
        _line(axis, run, "kl", color, f"{run.name}, to the reference")
        _line(axis, run, "gcpo/kl_causal", color, f"{run.name}, to the causal reference", linestyle="--")
    _log_if_spiked(axis)


def step_times(axis: Axes, runs: Sequence[Run]) -> None:
    """Seconds of each step."""
    for run, color in _colored(runs):
        _line(axis, run, "step_time", color, run.name)
    if not _log_if_spiked(axis):
        axis.set_ylim(bottom=0)


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


def weight_histogram(axis: Axes, run: Run) -> None:
    """How Upsilon is distributed at each logged step, from the samples: a column per step, dark where many are."""
    by_step: dict[float, list[float]] = {}
    for group in run.samples:
        values = [c["upsilon"] for c in group["candidates"] if c.get("upsilon") is not None]
        by_step.setdefault(group["step"], []).extend(values)
    points = [(step, value) for step, values in by_step.items() for value in values]
    if not points:
        return
    columns = min(len(by_step), 60)
    axis.hist2d([step for step, _ in points], [value for _, value in points], bins=(columns, 30), cmap="Blues", cmin=1)


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
        left = 0.0
        for phase, color in zip((*SECONDS, "rest"), (*COLORS[1:], "lightgray"), strict=True):
            seconds = phase_seconds(run).get(phase, 0.0)
            axis.barh(place, seconds, left=left, color=color, label=phase if place == 0 else None)
            left += seconds
    axis.set_yticks(range(len(runs)), [run.name for run in runs])
    axis.invert_yaxis()
    axis.set_xlabel("seconds of a step")


def phase_seconds(run: Run) -> dict[str, float]:
    """Median seconds of each phase, and of what is left of a step; the first step, which warms up, is left out."""
    settled = Run(run.name, run.config, run.log[1:] or run.log)
    medians = {}
    for phase in SECONDS:
        values = settled.values(f"gcpo/seconds/{phase}")
        medians[phase] = statistics.median(values) if values else 0.0
    total = settled.values("step_time")
    if total:
        medians["rest"] = max(0.0, statistics.median(total) - sum(medians.values()))
    return medians


def gradient_norms(axis: Axes, runs: Sequence[Run]) -> None:
    """Gradient norm before clipping."""
    for run, color in _colored(runs):
        _line(axis, run, "grad_norm", color, run.name)
    _log_if_spiked(axis)


def lengths(axis: Axes, runs: Sequence[Run]) -> None:
    """Mean tokens of a completion, and of a collider, dashed."""
    for run, color in _colored(runs):
        _line(axis, run, "completions/mean_length", color, run.name)
        _line(axis, run, "gcpo/colliders/mean_length", color, None, linestyle="--")


def save_overview(runs: Sequence[Run], path: Path) -> None:
    """Rewards, KLs, the causal weight and step times over steps, as a PNG."""
    figure, axes = pyplot.subplots(2, 2, figsize=(10, 7), layout="constrained")
    panels: list[tuple[str, Draw]] = [
        ("Reward (mean of a batch)", rewards),
        ("KL divergence per token (k3)", both_kls),
        ("Causal weight of the advantages, Upsilon", weights),
        ("Seconds per step", step_times),
    ]
    for axis, (title, draw) in zip(axes.flat, panels, strict=True):
        draw(axis, runs)
        _finish(axis, title)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def as_svg(draw: Callable[[Axes], None], x_label: str = "step", y_label: str = "") -> str | None:
    """A plot as an `<svg>` element; None where nothing was drawn."""
    with pyplot.rc_context({"svg.fonttype": "none", "svg.hashsalt": "gcpo", "font.size": 9}):
        figure, axis = pyplot.subplots(figsize=(5.2, 3.1), layout="constrained")
        try:
            draw(axis)
            if not (axis.has_data()):
                return None
            _finish(axis, "", x_label, y_label)
            return _svg(figure)
        finally:
            pyplot.close(figure)


def smooth(values: list[float], window: int = 9) -> list[float]:
    """Means over a window around each value, narrower at the ends."""
    half = window // 2
    return [statistics.fmean(values[max(0, k - half) : k + half + 1]) for k in range(len(values))]


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _finish(axis: Axes, title: str, x_label: str = "step", y_label: str = "") -> None:
    if title:
        axis.set_title(title)
    if not axis.get_xlabel():
        axis.set_xlabel(x_label)
    axis.set_ylabel(y_label)
    axis.grid(alpha=0.3)
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize="small")


def _line(axis: Axes, run: Run, key: str, color: str, label: str | None, **style: Any) -> None:
    steps, values = run.series(key)
    if values:
        axis.plot(steps, values, color=color, label=label, linewidth=1.2, **style)


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
