"""Properties that hold for any input: symmetries, bounds and invariances."""

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import gcpo_kernels
from gcpo_kernels.testing import make_representations, make_token_inputs, poison

quick = settings(
    deadline=None, max_examples=25, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow]
)
seeds = st.integers(0, 2**31 - 1)
baselines = st.sampled_from(["mean", "loo"])
similarities = st.sampled_from(["cosine", "euclidean", "gaussian"])
log_probs = st.floats(-60.0, 0.0, width=32) | st.just(-float("inf"))
rewards = st.floats(-100.0, 100.0, width=32)


@quick
@given(seeds, st.integers(1, 4), st.integers(2, 7), st.integers(1, 4), st.integers(1, 3), st.data())
def test_permuting_a_group_permutes_upsilon(
    seed: int, prompts: int, group: int, contexts: int, samples: int, data: st.DataObject
) -> None:
    """In every order of candidates, of prompts, of samples, and of the contexts after the first."""
    inputs = make_representations(prompts, group, contexts, samples, dtype=torch.float64, seed=seed)
    options = {"baseline": data.draw(baselines), "similarity": data.draw(similarities)}
    whole = gcpo_kernels.causal_weights(**inputs, **options)
    for dim, first in ((0, 0), (1, 0), (2, 1), (3, 0)):
        size = inputs["context_z"].shape[dim]
        order = list(range(first)) + data.draw(st.permutations(range(first, size)))
        moved = {key: x[(slice(None),) * dim + (order,)] for key, x in inputs.items() if key != "z" or dim < 2}
        got = gcpo_kernels.causal_weights(**({"z": inputs["z"]} | moved), **options)
        want = whole[(slice(None),) * dim + (order,)] if dim < 2 else whole
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


@quick
@given(seeds, st.floats(-5, 5, width=32), baselines, similarities, st.floats(-6, 6), st.integers(1, 8))
def test_upsilon_is_bounded(
    seed: int, alpha: float, baseline: str, similarity: str, exponent: float, hidden: int
) -> None:
    inputs = make_representations(2, 5, hidden=hidden, seed=seed)
    inputs |= {key: inputs[key] * 10.0**exponent for key in ("z", "context_z")}
    out = gcpo_kernels.causal_weights(**inputs, alpha=alpha, baseline=baseline, similarity=similarity)
    assert (out.abs() <= abs(alpha)).all()
    if similarity != "cosine":
        assert (out * (1 if alpha >= 0 else -1) >= 0).all()


@quick
@given(seeds, st.floats(-3, 6), baselines, similarities)
def test_upsilon_does_not_depend_on_the_scale(seed: int, exponent: float, baseline: str, similarity: str) -> None:
    inputs = make_representations(dtype=torch.float64, seed=seed)
    options = {"baseline": baseline, "similarity": similarity, "context_mask": inputs.pop("context_mask")}
    scaled = {key: x * 10.0**exponent for key, x in inputs.items()}
    out = gcpo_kernels.causal_weights(**inputs, **options)
    torch.testing.assert_close(gcpo_kernels.causal_weights(**scaled, **options), out, rtol=1e-6, atol=1e-9)


@quick
@given(seeds, baselines)
def test_one_context_cancels(seed: int, baseline: str) -> None:
    """With L = 1, and with equal contexts, Zbar = Zprime, and Upsilon depends on z alone."""
    inputs = make_representations(contexts=1, dtype=torch.float64, seed=seed)
    z, context_z = inputs["z"], inputs["context_z"]
    want = gcpo_kernels.causal_weights(z, torch.zeros_like(context_z), baseline=baseline)
    for other in (context_z, context_z.expand(-1, -1, 4, -1, -1)):
        torch.testing.assert_close(gcpo_kernels.causal_weights(z, other, baseline=baseline), want)


@quick
@given(seeds, st.floats(-3, 3))
def test_adding_to_all_contexts_changes_nothing(seed: int, shift: float) -> None:
    """Zbar - Zprime is a difference between contexts."""
    inputs = make_representations(dtype=torch.float64, seed=seed)
    moved = gcpo_kernels.causal_weights(inputs["z"], inputs["context_z"] + shift)
    torch.testing.assert_close(moved, gcpo_kernels.causal_weights(inputs["z"], inputs["context_z"]))


@quick
@given(st.lists(log_probs, min_size=2, max_size=6), st.floats(1e-12, 0.5), st.sampled_from(["float32", "float64"]))
def test_projection_is_a_probability(scores: list[float], floor: float, dtype: str) -> None:
    query, *contexts = torch.tensor(scores, dtype=getattr(torch, dtype)).unbind()
    out = gcpo_kernels.causal_reference_logprob(
        query.view(1, 1), torch.stack(contexts).view(1, 1, -1), proj_floor=floor
    )
    assert torch.log(torch.tensor(floor, dtype=out.dtype)) - 1e-5 <= out.item() <= 0


