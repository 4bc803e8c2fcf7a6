"""Layouts of the token loss: rows that are read in whole words and rows that are not, and what stands where masked."""

from collections.abc import Callable
from typing import Any

import budget
import pytest
import torch

import gcpo_kernels
from gcpo_kernels.testing import make_token_inputs, poison
from gcpo_kernels.triton_backend import token_loss

OPTIONS = {"beta": 0.04, "kappa": 0.06, "delta": 1.5, "kl_clip": 0.5, "loss_type": "grpo"}
LEVELS = pytest.mark.parametrize("level", ["token", "sequence"])
ROWS = ("logp", "mask", "old_logp", "ref_logp", "query_logp", "causal_logp", "importance_sampling_ratio")


def shifted(x: torch.Tensor) -> torch.Tensor:
    """A slice that starts one element, and ends three, inside the rows of a larger tensor full of NaN."""
    larger = x.new_full((x.shape[0], x.shape[1] + 4, *x.shape[2:]), 1 if x.dtype == torch.bool else float("nan"))
    view = larger[:, 1:-3]
    view.copy_(x)
    return view


def widened(x: torch.Tensor) -> torch.Tensor:
    """Rows that start where those of a larger tensor do, sixteen elements further apart."""
    larger = x.new_full((x.shape[0], x.shape[1] + 16, *x.shape[2:]), 1 if x.dtype == torch.bool else float("nan"))
    view = larger[:, :-16]
    view.copy_(x)
    return view


def transposed(x: torch.Tensor) -> torch.Tensor:
    return x.transpose(0, 1).contiguous().transpose(0, 1)


def contexts_first(x: torch.Tensor) -> torch.Tensor:
    """(B, T, L), stored as (L, B, T)."""
    return x.permute(2, 0, 1).contiguous().permute(1, 2, 0) if x.dim() == 3 else x


LAYOUTS = [shifted, widened, transposed, contexts_first]


@LEVELS
@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 512, 1024, 1040, 2048])
def test_lengths(tokens: int, level: str) -> None:
    """With and without the compiler's knowledge that 16 divides the length; one program a sequence, and several."""
    inputs = make_token_inputs(3, tokens, 4 if tokens % 16 == 0 else 3, seed=tokens)
    budget.compare("gcpo_loss", inputs, **OPTIONS, importance_sampling_level=level)


@pytest.mark.parametrize(
    ("contexts", "dtype", "level"),
    [
        (1, torch.float32, "token"),
        (2, torch.float16, "token"),
        (3, torch.float32, "sequence"),
        (4, torch.float16, "sequence"),
        (6, torch.float32, "token"),
        (8, torch.float32, "token"),
    ],
    ids=str,
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: Callable, contexts: int, dtype: torch.dtype, level: str) -> None:
    inputs = make_token_inputs(4, 48, contexts, seed=contexts, dtype=dtype)
    inputs = {key: layout(x) if key in (*ROWS, "context_logp") else x for key, x in inputs.items()}
    budget.compare("gcpo_loss", inputs, **OPTIONS, importance_sampling_level=level)


def same(ours: Any, want: Any) -> None:
    for x, y in zip(ours, want, strict=True):
        assert set(x) == set(y)
        for key in x:
            assert torch.isfinite(x[key]).all(), key
            assert torch.equal(x[key], y[key]), key


@LEVELS
@pytest.mark.parametrize("layout", LAYOUTS)
def test_garbage_that_is_read_takes_no_part(layout: Callable, level: str) -> None:
    """Whole words hold masked tokens beside others: NaN there changes no bit, and their gradients are exactly 0."""
    inputs = make_token_inputs(4, 1040, 4)
    options = OPTIONS | {"importance_sampling_level": level}
    clean = budget.outcome(gcpo_kernels.gcpo_loss, inputs, **options)
    for value in (float("nan"), float("inf")):
        names = [key for key in inputs if key not in ("mask", "context_weights")]
        dirty = poison(inputs, value, *names)
        assert all(not torch.equal(dirty[key], inputs[key]) for key in names)
        dirty = {key: layout(x) if key in (*ROWS, "context_logp") else x for key, x in dirty.items()}
        got = budget.outcome(gcpo_kernels.gcpo_loss, dirty, **options)
        same(got, clean)
        for key in ("logp", "causal_logp"):
            assert not got[1][key][~inputs["mask"]].any()


@LEVELS
@pytest.mark.parametrize("shape", [(2, 1024), (0, 16), (3, 0)], ids=str)
def test_nothing_counts(shape: tuple[int, int], level: str) -> None:
    """Fully masked, and empty: loss, metrics and gradients are exactly 0, whatever stands there."""
    inputs = poison(make_token_inputs(*shape, 4, masked="all"), float("nan"), *ROWS[2:], "logp", "context_logp")
    out, grads = budget.outcome(gcpo_kernels.gcpo_loss, inputs, **OPTIONS, importance_sampling_level=level)
    assert not torch.stack(list(out.values())).any()
    assert all(grads[key] is not None and not grads[key].any() for key in ("logp", "causal_logp"))


@LEVELS
def test_expanded_rows(level: str) -> None:
    """One row, one value and one set of contexts for all: strides of 0, with which contexts are not read together."""
    inputs = make_token_inputs(4, 48, 4)
    for key in ("old_logp", "ref_logp", "importance_sampling_ratio", "context_logp"):
        inputs[key] = inputs[key][:1].expand(inputs[key].shape)
    inputs["query_logp"] = inputs["query_logp"][:1, :1].expand(4, 48)
    budget.compare("gcpo_loss", inputs, **OPTIONS, importance_sampling_level=level)
    inputs["context_logp"] = inputs["context_logp"][..., :1].expand(4, 48, 4)
    budget.compare("gcpo_loss", inputs, **OPTIONS, importance_sampling_level=level)


@pytest.mark.parametrize("by_token", [False, True])
def test_advantages_by_token(by_token: bool) -> None:
    """(B, T) advantages, and (B,) ones expanded to that, which are read once a sequence."""
    inputs = make_token_inputs(4, 48, 4)
    advantages = inputs["advantages"][:, None].expand(4, 48)
    inputs["advantages"] = advantages + 0.1 * torch.linspace(-1, 1, 48) if by_token else advantages
    budget.compare("gcpo_loss", inputs, **OPTIONS)


@pytest.mark.parametrize(
    ("size", "layout", "found"),
    [
        (1, None, (1, False)),
        (2, None, (2, True)),
        (3, None, (1, False)),
        (4, None, (4, True)),
        (8, None, (4, True)),
        (4, contexts_first, (4, False)),
        (3, contexts_first, (1, False)),
        (4, shifted, (4, True)),  # by whole tokens: 16 bytes each
        (2, shifted, (1, False)),
        (4, transposed, (4, True)),
    ],
)
def test_contexts_read_together(size: int, layout: Callable | None, found: tuple[int, bool]) -> None:
    """Only at addresses that bear it: a compiler that is told so of others would read the wrong ones."""
    contexts = torch.zeros(2, 16, size)
    assert token_loss.contexts_at_a_time(contexts if layout is None else layout(contexts)) == found
    assert token_loss.contexts_at_a_time(None) == (1, False)
    assert token_loss.contexts_at_a_time(torch.zeros(2, 16, 5)[..., :4]) == (1, False)
    assert token_loss.contexts_at_a_time(torch.zeros(2, 16, 8)[..., 1:5]) == (1, False)
