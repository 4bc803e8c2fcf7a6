"""`kl_target`: what the second KL term pulls to, and how that goes with the advantages."""

import numpy as np
import pytest
import torch
from scripted_policy import scores_of
from test_causal_step import CANDIDATES, LENGTH, context_of, rollout_of, step_of
from test_own_loss import OWN, TRL, off_policy
from test_trainer_causal import first_batch, make_trainer
from tiny_policy import save_policy

from gcpo import CausalOptions
from gcpo.causal.loss import causal_kl_loss, mean_pull, pulling_to
from gcpo.causal.options import KL_TARGETS
from gcpo.causal.port import KLTerms
from gcpo.kl_terms import _correlation
from gcpo_kernels import gcpo_loss, maths

pytestmark = pytest.mark.filterwarnings("ignore:`share_prefix` needs")
OTHERS = ("context", "ensemble")
MASK = torch.tensor([[t < len(y) for t in range(LENGTH)] for y in CANDIDATES])
QUERY = -torch.rand(8, LENGTH, generator=torch.Generator().manual_seed(1)) - 0.5


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return save_policy(tmp_path_factory.mktemp("policy"))


def target_of(terms: KLTerms, floor: float = 1e-6) -> torch.Tensor:
    """(B, T): log of what a loss makes of the terms."""
    weights = terms.context_weights.unsqueeze(1)
    return maths.project(terms.query_logp, terms.context_logp, weights, floor)[0]


# ---------------------------------------------------------------------------------------------------------------------
# Without a model
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", KL_TARGETS)
def test_the_target_by_hand(target):
    """Two prompts; of the second one's three colliders two count."""
    _, step = step_of(kl_target=target, estimator="none")
    terms = step.terms(rollout_of(), LENGTH, QUERY).kl
    found = target_of(terms)
    for k, y in enumerate(CANDIDATES):
        p, i = divmod(k, 4)
        count = 3 if p == 0 else 2
        under = torch.stack([scores_of(context_of(p, i, l), y)[0].double().exp() for l in range(count)])
        query = QUERY[k, : len(y)].double().exp()
        wanted = {
            "projection": (under[0] - under.mean(dim=0) + query).clamp(1e-6, 1.0),
            "context": under[0],
            "ensemble": under.mean(dim=0),
        }[target]
        torch.testing.assert_close(found[k, : len(y)].double().exp(), wanted, atol=1e-6, rtol=1e-5)
    # What the term adds is 0 where the policy is there already, and nowhere else.
    for shift in (0.0, -0.2):
        loss, metrics = causal_kl_loss(terms, step.options, found + shift, MASK)
        wanted = step.options.kappa * (np.exp(-shift) + shift - 1)
        assert loss == pytest.approx(wanted, abs=1e-7) and metrics["tokens"] == MASK.sum()


@pytest.mark.parametrize("drawn", [{}, {"kl_fraction": 0.5, "num_kl_contexts": 1}])
def test_the_projection_is_made_of_what_was_scored(drawn):
    """By default nothing is touched."""
    _, step = step_of(estimator="none", **drawn)
    terms = step.terms(rollout_of(), LENGTH, QUERY).kl
    assert pulling_to("projection", terms) is terms and terms.query_logp is QUERY
    _, other = step_of(kl_target="context", **drawn)
    assert torch.equal(other.terms(rollout_of(), LENGTH, QUERY).kl.counted, terms.counted)  # the same rows are drawn


def test_one_context_is_all_that_is_scored():
    scripted, step = step_of(kl_target="context", kl_fraction=0.5)
    asked, score = [], scripted.score
    scripted.score = lambda x, y, length, tokens: asked.append((tokens, x)) or score(x, y, length, tokens)
    terms = step.terms(rollout_of(), LENGTH).kl
    (contexts,) = (x for tokens, x in asked if tokens == "scored_contexts")
    rows = terms.counted.nonzero().flatten().tolist()
    assert len(rows) == 4 and contexts == [context_of(*divmod(k, 4), 0) for k in rows]
    assert terms.context_logp.shape == (8, LENGTH, 1) and terms.scale == 2.0
    assert terms.context_weights[:, 0].tolist() == terms.counted.float().tolist()
    asked.clear()
    step_of(kl_target="context", policy={"score": scripted.score}, estimator="scored")[1].terms(rollout_of(), LENGTH)
    (contexts,) = (x for tokens, x in asked if tokens == "scored_contexts")
    assert len(contexts) == 4 * 3 + 4 * 2  # that estimator needs the others


