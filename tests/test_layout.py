"""Strides, reuse of outputs and inputs, and that nothing is modified."""

from collections.abc import Callable
from typing import Any

import grid
import pytest
import torch

import gcpo_kernels
from gcpo_kernels.testing import (
    make_hidden_representations,
    make_linear_inputs,
    make_representations,
    make_token_inputs,
    with_gradients,
)

OPTIONS = {"beta": 0.04, "kappa": 0.06}


def transposed(x: torch.Tensor) -> torch.Tensor:
    """The same values, laid out in reverse order of dimensions."""
    order = list(range(x.dim()))[::-1]
    return x.permute(order).contiguous().permute(order)


def sliced(x: torch.Tensor) -> torch.Tensor:
    """The same values inside a larger tensor, with a step in every dimension."""
    larger = torch.full([2 * n + 1 for n in x.shape], 77, dtype=x.dtype, device=x.device)
    view = larger[tuple(slice(1, 2 * n + 1, 2) for n in x.shape)]
    view.copy_(x)
    return view


def expanded(x: torch.Tensor) -> torch.Tensor:
    """The first entry along dimension 0, for all: stride 0."""
    return x[:1].expand(x.shape)


CALLS: dict[str, tuple[Callable[..., Any], Callable[[], dict[str, Any]], dict[str, Any]]] = {
    "gcpo_loss": (gcpo_kernels.gcpo_loss, make_token_inputs, OPTIONS),
    "linear_gcpo_loss": (gcpo_kernels.linear_gcpo_loss, make_linear_inputs, OPTIONS),
    "linear_logprob": (
        gcpo_kernels.linear_logprob,
        lambda: {key: make_linear_inputs()[key] for key in ("hidden", "weight", "bias", "token_ids")},
        {"return_entropy": True},
    ),
    "selective_logprob": (
        gcpo_kernels.selective_logprob,
        lambda: {"logits": make_linear_inputs()["hidden"], "token_ids": make_linear_inputs()["token_ids"] % 13},
        {"return_entropy": True},
    ),
    "causal_weights": (gcpo_kernels.causal_weights, make_representations, {}),
    "causal_weights_from_hidden": (gcpo_kernels.causal_weights_from_hidden, make_hidden_representations, {}),
    "leave_one_out_mean": (gcpo_kernels.leave_one_out_mean, lambda: {"z": make_representations()["z"]}, {}),
}
DIFFERENTIABLE = ("logp", "hidden", "weight", "bias", "causal_logp", "logits", "z", "context_z")


def total(out: Any) -> torch.Tensor:
    """One number from whatever a function returns; its gradient reaches outputs with stride 0."""
    out = out if isinstance(out, tuple) else (out,)
    return sum((k + 1.5) * x.sum() for k, x in enumerate(out) if isinstance(x, torch.Tensor))


def values_and_gradients(function: Callable[..., Any], arguments: dict[str, Any], options: dict[str, Any]) -> list:
    leaves = {key: x.detach().requires_grad_() for key, x in arguments.items() if key in DIFFERENTIABLE}
    out = total(function(**(arguments | leaves), **options))
    return [out.detach(), *torch.autograd.grad(out, list(leaves.values()))]


