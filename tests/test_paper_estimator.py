"""The paper's own form: outputs sampled under every context, pi_theta conditioned on the context in the second KL."""

from itertools import chain

import pytest
import torch
from test_trainer_causal import first_batch, make_trainer, plain_scores
from tiny_policy import options, parameters, save_policy, worst_difference

from gcpo import GCPOConfig, GCPOTrainer
from gcpo_kernels import gcpo_loss


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return save_policy(tmp_path_factory.mktemp("policy"))


@pytest.mark.parametrize("reuse", [True, False], ids=["from the generation", "read again"])
def test_sampled_weights_are_those_of_the_outputs_drawn(reuse, policy, tmp_path):
    drawn = []

    class Spy(GCPOTrainer):
        def _generate_single_turn(self, prompt_ids, *args, **kwargs):
            result = super()._generate_single_turn(prompt_ids, *args, **kwargs)
            drawn.append((prompt_ids, result[0]))
            return result

    trainer = make_trainer(
        policy, tmp_path, Spy, estimator="sampled", num_estimator_samples=2, kappa=0.0, reuse_rollout=reuse
    )
    _, captured = first_batch(trainer)
    n, colliders, m = 4, 3, 2
    assert all(len(prompt_ids) <= 8 for prompt_ids, _ in drawn)  # never more at once than the rollout's
    # Candidates, colliders, then these.
    contexts, outputs = (list(chain.from_iterable(parts)) for parts in zip(*drawn[2:], strict=True))
    assert len(outputs) == 8 * colliders * m
    z = torch.stack([plain_scores(trainer, g.prompt_ids, y)[1][-1] for g in captured["groups"] for y in g.candidates])
    sampled = [plain_scores(trainer, x, y)[1][-1] for x, y in zip(contexts, outputs, strict=True)]
    z, sampled = z.view(2, n, -1), torch.stack(sampled).view(2, n, colliders, m, -1)
    per_context = sampled.mean(dim=3)
    target = per_context[:, :, 0] - per_context.mean(dim=2) + z.mean(dim=1, keepdim=True)
    expected = 2.0 * torch.cosine_similarity(z, target, dim=-1).flatten()
    torch.testing.assert_close(captured["upsilon"], expected, atol=1e-5, rtol=1e-5)
    group = captured["groups"][0]
    assert contexts[0] == trainer._causal.builder.context(group.prompt, group.candidates[1:], group.colliders[0])
    assert trainer._account.tokens["generated_contexts"] == sum(map(len, outputs))
    assert (float(trainer._account.tokens["scored_contexts"]) == 0) is reuse


def test_policy_under_the_context_has_its_own_gradient(policy, tmp_path):
    trainer = make_trainer(policy, tmp_path, causal_policy_context="context", kappa=0.5, loss_type="grpo")
    output, captured = first_batch(trainer)
    trainer.current_gradient_accumulation_steps = 1
    loss = trainer._compute_loss(trainer.model, output)
    plain = {k: v for k, v in output.items() if k != "context_logps"}
    term = loss - trainer._compute_loss(trainer.model, plain)
    weights = list(trainer.model.parameters())
    got = torch.autograd.grad(term, weights)
    mask = output["completion_mask"]
    rows = []
    for row in range(8):
        group, i = captured["groups"][row // 4], row % 4
        others = group.candidates[:i] + group.candidates[i + 1 :]
        context = trainer._causal.builder.context(group.prompt, others, group.colliders[0])
        y = group.candidates[i]
        ids = torch.tensor([[*context, *y]])
        logits = trainer.model(input_ids=ids).logits[0, len(context) - 1 : -1]
        logp = torch.log_softmax(logits, dim=-1).gather(-1, torch.tensor(y)[:, None])[:, 0]
        rows.append(torch.nn.functional.pad(logp, (0, mask.size(1) - len(y))))
    causal_logp = torch.stack(rows)
    ids = torch.cat([output["prompt_ids"], output["completion_ids"]], dim=1)
    attention = torch.cat([output["prompt_mask"], mask], dim=1)
    with torch.no_grad():  # on-policy, the policy's own under q
        query_logp, _, _ = trainer._get_per_token_logps_and_entropies(trainer.model, ids, attention, mask.size(1))
    expected, _ = gcpo_loss(
        causal_logp.detach(),
        torch.zeros(8),
        mask,
        causal_logp=causal_logp,
        query_logp=query_logp,
        context_logp=output["context_logps"],
        kappa=0.5,
    )
    torch.testing.assert_close(term, expected, atol=1e-6, rtol=1e-4)
    wanted = torch.autograd.grad(expected, weights)
    assert max(g.abs().max() for g in wanted) > 1e-4
    for ours, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-3)


def test_paper_settings_train(policy, tmp_path):
    settings = options(tmp_path, per_device_train_batch_size=8, gradient_accumulation_steps=1, learning_rate=1e-3)
    config = GCPOConfig.paper(**settings, collider_max_completion_length=6)
    trainer = make_trainer(policy, tmp_path)
    trainer = GCPOTrainer(
        model=policy, args=config, reward_funcs=trainer.reward_funcs, train_dataset=trainer.train_dataset
    )
    before = parameters(trainer.model)
    trainer.train()
    assert worst_difference(before, parameters(trainer.model)) > 0
    assert trainer.state.log_history[0]["gcpo/tokens/generated_contexts"] > 0
    assert all(value.isfinite().all() for value in parameters(trainer.model).values())


@pytest.mark.parametrize(
    "changed",
    [
        {"num_kl_contexts": 1, "kl_fraction": 0.5},
        {"num_kl_contexts": 1, "causal_policy_context": "context", "kl_fraction": 0.25},
        {"shuffle_candidates": True, "collider_temperature": 0.5},
        {"estimator": "sampled", "kl_fraction": 0.5},
    ],
    ids=lambda changed: "-".join(changed),
)
def test_trains_with(changed, policy, tmp_path):
    settings = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4, **changed}
    trainer = make_trainer(policy, tmp_path, **settings)
    before = parameters(trainer.model)
    temperature = trainer.generation_kwargs["temperature"]
    trainer.train()
    assert worst_difference(before, parameters(trainer.model)) > 0
    assert trainer.generation_kwargs["temperature"] == temperature
    assert trainer.state.log_history[0]["gcpo/upsilon/fallback"] == 0
