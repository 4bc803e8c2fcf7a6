"""The oracle, and the torch backend, against the equations in plain Python; gradients against finite differences."""

from math import log
from typing import Any

import grid
import pytest
import scalar
import torch

import gcpo_kernels
from gcpo_kernels import maths, reference
from gcpo_kernels.testing import make_linear_inputs, make_mask, make_representations, make_token_inputs
from gcpo_kernels.tokens import TokenInputs

SIZES = {"batch": 5, "tokens": 6, "contexts": 3}
BOTH = pytest.mark.parametrize("module", [reference, gcpo_kernels], ids=["oracle", "torch"])


def as_lists(inputs: dict[str, Any]) -> dict[str, Any]:
    """Arguments as nested lists, (B, T) or (B, T, L), weights (B, L)."""
    batch, tokens = inputs["mask"].shape
    out = {}
    for key, x in inputs.items():
        if x is not None and x.dim() == 1:
            x = x.expand(batch, -1) if key == "context_weights" else x.unsqueeze(1)
        if x is not None and key not in ("context_logp", "context_weights"):
            x = x.expand(batch, tokens)
        out[key] = None if x is None else x.tolist()
    return out


@BOTH
@pytest.mark.parametrize("case", grid.cases(), ids=grid.name)
def test_loss_is_the_equation(case: Any, module: Any) -> None:
    options, changes = case
    inputs = grid.change(make_token_inputs(**SIZES, dtype=torch.float64, seed=3), changes)
    loss, metrics, _ = grid.run("gcpo_loss", inputs, options, backend=None if module is reference else "torch")
    items = options.get("num_items_in_batch")
    items = items.item() if isinstance(items, torch.Tensor) else items
    lists = as_lists(inputs)
    lists["ratio_per_sequence"] = changes["importance_sampling_ratio"] in ("(B, 1)", "(B,)")
    want, want_metrics = scalar.loss(lists, options | {"num_items_in_batch": items})
    assert loss.item() == pytest.approx(want, rel=1e-12, abs=1e-14)
    assert set(metrics) == set(want_metrics)
    for key, value in want_metrics.items():
        assert metrics[key].item() == pytest.approx(value, rel=1e-6), key
        assert metrics[key].dtype == torch.float32
        assert not metrics[key].requires_grad


def test_inputs_reach_every_branch() -> None:
    """Both clip sides, per token and per sequence, the cap, and p' inside its range and outside."""
    inputs = make_token_inputs(8, 16, dtype=torch.float64)
    for level in ("token", "sequence"):
        _, metrics = reference.gcpo_loss(**inputs, importance_sampling_level=level, kappa=0.1, kl_clip=0.3)
        for key in ("clip_low", "clip_high", "proj_clamped", "kl_clipped", "kl_causal_clipped"):
            assert 0.02 < metrics[key] < 0.6, (level, key)
    assert ((inputs["logp"] - inputs["old_logp"]).exp() > 1.35).any()
    mask = inputs["mask"]
    assert mask[0].all()
    assert not mask[-1].any()
    assert any("01" in "".join(map(str, row.int().tolist())).strip("0") for row in mask), "no hole"


@BOTH
@pytest.mark.parametrize("head", grid.HEADS, ids=str)
def test_logprob_is_the_equation(head: dict[str, Any], module: Any) -> None:
    inputs = make_linear_inputs(2, 3, hidden=4, vocab=7, dtype=torch.float64)
    kept = {key: inputs[key] for key in ("hidden", "weight", "token_ids", "bias")} | head
    logp, entropy = module.linear_logprob(**kept, return_entropy=True)
    bias = None if kept.pop("bias") is None else inputs["bias"].tolist()
    options = {key: value for key, value in head.items() if key != "bias"}
    for b in range(2):
        for t in range(3):
            row, token = inputs["hidden"][b, t].tolist(), int(inputs["token_ids"][b, t])
            want = scalar.token_logprob(row, inputs["weight"].tolist(), bias, token, **options)
            assert (logp[b, t].item(), entropy[b, t].item()) == pytest.approx(want, rel=1e-12)


@BOTH
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("eps", [1e-4, 0.0])
def test_advantages_are_the_equation(scale: str, eps: float, module: Any) -> None:
    rewards = torch.tensor([1.0, 0.0, 0.25, 0.5, 0.5, 0.5, -3.0, 2.0, 2.5], dtype=torch.float64)
    ours = module.group_advantages(rewards, 3, scale=scale, eps=eps)
    assert ours.tolist() == pytest.approx(scalar.advantages(rewards.tolist(), 3, scale, eps), rel=1e-12)