@pytest.mark.hazard(13)
@pytest.mark.parametrize("layout", [transposed, sliced, expanded])
@pytest.mark.parametrize("name", CALLS)
def test_strides(name: str, layout: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Every argument on its own, and all of them, in an odd layout: the same values and gradients (TE#2734)."""
    function, make, options = CALLS[name]
    inputs = make()
    for keys in [*([key] for key in inputs), list(inputs)]:
        odd = inputs | {key: layout(inputs[key]) for key in keys}
        plain = {key: x.contiguous() for key, x in odd.items()}
        for ours, want in zip(*(values_and_gradients(function, x, options) for x in (odd, plain)), strict=True):
            torch.testing.assert_close(ours, want, rtol=1e-5, atol=1e-6, msg=lambda m, keys=keys: f"{keys}: {m}")


@pytest.mark.hazard(13)
@pytest.mark.parametrize("name", [name for name in CALLS if "loss" not in name])
@pytest.mark.parametrize("layout", [transposed, sliced, expanded])
def test_strides_of_upstream_gradients(name: str, layout: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Seen in verl#6960."""
    function, make, options = CALLS[name]
    inputs = with_gradients(make(), *DIFFERENTIABLE)
    leaves = [x for x in inputs.values() if x.requires_grad]
    out = function(**inputs, **options)
    out = out if isinstance(out, tuple) else (out,)
    upstream = [layout(torch.linspace(-1, 2, x.numel()).view(x.shape)) for x in out]
    odd = torch.autograd.grad(out, leaves, upstream, retain_graph=True)
    plain = torch.autograd.grad(out, leaves, [x.contiguous() for x in upstream])
    assert all(torch.equal(x, y) for x, y in zip(odd, plain, strict=True))


@pytest.mark.hazard(14)
@pytest.mark.parametrize("name", CALLS)
def test_inputs_are_not_modified(name: str) -> None:
    """Seen in Liger#272."""
    function, make, options = CALLS[name]
    inputs = make()
    copies = {key: x.clone() for key, x in inputs.items()}
    leaves = {key: x.requires_grad_() for key, x in inputs.items() if key in DIFFERENTIABLE}
    versions = {key: x._version for key, x in inputs.items()}
    total(function(**(inputs | leaves), **options)).backward()
    for key, x in inputs.items():
        assert x._version == versions[key], key
        assert torch.equal(x.detach(), copies[key]), key


@pytest.mark.hazard(14)
@pytest.mark.parametrize("name", CALLS)
def test_backward_twice_and_outputs_used_twice(name: str) -> None:
    """A graph that is kept gives the same gradients again; an output used twice gives their sum (Liger#1251)."""
    function, make, options = CALLS[name]
    inputs = with_gradients(make(), *DIFFERENTIABLE)
    leaves = [x for x in inputs.values() if x.requires_grad]
    out = total(function(**inputs, **options))
    first = torch.autograd.grad(out, leaves, retain_graph=True)
    second = torch.autograd.grad(out, leaves, retain_graph=True)
    thrice = torch.autograd.grad(out + 2 * out, leaves)
    for x, y, z in zip(first, second, thrice, strict=True):
        assert torch.equal(x, y)
        assert x.any()
        torch.testing.assert_close(3 * x, z)


@pytest.mark.hazard(14)
@pytest.mark.parametrize("name", CALLS)
def test_two_losses_on_one_tensor(name: str) -> None:
    """Two calls on the same tensors, one backward through both, and through a softmax of an input (unsloth#5002)."""
    function, make, options = CALLS[name]
    inputs = with_gradients(make(), *DIFFERENTIABLE)
    leaves = [x for x in inputs.values() if x.requires_grad]
    once = torch.autograd.grad(total(function(**inputs, **options)), leaves)
    other = sum((x.softmax(-1) * x).sum() for x in leaves)
    extra = torch.autograd.grad(other, leaves)
    two = total(function(**inputs, **options)) + total(function(**inputs, **options))
    both = torch.autograd.grad(two + sum((x.softmax(-1) * x).sum() for x in leaves), leaves)
    for x, y, z in zip(once, extra, both, strict=True):
        torch.testing.assert_close(2 * x + y, z, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", CALLS)
def test_no_silent_second_derivative(name: str) -> None:
    """A second derivative is right or raises; it is never quietly zero."""
    function, make, options = CALLS[name]
    inputs = make()
    inputs = with_gradients({k: x.double() if x.is_floating_point() else x for k, x in inputs.items()}, *DIFFERENTIABLE)
    key = next(key for key in DIFFERENTIABLE if key in inputs)
    out = total(function(**inputs, **options)).square()
    try:
        (first,) = torch.autograd.grad(out, inputs[key], create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), inputs[key])
    except RuntimeError:
        return
    direction = torch.randn(second.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    step = 1e-6

    def squared_gradient(x: torch.Tensor) -> torch.Tensor:
        x = x.detach().requires_grad_()
        return torch.autograd.grad(total(function(**(inputs | {key: x}), **options)).square(), x)[0].square().sum()

    difference = squared_gradient(inputs[key] + step * direction) - squared_gradient(inputs[key] - step * direction)
    torch.testing.assert_close((second * direction).sum(), difference / (2 * step), rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("function", ["gcpo_loss", "linear_gcpo_loss"])
def test_constants_get_no_gradient(function: str) -> None:
    """Advantages and the scores of other policies are constants, even if they require gradients."""
    make = make_token_inputs if function == "gcpo_loss" else make_linear_inputs
    inputs = {key: x.requires_grad_(x.is_floating_point()) for key, x in make().items()}
    loss, metrics = getattr(gcpo_kernels, function)(**inputs, **OPTIONS)
    loss.backward()
    for key, x in inputs.items():
        assert (x.grad is not None) == (key in DIFFERENTIABLE), key
    assert not any(x.requires_grad for x in metrics.values())
    assert grid.run(function, inputs, OPTIONS)[0] == loss