def test_parallel_contexts_give_the_same_targets():
    changed = {"context_attention": "parallel", "policy": {"can_continue": True}}
    whole = step_of(**changed)[1].terms(rollout_of(), LENGTH).kl
    for target in OTHERS:
        terms = step_of(kl_target=target, **changed)[1].terms(rollout_of(), LENGTH).kl
        under = whole.context_logp.double().exp()
        mean = (under * whole.context_weights.double().unsqueeze(1)).sum(dim=-1)
        wanted = under[..., 0] if target == "context" else mean
        torch.testing.assert_close(target_of(terms)[MASK].double().exp(), wanted[MASK], atol=1e-6, rtol=1e-5)


def test_the_mean_of_drawn_contexts_is_that_of_all_in_expectation():
    _, step = step_of(kl_target="ensemble", num_kl_contexts=1)
    groups = step.terms(rollout_of(), LENGTH).groups
    found = [step.terms(rollout_of(), LENGTH, groups=groups, seed=seed).kl for seed in range(64)]
    by_value = {tuple(target_of(terms)[0, :2].tolist()) for terms in found}
    assert len(by_value) == 2  # one of two others stands for both
    under = [scores_of(context_of(0, 0, l), CANDIDATES[0])[0][:2].double().exp() for l in range(3)]
    torch.testing.assert_close(
        torch.tensor(sorted(by_value)).double().exp().mean(dim=0), torch.stack(under).mean(dim=0), atol=1e-6, rtol=1e-5
    )


def test_what_is_not_counted_and_what_has_no_weight_may_be_anything():
    context = torch.tensor([[[-1.0, -2.0, torch.nan]], [[torch.nan, torch.nan, torch.nan]]])
    weights = torch.tensor([[0.25, 0.75, 0.0], [0.0, 0.0, 0.0]])
    terms = KLTerms(context, weights, torch.tensor([True, False]), 2.0)
    for target, wanted in (("context", -1.0), ("ensemble", np.log(0.25 * np.exp(-1) + 0.75 * np.exp(-2)))):
        made = pulling_to(target, terms)
        assert made.query_logp[:, 0].tolist() == pytest.approx([wanted, 0.0]) and made.context_weights[1] == 0
        logp = torch.tensor([[-1.5], [-1.5]], requires_grad=True)
        loss, metrics = causal_kl_loss(made, CausalOptions(kappa=1.0), logp, torch.ones(2, 1), loss_type="dapo")
        loss.backward()
        assert metrics["tokens"] == 1 and logp.grad[1] == 0
        # k3's gradient, 1 - p' / pi, over two tokens and scaled by two.
        assert logp.grad[0].item() == pytest.approx(1 - np.exp(wanted + 1.5), rel=1e-5)