@BOTH
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("similarity", ["cosine", "euclidean", "gaussian"])
@pytest.mark.parametrize("baseline", ["mean", "loo"])
def test_causal_weights_are_the_equation(baseline: str, similarity: str, masked: bool, module: Any) -> None:
    inputs = make_representations(dtype=torch.float64)
    mask = inputs["context_mask"] if masked else torch.ones_like(inputs["context_mask"])
    ours = module.causal_weights(
        inputs["z"],
        inputs["context_z"],
        alpha=1.5,
        baseline=baseline,
        similarity=similarity,
        context_mask=mask if masked else None,
    )
    for p in range(ours.shape[0]):
        arguments = (x[p].tolist() for x in (inputs["z"], inputs["context_z"], mask))
        want = scalar.upsilon(*arguments, 1.5, baseline, similarity)
        assert ours[p].tolist() == pytest.approx(want, rel=1e-12)


@BOTH
def test_leave_one_out_mean_is_the_equation(module: Any) -> None:
    z = make_representations(dtype=torch.float64)["z"]
    for i in range(z.shape[1]):
        others = [k for k in range(z.shape[1]) if k != i]
        torch.testing.assert_close(module.leave_one_out_mean(z)[:, i], z[:, others].mean(dim=1))


@BOTH
@pytest.mark.parametrize("at_query", [False, True])
@pytest.mark.parametrize("weights", [None, "(L,)", "(B, L)"])
def test_causal_reference_is_the_equation(weights: str | None, at_query: bool, module: Any) -> None:
    inputs = make_token_inputs(3, 4, 5, dtype=torch.float64, masked="none")
    all_weights = inputs["context_weights"] if weights else torch.full((3, 5), 0.2, dtype=torch.float64)
    all_weights = all_weights[:1].expand(3, -1) if weights == "(L,)" else all_weights
    ours = module.causal_reference_logprob(
        inputs["query_logp"],
        inputs["context_logp"],
        context_weights={None: None, "(L,)": all_weights[0], "(B, L)": all_weights}[weights],
        proj_floor=0.5,
        floor_at_query=at_query,
    )
    assert (ours < log(0.5) - 0.01).any() == at_query
    for b in range(3):
        for t in range(4):
            bs, shares = inputs["context_logp"][b, t].tolist(), all_weights[b].tolist()
            want, _ = scalar.projected(bs[0], bs, shares, inputs["query_logp"][b, t].item(), 0.5, at_query)
            assert ours[b, t].item() == pytest.approx(want, rel=1e-10, abs=1e-13)


