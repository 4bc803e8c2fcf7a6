"""The torch backend against the reference: values and every gradient, over the grid of options, tile by tile."""

from typing import Any

import budget
import grid
import pytest
import torch

import gcpo_kernels
from gcpo_kernels import reference, torch_backend
from gcpo_kernels.testing import (
    assert_gradient,
    in_float64,
    make_linear_inputs,
    make_representations,
    make_token_inputs,
    with_gradients,
)

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}


def assert_near(ours: torch.Tensor, truth: torch.Tensor, dtype: torch.dtype, what: str, scale: float = 0.0) -> None:
    """The largest error is below TOLERANCE, relative to the largest true value (or to `scale`, if that is more)."""
    assert ours.dtype == dtype, what
    error = (ours.double() - truth).abs().max().item()
    assert error <= TOLERANCE[dtype] * max(truth.abs().max().item(), scale), f"{what}: {error}"


def compare(function: str, inputs: dict[str, Any], options: dict[str, Any], dtype: torch.dtype) -> None:
    loss, metrics, grads = grid.run(function, inputs, options)
    truth, true_metrics, true_grads = grid.run(function, in_float64(inputs), options, backend=None)
    assert_near(loss, truth, dtype, "loss", scale=0.1)  # a sum of terms of size 1 that may cancel
    assert set(metrics) == set(true_metrics)
    for key, value in true_metrics.items():
        torch.testing.assert_close(metrics[key], value, rtol=2e-5, atol=1e-6, msg=lambda m, key=key: f"{key}: {m}")
    assert set(grads) == set(true_grads)
    for key, want in true_grads.items():
        if want is None or not want.any():  # causal_logp without kappa: None, or zeros
            assert key == "causal_logp"
            assert options["kappa"] == 0.0
            assert grads[key] is None or not grads[key].any()
            continue
        assert_gradient(grads[key], want, want, what=key, roundings=1e6)  # not zero; the size of the error is next
        assert_near(grads[key], want, dtype, key)


@pytest.mark.hazard(1)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("case", grid.cases(), ids=grid.name)
def test_loss(case: Any, dtype: torch.dtype) -> None:
    """Seen in Liger#1082."""
    inputs, options = grid.token_call(case, 5, 7, dtype=dtype)
    compare("gcpo_loss", inputs, options, dtype)


@pytest.mark.parametrize("case", grid.cases(), ids=grid.name)
def test_loss_of_long_sequences(case: Any) -> None:
    """In float16, whose smallest number is large: of sequences as long as on a GPU, every case has a gradient."""
    inputs, options = grid.token_call(case, 5, 300, dtype=torch.float16)
    budget.compare("gcpo_loss", inputs, "torch", **options)


@pytest.mark.hazard(1)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("case", grid.cases(), ids=grid.name)
def test_linear_loss(case: Any, dtype: torch.dtype, small_tiles: None) -> None:
    """Tiles of three tokens: shorter than the sequences, and not a divisor of anything (Liger#1082)."""
    inputs, options = grid.linear_call(case, 5, 7, dtype=dtype)
    compare("linear_gcpo_loss", inputs, options, dtype)


