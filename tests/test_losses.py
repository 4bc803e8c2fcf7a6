"""What the losses beside GRPO's, their weights and the corrected KL do at the edges, and what they have in common."""

import math
from typing import Any

import grid
import pytest
import torch

import gcpo_kernels
from gcpo_kernels import maths
from gcpo_kernels.options import LossOptions
from gcpo_kernels.testing import make_linear_inputs, make_token_inputs
from gcpo_kernels.tokens import TokenInputs

NAN = float("nan")
LEVELS = pytest.mark.parametrize("level", ["token", "sequence"])
MAKERS = {"gcpo_loss": make_token_inputs, "linear_gcpo_loss": make_linear_inputs}
FUNCTIONS = pytest.mark.parametrize("function", MAKERS)
OPTIONS = {"beta": 0.04, "kappa": 0.06, "bias_correction_kl": True, "kl_clip": 0.4}


def one_token(log_ratio: float, advantage: float, ref_logp: float = 0.0, **options: Any) -> tuple[float, float]:
    """Loss of one token of log-probability -1, and its derivative; `ref_logp` is relative to that."""
    logp = torch.full((1, 1), -1.0, requires_grad=True)
    old, ref = logp.detach() - log_ratio, logp.detach() + ref_logp
    given = {"old_logp": old, "ref_logp": ref, "loss_type": "luspo", **options}
    loss, _ = gcpo_kernels.gcpo_loss(logp, torch.tensor([advantage]), torch.ones(1, 1), **given, backend=grid.BACKEND)
    loss.backward()
    assert logp.grad is not None
    return loss.item(), logp.grad.item()


@pytest.mark.parametrize("log_ratio", [90.0, 200.0, 1e4])
@pytest.mark.parametrize("advantage", [2.0, -2.0])
@LEVELS
def test_ratios_that_no_number_holds(level: str, advantage: float, log_ratio: float) -> None:
    """Where the term no longer grows with R its derivative is a number, and 0 unless the factor is a constant."""
    given = {"importance_sampling_level": level}
    tau = 1.5 if advantage > 0 else 0.5
    options = {"sapo_temperature_pos": 1.5, "sapo_temperature_neg": 0.5}
    got = one_token(log_ratio, advantage, loss_type="sapo", **options, **given)
    assert got == (pytest.approx(-4.0 / tau * advantage), 0.0)
    assert one_token(log_ratio, advantage, loss_type="cispo", epsilon_high=5.0, **given) == (
        pytest.approx(5.0 * advantage),
        pytest.approx(-5.0 * advantage),
    )
    assert one_token(log_ratio, advantage, loss_type="vespo", **given) == (0.0, 0.0)
    assert one_token(log_ratio, 2.0, importance_sampling_ratio=torch.zeros(1), loss_type="sapo") == (0.0, 0.0)


@pytest.mark.parametrize(("log_ratio", "ref_logp"), [(-95.0, 95.0), (-300.0, 301.0), (-30.0, 3.0), (0.2, 2.1)])
def test_a_corrected_kl_is_a_number_where_exp_of_its_log_ratio_is_none(log_ratio: float, ref_logp: float) -> None:
    """k3(d) R = exp(d + log R) - (d + 1) R, whose derivative in logp is -R d."""
    loss, grad = one_token(log_ratio, 0.0, ref_logp, beta=1.0, bias_correction_kl=True)
    small = math.exp(log_ratio)
    assert loss == pytest.approx(math.exp(ref_logp + log_ratio) - (ref_logp + 1.0) * small, rel=1e-4)
    assert grad == pytest.approx(-small * ref_logp, rel=1e-4, abs=1e-6 * loss)


@pytest.mark.parametrize("log_ratio", [90.0, 1e4])
def test_a_corrected_kl_of_0_stays_0(log_ratio: float) -> None:
    assert one_token(log_ratio, 1.0, 0.0, beta=1.0, bias_correction_kl=True) == (pytest.approx(-1.2), 0.0)


