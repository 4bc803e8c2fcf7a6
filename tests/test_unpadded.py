"""Packed rows of a trainer: every completion sees what it should, in as few tokens as may be, in even micro-batches."""

import random

import pytest
import torch

from gcpo.forward import unpadded
from gcpo.forward.microbatches import deal, regrouped
from gcpo.forward.unpadded import LayerCost, choose_layout, spread, unpad

PAIRS_COST_NOTHING = LayerCost(1.0, 0.0)
PAIRS_COST_ALL = LayerCost(1.0, 1e9)


def batch(seed: int, rows: int = 8, groups: int = 2, longest: int = 9) -> tuple[list[list[int]], list[list[int]]]:
    """Prompts that groups of rows share, two of which begin alike, and completions from one token to the longest."""
    draw = random.Random(seed)
    stems = [[1, 2, 3, *(draw.randrange(4, 50) for _ in range(draw.randint(0, 5)))] for _ in range(groups)]
    prompts = [stems[k * groups // rows] for k in range(rows)]
    lengths = [1, longest, *(draw.randint(1, longest) for _ in range(rows - 2))]
    return prompts, [[draw.randrange(4, 50) for _ in range(length)] for length in lengths]


def allowed(rows: unpadded.Unpadded) -> torch.Tensor:
    """(R, S, S): which token may look at which."""
    mask = rows.attention_mask("sdpa", None, torch.float32)
    length = rows.ids.shape[1]
    return torch.ones(len(rows.ids), length, length).tril().bool() if mask is None else mask[:, 0]


@pytest.mark.parametrize(
    "cost", [PAIRS_COST_NOTHING, PAIRS_COST_ALL, LayerCost(20.0, 1.0)], ids=["tree", "plain", "mix"]
)
@pytest.mark.parametrize("seed", range(4))
def test_every_token_sees_its_own_sequence(cost: LayerCost, seed: int) -> None:
    prompts, completions = batch(seed)
    rows = unpad(prompts, completions, 11, 0, cost)
    sees, length = allowed(rows), rows.ids.shape[1]
    for k, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        for j in range(len(completion)):
            row, place = divmod(rows.places[k, j].item(), length)
            seen = sees[row, place].nonzero()[:, 0]
            whole = prompt + completion[:j]
            assert rows.ids[row, seen].tolist() == whole
            assert rows.positions[row, seen].tolist() == list(range(len(whole)))
            # The token itself comes next, where its own state is read.
            assert rows.ids[row, place + 1] == completion[j] and rows.positions[row, place + 1] == len(whole)
    assert rows.places.min() >= 0 and rows.places.max() < rows.ids.numel()
    assert sees.diagonal(dim1=1, dim2=2).all()  # padding too: a softmax over nothing is NaN
    assert rows.tokens + rows.padding == rows.ids.numel()


def test_prompts_stand_once_where_that_is_cheapest() -> None:
    prompts, completions = batch(0)
    tree = unpad(prompts, completions, 9, 0, PAIRS_COST_NOTHING)
    assert len(tree.ids) == 1 and tree.padding == 0
    starts = {tuple(prompt[: k + 1]) for prompt in prompts for k in range(len(prompt) - 1)}
    assert tree.tokens == len(starts) + len(prompts) + sum(map(len, completions))
    plain = unpad(prompts, completions, 9, 0, PAIRS_COST_ALL)
    assert plain.ends is None and len(plain.ids) == len(prompts)
    assert plain.tokens == sum(map(len, prompts)) + sum(map(len, completions))
    assert plain.ids.shape[1] == max(len(x) + len(y) for x, y in zip(prompts, completions, strict=True))


def test_what_flex_attention_leaves_out_costs_nothing() -> None:
    prompts, completions = batch(1)
    layout = choose_layout(prompts, completions, LayerCost(1.0, 10.0, whole_square=False))
    assert len(layout.rows) == 1


def test_masks_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    prompts, completions = batch(2)
    for most in (1, 300, 600, 5000):
        monkeypatch.setattr(unpadded, "MOST_MASK_ENTRIES", most)
        layout = choose_layout(prompts, completions, PAIRS_COST_NOTHING)
        assert layout.is_plain or len(layout.rows) * layout.length**2 <= most
    assert not layout.is_plain


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_rows_are_even(count: int) -> None:
    prompts, completions = batch(3, rows=24, groups=3, longest=40)
    rows, lengths = spread(prompts, completions, count)
    assert sorted(k for row in rows for k in row) == list(range(24))
    for row, length in zip(rows, lengths, strict=True):
        distinct = {tuple(prompts[k]) for k in row}
        assert length == sum(len(p) - 1 for p in distinct) + sum(1 + len(completions[k]) for k in row)
    assert max(lengths) - min(lengths) <= max(len(x) + len(y) for x, y in zip(prompts, completions, strict=True))


def test_completions_without_tokens_are_left_out_unless_all_are() -> None:
    prompts, completions = batch(4)
    some = unpad(prompts, [[], *completions[1:]], 9, 0, PAIRS_COST_ALL)
    assert len(some.ids) == len(prompts) - 1 and some.tokens == sum(map(len, [*prompts[1:], *completions[1:]]))
    none = unpad(prompts, [[]] * 8, 9, 0, PAIRS_COST_NOTHING)
    assert none.ids.tolist() == [prompts[0]]


@pytest.mark.parametrize("groups", [[4] * 4, [8, 8], [16], [3, 5, 6, 2], [1] * 16, [9, 7]], ids=str)
@pytest.mark.parametrize("count", [1, 2, 4, 8, 16])
def test_rows_are_dealt_out_evenly(groups: list[int], count: int) -> None:
    draw = random.Random(count)
    group = [k for k, size in enumerate(groups) for _ in range(size)]
    draw.shuffle(group)
    lengths = [draw.randint(1, 60) for _ in group]
    dealt = deal(group, lengths, [10] * 16, count)
    size = 16 // count
    assert sorted(row for rows in dealt for row in rows) == list(range(16))
    assert {len(rows) for rows in dealt} == {size}
    kinds = [len({group[row] for row in rows}) for rows in dealt]
    if set(groups) in ({size}, {16}) or (len(set(groups)) == 1 and size % groups[0] == 0):
        assert sum(kinds) == max(count, len(groups))  # no group is divided without need
    totals = [sum(lengths[row] for row in rows) for rows in dealt]
    if len(groups) == 1 and count < 16:
        assert max(totals) - min(totals) <= 60


def micro_batches(count: int) -> list[dict[str, torch.Tensor | None]]:
    torch.manual_seed(0)
    rows = torch.randperm(4 * count)
    prompts = torch.stack([rows // 4, rows // 4 + 1], dim=1)
    lengths = torch.randint(1, 6, (4 * count,))
    whole = {
        "prompt_ids": prompts,
        "prompt_mask": torch.ones_like(prompts),
        "completion_ids": rows[:, None].expand(-1, 5),
        "completion_mask": (torch.arange(5) < lengths[:, None]).long(),
        "advantages": rows.float(),
    }
    parts = [{name: x[4 * k :][:4] for name, x in whole.items()} for k in range(count)]
    return [part | {"num_items_in_batch": torch.tensor(7), "tool_mask": None} for part in parts]


@pytest.mark.parametrize(("count", "accumulation", "window"), [(4, 2, 2), (4, 8, 4), (4, 1, 1), (6, 4, 2), (3, 2, 1)])
def test_no_row_leaves_its_optimizer_step(count: int, accumulation: int, window: int) -> None:
    before = micro_batches(count)
    after = regrouped(before, accumulation)
    assert len(after) == count
    for start in range(0, count, window):
        old, new = (torch.cat([b["advantages"] for b in part[start : start + window]]) for part in (before, after))
        assert sorted(old.tolist()) == sorted(new.tolist())
    for part in after:
        assert torch.equal(part["completion_ids"][:, 0].float(), part["advantages"])  # rows stay whole
        assert torch.equal(part["prompt_ids"][:, 0], part["completion_ids"][:, 0] // 4)
        assert len(part["advantages"]) == 4 and part["num_items_in_batch"] == 7 and part["tool_mask"] is None
    if window == count:
        assert all(len(set(part["prompt_ids"][:, 0].tolist())) == 1 for part in after)


def test_batches_with_anything_else_stay_as_they_are() -> None:
    before: list[dict] = [batch | {"num_images": [1, 1, 1, 1]} for batch in micro_batches(2)]
    assert regrouped(before, 2) is before
