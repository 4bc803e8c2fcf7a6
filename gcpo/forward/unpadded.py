"""
The policy's own rows without padding: a prompt stands once, its completions after it, in a few rows of one length.

Rows are packed so that they are alike, and so few or so many that the forward costs least: a longer row repeats fewer
prompts, but attention computes its whole square. With one completion in each row attention is plain causal attention,
and what is left out of TRL's batch is the padding alone.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.nn.attention.flex_attention import create_block_mask

from gcpo.causal.port import Ids
from gcpo.forward.packing import PackedRow, pack

# Entries of the masks of one forward, (rows, length, length): where there would be more, every completion gets a row of
# its own, and no mask is made. At a byte each this is 256 MiB; an additive mask in float32 takes four times that.
MOST_MASK_ENTRIES = 1 << 28
_COUNTS = 16  # numbers of rows that are tried, beside one for each completion
# Attention under a mask runs at about a third of the rate of matrix products: with SmolLM2 on 2 threads, a forward and
# backward of 2,048 tokens took 12 seconds in rows of 256 and 17 in rows of 512.
_ATTENTION = 3.0


class LayerCost(NamedTuple):
    """Operations of one layer's forward, as far as the choice between layouts depends on them."""

    per_token: float  # matrix products
    per_pair: float  # attention, for one token and one that it looks at, at its lower rate
    whole_square: bool = True  # sdpa and eager apply a mask to all products; flex_attention leaves blocks out

    @classmethod
    def of(cls, config: Any, attention: str | None) -> "LayerCost":
        """Of a model's text config, and its attention implementation."""
        heads, hidden = config.num_attention_heads, config.hidden_size
        head_dim = getattr(config, "head_dim", None) or hidden // heads
        keys = getattr(config, "num_key_value_heads", None) or heads
        experts = getattr(config, "num_experts_per_tok", None)
        width = getattr(config, "moe_intermediate_size", None) if experts else None
        width = (width or getattr(config, "intermediate_size", None) or 4 * hidden) * (experts or 1)
        weights = hidden * head_dim * 2 * (heads + keys) + 3 * hidden * width
        return cls(2.0 * weights, _ATTENTION * 4.0 * heads * head_dim, attention != "flex_attention")


class Layout(NamedTuple):
    """Which completions share a row."""

    rows: list[list[int]]
    length: int  # of the longest row, to which the others are padded
    cost: float  # operations of one layer's forward

    @property
    def is_plain(self) -> bool:
        """Whether no row holds two completions, so that causal attention is all that is needed."""
        return all(len(row) == 1 for row in self.rows)


def choose_layout(prompts: Sequence[Any], completions: Sequence[Any], cost: LayerCost) -> Layout:
    """
    The cheapest layout of these completions.

    Args:
        prompts: token ids that each completion comes after; at least one each.
        completions: token ids.
        cost: of a layer of the model.
    """
    layouts = []
    for count in {*range(1, min(len(prompts), _COUNTS) + 1), len(prompts)}:
        rows, lengths = spread(prompts, completions, count)
        length, pairs = max(lengths), float(len(rows) * max(lengths) ** 2)
        layout = Layout(rows, length, 0.0)
        if cost.whole_square and pairs > MOST_MASK_ENTRIES and not layout.is_plain:
            continue
        if not cost.whole_square:
            pairs = sum((len(x) + len(y)) ** 2 for x, y in zip(prompts, completions, strict=True)) / 2
        elif layout.is_plain:
            pairs /= 2
        layouts.append(layout._replace(cost=len(rows) * length * cost.per_token + pairs * cost.per_pair))
    return min(layouts, key=lambda layout: layout.cost)


def spread(prompts: Sequence[Any], completions: Sequence[Any], count: int) -> tuple[list[list[int]], list[int]]:
    """
    The completions in at most `count` rows, as even as may be, and the tokens of each: the longest first, each where
    the row ends up shortest. A row holds a prompt once, less its last token, which every completion has for itself.
    """
    keys: list[Hashable] = [tuple(prompt) if isinstance(prompt, list) else prompt for prompt in prompts]
    rows: list[list[int]] = [[] for _ in range(count)]
    held: list[set[Hashable]] = [set() for _ in range(count)]
    lengths = [0] * count

    def grown(place: int, k: int) -> int:
        return lengths[place] + len(completions[k]) + (1 if keys[k] in held[place] else len(prompts[k]))

    for k in sorted(range(len(prompts)), key=lambda k: -len(completions[k])):
        place = min(range(count), key=lambda place: grown(place, k))
        lengths[place] = grown(place, k)
        rows[place].append(k)
        held[place].add(keys[k])
    used = [place for place in range(count) if rows[place]]
    return [sorted(rows[place]) for place in used], [lengths[place] for place in used]


