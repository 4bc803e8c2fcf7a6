"""Extremes: certain and impossible tokens, huge logits, padded vocabularies, p' at both ends, exact limits."""

from math import exp, log
from typing import Any

import grid
import pytest
import torch

import gcpo_kernels
from gcpo_kernels import maths, reference
from gcpo_kernels.testing import assert_close_to_truth, assert_gradient, make_linear_inputs, make_token_inputs

INF, NAN = float("inf"), float("nan")


def logits_of(kind: str, dtype: torch.dtype = torch.float32, rows: int = 6, vocab: int = 1000) -> torch.Tensor:
    x = torch.randn(rows, vocab, generator=torch.Generator().manual_seed(0))
    if kind == "confident":  # p of token 0 from 0.9 to 1 - 1e-12
        x[:, 0] = x[:, 1:].logsumexp(dim=1) + torch.linspace(2.0, 28.0, rows)
    if kind == "certain":
        x[:, 0] += 200.0
    if kind == "large":
        x += 1e4
    if kind == "negative":
        x -= 1e4
    if kind == "spread":
        x *= 1e3
    if kind == "equal":
        x[:] = -7.0
    if kind == "padded":
        x[:, 900:] = -INF
    if kind == "one left":
        x[:, 1:] = -INF
    return x.to(dtype)


KINDS = ("confident", "certain", "large", "negative", "spread", "equal", "padded", "one left")


@pytest.mark.hazard(8, 9)
@pytest.mark.parametrize("token", [0, 1, 899])
@pytest.mark.parametrize("kind", KINDS)
def test_selective_logprob(kind: str, token: int) -> None:
    """Finite where the truth is, never above 0, and the truth to float32 rounding; so are the gradients.
    Seen in verl#2656, flash-attention#1930."""
    logits, ids = logits_of(kind), torch.full((6,), token)
    leaves = [logits.clone().requires_grad_(), logits.double().requires_grad_(), logits.clone().requires_grad_()]
    outs = [
        function(x, ids, return_entropy=True)
        for function, x in zip(
            (gcpo_kernels.selective_logprob, reference.selective_logprob, reference.selective_logprob),
            leaves,
            strict=True,
        )
    ]
    (ours, entropy), (truth, true_entropy), (plain, plain_entropy) = outs
    assert (ours <= 0).all()
    assert (entropy >= -1e-6).all()
    finite = torch.isfinite(truth)
    assert torch.equal(torch.isfinite(ours), finite)
    assert_close_to_truth(ours[finite], truth[finite], plain[finite])
    assert_close_to_truth(entropy, true_entropy, plain_entropy)
    if not finite.all():  # an impossible token: -inf, and a gradient that pulls on it alone
        assert kind == "one left"
        return
    weights = torch.linspace(0.5, 2.0, 6)
    for out in outs:
        ((out[0] - 0.3 * out[1]) * weights).sum().backward()
    assert torch.isfinite(leaves[0].grad).all()
    assert_close_to_truth(leaves[0].grad, leaves[1].grad, leaves[2].grad)
    if kind == "padded":
        assert not leaves[0].grad[:, 900:].any()


@pytest.mark.hazard(8, 9)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("softcap", [None, 30.0])
def test_linear_logprob(kind: str, softcap: float | None, small_tiles: None) -> None:
    """The same through the output layer: the offsets come with the bias, padding is a bias of -inf.
    Seen in unsloth#10616, flash-attention#1930."""
    row = logits_of(kind, rows=1, vocab=60)[0]
    row[-4:] = -INF if kind == "padded" else row[-4:]
    hidden = torch.randn(9, 5, generator=torch.Generator().manual_seed(1)) * 0.1
    weight = torch.randn(60, 5, generator=torch.Generator().manual_seed(2)) * 0.1
    ids = torch.zeros(9, dtype=torch.int64)
    results = []
    for dtype, function in ((torch.float32, gcpo_kernels.linear_logprob), (torch.float64, reference.linear_logprob)):
        leaves = [x.detach().clone().to(dtype).requires_grad_() for x in (hidden, weight, row)]
        logp, entropy = function(*leaves[:2], ids, bias=leaves[2], return_entropy=True, logit_softcap=softcap)
        (logp * torch.linspace(0.5, 2, 9) + 0.1 * entropy).sum().backward()
        results.append((logp.detach(), entropy.detach(), *(x.grad for x in leaves)))
    assert (results[0][0] <= 0).all()
    for ours, truth in zip(*results, strict=True):
        assert torch.isfinite(ours).all()
        # A logit of 1e4 is known to 1e-3 in float32, whoever computes it; without such offsets, rounding remains.
        absolute = 2e-2 if kind in ("large", "negative", "spread") else 0.0
        torch.testing.assert_close(ours.double(), truth, rtol=1e-4, atol=absolute or 1e-6)