@LEVELS
@pytest.mark.parametrize("kind", ["grpo", "cispo", "sapo", "vespo"])
def test_derivatives_by_hand_are_autograds(kind: str, level: str) -> None:
    """Of the corrected KL too, at log-ratios where its formula changes and where it leaves the clip."""
    d = torch.tensor([[-90.0, -3.0, -1e-9, 0.0, 1e-9, 1.0, 1.999, 2.001, 30.0]], dtype=torch.float64)
    logp = torch.linspace(-5.0, -1.0, 9, dtype=torch.float64).unsqueeze(0).requires_grad_()
    r = torch.tensor([[-8.0, 0.3, -0.1, 800.0, 0.0, 0.1, -1.0, 0.5, -25.0]], dtype=torch.float64, requires_grad=True)
    mask = torch.ones(1, 9, dtype=torch.bool)
    for sign in (1.0, -1.0):
        for kl_clip in (None, 2.5):
            advantages = torch.full((1, 9), 1.3 * sign, dtype=torch.float64)
            advantages[0, 3] = 1.3  # of the ratio that no number holds
            inputs = TokenInputs(mask, advantages, ref_logp=logp.detach() + d)
            options = LossOptions(
                beta=0.7, bias_correction_kl=True, kl_clip=kl_clip, loss_type=kind, importance_sampling_level=level
            )
            loss = maths.token_objective(logp, r, None, inputs, options).sum()
            want = torch.autograd.grad(loss, (r, logp), allow_unused=True)
            d_ratio, d_logp, d_causal = maths.token_objective_gradient(logp, r, None, inputs, options)
            assert d_causal is None
            torch.testing.assert_close(d_ratio, want[0], rtol=1e-12, atol=1e-14)
            torch.testing.assert_close(d_logp, want[1], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("loss_type", ["luspo", "sapo"])
@LEVELS
def test_loss_gradients(level: str, loss_type: str) -> None:
    """Finite differences; the factors of the other two losses are constants, which these would move."""
    inputs = make_token_inputs(3, 4, 2, dtype=torch.float64, seed=1)
    leaves = [inputs.pop(key).requires_grad_() for key in ("logp", "causal_logp")]
    weights = torch.linspace(0.0, 1.5, 12, dtype=torch.float64).view(3, 4)
    inputs |= {"policy_weights": weights, "kappa_weights": weights.flip(1), "loss_type": loss_type}

    def function(logp: torch.Tensor, causal_logp: torch.Tensor) -> torch.Tensor:
        options = OPTIONS | {"importance_sampling_level": level, "causal_logp": causal_logp, "beta": 0.5}
        return gcpo_kernels.gcpo_loss(logp, **inputs, **options)[0]

    assert torch.autograd.gradcheck(function, leaves)


@FUNCTIONS
def test_policy_weights_are_a_part_of_the_samplers_correction(function: str) -> None:
    """Of every shape, for all losses but vespo, whose phi knows the correction alone."""
    inputs = MAKERS[function]()
    weights = {"(B, T)": torch.linspace(0.0, 2.0, 35).view(5, 7), "(B,)": torch.arange(5.0)}
    weights["(B, 1)"] = weights["(B,)"].unsqueeze(1)
    ratio = inputs.pop("importance_sampling_ratio")
    for kind in ("bnpo", "sapo", "cispo"):
        options = OPTIONS | {"loss_type": kind}
        for given in weights.values():
            whole = (given if given.dim() == 2 else given.unsqueeze(1)) * ratio
            want = grid.run(function, inputs | {"importance_sampling_ratio": whole}, options)
            both = {"importance_sampling_ratio": ratio, "policy_weights": given}
            for changed in (both, {"policy_weights": whole}):
                got = grid.run(function, inputs | changed, options)
                assert torch.equal(got[0], want[0])
                assert all(torch.equal(got[2][key], want[2][key]) for key in want[2])


@FUNCTIONS
def test_kappa_weights_of_some_rows(function: str) -> None:
    """A row without a causal term gives the loss without one, whatever stands there; metrics are of the others."""
    inputs = MAKERS[function]()
    options = OPTIONS | {"loss_type": "luspo"}
    counted = torch.tensor([1.0, 0.0, 2.0, 0.0, 0.0])
    dirty = {key: inputs[key].clone() for key in ("context_logp", "query_logp", "causal_logp")}
    for x in dirty.values():
        x[counted == 0] = NAN
    names = ("kl_causal", "proj_clamped", "kl_causal_clipped")

    def take(rows: slice | list[int]) -> dict[str, Any]:
        return {key: x if key in ("weight", "bias") else x[rows] for key, x in inputs.items()}

    for by_token in (False, True):
        given = counted.unsqueeze(1).expand(5, 7).contiguous() if by_token else counted
        loss, metrics, grads = grid.run(function, inputs | dirty | {"kappa_weights": given}, options)
        want, _, want_grads = grid.run(function, inputs | {"kappa_weights": given}, options)
        assert torch.equal(loss, want)
        assert all(torch.equal(grads[key], want_grads[key]) for key in grads)
        assert not grads["causal_logp"][counted == 0].any() and grads["causal_logp"][0].any()
        parts = [grid.run(function, take([i]), options | {"kappa": 0.06 * counted[i].item()})[0] for i in range(5)]
        torch.testing.assert_close(loss, torch.stack(parts).mean())
        _, alone, _ = grid.run(function, take([0, 2]), options)
        assert all(metrics[key] == pytest.approx(alone[key].item(), rel=1e-5) for key in names)
    none = grid.run(function, inputs | dirty | {"kappa_weights": torch.zeros(5)}, options)
    torch.testing.assert_close(none[0], grid.run(function, inputs, options | {"kappa": 0.0})[0])
    assert not any(none[1][key] for key in names)


@FUNCTIONS
def test_vespo_hides_nothing(function: str) -> None:
    """NaN in what phi is made of is NaN in the loss, not a sequence that is left out; where masked it is nothing."""
    inputs = MAKERS[function]()
    for key in ("old_logp", "importance_sampling_ratio", "advantages"):
        x = inputs[key].clone()
        x.view(-1)[0] = NAN
        assert grid.run(function, inputs | {key: x}, {"loss_type": "vespo"})[0].isnan()
        x[-1], x.view(-1)[0] = NAN, 0.5
        assert not inputs["mask"][-1].any()
        assert torch.isfinite(grid.run(function, inputs | {key: x}, {"loss_type": "vespo"})[0])


@LEVELS
@pytest.mark.parametrize("loss_type", ["grpo", "vespo"])
def test_scores_are_returned(loss_type: str, level: str, small_tiles: None) -> None:
    """What the loss read: detached, 0 where masked, with tiles that divide sequences and without gradients too."""
    inputs = make_linear_inputs()
    options = {"loss_type": loss_type, "importance_sampling_level": level, "backend": grid.BACKEND}
    head = {key: inputs[key] for key in ("hidden", "weight", "token_ids", "bias")}
    want = gcpo_kernels.linear_logprob(**head, return_entropy=True, backend=grid.BACKEND)
    inputs["hidden"].requires_grad_()
    loss, metrics, scores = gcpo_kernels.linear_gcpo_loss(**inputs, **options, return_scores=True)
    same, _ = gcpo_kernels.linear_gcpo_loss(**inputs, **options)
    assert torch.equal(loss, same)
    for got, x in zip(scores, want, strict=True):
        assert got.shape == (5, 7) and not got.requires_grad
        assert not got[~inputs["mask"]].any()
        torch.testing.assert_close(got, torch.where(inputs["mask"], x, 0.0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(metrics["entropy"], scores[1][inputs["mask"]].mean())
    for x in scores:  # what the caller gets, the caller may change
        x.fill_(NAN)
    loss.backward()
    assert torch.isfinite(inputs["hidden"].grad).all()
