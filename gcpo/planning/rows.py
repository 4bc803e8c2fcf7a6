"""
The rows of TRL's batches as a forward reads them: padded as TRL pads them, or packed without padding; and which of them
share a micro-batch. By the functions that a run uses.
"""

import math
from collections import Counter
from collections.abc import Sequence

from gcpo.causal.port import Ids, common_prefix
from gcpo.config import GCPOConfig
from gcpo.forward.counting import Abilities, Pass, hashable
from gcpo.forward.microbatches import deal
from gcpo.forward.models import padded_width
from gcpo.forward.unpadded import LayerCost, choose_layout
from gcpo.own_loss import loss_is_of_its_rows


def micro_batches(
    config: GCPOConfig, prompts: Sequence[Ids], completions: Sequence[Ids], order: list[int], packs: bool
) -> list[list[int]]:
    """
    The rows of each micro-batch of a rollout, where rows are packed brought together by prompt.

    Args:
        config: of the run.
        prompts, completions: token ids of each row, as the loss sees them.
        order: the rows as TRL shuffles them.
        packs: whether rows are packed.
    """
    count = int(config.steps_per_generation or 1)
    # As `OwnLossTrainer` does it: `regrouped` within an optimizer step, and not where a batch's loss is its own mean.
    regroups = packs and not loss_is_of_its_rows(config)
    window = math.gcd(count, config.gradient_accumulation_steps) if regroups else 1
    size = len(order) // count * window
    found = []
    for start in range(0, len(order), size):
        rows = order[start : start + size]
        numbers: dict = {}
        groups = [numbers.setdefault(hashable(prompts[k]), len(numbers)) for k in rows]
        lengths, reads = [len(completions[k]) for k in rows], [len(prompts[k]) for k in rows]
        dealt = deal(groups, lengths, reads, window) if window > 1 else [list(range(len(rows)))]
        found += [[rows[place] for place in places] for places in dealt]
    return found


def padded(
    item: Pass, prompts: Sequence[Ids], completions: Sequence[Ids], rows: Sequence[int], width: int, squares: bool
) -> Counter[Pass]:
    """
    A forward over some rows of a batch that is padded to `width` columns.

    Args:
        item: what the passes have in common.
        prompts, completions: token ids of the batch's rows, as the forward sees them.
        rows: those of this forward.
        squares: whether attention computes whole squares where there is padding to mask.
    """
    sizes = [(len(prompts[k]) + len(completions[k]), len(completions[k])) for k in rows]
    dense = squares and any(read < width for read, _ in sizes)
    return Counter(
        item._replace(new=read, predicted=scored, padding=width - read, dense=dense) for read, scored in sizes
    )


def batch_width(config: GCPOConfig, prompts: Sequence[Ids], completions: Sequence[Ids]) -> int:
    """Columns of TRL's batch of these rows."""
    return sum(padded_width(list(ids), config.pad_to_multiple_of) for ids in (prompts, completions))


def packed(item: Pass, prompts: Sequence[Ids], completions: Sequence[Ids], abilities: Abilities) -> Counter[Pass]:
    """A forward over these rows without padding, in the rows of `gcpo.forward.unpadded.unpad`."""
    present = [k for k, ids in enumerate(completions) if ids] or [0]
    prompts, completions = [prompts[k] for k in present], [completions[k] for k in present]
    cost: LayerCost = abilities.layer_cost
    layout = choose_layout(prompts, completions, cost)
    found = [_pieces([prompts[k] for k in row], [completions[k] for k in row]) for row in layout.rows]
    sizes = [sum(read for read, _, _ in row) for row in found]
    passes: Counter[Pass] = Counter()
    for row, size in zip(found, sizes, strict=True):
        padding = max(sizes) - size
        if cost.whole_square or layout.is_plain:
            scored = sum(scored for _, scored, _ in row)
            passes[item._replace(new=size, predicted=scored, padding=padding, dense=not layout.is_plain)] += 1
            continue
        for read, scored, shared in row:
            passes[item._replace(new=read, predicted=scored, before=shared)] += 1
        passes[item._replace(padding=1)] += padding  # which sees itself alone
    return +passes


def _pieces(prompts: list[Ids], completions: list[Ids]) -> list[tuple[int, int, int]]:
    """
    Of each sequence of a packed row: tokens that it adds to the row, those scored, and those that it shares with the
    sequence before. As `gcpo.forward.packing.pack` has it, which writes all of them out.
    """
    found, before = [], None
    whole = [x + y for x, y in zip(prompts, completions, strict=True)]
    for k in sorted(range(len(whole)), key=whole.__getitem__):
        shared = 0 if before is None else common_prefix(prompts[before][:-1], prompts[k][:-1])
        found.append((len(whole[k]) - shared, len(completions[k]), shared))
        before = k
    return found
