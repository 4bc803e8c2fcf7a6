"""Masked positions change no bit of anything, whatever they hold; empty and fully masked batches work."""

from typing import Any

import grid
import pytest
import torch

import gcpo_kernels
from gcpo_kernels.testing import (
    assert_gradient,
    make_linear_inputs,
    make_representations,
    make_token_inputs,
    poison,
)

GARBAGE = (float("nan"), float("inf"), -float("inf"), 1e4, -1e4)
OPTIONS = {"beta": 0.04, "kappa": 0.06, "delta": 1.5, "kl_clip": 0.3}
MAKERS = {"gcpo_loss": make_token_inputs, "linear_gcpo_loss": make_linear_inputs}
EACH = [
    (function, name) for function, make in MAKERS.items() for name in make() if name not in ("mask", "weight", "bias")
]


def assert_same_bits(clean: Any, dirty: Any) -> None:
    (loss, metrics, grads), (other, other_metrics, other_grads) = clean, dirty
    assert torch.isfinite(loss)
    assert torch.equal(loss, other), "loss"
    for kind, want, got in (("metric", metrics, other_metrics), ("gradient", grads, other_grads)):
        assert set(want) == set(got)
        for key, x in want.items():
            if x is None and got[key] is None:  # causal_logp without kappa
                continue
            assert torch.isfinite(x).all(), f"{kind} {key}"
            assert torch.equal(x, got[key]), f"{kind} {key}"


def garbage_in(inputs: dict[str, Any], value: float, *names: str) -> dict[str, Any]:
    """Poisoned inputs; weights of contexts must stay non-negative even there."""
    out = poison(inputs, value, *names)
    if value < 0 and out["context_weights"] is not inputs["context_weights"]:
        out["context_weights"] = out["context_weights"].abs()
    return out


@pytest.mark.hazard(10)
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize(("function", "name"), EACH)
def test_each_argument(function: str, name: str, level: str, small_tiles: None) -> None:
    """Seen in Soup#342."""
    inputs = MAKERS[function]()
    options = OPTIONS | {"importance_sampling_level": level}
    clean = grid.run(function, inputs, options)
    for value in GARBAGE:
        dirty = garbage_in(inputs, value, name)
        assert not torch.equal(dirty[name], inputs[name]), "nothing was poisoned"
        assert_same_bits(clean, grid.run(function, dirty, options))


@pytest.mark.hazard(10)
@pytest.mark.parametrize("case", [*grid.cases()[::5], *grid.other_cases()[-3:]], ids=grid.name)
@pytest.mark.parametrize("function", MAKERS)
def test_all_arguments(function: str, case: Any, small_tiles: None) -> None:
    """Seen in Soup#342."""
    options, changes = case
    inputs = grid.change(MAKERS[function](), changes)
    clean = grid.run(function, inputs, options)
    for value in GARBAGE:
        assert_same_bits(clean, grid.run(function, garbage_in(inputs, value), options))


@pytest.mark.parametrize("function", MAKERS)
def test_gradients_are_zero_where_masked_and_only_there(function: str) -> None:
    inputs = garbage_in(MAKERS[function](), float("nan"))
    _, _, grads = grid.run(function, inputs, OPTIONS)
    keep = inputs["mask"]
    for key in ("logp", "hidden", "causal_logp"):
        if key in grads:
            assert not grads[key][~keep].any(), key
            assert (grads[key][keep] != 0).any(), key


@pytest.mark.parametrize("function", MAKERS)
def test_rows_do_not_depend_on_what_is_masked_elsewhere(function: str) -> None:
    """Dropping the fully masked sequence changes no per-token mean."""
    inputs = MAKERS[function](dtype=torch.float64)
    assert not inputs["mask"][-1].any()
    fewer = {key: x if key in ("weight", "bias") else x[:-1] for key, x in inputs.items()}
    whole, part = (grid.run(function, x, OPTIONS | {"loss_type": "bnpo"}) for x in (inputs, fewer))
    torch.testing.assert_close(whole[0], part[0])
    for key, x in part[2].items():
        assert_gradient(x, (whole[2][key] if key in ("weight", "bias") else whole[2][key][:-1]).double(), what=key)


@pytest.mark.hazard(28)
@pytest.mark.parametrize("loss_type", [*grid.LOSSES, *grid.OTHER_LOSSES])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("function", MAKERS)
def test_everything_masked(function: str, level: str, loss_type: str) -> None:
    """The loss is 0, its gradients are 0, and metrics are finite, with garbage everywhere (unsloth-zoo#1262)."""
    inputs = garbage_in(MAKERS[function](masked="all"), float("nan"))
    options = OPTIONS | {"loss_type": loss_type, "importance_sampling_level": level, "max_completion_length": 7}
    loss, metrics, grads = grid.run(function, inputs, options)
    assert loss == 0
    assert all(torch.isfinite(x) for x in metrics.values())
    for key, x in grads.items():
        assert not x.any(), key
        assert torch.isfinite(x).all(), key


