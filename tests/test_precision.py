"""Narrow and mixed types against float64, within the error of plain torch; and that the yardstick can fail."""

from typing import Any

import pytest
import torch

import gcpo_kernels
from gcpo_kernels import reference
from gcpo_kernels.testing import (
    assert_close_to_truth,
    assert_gradient,
    in_float64,
    make_linear_inputs,
    make_representations,
    with_gradients,
)

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
OPTIONS = {"beta": 0.04, "kappa": 0.06, "loss_type": "bnpo"}
LEAVES = ("hidden", "weight", "bias")
SIZES = {"batch": 6, "tokens": 19, "hidden": 43, "vocab": 301}


def plain_loss(inputs: dict[str, Any], softcap: float | None) -> torch.Tensor:
    """What a training loop without this package writes: logits in the type of the operands, float32 from there on."""
    rest = dict(inputs)
    hidden, weight, bias, ids = (rest.pop(key) for key in (*LEAVES, "token_ids"))
    if not torch.is_autocast_enabled("cpu"):
        hidden = hidden.to(torch.promote_types(hidden.dtype, weight.dtype))
        weight, bias = weight.to(hidden.dtype), bias.to(hidden.dtype)
    logits = torch.nn.functional.linear(hidden, weight, bias)
    logits = reference.head_logits(logits.float(), logit_softcap=softcap)
    return reference.gcpo_loss(reference.selective_logprob(logits, ids), **rest, **OPTIONS)[0]


@pytest.mark.hazard(16)
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("autocast", [None, BF16])
@pytest.mark.parametrize(
    ("hidden", "weight"), [(BF16, BF16), (FP16, FP16), (BF16, FP32), (FP32, BF16), (FP32, FP32)], ids=str
)
def test_linear_loss(
    hidden: torch.dtype, weight: torch.dtype, autocast: torch.dtype | None, softcap: float | None, small_tiles: None
) -> None:
    """Seen in Liger#305, unsloth#7020."""
    inputs = make_linear_inputs(**SIZES, dtype=hidden, weight_dtype=weight)
    ours, plain = with_gradients(inputs, *LEAVES), with_gradients(inputs, *LEAVES)
    truth = with_gradients(in_float64(inputs), *LEAVES)
    with torch.autocast("cpu", autocast or BF16, enabled=autocast is not None):
        loss, _ = gcpo_kernels.linear_gcpo_loss(**ours, **OPTIONS, logit_softcap=softcap)
        plain_value = plain_loss(plain, softcap)
    true_loss, _ = reference.linear_gcpo_loss(**truth, **OPTIONS, logit_softcap=softcap)
    for x in (loss, plain_value, true_loss):
        x.backward()
    assert loss.dtype == FP32
    # Plain torch's error in one number can be small by luck: a bfloat16 rounding (2**-9) is allowed besides.
    assert_close_to_truth(loss, true_loss, plain_value, roundings=2**14)
    for key in LEAVES:
        assert ours[key].grad.dtype == inputs[key].dtype
        assert_gradient(ours[key].grad, truth[key].grad, plain[key].grad, what=key)


@pytest.mark.hazard(16)
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(("hidden", "weight"), [(BF16, BF16), (FP16, FP16), (BF16, FP32), (FP32, FP32)], ids=str)
def test_linear_logprob(hidden: torch.dtype, weight: torch.dtype, autocast: bool, small_tiles: None) -> None:
    """Without autocast: float32 results to float32 rounding, whatever the type of the operands (Liger#501)."""
    inputs = make_linear_inputs(**SIZES, dtype=hidden, weight_dtype=weight)
    inputs = {key: inputs[key] for key in (*LEAVES, "token_ids")}
    ours, plain = with_gradients(inputs, *LEAVES), with_gradients(inputs, *LEAVES)
    truth = with_gradients(in_float64(inputs), *LEAVES)
    ids = plain.pop("token_ids")
    with torch.autocast("cpu", BF16, enabled=autocast):
        out = gcpo_kernels.linear_logprob(**ours, return_entropy=True)
        wide = plain if autocast else {key: x.float() for key, x in plain.items()}
        logits = torch.nn.functional.linear(wide["hidden"], wide["weight"], wide["bias"])
        plain_out = reference.selective_logprob(logits, ids, return_entropy=True)
    true_out = reference.linear_logprob(**truth, return_entropy=True)
    for pair in (out, plain_out, true_out):
        (pair[0] * torch.linspace(-1, 2, pair[0].shape[1]) - 0.3 * pair[1]).sum().backward()
    for x, y, z in zip(out, true_out, plain_out, strict=True):
        assert x.dtype == FP32
        assert_close_to_truth(x, y, z)
    for key in LEAVES:
        assert_gradient(ours[key].grad, truth[key].grad, plain[key].grad, what=key)


@pytest.mark.hazard(16)
def test_autocast_is_a_cast_of_the_operands() -> None:
    """Under autocast, float32 operands give what operands rounded to bfloat16 give (Liger#501)."""
    inputs = make_linear_inputs(**SIZES)
    call = {key: inputs[key] for key in ("hidden", "weight", "token_ids")}
    rounded = {key: x if key == "token_ids" else x.to(BF16).float() for key, x in call.items()}
    with torch.autocast("cpu", BF16):
        ours = gcpo_kernels.linear_logprob(**call)
    torch.testing.assert_close(ours, gcpo_kernels.linear_logprob(**rounded))
    assert (ours - gcpo_kernels.linear_logprob(**call)).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
