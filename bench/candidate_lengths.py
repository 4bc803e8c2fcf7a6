"""Lengths that a benchmark forces on candidates: those of `gcpo.planning.candidate_lengths`."""

import torch
from transformers import LogitsProcessor


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
