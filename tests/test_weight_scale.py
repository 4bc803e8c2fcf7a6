"""`weight_scale`: weights whose mean is 1, what is logged of them, and when there is no such scale."""

import math

import pytest
import torch
from test_causal_step import LENGTH, rollout_of, step_of
from test_trainer_causal import first_batch, make_trainer
from tiny_policy import save_policy

from gcpo import CausalOptions
from gcpo.causal.estimators import estimate_weights
from gcpo.causal.port import WeightInputs

OF_EQ_11 = ("mean", "std", "min", "max", "near_zero")


def inputs_of(seed: int = 0, towards: float = 1.0) -> WeightInputs:
    """Representations of 3 groups of 4 that point to one side as far as `towards` says, and 2 colliders of each."""
    generator = torch.Generator().manual_seed(seed)
    z = towards + torch.randn(3, 4, 8, generator=generator)
    collider_z = towards + torch.randn(3, 2, 8, generator=generator)
    return WeightInputs(z, collider_z, None, torch.ones(3, 2, dtype=torch.bool))


def estimate(inputs: WeightInputs, **options) -> tuple[torch.Tensor, dict[str, float]]:
    weights, metrics = estimate_weights(CausalOptions(**options), inputs)
    return weights, {name.removeprefix("upsilon/"): float(value) for name, value in metrics.items()}


@pytest.mark.parametrize("similarity", ["cosine", "gaussian"])
def test_their_mean_is_1_and_alpha_has_no_say(similarity):
    plain, logged = estimate(inputs_of(), similarity=similarity)
    assert plain.min() < 0.9 * plain.mean() and plain.mean() > 0.5
    for alpha in (2.0, 0.3, 50.0, -2.0):
        unit, metrics = estimate(inputs_of(), weight_scale="unit", alpha=alpha, similarity=similarity)
        torch.testing.assert_close(unit, plain / plain.mean(), atol=1e-6, rtol=1e-5)
        assert unit.mean().item() == pytest.approx(1.0, abs=1e-6) and metrics["fallback"] == 0
        assert metrics["mean"] == pytest.approx(logged["mean"] * alpha / 2, rel=1e-5)  # of eq. 11 all the same
    both = (logged, estimate(inputs_of(), weight_scale="unit", similarity=similarity)[1])
    for metrics in both:
        assert metrics["unit_std"] == pytest.approx((plain / plain.mean()).std(unbiased=False).item(), rel=1e-5)
        assert metrics["unit_min"] == pytest.approx((plain.min() / plain.mean()).item(), rel=1e-5)
        assert metrics["unit_max"] == pytest.approx((plain.max() / plain.mean()).item(), rel=1e-5)
        assert {name: metrics[name] for name in OF_EQ_11} == {name: logged[name] for name in OF_EQ_11}


def test_weights_that_are_undefined_stay_1_and_out_of_the_mean():
    inputs = inputs_of()
    inputs.z[1] = torch.nan
    unit, metrics = estimate(inputs, weight_scale="unit")
    assert unit[1].tolist() == [1.0] * 4 and metrics["fallback"] == pytest.approx(1 / 3)
    assert unit[[0, 2]].mean().item() == pytest.approx(1.0, abs=1e-6) and unit[[0, 2]].std() > 0.05
    inputs.z[:] = torch.nan
    unit, metrics = estimate(inputs, weight_scale="unit")
    assert torch.equal(unit, torch.ones(3, 4)) and metrics["fallback"] == 1.0 and "unit_std" not in metrics


def test_there_is_no_such_scale_without_a_mean_to_speak_of():
    """Leave-one-out means of a group that adds up to nothing point away from each candidate: the mean is negative."""
    inputs = inputs_of(towards=0.0)
    inputs.z -= inputs.z.mean(dim=1, keepdim=True)
    plain, logged = estimate(inputs, weight_scale="alpha")
    assert plain.mean() < -0.1 and logged["fallback"] == 0 and "unit_std" not in logged
    unit, metrics = estimate(inputs, weight_scale="unit")
    assert torch.equal(unit, torch.ones(3, 4)) and metrics["fallback"] == 1.0
    assert metrics["mean"] == logged["mean"]
    for alpha, fallback in ((0.0, 1.0), (1e-6, 0.0)):  # alpha = 0 says nothing of the similarities
        assert estimate(inputs_of(), weight_scale="unit", alpha=alpha)[1]["fallback"] == fallback


@pytest.mark.filterwarnings("ignore:`share_prefix` needs")
def test_a_step_weighs_with_them():
    scripted, step = step_of(estimator="sampled", similarity="gaussian", kappa=0.0)
    plain = step.terms(rollout_of(), LENGTH).upsilon
    other, unit_step = step_of(estimator="sampled", similarity="gaussian", kappa=0.0, weight_scale="unit")
    terms = unit_step.terms(rollout_of(), LENGTH)
    torch.testing.assert_close(terms.upsilon, plain / plain.mean())
    torch.testing.assert_close(terms.weigh(torch.ones(8)), terms.upsilon)
    assert other.logged["upsilon/std"] == scripted.logged["upsilon/std"] > 0
    assert other.logged["upsilon/unit_std"] == scripted.logged["upsilon/unit_std"]
    assert not math.isclose(other.logged["upsilon/unit_std"], other.logged["upsilon/std"], rel_tol=0.05)


def test_the_trainers_advantages_keep_their_size(tmp_path):
    trainer = make_trainer(save_policy(tmp_path / "policy"), tmp_path, weight_scale="unit")
    output, captured = first_batch(trainer)
    torch.testing.assert_close(output["advantages"], captured["advantages"] * captured["upsilon"])
    assert captured["upsilon"].mean().item() == pytest.approx(1.0, abs=1e-6) and captured["upsilon"].std() > 1e-3
    trainer.log({})
    logged = trainer.state.log_history[-1]
    assert logged["gcpo/upsilon/unit_max"] == pytest.approx(captured["upsilon"].max().item())
    scale = logged["gcpo/upsilon/mean"]
    assert logged["gcpo/upsilon/max"] == pytest.approx(scale * captured["upsilon"].max().item(), rel=1e-5)
    assert abs(scale - 1.0) > 0.1
