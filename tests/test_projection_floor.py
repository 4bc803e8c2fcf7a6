"""The floor of p': proj_floor, and with a kl_clip the query's probability where that is smaller."""

from math import inf, log, nan
from typing import Any

import pytest
import torch

import gcpo_kernels
from gcpo_kernels import reference
from gcpo_kernels.testing import make_token_inputs

KAPPA = 0.06
RARE = log(1e-8)
FORMS = pytest.mark.parametrize("weights", [None, "(L,)", "(B, L)"])
CONTEXTS = pytest.mark.parametrize("contexts", [1, 2, 3, 5, 6, 7, 12])


def pull(logp: torch.Tensor, **given: Any) -> tuple[torch.Tensor, float]:
    """The gradient of the second KL in the (1, T) log-probabilities, per unit of kappa, and the share clamped."""
    leaf = logp.clone().requires_grad_()
    arguments = {"kappa": KAPPA, "loss_type": "luspo"} | given  # luspo: the sum over the tokens of one sequence
    loss, metrics = gcpo_kernels.gcpo_loss(leaf, torch.zeros(1).to(logp), torch.ones(logp.shape), **arguments)
    loss.backward()
    assert leaf.grad is not None
    return leaf.grad / KAPPA, metrics["proj_clamped"].item()


def weights_of(form: str | None, contexts: int, dtype: torch.dtype) -> torch.Tensor | None:
    """As a draw makes them: their sum may be 1 but for a rounding."""
    shapes = {"(L,)": (contexts,), "(B, L)": (1, contexts)}
    return None if form is None else torch.full(shapes[form], 1.0 / contexts, dtype=dtype)


def check_agreement(dtype: torch.dtype, weights: str | None, contexts: int) -> None:
    logp = torch.tensor([[RARE, log(1e-7), log(3e-10)]], dtype=dtype)
    given: dict[str, Any] = {
        "context_logp": logp.unsqueeze(-1).expand(1, 3, contexts),
        "context_weights": weights_of(weights, contexts, torch.promote_types(dtype, torch.float32)),
    }
    for query in ({}, {"query_logp": logp}, {"old_logp": logp}):
        gradient, clamped = pull(logp, **given, **query, kl_clip=5.0)
        assert clamped == 0.0
        assert not gradient.any()
    gradient, clamped = pull(logp, **given)
    assert clamped == 1.0
    want = 1.0 - 1e-6 * torch.exp(-logp.double())
    torch.testing.assert_close(gradient.double(), want, rtol=2 * torch.finfo(dtype).eps + 1e-6, atol=0.0)


@FORMS
@CONTEXTS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_rare_token_that_all_agree_on_is_left_alone(dtype: torch.dtype, weights: str | None, contexts: int) -> None:
    """Its gradient is 0 and it is not clamped; with proj_floor alone, 1 - 1e-6 / p: -99 where p = 1e-8."""
    check_agreement(dtype, weights, contexts)


@FORMS
@CONTEXTS
def test_a_rare_token_that_all_agree_on_in_float64(weights: str | None, contexts: int) -> None:
    check_agreement(torch.float64, weights, contexts)


def test_the_figure() -> None:
    """p = 1e-8 everywhere: a gradient of -99 per unit of kappa at proj_floor, and none at the query's probability."""
    logp = torch.tensor([[RARE]])
    contexts = logp.unsqueeze(-1).expand(1, 1, 4)
    assert pull(logp, context_logp=contexts)[0].item() == pytest.approx(-99.0, rel=1e-5)
    assert pull(logp, context_logp=contexts, kl_clip=5.0)[0].item() == 0.0


@pytest.mark.parametrize("kl_clip", [None, 20.0])
def test_a_linear_loss(kl_clip: float | None) -> None:
    """The same token from an output layer, whose bias is all there is."""
    probabilities = torch.tensor([1e-8, 0.25, 0.75 - 1e-8])
    bias = probabilities.log().requires_grad_()
    zero, first = torch.zeros(1, 1, 2), torch.zeros(1, 1, dtype=torch.int64)
    contexts = torch.full((1, 1, 3), RARE)
    loss, metrics = gcpo_kernels.linear_gcpo_loss(
        zero, torch.zeros(3, 2), first, torch.zeros(1), torch.ones(1, 1), bias=bias, context_logp=contexts,
        kappa=KAPPA, kl_clip=kl_clip,
    )  # fmt: skip
    loss.backward()
    assert bias.grad is not None
    if kl_clip is None:
        assert metrics["proj_clamped"] == 1.0
        assert bias.grad[0].item() / KAPPA == pytest.approx(-99.0, rel=1e-4)
    else:
        assert bias.grad.abs().max() / KAPPA < 1e-5


@FORMS
def test_what_contexts_agree_on_does_not_matter(weights: str | None) -> None:
    """A token of probability 0.9 under every context: the rounding of their mean is several times the query's 1e-8."""
    logp = torch.tensor([[RARE, log(1e-7)]])
    for contexts in range(1, 33):
        given = torch.full((1, 2, contexts), log(0.9))
        form = weights_of(weights, contexts, torch.float32)
        gradient, clamped = pull(logp, context_logp=given, context_weights=form, kl_clip=25.0)
        assert clamped == 0.0
        assert gradient.abs().max() < 1e-5


