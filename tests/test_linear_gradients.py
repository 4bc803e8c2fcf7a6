"""What the backward of `linear_gcpo_loss` hands out: gradients that the forward made, times the upstream gradient."""

from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import gcpo_kernels
from gcpo_kernels import reference
from gcpo_kernels.testing import assert_gradient, make_linear_inputs, with_gradients

LEAVES = ("hidden", "weight", "bias")
OPTIONS = {"beta": 0.04, "kappa": 0.06}


def loss_of(inputs: dict[str, Any], **more: Any) -> torch.Tensor:
    return gcpo_kernels.linear_gcpo_loss(**inputs, **OPTIONS, **more)[0]


def truth(inputs: dict[str, Any], factor: float = 1.0) -> dict[str, torch.Tensor]:
    wide = with_gradients({k: x.double() if k in LEAVES else x for k, x in inputs.items()}, *LEAVES)
    loss = reference.linear_gcpo_loss(**wide, **OPTIONS)[0] * factor
    return dict(zip(LEAVES, torch.autograd.grad(loss, [wide[key] for key in LEAVES]), strict=True))


def check(found: dict[str, torch.Tensor | None], want: dict[str, torch.Tensor]) -> None:
    for key, x in want.items():
        got = found[key]
        assert got is not None, key
        assert_gradient(got, x, x.to(got.dtype), what=key, roundings=64)


@pytest.mark.parametrize("factor", [1.0, 2.5, -0.3, 0.0])
def test_upstream_gradient(factor: float) -> None:
    inputs = make_linear_inputs()
    leaves = with_gradients(inputs, *LEAVES)
    (loss_of(leaves) * factor).backward()
    if factor == 0.0:
        assert not any(leaves[key].grad.any() for key in LEAVES)
    else:
        check({key: leaves[key].grad for key in LEAVES}, truth(inputs, factor))


@pytest.mark.parametrize("factor", [2.0**-3, -4.0, 1.7])
def test_rounded_once_more(factor: float) -> None:
    """
    A bfloat16 gradient, rounded where it was made, is rounded again where it is multiplied: nowhere else, so that by a
    power of two, as gradient accumulation and loss scales have it, it is rounded once.
    """
    inputs = make_linear_inputs(dtype=torch.bfloat16)
    found = []
    for by in (1.0, factor):
        leaves = with_gradients(inputs, *LEAVES)
        (loss_of(leaves) * by).backward()
        found.append([leaves[key].grad.float() for key in LEAVES])
    for made, multiplied in zip(*found, strict=True):
        product = made * factor
        assert torch.equal(multiplied, product.bfloat16().float())
        assert (factor == 1.7) != torch.equal(multiplied, product)


def test_upstream_gradient_that_is_nan() -> None:
    leaves = with_gradients(make_linear_inputs(), *LEAVES)
    (loss_of(leaves) * torch.nan).backward()
    assert all(leaves[key].grad.isnan().all() for key in ("weight", "bias"))


def test_what_is_handed_out_is_the_callers() -> None:
    """A kept graph gives the same again, whatever became of what it gave first, with another factor too."""
    inputs = make_linear_inputs()
    leaves = with_gradients(inputs, *LEAVES)
    loss = loss_of(leaves)
    named = [leaves[key] for key in LEAVES]
    first = torch.autograd.grad(loss, named, retain_graph=True)
    check(dict(zip(LEAVES, first, strict=True)), truth(inputs))
    kept = [x.clone() for x in first]
    second = torch.autograd.grad(loss, named, torch.tensor(3.0), retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, kept, strict=True))
    for x in (*first, *second):
        x.zero_()
    last = torch.autograd.grad(loss, named, torch.tensor(-2.0))
    check(dict(zip(LEAVES, last, strict=True)), truth(inputs, -2.0))


def test_gradients_accumulate() -> None:
    """The second call adds to what the first one left in .grad."""
    inputs = make_linear_inputs()
    leaves = with_gradients(inputs, *LEAVES)
    loss_of(leaves).backward()
    (2.0 * loss_of(leaves)).backward()
    check({key: leaves[key].grad for key in LEAVES}, truth(inputs, 3.0))


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("factor", [1.0, 0.5])
def test_main_grad(factor: float, weight_dtype: torch.dtype) -> None:
    """It is added to in float32, and the weight gets nothing; the other gradients are what they were."""
    inputs = make_linear_inputs(weight_dtype=weight_dtype)
    leaves = with_gradients(inputs, *LEAVES)
    before = torch.linspace(-1, 1, leaves["weight"].numel()).view(leaves["weight"].shape)
    main_grad = before.clone()
    for _ in range(2):
        (factor * loss_of(leaves, main_grad=main_grad)).backward()
    assert leaves["weight"].grad is None
    want = truth(inputs, 2 * factor)
    check({key: leaves[key].grad for key in ("hidden", "bias")}, {key: want[key] for key in ("hidden", "bias")})
    torch.testing.assert_close((main_grad - before).double(), want["weight"], rtol=2e-5, atol=2e-6)


def test_main_grad_without_a_gradient_to_add() -> None:
    """A frozen weight, and no_grad, leave it alone."""
    inputs = with_gradients(make_linear_inputs(), "hidden")
    main_grad = torch.ones_like(inputs["weight"])
    loss_of(inputs, main_grad=main_grad).backward()
    with torch.no_grad():
        loss_of(with_gradients(make_linear_inputs(), *LEAVES), main_grad=main_grad)
    assert torch.equal(main_grad, torch.ones_like(main_grad))


@pytest.mark.parametrize("entropy", [False, True])
def test_log_probabilities_may_be_overwritten(entropy: bool) -> None:
    """The result is the caller's: what became of it before the backward does not matter."""
    inputs = make_linear_inputs()
    call = {key: inputs[key] for key in ("hidden", "weight", "bias", "token_ids")}
    grads = []
    for overwrite in (False, True):
        leaves = with_gradients(call, *LEAVES)
        out = gcpo_kernels.linear_logprob(**leaves, return_entropy=entropy)
        logp = out[0] if entropy else out
        if overwrite:
            logp.masked_fill_(inputs["mask"] == 0, 0.0)
        else:
            logp = logp.masked_fill(inputs["mask"] == 0, 0.0)
        (logp.sum() + (out[1].sum() if entropy else 0.0)).backward()
        grads.append([leaves[key].grad for key in LEAVES])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_tensors_without_data() -> None:
    """As tools that estimate memory run a step: shapes only."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        leaves = with_gradients({k: x for k, x in make_linear_inputs().items() if k != "context_weights"}, *LEAVES)
        loss_of(leaves, backend="torch").backward()
    assert all(leaves[key].grad.shape == leaves[key].shape for key in LEAVES)


def test_everything_masked() -> None:
    """No tile at all: zeros of the right types."""
    leaves = with_gradients(make_linear_inputs(masked="all"), *LEAVES)
    loss_of(leaves).backward()
    assert all(leaves[key].grad is not None and not leaves[key].grad.any() for key in LEAVES)
