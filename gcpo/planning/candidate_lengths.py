"""
Lengths of candidates where no run has given any: all as long as may be, or drawn, so that some end long before others
and rows of a batch differ as those of a training run do. `gcpo plan` plans with them, benchmarks force them.
"""

import math
import operator
import random
from dataclasses import replace
from functools import reduce
from statistics import fmean
from typing import Any

from gcpo.config import GCPOConfig
from gcpo.forward.counting import Abilities
from gcpo.planning.counts import Counts, Lengths, PlannedScript, count_cycle

MEAN, SIGMA = 0.4, 0.8  # of the lognormal lengths: the mean before clipping, in shares of the longest, and of logs
CHOICES = ("full", "lognormal")
# Candidates that a plan draws at the least: a step waits for its longest, of which a few small batches say little.
DRAWN = 256


def draw_lengths(kind: str, longest: int, count: int, seed: int) -> list[int]:
    """
    Tokens of `count` candidates, end token included. "full": all have `longest`. "lognormal": of a lognormal
    distribution with mean `MEAN * longest` whose logarithm has the standard deviation `SIGMA`, rounded and clipped to
    [1, longest]. The same seed gives the same lengths; no other random stream is touched.
    """
    if kind == "full":
        return [longest] * count
    draw = random.Random(seed)
    mean_of_log = math.log(MEAN * longest) - SIGMA**2 / 2
    return [min(max(round(draw.lognormvariate(mean_of_log, SIGMA)), 1), longest) for _ in range(count)]


def describe(kind: str) -> dict[str, Any]:
    """What a result file says of the lengths."""
    return {"kind": kind} if kind == "full" else {"kind": kind, "mean_before_clipping": MEAN, "sigma": SIGMA}


def planned_batches(kind: str, config: GCPOConfig, longest: int) -> list[list[int]]:
    """
    Tokens of every candidate of each batch that a plan is the mean of: the one batch of "full", or as many as hold
    `DRAWN` candidates, drawn with the seeds 0, 1, 2 and so on.
    """
    rows = int(config.generation_batch_size or 1)
    batches = 1 if kind == "full" else -(-DRAWN // rows)
    return [draw_lengths(kind, longest, rows, seed) for seed in range(batches)]


def count_batches(
    config: GCPOConfig, lengths: Lengths, batches: list[list[int]], abilities: Abilities, is_grpo: bool
) -> Counts:
    """
    The cycles of these batches, one after the other. Outputs sampled under contexts have the candidates' mean length,
    colliders the one that `lengths` says.
    """
    own = replace(lengths, sample=lengths.sample or round(fmean(fmean(batch) for batch in batches)))
    scripts = (PlannedScript(config, own, batch) for batch in batches)
    return reduce(operator.add, (count_cycle(config, script, abilities, is_grpo) for script in scripts))