def test_selective_logprob(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = (4 * torch.randn(29, 211, generator=generator, dtype=torch.float64)).to(dtype)
    ids = torch.randint(0, 211, (29,), generator=generator)
    leaves = [logits.clone().requires_grad_(), logits.double().requires_grad_(), logits.clone().requires_grad_()]
    functions = (gcpo_kernels.selective_logprob, reference.selective_logprob, reference.selective_logprob)
    outs = [f(x, ids, temperature=0.9, return_entropy=True) for f, x in zip(functions, leaves, strict=True)]
    for out in outs:
        (out[0] * torch.linspace(-1, 2, 29) - 0.3 * out[1]).sum().backward()
    for ours, truth, plain in zip(*outs, strict=True):
        assert ours.dtype == FP32
        assert_close_to_truth(ours, truth, plain)
    assert_gradient(leaves[0].grad, leaves[1].grad, leaves[2].grad)


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("baseline", ["mean", "loo"])
def test_causal_weights(baseline: str, masked: bool, dtype: torch.dtype) -> None:
    """Arithmetic is float32 whatever the input type."""
    inputs = make_representations(4, 8, 4, 3, 57, dtype=dtype)
    mask = inputs.pop("context_mask") if masked else None
    inputs = {key: inputs[key] for key in ("z", "context_z")}
    results = []
    for given in (inputs, in_float64(inputs), {key: x.float() for key, x in inputs.items()}):
        leaves = with_gradients(given, *given)
        function = gcpo_kernels.causal_weights if not results else reference.causal_weights
        out = function(**leaves, baseline=baseline, context_mask=mask)
        (out * torch.linspace(-1, 2, out.numel()).view(out.shape)).sum().backward()
        results.append((out, leaves["z"].grad, leaves["context_z"].grad))
    (ours, *ours_grads), (truth, *true_grads), (plain, *plain_grads) = results
    assert ours.dtype == FP32
    assert_close_to_truth(ours, truth, plain)
    for x, y, z in zip(ours_grads, true_grads, plain_grads, strict=True):
        assert x.dtype == dtype
        assert_gradient(x, y, z)


@pytest.mark.parametrize("upstream", [1 / 3, 1.0, 37.0])
def test_scaled_loss(upstream: float) -> None:
    """Dividing the loss, as gradient accumulation does, scales gradients without a rounding of the factor."""
    inputs = make_linear_inputs(**SIZES, dtype=BF16)
    ours, plain = with_gradients(inputs, *LEAVES), with_gradients(inputs, *LEAVES)
    truth = with_gradients(in_float64(inputs), *LEAVES)
    losses = (
        gcpo_kernels.linear_gcpo_loss(**ours, **OPTIONS)[0],
        plain_loss(plain, None),
        reference.linear_gcpo_loss(**truth, **OPTIONS)[0],
    )
    for loss in losses:
        (loss * upstream).backward()
    for key in LEAVES:
        assert_gradient(ours[key].grad, truth[key].grad, plain[key].grad, what=key)


def test_float16_gradients_survive_a_loss_scale() -> None:
    """Gradients below float16's smallest number come out right under a loss scale, as from plain torch."""
    inputs = make_linear_inputs(**SIZES, dtype=FP16)
    inputs["advantages"] = inputs["advantages"] * 1e-4
    options = {"loss_type": "bnpo"}
    ours, truth = with_gradients(inputs, *LEAVES), with_gradients(in_float64(inputs), *LEAVES)
    (gcpo_kernels.linear_gcpo_loss(**ours, **options)[0] * 2**16).backward()
    (reference.linear_gcpo_loss(**truth, **options)[0] * 2**16).backward()
    assert (truth["weight"].grad.abs() / 2**16).median() < 6e-8
    for key in LEAVES:
        assert_gradient(ours[key].grad, truth[key].grad, what=key)


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16, torch.float64], ids=str)
def test_the_budget_rejects_wrong_gradients(dtype: torch.dtype) -> None:
    """Zero, missing, 1% off, one element off, NaN, and a zero truth."""
    truth = torch.randn(64, 33, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ours = truth.to(dtype)
    assert_gradient(ours, truth)
    one = ours.clone()
    one[0, 0] += 0.1 * truth.abs().max()
    nan = ours.clone()
    nan[3, 3] = torch.nan
    for wrong in (torch.zeros_like(ours), None, (truth * 1.01).to(dtype), -ours, one, nan, ours[1:]):
        with pytest.raises(AssertionError):
            assert_gradient(wrong, truth)
    with pytest.raises(AssertionError, match="true gradient is zero"):
        assert_gradient(torch.zeros_like(ours), torch.zeros_like(truth))
    # A plain error of a rounding allows two, and no more.
    plain = truth.to(BF16)
    assert_gradient(plain, truth, plain)
    with pytest.raises(AssertionError):
        assert_gradient((truth * 1.01).to(dtype), truth, plain)