def pack_rows(prompts: Sequence[Any], completions: Sequence[Any], layout: Layout) -> list[PackedRow]:
    """The rows of a layout; a branch's key is its completion's number."""
    packed = []
    for row in layout.rows:
        (one,) = pack([prompts[k] for k in row], [completions[k] for k in row], None)
        for branch in one.branches:
            branch.key = row[branch.key]
        packed.append(one)
    return packed


@dataclass
class Unpadded:
    """
    Packed rows as a model takes them.

    Attributes:
        ids: (R, S) int64, padded on the right.
        positions: (R, S) int64.
        ends: (R, S) int64, the place after the last token that sees this one (`PackedRow.ends`). None: causal
            attention is all that is needed.
        places: (B, T) int64: where in the flattened rows each completion's tokens are predicted; anywhere, and spread
            out, where there are none: gradients of one place are added up one after the other.
        tokens: how many tokens are read, padding left out.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    ends: torch.Tensor | None
    places: torch.Tensor
    tokens: int

    @property
    def padding(self) -> int:
        return self.ids.numel() - self.tokens

    def to(self, device: torch.device) -> "Unpadded":
        ends = None if self.ends is None else self.ends.to(device)
        return Unpadded(self.ids.to(device), self.positions.to(device), ends, self.places.to(device), self.tokens)

    def select(self, hidden: torch.Tensor, own: bool = False) -> torch.Tensor:
        """(B, T, H): of hidden states (R, S, H), those that predict the completions' tokens, or the tokens' `own`."""
        # A completion's tokens follow one another, and the prompt's last token, which is not shared.
        places = (self.places + 1).clamp(max=self.ids.numel() - 1) if own else self.places
        flat = hidden.flatten(0, 1).index_select(0, places.flatten())
        return flat.view(*places.shape, -1)

    def attention_mask(self, attention: str, window: int | None, dtype: torch.dtype) -> Any:
        """
        What a layer whose attention looks back `window` tokens (None: all) takes: a block mask under flex_attention,
        bool (R, 1, S, S) under sdpa, additive of type `dtype` under eager attention. None for plain causal attention.
        """
        if self.ends is None:
            return None
        ends, positions, (rows, length) = self.ends, self.positions, self.ids.shape

        def sees(row: Any, head: Any, query: Any, key: Any) -> Any:
            allowed = (key <= query) & (query < ends[row, key])
            return allowed if window is None else allowed & (positions[row, query] - positions[row, key] < window)

        if attention == "flex_attention":
            return create_block_mask(sees, rows, None, length, length, device=str(ends.device))
        row, place = torch.arange(rows, device=ends.device), torch.arange(length, device=ends.device)
        allowed = sees(row[:, None, None], None, place[None, :, None], place[None, None, :])[:, None]
        if attention == "sdpa":
            return allowed  # of no type that autocast could make differ from the queries'
        return torch.zeros(allowed.shape, dtype=dtype, device=ends.device).masked_fill(~allowed, torch.finfo(dtype).min)


def unpad(prompts: list[Ids], completions: list[Ids], width: int, pad_token_id: int, cost: LayerCost) -> Unpadded:
    """
    Packed rows of these completions, on the CPU.

    Args:
        prompts: what each completion comes after; at least one token each.
        completions: the tokens to score; a completion without tokens is left out, unless all are.
        width: T, at least the longest completion.
        pad_token_id: of the rows' padding.
        cost: of a layer of the model, by which the layout is chosen.
    """
    present = [k for k, ids in enumerate(completions) if ids] or [0]
    some = [prompts[k] for k in present], [completions[k] for k in present]
    layout = choose_layout(*some, cost)
    packed = pack_rows(*some, layout)
    rows, length = len(packed), max(len(row.ids) for row in packed)
    place = torch.arange(length)
    ids = torch.full((rows, length), pad_token_id)
    # Padding goes on where its row ends, and sees itself alone: a softmax over nothing would be NaN.
    positions, ends = place.repeat(rows, 1), (place + 1).repeat(rows, 1)
    places = torch.arange(len(completions) * width).remainder(rows * length).view(-1, width)
    for number, row in enumerate(packed):
        size = len(row.ids)
        ids[number, :size], positions[number, :size] = torch.tensor(row.ids), torch.tensor(row.positions)
        ends[number, :size] = row.ends()
        for branch in row.branches:
            predictors = branch.predictors
            places[present[branch.key], : len(predictors)] = number * length + predictors
    tokens = sum(len(row.ids) for row in packed)
    return Unpadded(ids, positions, None if layout.is_plain else ends, places, tokens)
