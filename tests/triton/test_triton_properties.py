"""Properties of the kernels that hold for any input, in float32."""

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_triton_numerics import project

import gcpo_kernels
from gcpo_kernels.testing import make_representations, make_token_inputs, poison

quick = settings(
    deadline=None, max_examples=15, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow]
)
seeds = st.integers(0, 2**31 - 1)
baselines = st.sampled_from(["mean", "loo"])
similarities = st.sampled_from(["cosine", "gaussian"])
log_probs = st.floats(-60.0, 0.0, width=32) | st.just(-float("inf"))
NEAR = {"rtol": 1e-4, "atol": 1e-5}


@quick
@given(seeds, st.integers(1, 3), st.integers(2, 5), st.integers(1, 3), st.integers(1, 2), st.data())
def test_permuting_a_group_permutes_upsilon(
    seed: int, prompts: int, group: int, contexts: int, samples: int, data: st.DataObject
) -> None:
    """In every order of candidates, of prompts, of samples, and of the contexts after the first."""
    inputs = make_representations(prompts, group, contexts, samples, seed=seed)
    options = {"baseline": data.draw(baselines), "similarity": data.draw(similarities)}
    whole = gcpo_kernels.causal_weights(**inputs, **options)
    for dim, first in ((0, 0), (1, 0), (2, 1), (3, 0)):
        size = inputs["context_z"].shape[dim]
        order = list(range(first)) + data.draw(st.permutations(range(first, size)))
        moved = {key: x[(slice(None),) * dim + (order,)] for key, x in inputs.items() if key != "z" or dim < 2}
        got = gcpo_kernels.causal_weights(**({"z": inputs["z"]} | moved), **options)
        torch.testing.assert_close(got, whole[(slice(None),) * dim + (order,)] if dim < 2 else whole, **NEAR)


@quick
@given(seeds, st.floats(-3, 6), baselines, similarities, st.booleans())
def test_upsilon_does_not_depend_on_the_scale(
    seed: int, exponent: float, baseline: str, similarity: str, masked: bool
) -> None:
    inputs = make_representations(seed=seed)
    mask = inputs.pop("context_mask")
    options = {"baseline": baseline, "similarity": similarity, "context_mask": mask if masked else None}
    scaled = {key: x * 10.0**exponent for key, x in inputs.items()}
    torch.testing.assert_close(
        gcpo_kernels.causal_weights(**scaled, **options), gcpo_kernels.causal_weights(**inputs, **options), **NEAR
    )


@quick
@given(seeds, baselines)
def test_one_context_cancels(seed: int, baseline: str) -> None:
    """With L = 1, and with equal contexts, Zbar = Zprime, and Upsilon depends on z alone."""
    inputs = make_representations(contexts=1, seed=seed)
    z, context_z = inputs["z"], inputs["context_z"]
    want = gcpo_kernels.causal_weights(z, torch.zeros_like(context_z), baseline=baseline)
    for other in (context_z, context_z.expand(-1, -1, 4, -1, -1)):
        torch.testing.assert_close(gcpo_kernels.causal_weights(z, other, baseline=baseline), want, **NEAR)


@quick
@given(st.lists(st.lists(log_probs, min_size=4, max_size=4), min_size=1, max_size=8), st.floats(1e-12, 0.5))
def test_projection_is_a_probability(scores: list[list[float]], floor: float) -> None:
    x = torch.tensor(scores)
    for weights in (None, torch.tensor([0.2, 1.5, 0.0])):
        out, _ = project(x[:, 0].contiguous(), x[:, 1:], weights, floor)
        assert (out >= torch.log(torch.tensor(floor)) - 1e-5).all()
        assert (out <= 0).all()


@quick
@given(
    seeds,
    st.integers(1, 4),
    st.integers(1, 9),
    st.sampled_from(["grpo", "bnpo", "dr_grpo", "dapo"]),
    st.sampled_from(["token", "sequence"]),
)
def test_terms_of_weight_zero_change_nothing(seed: int, batch: int, tokens: int, loss_type: str, level: str) -> None:
    """kappa = 0 and beta = 0 are, bit for bit, the losses without contexts and without a reference."""
    inputs = make_token_inputs(batch, tokens, seed=seed) | {"causal_logp": None}
    options = {"loss_type": loss_type, "importance_sampling_level": level, "max_completion_length": 9}
    results = []
    for left_out in ((), ("context",), ("context", "query"), ("context", "query", "ref")):
        given_now = {key: None if key.startswith(left_out) else x for key, x in inputs.items()} if left_out else inputs
        logp = inputs["logp"].clone().requires_grad_()
        loss, _ = gcpo_kernels.gcpo_loss(**(given_now | {"logp": logp}), **options)
        loss.backward()
        results.append((loss.detach(), logp.grad))
    for loss, grad in results[1:]:
        assert torch.equal(loss, results[0][0])
        assert torch.equal(grad, results[0][1])


@quick
@given(seeds, st.integers(1, 9), st.sampled_from(["grpo", "bnpo", "dapo"]), st.sampled_from(["token", "sequence"]))
def test_padding_does_not_matter(seed: int, extra: int, loss_type: str, level: str) -> None:
    """More padding, full of NaN, and any order of sequences give the same loss."""
    inputs = make_token_inputs(4, 6, seed=seed)
    options = {"loss_type": loss_type, "importance_sampling_level": level, "beta": 0.1, "kappa": 0.1}
    loss, _ = gcpo_kernels.gcpo_loss(**inputs, **options)
    padded = {
        key: torch.cat([x, torch.zeros(4, extra, *x.shape[2:], dtype=x.dtype)], dim=1) if x.shape[:2] == (4, 6) else x
        for key, x in inputs.items()
    }
    other, _ = gcpo_kernels.gcpo_loss(**{key: x.flip(0) for key, x in poison(padded).items()}, **options)
    torch.testing.assert_close(loss, other, **NEAR)
