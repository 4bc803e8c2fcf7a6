"""
Lengths that a benchmark forces on candidates: all as long as may be, or drawn, so that some end long before others and
rows of a batch differ as those of a training run do.
"""

import math
import random
from typing import Any

import torch
from transformers import LogitsProcessor

MEAN, SIGMA = 0.4, 0.8  # of the lognormal lengths: the mean before clipping, in shares of the longest, and of logs
CHOICES = ("full", "lognormal")


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


class EndsAt(LogitsProcessor):
    """
    Lets every row of a generation end at a length of its own, and nowhere before.

    Args:
        lengths: tokens of each row, end token included.
        prompt_width: columns of the padded prompts.
        end_ids: what ends a completion; the first is forced.
    """

    def __init__(self, lengths: list[int], prompt_width: int, end_ids: list[int]):
        self.lengths, self.prompt_width, self.end_ids = torch.tensor(lengths), prompt_width, end_ids

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """
        Args:
            input_ids: (B, P + t) what there is so far.
            scores: (B, V) floating: of the next token.
        """
        left = self.lengths.to(scores.device) - (input_ids.shape[1] - self.prompt_width)  # tokens, the next included
        scores = scores.clone()
        scores[:, self.end_ids] = -torch.inf
        ends = left <= 1
        scores[ends] = -torch.inf
        scores[ends, self.end_ids[0]] = 0.0
        return scores