def test_the_smaller_of_both_is_the_floor() -> None:
    """A token that c_0 finds unlikelier than the others do: p' is negative. Above proj_floor nothing changes."""
    logp = torch.tensor([[log(1e-8), log(1e-4)]])
    contexts = torch.tensor([[[log(1e-9), log(1e-3)]]]).expand(1, 2, 2)
    gradient, clamped = pull(logp, context_logp=contexts, kl_clip=25.0)
    assert clamped == 1.0
    assert gradient[0, 0].item() == 0.0
    assert gradient[0, 1].item() == pytest.approx(1.0 - 1e-2, rel=1e-5)
    before, clamped = pull(logp, context_logp=contexts)
    assert clamped == 1.0
    assert before[0, 0].item() == pytest.approx(1.0 - 1e2, rel=1e-5)
    assert before[0, 1].item() == gradient[0, 1].item()


@pytest.mark.parametrize("query", [-150.0, -1e4, -inf])
@pytest.mark.parametrize("context", [-0.1, -150.0, -1e4, -inf])
def test_probabilities_that_no_number_holds(query: float, context: float) -> None:
    """Contexts that agree leave the query's, finite although it may be 0, and so are loss and gradient."""
    logp = torch.tensor([[-150.0]])
    contexts = torch.full((1, 1, 3), context)
    gradient, clamped = pull(logp, query_logp=torch.tensor([[query]]), context_logp=contexts, kl_clip=5.0)
    assert clamped == 0.0
    assert gradient.abs().item() < 1e-4  # log p' is known to a rounding; far below log pi, the clip stops it
    value = gcpo_kernels.causal_reference_logprob(torch.tensor([[query]]), contexts, floor_at_query=True)
    assert value.item() == pytest.approx(max(query, -1e30), rel=1e-6)


def test_what_is_not_a_number_shows() -> None:
    logp = torch.full((1, 1), RARE)
    good = logp.unsqueeze(-1).expand(1, 1, 3)
    for place in range(3):
        bad = good.clone()
        bad[..., place] = nan
        assert pull(logp, context_logp=bad, kl_clip=5.0)[0].isnan().all()
    assert pull(logp, context_logp=good, query_logp=torch.full((1, 1), nan), kl_clip=5.0)[0].isnan().all()
    # Where a weight is 0 it does not matter, and the others agree.
    weights = torch.tensor([0.5, 0.5, 0.0])
    gradient, clamped = pull(logp, context_logp=bad, context_weights=weights, kl_clip=5.0)
    assert gradient.item() == clamped == 0.0


@pytest.mark.parametrize("floor", [1e-6, 1e-3, 0.3])
def test_other_tokens_have_the_target_they_had(floor: float) -> None:
    """Bit for bit where the query is at least proj_floor, and where p' is; below, p' is at least the query's."""
    inputs = make_token_inputs(40, 30, 4, masked="none")
    query, contexts = 3.0 * inputs["query_logp"], 3.0 * inputs["context_logp"]
    plain, at_query = (
        gcpo_kernels.causal_reference_logprob(query, contexts, proj_floor=floor, floor_at_query=flag)
        for flag in (False, True)
    )
    low = torch.tensor(log(floor))
    unchanged = (query >= low) | (plain > low)
    assert torch.equal(plain[unchanged], at_query[unchanged])
    assert (at_query <= plain).all()
    assert (at_query >= torch.minimum(query, low)).all()
    assert unchanged.any()
    assert floor == 1e-6 or (at_query < plain).any()


def test_gradients_in_float64() -> None:
    """By finite differences, with p' of many tokens at the query's probability; the oracle has the same."""
    inputs = make_token_inputs(4, 5, 3, dtype=torch.float64, seed=1, masked="none")
    logp, causal = inputs.pop("logp").requires_grad_(), inputs.pop("causal_logp").requires_grad_()
    options: dict[str, Any] = {"kappa": 0.5, "kl_clip": 0.4, "proj_floor": 0.5}

    def loss(module: Any, logp: torch.Tensor, causal: torch.Tensor) -> torch.Tensor:
        return module.gcpo_loss(logp, **inputs, causal_logp=causal, **options)[0]

    assert (inputs["query_logp"] < log(0.5)).double().mean() > 0.3
    assert torch.autograd.gradcheck(lambda *x: loss(gcpo_kernels, *x), (logp, causal))
    for ours, truth in zip(
        *(torch.autograd.grad(loss(module, logp, causal), (logp, causal)) for module in (gcpo_kernels, reference)),
        strict=True,
    ):
        torch.testing.assert_close(ours, truth, rtol=1e-12, atol=1e-15)


def test_weights_of_the_mean() -> None:
    """`causal_reference_logprob` makes the p' that the loss does, with weights per context and per row."""
    inputs = make_token_inputs(3, 4, 3, masked="none")
    for weights in (inputs["context_weights"], inputs["context_weights"][0]):
        target = gcpo_kernels.causal_reference_logprob(
            inputs["query_logp"], inputs["context_logp"], context_weights=weights
        )
        _, metrics = gcpo_kernels.gcpo_loss(**(inputs | {"context_weights": weights}), kappa=KAPPA)
        d = target - inputs["causal_logp"]
        assert metrics["kl_causal"].item() == pytest.approx((torch.expm1(d) - d).mean().item(), rel=1e-5)