@quick
@given(seeds, st.floats(1e-3, 2.0), st.floats(0, 2.0))
def test_k3_terms_are_not_negative(seed: int, scale: float, shift: float) -> None:
    inputs = make_token_inputs(3, 9, seed=seed)
    inputs["ref_logp"] = inputs["logp"] + scale * (inputs["ref_logp"] - inputs["logp"]) - shift
    _, metrics = gcpo_kernels.gcpo_loss(**inputs)
    assert metrics["kl"] >= 0
    assert metrics["kl_causal"] >= 0
    assert 0 <= metrics["clip_low"] + metrics["clip_high"] <= 1
    assert 0 <= metrics["proj_clamped"] <= 1


@quick
@given(seeds, st.sampled_from(["grpo", "bnpo", "dapo"]), st.sampled_from(["token", "sequence"]), st.data())
def test_order_of_sequences_does_not_matter(seed: int, loss_type: str, level: str, data: st.DataObject) -> None:
    inputs = make_token_inputs(6, 5, dtype=torch.float64, seed=seed)
    order = data.draw(st.permutations(range(6)))
    options = {"loss_type": loss_type, "importance_sampling_level": level, "beta": 0.1, "kappa": 0.1}
    loss, _ = gcpo_kernels.gcpo_loss(**inputs, **options)
    other, _ = gcpo_kernels.gcpo_loss(**{key: x[order] for key, x in inputs.items()}, **options)
    torch.testing.assert_close(loss, other)


@pytest.mark.hazard(28)
@quick
@given(seeds, st.integers(1, 9), st.sampled_from(["grpo", "bnpo", "dapo"]), st.sampled_from(["token", "sequence"]))
def test_padding_does_not_matter(seed: int, extra: int, loss_type: str, level: str) -> None:
    """More padding, full of NaN, gives the same loss (trl#6654)."""
    inputs = make_token_inputs(4, 6, dtype=torch.float64, seed=seed)
    options = {"loss_type": loss_type, "importance_sampling_level": level, "beta": 0.1, "kappa": 0.1}
    loss, _ = gcpo_kernels.gcpo_loss(**inputs, **options)
    padded = {
        key: torch.cat([x, torch.zeros(4, extra, *x.shape[2:], dtype=x.dtype)], dim=1) if x.shape[:2] == (4, 6) else x
        for key, x in inputs.items()
    }
    other, _ = gcpo_kernels.gcpo_loss(**poison(padded), **options)
    torch.testing.assert_close(loss, other)


@quick
@given(st.lists(rewards, min_size=4, max_size=4), st.floats(-50, 50), st.sampled_from(["group", "batch", "none"]))
def test_shifting_rewards_changes_nothing(values: list[float], shift: float, scale: str) -> None:
    x = torch.tensor(values * 2, dtype=torch.float64)
    x[4:] *= 2
    ours = gcpo_kernels.group_advantages(x, 4, scale=scale)
    # Shifting rounds: rewards that differ by less than that may become equal.
    assume(len({*values}) == 1 or min(abs(a - b) for a in values for b in values if a != b) > 1e-6)
    torch.testing.assert_close(gcpo_kernels.group_advantages(x + shift, 4, scale=scale), ours, rtol=1e-4, atol=1e-6)


@pytest.mark.hazard(27)
@quick
@given(rewards, st.integers(1, 9), st.sampled_from(["group", "batch", "none"]), st.booleans())
def test_equal_rewards_give_exactly_zero(value: float, group: int, scale: str, missing: bool) -> None:
    """Although their rounded mean may differ from them; the other group is not affected (trl#5588)."""
    x = torch.tensor([value] * group + [float(k) for k in range(group)])
    if missing and group > 1:
        x[0] = torch.nan
    out = gcpo_kernels.group_advantages(x, group, scale=scale)
    assert not out[:group].any()
    assert group == 1 or out[group:].any()
    assert torch.isfinite(out).all()


@pytest.mark.parametrize("size", [3, 7, 10])
def test_tenths(size: int) -> None:
    """[0.1] * 3 has a float32 mean that is not 0.1."""
    assert not gcpo_kernels.group_advantages(torch.full((size,), 0.1), size).any()
    assert not gcpo_kernels.group_advantages(torch.full((size,), 1e6 + 0.1), size, eps=0.0).any()