@pytest.mark.parametrize("target", OTHERS)
def test_an_unlikely_target_keeps_its_digits(target):
    """However far the contexts are from each other: nothing of the target cancels."""
    context = torch.tensor([[[-60.0, -1e-3], [-30.0, -90.0]]])
    terms = pulling_to(target, KLTerms(context, torch.full((1, 2), 0.5), torch.tensor([True]), 1.0))
    mean = torch.log((context.double().exp() * 0.5).sum(dim=-1))
    wanted = context[..., 0].double() if target == "context" else mean
    torch.testing.assert_close(target_of(terms, 1e-37).double(), wanted.clamp(min=np.log(1e-37)), atol=0, rtol=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# The pull beside the advantage
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", KL_TARGETS)
def test_the_pull_of_a_sequence(target):
    _, step = step_of(kl_target=target, kl_fraction=0.5, estimator="none")
    terms = step.terms(rollout_of(), LENGTH, QUERY).kl
    mask = MASK.clone()
    mask[int(terms.counted.nonzero()[0])] = False  # a row without tokens says nothing
    pull = mean_pull(terms, step.options, QUERY, mask)
    assert pull.isfinite().sum() == terms.counted.sum() - 1 == 3
    for k in pull.isfinite().nonzero().flatten().tolist():
        d = (target_of(terms) - QUERY)[k, : len(CANDIDATES[k])]
        assert pull[k].item() == pytest.approx(d.mean().item(), rel=1e-5, abs=1e-6) and d.abs().max() > 1e-3


def test_an_unlikely_token_on_which_all_agree_is_no_pull():
    """The term does not lift it either, with a `kl_clip`; without one p' is at least its floor."""
    query = torch.full((2, LENGTH), -20.0)
    terms = KLTerms(query[..., None].expand(2, LENGTH, 3), torch.full((2, 3), 1 / 3), torch.tensor([True, True]), 1.0)
    ones = torch.ones(2, LENGTH)
    assert mean_pull(terms, CausalOptions(kl_clip=3.0), query, ones).tolist() == [0.0, 0.0]
    assert mean_pull(terms, CausalOptions(), query, ones).tolist() == pytest.approx([20 + np.log(1e-6)] * 2)


def test_a_correlation_from_sums():
    rng = np.random.default_rng(0)
    x, noise = rng.normal(-1.3, 0.2, 40), rng.normal(0, 1, 40)
    y = 3 * x + noise
    sums = [
        [len(a), a.sum(), b.sum(), (a * a).sum(), (b * b).sum(), (a * b).sum()]
        for a, b in ((x[:7], y[:7]), (x[7:7], y[7:7]), (x[7:], y[7:]))
    ]
    assert _correlation(sums) == pytest.approx(np.corrcoef(x, y)[0, 1])
    for rows in ([], sums[1:2], [[1.0] * 6], [[3.0, -3.9, 1.0, 5.07, 2.0, -1.3]], [[4.0, 1.0, 0.0, 2.0, 0.0, 0.0]]):
        assert np.isnan(_correlation(rows)), rows  # fewer than two rows; one of the two does not vary


def hand_made(trainer, output, logp):
    """The correlation of one micro-batch's rows, written out."""
    rows, mask = output["has_collider"], output["completion_mask"].bool()
    context, weights = output["context_logps"].double(), output["context_weights"].double()
    query = output.get("query_logps", logp).double()
    p = context[..., 0].exp() - (context.exp() * weights[:, None]).sum(dim=-1) + query.exp()
    d = p.clamp(trainer.args.proj_floor, 1.0).log() - output.get("old_per_token_logps", logp).double()
    d = torch.where(mask, d, 0.0).sum(dim=1) / mask.sum(dim=1)
    return np.corrcoef(d[rows].numpy(), output["plain_advantages"][rows].double().numpy())[0, 1]


@pytest.mark.parametrize("steps", [{}, {"num_iterations": 2}, {"reuse_rollout": False}], ids=str)
@pytest.mark.parametrize("target", KL_TARGETS)
def test_the_correlation_that_is_logged(target, steps, policy, tmp_path):
    """With TRL's loss and with the trainer's own, whose loss and gradients are the same."""
    settings = {"kl_target": target, "kappa": 0.5, "kl_fraction": 0.75, **steps}
    trainer = make_trainer(policy, tmp_path, **TRL, **settings)
    output, captured = first_batch(trainer)
    assert torch.equal(output["plain_advantages"], captured["advantages"])
    assert not torch.allclose(output["plain_advantages"], output["advantages"])
    found = []
    for way in (TRL, OWN):
        trainer = make_trainer(policy, tmp_path, **settings, **way)
        trainer.current_gradient_accumulation_steps = 1
        trainer.model.train()
        ids = torch.cat([output["prompt_ids"], output["completion_ids"]], dim=1)
        attention = torch.cat([output["prompt_mask"], output["completion_mask"]], dim=1)
        with torch.no_grad():
            logp = trainer._get_per_token_logps_and_entropies(
                trainer.model, ids, attention, output["completion_ids"].size(1)
            )[0]
        loss = trainer._compute_loss(trainer.model, dict(output))
        loss.backward()
        trainer.log({})
        logged = trainer.state.log_history[-1]
        assert logged["gcpo/kl_causal_correlation"] == pytest.approx(hand_made(trainer, output, logp), abs=2e-4)
        gradients = {name: p.grad for name, p in trainer.model.named_parameters()}
        found.append((loss.item(), logged["gcpo/kl_causal"], gradients))
    (loss, kl, gradients), (own_loss, own_kl, own_gradients) = found
    assert own_loss == pytest.approx(loss, rel=1e-5, abs=1e-5) and own_kl == pytest.approx(kl, rel=1e-4) and kl > 1e-3
    for name, gradient in gradients.items():
        assert (own_gradients[name] - gradient).abs().max() <= 1e-5 * gradient.abs().max(), name


def test_advantages_of_tokens_count_by_their_mean(policy, tmp_path):
    """A subclass may give a token an advantage of its own, as TRL's loss allows."""
    trainer = make_trainer(policy, tmp_path, kappa=0.5, kl_fraction=1.0)
    output, _ = first_batch(trainer)
    trainer.current_gradient_accumulation_steps = 1
    mask, plain = output["completion_mask"], output["plain_advantages"]
    steps = torch.arange(mask.size(1)).float()
    steps = (steps - (mask * steps).sum(dim=1, keepdim=True) / mask.sum(dim=1, keepdim=True)) * mask
    anything = torch.where(mask == 0, 9.0, 0.0)  # behind a completion's end
    found = []
    for advantages in (plain, plain[:, None] + steps + anything):
        trainer._compute_loss(trainer.model, {**output, "plain_advantages": advantages})
        trainer.log({})
        found.append(trainer.state.log_history[-1]["gcpo/kl_causal_correlation"])
    assert found[1] == pytest.approx(found[0], abs=1e-5) and abs(found[0]) < 1


@pytest.mark.parametrize("target", KL_TARGETS)
def test_the_loss_is_that_of_the_target(target, policy, tmp_path):
    """Against the objective with the term written out."""
    trainer = make_trainer(policy, tmp_path, kl_target=target, kappa=0.5, loss_type="dapo", **TRL)
    plain = make_trainer(policy, tmp_path, kappa=0.5, loss_type="dapo", **TRL)
    batches = []
    for one in (plain, trainer):
        torch.manual_seed(0)
        batches.append(first_batch(one)[0])
    whole, output = batches
    assert torch.equal(whole["completion_ids"], output["completion_ids"])
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    mask = output["completion_mask"]
    ids = torch.cat([output["prompt_ids"], output["completion_ids"]], dim=1)
    attention = torch.cat([output["prompt_mask"], mask], dim=1)
    logp = trainer._get_per_token_logps_and_entropies(trainer.model, ids, attention, mask.size(1))[0]
    under, query = whole["context_logps"].exp(), logp.detach().exp()
    mean = (under * whole["context_weights"][:, None]).sum(dim=-1)
    p = {"projection": under[..., 0] - mean + query, "context": under[..., 0], "ensemble": mean}[target]
    d = p.clamp(1e-6, 1.0).log() - logp
    policy_term, _ = gcpo_loss(logp, output["advantages"], mask, loss_type="dapo")
    wanted = policy_term + 0.5 * (torch.where(mask.bool(), d.exp() - d - 1, 0.0)).sum() / mask.sum()
    loss = trainer._compute_loss(trainer.model, dict(output))
    torch.testing.assert_close(loss, wanted, atol=1e-5, rtol=1e-5)
    weights = list(trainer.model.parameters())
    for ours, theirs in zip(torch.autograd.grad(loss, weights), torch.autograd.grad(wanted, weights), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_estimates_for_speed_are_of_the_policy(policy, tmp_path):
    """What the own loss takes as a hint is never another target's log-probability."""
    for target in KL_TARGETS:
        trainer = make_trainer(policy, tmp_path, kl_target=target, reuse_rollout=False, **OWN)
        output, _ = first_batch(trainer)
        hint = trainer._loss_options(output)["offset_logp"]
        assert (hint is output["query_logps"]) if target == "projection" else hint is None
        later = off_policy(output)
        assert trainer._loss_options(later)["offset_logp"] is later["old_per_token_logps"]
