"""Means with their confidence intervals, tests of several of them, and the elbow of a curve."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from scipy.stats import t


@dataclass(frozen=True)
class Interval:
    """A mean, over seeds say, and the half width of its 95% interval (Student's t); NaN for a single value."""

    mean: float
    half: float
    count: int

    def __str__(self) -> str:
        return f"{self.mean:.3f} ± {self.half_text}"

    @property
    def half_text(self) -> str:
        return f"{self.half:.3f}" if math.isfinite(self.half) else "?"

    @property
    def excludes_zero(self) -> bool:
        """Whether 0 lies outside of it. Values that are all the same give no spread to judge by: then not."""
        return math.isfinite(self.half) and abs(self.mean) > self.half > 0

    @property
    def p_value(self) -> float:
        """Of a two-sided t test that the mean is 0; 1 where there is no spread to judge by."""
        if not (math.isfinite(self.half) and self.half > 0):
            return 1.0
        quantile = float(t.ppf(0.975, self.count - 1))
        return 2 * float(t.sf(abs(self.mean) / self.half * quantile, self.count - 1))


def interval(values: Sequence[float]) -> Interval:
    """
    Mean of some values, with its interval.

    Raises:
        ValueError: no values.
    """
    if not values:
        raise ValueError("`values` must not be empty.")
    count = len(values)
    if count == 1:
        return Interval(values[0], math.nan, 1)
    quantile = float(t.ppf(0.975, count - 1))
    return Interval(statistics.fmean(values), quantile * statistics.stdev(values) / math.sqrt(count), count)


def holm(p_values: Sequence[float], level: float = 0.05) -> list[bool]:
    """Which of several tests hold together at a level (Holm 1979): the smallest p against level / their number."""
    order, holds = sorted(range(len(p_values)), key=lambda k: p_values[k]), [False] * len(p_values)
    for place, k in enumerate(order):
        if p_values[k] > level / (len(p_values) - place):
            break
        holds[k] = True
    return holds


def elbow(x: Sequence[float], y: Sequence[float]) -> int | None:
    """
    Index of the elbow of a falling curve: of its points, that furthest below the line from its first to its last one,
    both axes scaled to [0, 1]. None where no point lies below it, or the curve does not fall.
    """
    if len(x) < 3:
        return None
    order = sorted(range(len(x)), key=lambda k: x[k])
    first, last = order[0], order[-1]
    width, height = x[last] - x[first], y[first] - y[last]
    if width <= 0 or height <= 0:
        return None
    # Below the chord from (0, 1) to (1, 0).
    depth = {k: 1 - (x[k] - x[first]) / width - (y[k] - y[last]) / height for k in order[1:-1]}
    best = max(depth, key=lambda k: depth[k])
    return best if depth[best] > 1e-9 else None  # more than rounding
