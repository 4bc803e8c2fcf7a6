"""Draws: which contexts are scored, all of them or an unbiased part; and random streams kept apart."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch


@dataclass
class ContextDraw:
    """Which contexts x_{i,l} each of B sequences is scored under, and how the second KL term makes up for the rest."""

    contexts: list[list[int]]  # per sequence: collider indices, 0 first; empty where the sequence is left out
    weights: torch.Tensor  # (B, width) float32: weights of the mean over l in p', 0 behind a sequence's contexts
    counted: torch.Tensor  # (B,) bool: sequences in the second KL term
    scale: float  # what the term is multiplied by: sequences that could be drawn / number of sequences drawn

    def part(self, rows: slice) -> "ContextDraw":
        """What was drawn for some of the sequences."""
        return ContextDraw(self.contexts[rows], self.weights[rows], self.counted[rows], self.scale)


def draw_contexts(
    available: list[int],  # per sequence: how many colliders count, which come first; 0: it adds nothing to the term
    num_contexts: int | None,
    fraction: float,
    generator: torch.Generator,
) -> ContextDraw:
    """
    Draw contexts and sequences uniformly, without replacement.

    Of a sequence's V contexts, number 0 is always scored and `num_contexts` = S of the others are drawn:

        mean_l exp(b_l) ~ exp(b_0) / V + (V - 1) / V * mean_drawn exp(b_l)

    has the full mean as its expectation, and the gradient of the second KL term is linear in it. With S = 0, for a term
    that takes exp(b_0) alone, number 0 has weight 1. Of the sequences that have a collider, say E of them,
    round(fraction * E), at least one, enter the term, which is scaled by E over their number.
    """
    count = len(available)
    eligible = [row for row, total in enumerate(available) if total > 0]
    drawn = max(1, round(fraction * len(eligible)))
    chosen = {eligible[k] for k in torch.randperm(len(eligible), generator=generator)[:drawn].tolist()}
    contexts: list[list[int]] = []
    rows: list[list[float]] = []
    for row, total in enumerate(available):
        if row not in chosen:
            contexts.append([])
            rows.append([])
            continue
        others = total - 1
        if num_contexts == 0:
            contexts.append([0])
            rows.append([1.0])
            continue
        if num_contexts is None or num_contexts >= others:
            contexts.append(list(range(total)))
            rows.append([1.0 / total] * total)
            continue
        picked = torch.randperm(others, generator=generator)[:num_contexts].add_(1).sort().values.tolist()
        contexts.append([0, *picked])
        rows.append([1.0 / total] + [others / (total * num_contexts)] * num_contexts)
    width = max(1, max(map(len, contexts)))
    weights = torch.zeros(count, width)
    for row, values in enumerate(rows):
        weights[row, : len(values)] = torch.tensor(values)
    counted = torch.tensor([bool(some) for some in contexts])
    return ContextDraw(contexts, weights, counted, len(eligible) / drawn)


@contextmanager
def own_random_stream(seed: int) -> Iterator[None]:
    """
    Draw from a stream of its own: sampling colliders then leaves the candidates' stream as GRPO would have it, so that
    runs of the two from one seed see the same first candidates.
    """
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if device is None:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            yield
        return
    # Seeded is what is restored: the CPU's generator and that of this process's device. `torch.manual_seed` would seed
    # every accelerator that the process sees.
    module, index = torch.get_device_module(device), torch.accelerator.current_device_index()
    with torch.random.fork_rng(devices=[index], device_type=device.type):
        torch.default_generator.manual_seed(seed)
        module.manual_seed(seed)
        yield