# Finite differences. Random float64 inputs are nowhere near a kink: a difference quotient across one would fail.


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize(("delta", "kl_clip"), [(None, None), (1.35, None), (None, 0.3)])
@pytest.mark.parametrize("causal", [True, False])
def test_loss_gradients(level: str, delta: float | None, kl_clip: float | None, causal: bool) -> None:
    inputs = make_token_inputs(4, 5, 3, dtype=torch.float64, seed=1)
    logp, causal_logp = inputs.pop("logp").requires_grad_(), inputs.pop("causal_logp").requires_grad_()

    def function(logp: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        options = {"beta": 0.3, "kappa": 0.5, "delta": delta, "kl_clip": kl_clip, "importance_sampling_level": level}
        return gcpo_kernels.gcpo_loss(logp, **inputs, causal_logp=rest[0] if rest else None, **options)[0]

    assert torch.autograd.gradcheck(function, (logp, causal_logp) if causal else (logp,))


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("head", [{}, {"temperature": 0.8, "logit_scale": 1.4, "logit_softcap": 2.0}], ids=str)
def test_linear_loss_gradients(level: str, head: dict[str, Any], small_tiles: None) -> None:
    kl_clip = 0.3 if head else None
    inputs = make_linear_inputs(3, 5, 2, hidden=4, vocab=9, dtype=torch.float64, seed=2)
    names = ("hidden", "weight", "bias", "causal_logp")
    leaves = [inputs.pop(key).requires_grad_() for key in names]

    def function(*leaves: torch.Tensor) -> torch.Tensor:
        options = {"beta": 0.3, "kappa": 0.5, "delta": 1.5, "kl_clip": kl_clip, "importance_sampling_level": level}
        return gcpo_kernels.linear_gcpo_loss(**dict(zip(names, leaves, strict=True)), **inputs, **options, **head)[0]

    assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("head", grid.HEADS, ids=str)
def test_linear_logprob_gradients(head: dict[str, Any], small_tiles: None) -> None:
    inputs = make_linear_inputs(2, 4, hidden=4, vocab=9, dtype=torch.float64)
    leaves = [inputs[key].requires_grad_() for key in ("hidden", "weight", "bias")[: 2 if "bias" in head else 3]]

    def function(hidden: torch.Tensor, weight: torch.Tensor, *bias: torch.Tensor) -> Any:
        options = head | {"bias": bias[0] if bias else None}
        return gcpo_kernels.linear_logprob(hidden, weight, inputs["token_ids"], return_entropy=True, **options)

    assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("shape", [(5, 7), (2, 3, 7)])
def test_selective_logprob_gradients(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
    ids = torch.randint(0, 7, shape[:-1], generator=generator)

    def function(logits: torch.Tensor) -> Any:
        return gcpo_kernels.selective_logprob(logits, ids, temperature=0.7, return_entropy=True)

    assert torch.autograd.gradcheck(function, (logits,))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("similarity", ["cosine", "euclidean", "gaussian"])
@pytest.mark.parametrize("baseline", ["mean", "loo"])
def test_causal_weights_gradients(baseline: str, similarity: str, masked: bool) -> None:
    inputs = make_representations(2, 3, 3, 2, 4, dtype=torch.float64)
    mask = inputs["context_mask"] if masked else None

    def function(z: torch.Tensor, context_z: torch.Tensor) -> torch.Tensor:
        return gcpo_kernels.causal_weights(z, context_z, baseline=baseline, similarity=similarity, context_mask=mask)

    leaves = [inputs[key].requires_grad_() for key in ("z", "context_z")]
    assert torch.autograd.gradcheck(function, leaves)


def test_leave_one_out_mean_gradients() -> None:
    z = make_representations(2, 3, hidden=4, dtype=torch.float64)["z"].requires_grad_()
    assert torch.autograd.gradcheck(gcpo_kernels.leave_one_out_mean, (z,))


def test_on_policy_gradient_is_the_policy_gradient() -> None:
    """Without old_logp the ratio is 1 and its gradient the advantage's, which no finite difference can see."""
    inputs = make_token_inputs(4, 5, dtype=torch.float64)
    logp = inputs["logp"].requires_grad_()
    gcpo_kernels.gcpo_loss(logp, inputs["advantages"], inputs["mask"], loss_type="bnpo")[0].backward()
    want = -inputs["advantages"].unsqueeze(1) * inputs["mask"] / inputs["mask"].sum()
    torch.testing.assert_close(logp.grad, want)


@pytest.mark.parametrize("causal", [True, False])
def test_the_gradient_made_in_the_forward_is_autograds(causal: bool) -> None:
    """At `kl_clip` itself too, which no random input meets: log-ratios are 0, half of it, it and twice that."""
    logp = torch.zeros(7, dtype=torch.float64, requires_grad=True)
    d = 0.5 * torch.tensor([-2, -1, -0.5, 0, 0.5, 1, 2], dtype=torch.float64)
    causal_logp = torch.zeros_like(d).requires_grad_() if causal else None
    ones = torch.ones_like(d)
    inputs = TokenInputs(ones > 0, ones, ref_logp=d, causal_logp=causal_logp)
    options = gcpo_kernels.options.LossOptions(beta=0.7, kappa=1.3, kl_clip=0.5)
    leaves = [logp, causal_logp] if causal_logp is not None else [logp]
    total = maths.token_objective(logp, torch.zeros_like(d), d, inputs, options).sum()
    want = torch.autograd.grad(total, leaves)
    _, *got = maths.token_objective_gradient(logp.detach(), torch.zeros_like(d), d, inputs, options)
    for x, y in zip(want, got, strict=False):
        assert x.ne(0).tolist() == [False, True, True, False, True, True, False]
        torch.testing.assert_close(x, y, rtol=1e-12, atol=0)


@pytest.mark.parametrize("backend", [None, "torch"], ids=["oracle", "torch"])
def test_the_causal_target_is_a_constant(backend: str | None) -> None:
    """Without scores of the old policy, the query's are the policy's own; no gradient flows through them into p'."""
    inputs = make_token_inputs(dtype=torch.float64) | {"causal_logp": None, "old_logp": None, "query_logp": None}
    options = {"kappa": 0.5, "loss_type": "bnpo"}
    own = grid.run("gcpo_loss", inputs, options, backend=backend)
    given = grid.run("gcpo_loss", inputs | {"query_logp": inputs["logp"]}, options, backend=backend)
    assert torch.equal(own[0], given[0])
    assert own[2]["logp"].any()
    assert torch.equal(own[2]["logp"], given[2]["logp"])


def test_mask_kinds() -> None:
    assert make_mask(3, 4, "none").all()
    assert not make_mask(3, 4, "all").any()
    assert make_mask(0, 4).shape == (0, 4)
    assert make_mask(4, 0).shape == (4, 0)