@pytest.mark.hazard(28)
@pytest.mark.parametrize("loss_type", [*grid.LOSSES, *grid.OTHER_LOSSES])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize(("batch", "tokens"), [(0, 7), (5, 0), (0, 0)])
@pytest.mark.parametrize("function", MAKERS)
def test_no_tokens(function: str, batch: int, tokens: int, level: str, loss_type: str) -> None:
    """Seen in trl#4976."""
    options = OPTIONS | {"loss_type": loss_type, "importance_sampling_level": level, "max_completion_length": 7}
    inputs = MAKERS[function](batch, tokens)
    loss, metrics, grads = grid.run(function, inputs, options)
    assert loss == 0
    assert all(torch.isfinite(x) for x in metrics.values())
    assert all(not x.any() and x.shape == inputs[key].shape for key, x in grads.items())


@pytest.mark.parametrize("shape", [(0,), (0, 5), (5, 0)])
def test_no_rows(shape: tuple[int, ...]) -> None:
    ids = torch.zeros(shape, dtype=torch.int64)
    weight = torch.randn(11, 4, requires_grad=True)
    for x, call in (
        (torch.randn(*shape, 4, requires_grad=True), lambda x, **k: gcpo_kernels.linear_logprob(x, weight, ids, **k)),
        (torch.randn(*shape, 11, requires_grad=True), lambda x, **k: gcpo_kernels.selective_logprob(x, ids, **k)),
    ):
        logp, entropy = call(x, return_entropy=True)
        assert logp.shape == entropy.shape == shape
        (logp.sum() + entropy.sum()).backward()
        assert x.grad.shape == x.shape
    assert not weight.grad.any()


@pytest.mark.parametrize("baseline", ["mean", "loo"])
def test_no_prompts(baseline: str) -> None:
    inputs = make_representations(0)
    mask = inputs.pop("context_mask")
    leaves = {key: x.requires_grad_() for key, x in inputs.items()}
    for context_mask in (None, mask):
        out = gcpo_kernels.causal_weights(**leaves, baseline=baseline, context_mask=context_mask)
        assert out.shape == (0, 4)
        out.sum().backward()
    assert gcpo_kernels.leave_one_out_mean(inputs["z"]).shape == inputs["z"].shape
    assert gcpo_kernels.group_advantages(torch.zeros(0), 4).shape == (0,)
    assert gcpo_kernels.causal_reference_logprob(torch.zeros(0, 3), torch.zeros(0, 3, 2)).shape == (0, 3)


@pytest.mark.parametrize("value", GARBAGE)
def test_missing_samples(value: float) -> None:
    """Samples that do not exist change no bit of Upsilon, and get gradient 0."""
    inputs = make_representations()
    clean = gcpo_kernels.causal_weights(**inputs)
    keep = inputs["context_mask"]
    context_z = torch.where(keep.unsqueeze(-1), inputs["context_z"], value).requires_grad_()
    z = inputs["z"].clone().requires_grad_()
    dirty = gcpo_kernels.causal_weights(z, context_z, context_mask=keep)
    dirty.sum().backward()
    assert torch.equal(clean, dirty)
    assert not context_z.grad[~keep].any()
    assert torch.isfinite(z.grad).all()
    # Candidates 0 and 1 have no sample under context 0: their difference is 0.
    no_difference = gcpo_kernels.causal_weights(inputs["z"], torch.zeros_like(context_z))
    torch.testing.assert_close(dirty[:, :2], no_difference[:, :2])
    assert not torch.allclose(dirty[:, 2:], no_difference[:, 2:])


@pytest.mark.parametrize("value", GARBAGE)
def test_contexts_of_weight_zero(value: float) -> None:
    """A context whose weight is 0 changes nothing, except that context 0 stays the context x_i."""
    inputs = make_token_inputs(masked="none")
    inputs["context_weights"] = torch.tensor([0.0, 1.0, 0.0])
    clean = grid.run("gcpo_loss", inputs, {"kappa": 0.06})
    dirty = inputs | {"context_logp": inputs["context_logp"].clone()}
    dirty["context_logp"][..., 2] = value
    assert_same_bits(clean, grid.run("gcpo_loss", dirty, {"kappa": 0.06}))
    moved = inputs | {"context_logp": inputs["context_logp"] - torch.tensor([0.3, 0.0, 0.0])}
    assert not torch.equal(clean[0], grid.run("gcpo_loss", moved, {"kappa": 0.06})[0])