@pytest.mark.parametrize("rows", [1, 2, 7, 8, 15, 100])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("masked", ["ragged", "none"])
def test_any_tile_size(level: str, rows: int, masked: str, small_tiles: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles below, at and above the length of a sequence; several sequences in one; one tile for all."""
    monkeypatch.setattr(torch_backend, "_MIN_TILE_ROWS", {"cpu": rows})
    inputs = make_linear_inputs(6, 7, dtype=torch.float64, seed=rows, masked=masked)
    options = {"importance_sampling_level": level, "beta": 0.04, "kappa": 0.06}
    compare("linear_gcpo_loss", inputs, options, torch.float64)


@pytest.mark.parametrize("need", [("hidden",), ("weight",), ("bias",), ("hidden", "bias"), ("causal_logp",), ()])
def test_linear_loss_makes_the_gradients_asked_for(need: tuple[str, ...], small_tiles: None) -> None:
    inputs = with_gradients(make_linear_inputs(dtype=torch.float64), *need)
    truths = with_gradients(inputs, "hidden", "weight", "bias", "causal_logp")
    options = {"beta": 0.04, "kappa": 0.06}
    loss, _ = gcpo_kernels.linear_gcpo_loss(**inputs, **options)
    truth, _ = reference.linear_gcpo_loss(**truths, **options)
    truth.backward()
    torch.testing.assert_close(loss.detach(), truth.detach())
    assert loss.requires_grad == bool(need)
    if need:
        loss.backward()
    for key in ("hidden", "weight", "bias", "causal_logp"):
        if key in need:
            torch.testing.assert_close(inputs[key].grad, truths[key].grad)
        else:
            assert inputs[key].grad is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("head", grid.HEADS, ids=str)
def test_linear_logprob(head: dict[str, Any], entropy: bool, flat: bool, dtype: torch.dtype, small_tiles: None) -> None:
    inputs = make_linear_inputs(3, 5, dtype=dtype)
    call = {key: inputs[key] for key in ("hidden", "weight", "bias", "token_ids")} | head
    if flat:
        call |= {"hidden": call["hidden"].flatten(0, 1), "token_ids": call["token_ids"].flatten()}
    upstream = torch.randn(2, *call["token_ids"].shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    ours = with_gradients(call, "hidden", "weight", "bias")
    truths = with_gradients(in_float64(call), "hidden", "weight", "bias")
    for function, kept in ((gcpo_kernels.linear_logprob, ours), (reference.linear_logprob, truths)):
        out = function(**kept, return_entropy=entropy)
        kept["out"] = out if entropy else (out,)
        sum((x * g).sum() for x, g in zip(kept["out"], upstream, strict=False)).backward()
    for x, y in zip(ours["out"], truths["out"], strict=True):
        assert x.shape == call["token_ids"].shape
        assert_near(x.detach(), y.detach(), dtype, "value")
    for key in ("hidden", "weight", "bias"):
        if truths[key] is not None:
            assert_near(ours[key].grad, truths[key].grad, dtype, key)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(41, 37), (3, 13, 37), (2, 40, 5)])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("entropy", [False, True])
def test_selective_logprob(
    shape: tuple[int, ...], temperature: float, entropy: bool, dtype: torch.dtype, small_tiles: None
) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    ids = torch.randint(0, shape[-1], shape[:-1], generator=generator)
    upstream = torch.randn(2, *ids.shape, generator=generator).to(dtype)
    results = []
    for function, x in ((gcpo_kernels.selective_logprob, logits), (reference.selective_logprob, logits.double())):
        x = x.clone().requires_grad_()
        out = function(x, ids, temperature=temperature, return_entropy=entropy)
        out = out if entropy else (out,)
        sum((y * g).sum() for y, g in zip(out, upstream, strict=False)).backward()
        results.append([y.detach() for y in out] + [x.grad])
    for ours, truth in zip(*results, strict=True):
        assert_near(ours, truth, dtype, str(tuple(ours.shape)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("similarity", ["cosine", "gaussian"])
@pytest.mark.parametrize("baseline", ["mean", "loo"])
def test_causal_weights(baseline: str, similarity: str, masked: bool, dtype: torch.dtype) -> None:
    inputs = make_representations(dtype=dtype)
    mask = inputs.pop("context_mask")
    results = []
    for function, given in ((gcpo_kernels.causal_weights, inputs), (reference.causal_weights, in_float64(inputs))):
        leaves = with_gradients(given, "z", "context_z")
        out = function(**leaves, baseline=baseline, similarity=similarity, context_mask=mask if masked else None)
        (out * torch.arange(1.0, 1.0 + out.numel(), dtype=out.dtype).view(out.shape)).sum().backward()
        results.append([out.detach(), leaves["z"].grad, leaves["context_z"].grad])
    for ours, truth in zip(*results, strict=True):
        assert_near(ours, truth, dtype, str(tuple(ours.shape)))
    ours_mean = gcpo_kernels.leave_one_out_mean(inputs["z"])
    assert_near(ours_mean, reference.leave_one_out_mean(inputs["z"].double()), dtype, "leave_one_out_mean")


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("rank", [0, 1, 3])
def test_items_of_any_rank(rank: int, level: str) -> None:
    """A one-element `num_items_in_batch` is a number, whatever its shape."""
    options = {"loss_type": "dapo", "importance_sampling_level": level, "kappa": 0.06}
    items = torch.full([1] * rank, 17)
    for function, make in (("gcpo_loss", make_token_inputs), ("linear_gcpo_loss", make_linear_inputs)):
        want = grid.run(function, make(), options | {"num_items_in_batch": 17})
        torch.testing.assert_close(grid.run(function, make(), options | {"num_items_in_batch": items}), want)


def test_hidden_may_be_flat() -> None:
    inputs = make_linear_inputs(dtype=torch.float64)
    flat = inputs | {"hidden": inputs["hidden"].flatten(0, 1), "token_ids": inputs["token_ids"].flatten()}
    whole, flattened = (grid.run("linear_gcpo_loss", x, {"kappa": 0.06}) for x in (inputs, flat))
    assert torch.equal(whole[0], flattened[0])
    assert torch.equal(whole[2]["hidden"].flatten(0, 1), flattened[2]["hidden"])
    assert torch.equal(whole[2]["weight"], flattened[2]["weight"])


def test_linear_loss_is_the_two_halves() -> None:
    """linear_gcpo_loss(...) = gcpo_loss(linear_logprob(...), ...), gradients included."""
    inputs = make_linear_inputs(dtype=torch.float64)
    fused = with_gradients(inputs, "hidden", "weight", "bias")
    halves = with_gradients(inputs, "hidden", "weight", "bias")
    options = {"beta": 0.04, "kappa": 0.06, "importance_sampling_level": "sequence"}
    head = {key: halves.pop(key) for key in ("hidden", "weight", "bias", "token_ids")}
    loss, metrics = gcpo_kernels.linear_gcpo_loss(**fused, **options, logit_softcap=2.0)
    entropy = metrics.pop("entropy")
    logp, entropies = gcpo_kernels.linear_logprob(**head, return_entropy=True, logit_softcap=2.0)
    other, other_metrics = gcpo_kernels.gcpo_loss(logp, **halves, **options)
    loss.backward()
    other.backward()
    torch.testing.assert_close(loss, other)
    torch.testing.assert_close(metrics, other_metrics)
    torch.testing.assert_close(entropy.double(), entropies[inputs["mask"]].mean(), rtol=1e-6, atol=0)
    for key in ("hidden", "weight", "bias"):
        torch.testing.assert_close(fused[key].grad, head[key].grad)