@pytest.mark.hazard(15)
@pytest.mark.parametrize("gap", [10.0, 14.0, 17.0, 20.0, 24.0])
def test_confident_tokens_keep_a_gradient(gap: float) -> None:
    """As p -> 1 the gradients in the other logits keep their relative precision, the token's own a few roundings.
    Seen in Liger#1419."""
    logits = torch.zeros(1, 8)
    logits[0, 0] = gap
    ours, truth = logits.clone().requires_grad_(), logits.double().requires_grad_()
    for function, x in ((gcpo_kernels.selective_logprob, ours), (reference.selective_logprob, truth)):
        function(x, torch.tensor([0])).sum().backward()
    torch.testing.assert_close(ours.grad[0, 1:].double(), truth.grad[0, 1:], rtol=1e-5, atol=0)
    torch.testing.assert_close(ours.grad[0, 0].double(), truth.grad[0, 0], rtol=1e-5, atol=5e-7)


@pytest.mark.hazard(15)
def test_error_does_not_grow_with_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weight gradients accumulate in float32: 400 tiles of bfloat16 operands end as exact as one (Liger#830)."""
    from gcpo_kernels import torch_backend

    inputs = make_linear_inputs(20, 20, 1, 8, 50, dtype=torch.bfloat16, masked="none")
    truth = grid.run("linear_gcpo_loss", {k: x.double() if x.is_floating_point() else x for k, x in inputs.items()}, {})
    for rows in (400, 1):
        monkeypatch.setattr(torch_backend, "_TILE_BYTES", {"cpu": 0})
        monkeypatch.setattr(torch_backend, "_MIN_TILE_ROWS", {"cpu": rows})
        grads = grid.run("linear_gcpo_loss", inputs, {})[2]
        for key in ("hidden", "weight", "bias"):
            assert_gradient(grads[key], truth[2][key], what=f"{key}, tiles of {rows}")


# ---------------------------------------------------------------------------------------------------------------------
# p'
# ---------------------------------------------------------------------------------------------------------------------


def project(query: float, contexts: list[float], floor: float = 1e-6, dtype: torch.dtype = torch.float32) -> float:
    q, c = torch.tensor([[query]], dtype=dtype), torch.tensor([[contexts]], dtype=dtype)
    return gcpo_kernels.causal_reference_logprob(q, c, proj_floor=floor).item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_projection_at_extremes(dtype: torch.dtype) -> None:
    floor = log(1e-6)
    tiny = 1e-30

    def check(got: float, want: float) -> None:
        assert got == pytest.approx(want, rel=1e-6, abs=1e-7)

    check(project(-INF, [-INF, -INF], dtype=dtype), floor)
    check(project(-1e4, [-1e4, -1e4], dtype=dtype), floor)
    check(project(-50.0, [-50.0, -51.0], tiny, dtype), -50.0 + log(2 - (1 + 2.718281828459045**-1) / 2))
    check(project(-60.0, [-INF, -INF], tiny, dtype), -60.0)
    check(project(-1.0, [-INF, -INF, -INF], dtype=dtype), -1.0)
    check(project(0.0, [0.0, -INF], dtype=dtype), 0.0)  # 1 - 1/2 + 1, clamped to 1
    check(project(-1e-3, [-20.0, 0.0], dtype=dtype), log(2.718281828459045**-1e-3 - 0.5 + 0.5 * 2.0611536e-09))
    check(project(-20.0, [-20.0, 0.0], dtype=dtype), floor)  # below 0
    assert project(NAN, [-1.0, -1.0], dtype=dtype) != project(NAN, [-1.0, -1.0], dtype=dtype)
    assert project(-1.0, [-1.0, NAN], dtype=dtype) != project(-1.0, [-1.0, NAN], dtype=dtype)


@pytest.mark.parametrize("scale", [1.0, 5.0, 13.0])
def test_projection_keeps_relative_precision(scale: float) -> None:
    """float32 log p' against float64, down to probabilities of 1e-20."""
    generator = torch.Generator().manual_seed(0)
    query = -scale * torch.rand(64, 64, generator=generator).neg().exp().mul(3)
    contexts = (query.unsqueeze(-1) + 0.5 * torch.randn(64, 64, 4, generator=generator)).clamp(max=-1e-4)
    ours = gcpo_kernels.causal_reference_logprob(query, contexts, proj_floor=1e-30)
    truth = gcpo_kernels.causal_reference_logprob(query.double(), contexts.double(), proj_floor=1e-30)
    kept = (truth - query > -1.0) & (truth < 0)  # not where the terms cancel
    assert kept.float().mean() > 0.5
    torch.testing.assert_close(ours[kept].double(), truth[kept], rtol=1e-6, atol=1e-6)


def test_a_projection_that_cancels_is_known_to_a_rounding_of_its_terms() -> None:
    """Contexts nearly certain of a token, and nearly agreeing, of which the query thinks little: p' is a difference."""
    query, contexts = torch.tensor([[-20.0]]), torch.tensor([[[-1e-4, -1e-3, -1e-4]]])
    ours = gcpo_kernels.causal_reference_logprob(query, contexts).double().exp()
    truth = gcpo_kernels.causal_reference_logprob(query.double(), contexts.double()).exp()
    assert 2.9e-4 < truth < 3.1e-4
    assert abs(ours - truth) < 2 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_one_context_is_the_query(dtype: torch.dtype) -> None:
    """With L = 1 the first two terms cancel: log p' is query_logp."""
    query = -torch.linspace(0.0, 13.0, 200).view(4, 50).to(dtype)
    for contexts in (query.flip(0), torch.zeros_like(query), torch.full_like(query, -INF)):
        ours = gcpo_kernels.causal_reference_logprob(query, contexts.unsqueeze(-1))
        assert ours.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        torch.testing.assert_close(ours, query.to(ours.dtype), rtol=1e-6, atol=1e-6)
    # Exactly, where no other probability is larger.
    assert torch.equal(gcpo_kernels.causal_reference_logprob(query, query.unsqueeze(-1) - 1), query.to(ours.dtype))


def test_clamped_share() -> None:
    """Of four tokens one falls below the floor, one rises above 1, one is masked."""
    query = torch.tensor([[-1.0, -20.0, -0.01, -20.0]])
    context = torch.tensor([[[-1.0, -1.0], [-20.0, -0.1], [-0.01, -5.0], [-20.0, -0.1]]])
    mask = torch.tensor([[1, 1, 1, 0]])
    for floor, share in ((1e-6, 2 / 3), (0.5, 1.0)):
        _, metrics = gcpo_kernels.gcpo_loss(
            query.clone(), torch.ones(1), mask, query_logp=query, context_logp=context, kappa=0.1, proj_floor=floor
        )
        assert metrics["proj_clamped"].item() == pytest.approx(share)


def test_k3_is_not_negative() -> None:
    d = torch.cat([s * torch.logspace(-12, 1.9, 20001, dtype=torch.float64) for s in (-1, 1)])
    d = torch.cat([d, torch.zeros(1, dtype=torch.float64)])
    for dtype in (torch.float32, torch.float64):
        ours = maths.k3(d.to(dtype))
        assert (ours >= 0).all(), f"{dtype}: {ours.min()}"
    torch.testing.assert_close(maths.k3(d.float()).double(), maths.k3(d.float().double()), rtol=1e-3, atol=1e-9)


# ---------------------------------------------------------------------------------------------------------------------
# Limits that hold exactly
# ---------------------------------------------------------------------------------------------------------------------


def same(*pairs: Any) -> None:
    (loss, _, grads), (other, _, other_grads) = pairs
    assert torch.equal(loss, other)
    for key in grads.keys() & other_grads.keys():
        assert torch.equal(grads[key], other_grads[key]), key


@pytest.mark.parametrize("loss_type", [*grid.LOSSES, *grid.OTHER_LOSSES])
@pytest.mark.parametrize("function", ["gcpo_loss", "linear_gcpo_loss"])
def test_limits(function: str, loss_type: str) -> None:
    """Options at their neutral value give, bit for bit, the loss without them."""
    inputs = {"gcpo_loss": make_token_inputs, "linear_gcpo_loss": make_linear_inputs}[function]()
    inputs["causal_logp"] = None
    options = {"loss_type": loss_type, "max_completion_length": 8}
    grpo = {key: None if key.startswith(("context", "query")) else x for key, x in inputs.items()}
    plain = grid.run(function, grpo, options)
    same(grid.run(function, inputs, options | {"kappa": 0.0}), plain)
    same(grid.run(function, grpo | {"ref_logp": None}, options), plain)
    same(grid.run(function, inputs, options | {"delta": 1e30}), plain)
    both = options | {"beta": 0.04, "kappa": 0.1}
    same(grid.run(function, inputs, both | {"kl_clip": 1e30}), grid.run(function, inputs, both | {"kl_clip": None}))
    ones = torch.ones_like(inputs["importance_sampling_ratio"])
    same(grid.run(function, grpo | {"policy_weights": ones}, options), plain)
    same(grid.run(function, inputs | {"kappa_weights": ones}, both), grid.run(function, inputs, both))
    none = {"importance_sampling_ratio": None}
    same(
        grid.run(function, grpo | {"importance_sampling_ratio": ones}, options),
        grid.run(function, grpo | none, options),
    )
    same(grid.run(function, grpo | {"advantages": inputs["advantages"].unsqueeze(1).expand(5, 7)}, options), plain)
    same(
        grid.run(function, inputs | {"context_weights": None}, options | {"kappa": 0.1}),
        grid.run(function, inputs | {"context_weights": torch.full((3,), 1 / 3)}, options | {"kappa": 0.1}),
    )
    query = inputs | {"query_logp": inputs["old_logp"]}
    same(
        grid.run(function, query, options | {"kappa": 0.1}),
        grid.run(function, inputs | {"query_logp": None}, options | {"kappa": 0.1}),
    )
    if loss_type == "dapo":
        same(grid.run(function, grpo, options | {"num_items_in_batch": int(inputs["mask"].sum())}), plain)
        same(plain, grid.run(function, grpo, {"loss_type": "bnpo"}))
    if loss_type == "luspo":
        same(plain, grid.run(function, grpo, {"loss_type": "dr_grpo", "max_completion_length": 1}))


def test_on_policy_loss_is_minus_the_advantage() -> None:
    inputs = make_token_inputs(masked="none")
    loss, metrics = gcpo_kernels.gcpo_loss(inputs["logp"], inputs["advantages"], inputs["mask"])
    torch.testing.assert_close(loss, -inputs["advantages"].mean())
    assert set(metrics) == {"kl", "kl_causal", "clip_low", "clip_high", "proj_clamped"}
    assert not any(metrics.values())


def kl_terms(
    which: str, ratios: list[float], **more: Any
) -> tuple[torch.Tensor, dict[str, torch.Tensor], torch.Tensor]:
    """Loss, metrics and gradient of one of the two KL terms alone, summed over tokens of those log-ratios."""
    d = torch.tensor([ratios])
    base = torch.full_like(d, -1.0)
    leaf = (base - d if which == "kl_causal" else base).requires_grad_()
    options: dict[str, Any] = {"beta": 1.0, "ref_logp": base + d}
    if which == "kl_causal":  # one context: p' is the query's probability
        options = {"kappa": 1.0, "query_logp": base, "context_logp": base[..., None] - 1.0, "causal_logp": leaf}
    logp = leaf if which == "kl" else base
    options |= {"loss_type": "dapo", "num_items_in_batch": 1, **more}
    loss, metrics = gcpo_kernels.gcpo_loss(logp, torch.zeros(1), options.pop("mask", torch.ones_like(d)), **options)
    loss.backward()
    assert leaf.grad is not None
    return loss.detach(), metrics, leaf.grad[0]


@pytest.mark.parametrize("which", ["kl", "kl_causal"])
def test_kl_clip(which: str) -> None:
    """Within the bound and at it k3 as it is; beyond, that of the bound, and no gradient, however large the ratio."""
    ratios = [-0.75, -0.5, -0.25, 0.0, 0.25, 0.5, 0.75, 9.0, 100.0]
    bounded = [min(max(d, -0.5), 0.5) for d in ratios]
    loss, metrics, grad = kl_terms(which, ratios, kl_clip=0.5)
    assert loss.item() == pytest.approx(sum(exp(d) - d - 1 for d in bounded), rel=1e-6)
    want = [1 - exp(d) if abs(d) <= 0.5 else 0.0 for d in ratios]
    assert grad.tolist() == pytest.approx(want, rel=1e-6)
    assert metrics[which].item() == pytest.approx(loss.item() / 9, rel=1e-6)
    other = {"kl": "kl_causal", "kl_causal": "kl"}[which]
    assert (metrics[f"{which}_clipped"].item(), metrics[f"{other}_clipped"].item()) == (pytest.approx(4 / 9), 0.0)


@pytest.mark.parametrize("which", ["kl", "kl_causal"])
def test_kl_clip_hides_nothing_but_the_size(which: str) -> None:
    """An infinite log-ratio is a large one; NaN stays, in the loss and in its token's gradient, unless it is masked."""
    ratios = [0.25, INF if which == "kl_causal" else -INF]
    loss, metrics, grad = kl_terms(which, ratios, kl_clip=0.5)
    assert torch.isfinite(loss)
    assert grad[0] != 0 and grad[1] == 0
    assert metrics[f"{which}_clipped"] == 0.5
    loss, metrics, grad = kl_terms(which, [0.25, NAN], kl_clip=0.5)
    assert loss.isnan() and grad[1].isnan()
    assert grad[0] == pytest.approx(1 - exp(0.25), rel=1e-6)
    loss, metrics, grad = kl_terms(which, [0.25, NAN], kl_clip=0.5, mask=torch.tensor([[True, False]]))
    assert loss.item() == pytest.approx(exp(0.25) - 1.25, rel=1e-6)
    assert metrics[f"{which}_clipped"] == 0 and grad[1] == 0


def test_clipped_tokens_count_whatever_their_correction() -> None:
    """The sampler's correction scales a token's loss, to nothing at 0: whether it is clipped is not its business."""
    logp, advantages = torch.tensor([[1.0, 95.0, -1.0]] * 2).requires_grad_(), torch.tensor([1.0, -1.0])
    for correction in (1.0, 0.0):
        for delta in (None, 1.5):
            loss, metrics = gcpo_kernels.gcpo_loss(
                logp,
                advantages,
                torch.ones(2, 3),
                old_logp=torch.zeros(2, 3),
                importance_sampling_ratio=torch.full((2, 3), correction),
                delta=delta,
            )
            assert metrics["clip_high"].item() == pytest.approx(2 / 6)
            assert metrics["clip_low"].item() == pytest.approx(1 / 6)
    assert loss == 0
    loss.backward()
    assert logp.grad is not None and not logp.grad.any()


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_on_policy_ratios_hide_nothing(level: str) -> None:
    """Without old_logp the ratio is 1, but not that of a NaN."""
    logp = torch.full((2, 3), -1.0)
    logp[1, 1] = NAN
    losses = [
        gcpo_kernels.gcpo_loss(row[None], torch.ones(1), torch.ones(1, 3), importance_sampling_level=level)[0]
        for row in logp
    ]
    assert losses[0] == -1
    assert losses[1].isnan()


@pytest.mark.parametrize("name", ["z", "context_z"])
def test_causal_weights_hide_nothing(name: str) -> None:
    """NaN and inf come out as NaN for the prompt they are in, and for no other; a zero vector gives 0."""
    for value in (NAN, INF, -INF):
        inputs = {"z": torch.randn(2, 3, 4), "context_z": torch.randn(2, 3, 2, 2, 4)}
        inputs[name][1, 0] = value
        out = gcpo_kernels.causal_weights(**inputs)
        assert torch.isfinite(out[0]).all()
        assert out[1, 0].isnan()
        # A sample that cancels against itself is there all the same; one that is masked is not.
        for mask in (None, torch.ones(2, 3, 1, 2), torch.tensor([1.0, 0.0]).expand(2, 3, 1, 2)):
            only = {**inputs, "context_z": inputs["context_z"][:, :, :1]}
            assert gcpo_kernels.causal_weights(**only, context_mask=mask)[1, 0].isnan()
        if name == "context_z":
            no_first = torch.tensor([[0.0], [1.0]]).expand(2, 3, 2, 2)
            assert torch.isfinite(gcpo_kernels.causal_weights(**inputs, context_mask=no_first)).all()
    z = torch.randn(2, 3, 4)
    z[0, 1] = 0
    out = gcpo_kernels.causal_weights(z.requires_grad_(), torch.randn(2, 3, 2, 2, 4))
    assert out[0, 1] == 0
    out.sum().backward()
    assert torch.isfinite(z.grad).all()
    assert gcpo_kernels.causal_weights(torch.zeros(1, 2, 4), torch.zeros(1, 2, 1, 1, 4)).eq(0).all()


@pytest.mark.parametrize("similarity", ["cosine", "euclidean", "gaussian"])
def test_equal_candidates(similarity: str) -> None:
    """The cosine of a vector with itself rounds to more than 1: the weight never does."""
    z = torch.randn(500, 1, 17, generator=torch.Generator().manual_seed(0)).expand(-1, 3, -1)
    out = gcpo_kernels.causal_weights(z, torch.zeros(500, 3, 1, 1, 17), alpha=1.0, similarity=similarity)
    assert (out <= 1).all()
    torch.testing.assert_close(out, torch.ones(500, 3), rtol=0, atol=2e-3 if similarity == "euclidean" else 1e-6)


def test_almost_parallel_vectors_keep_a_gradient() -> None:
    """Their cosine rounds to 1 or past it, and pulls z towards its target all the same."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(200, 1, 8, generator=generator)
    context_z = 1e-3 * torch.randn(200, 1, 2, 1, 8, generator=generator)
    grads = []
    for module, dtype in ((gcpo_kernels, torch.float32), (reference, torch.float64)):
        leaf = context_z.detach().to(dtype).requires_grad_()
        module.causal_weights(z.to(dtype), leaf).sum().backward()
        grads.append(leaf.grad)
    assert grads[1].abs().amax(dim=-1).min() > 5e-6
    torch.testing.assert_close(grads[0].double(), grads[1], rtol=0, atol=2e-6)


def test_one_candidate() -> None:
    z = torch.randn(2, 1, 4)
    context_z = torch.randn(2, 1, 1, 1, 4)
    torch.testing.assert_close(gcpo_kernels.causal_weights(z, context_z), torch.full((2, 1), 2.0))
    assert gcpo_kernels.causal_weights(z, context_z, baseline="loo").isnan().all()
    assert gcpo_kernels.leave_one_out_mean(z).isnan().all()
    assert not gcpo_kernels.group_advantages(torch.randn(4), 1).any()
