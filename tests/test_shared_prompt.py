"""`share_prompt`: prompts that rows share are read once in the forward with gradient; nothing else changes."""

import pytest
import torch
from test_trainer_causal import first_batch, make_trainer
from tiny_policy import options, parameters, save_policy, worst_difference

from gcpo import GCPOConfig


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return save_policy(tmp_path_factory.mktemp("policy"))


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"conversational": True, "temperature": 0.7},
        {"pad_to_multiple_of": 8},
        {"entropy_coef": 0.1},
        {"causal_policy_context": "context", "kappa": 0.5},
        {"model_init_kwargs": {"attn_implementation": "eager"}},
    ],
    ids=lambda changed: "-".join(changed) or "defaults",
)
def test_same_loss_and_gradients_from_fewer_tokens(changed, policy, tmp_path):
    output, _ = first_batch(make_trainer(policy, tmp_path, beta=0.1, **changed))
    found = []
    for share in (False, True):
        trainer = make_trainer(policy, tmp_path, beta=0.1, share_prompt=share, **changed)
        trainer.current_gradient_accumulation_steps = 1
        trainer.model.train()
        loss = trainer._compute_loss(trainer.model, output)
        grads = torch.autograd.grad(loss, list(trainer.model.parameters()))
        found.append((loss, grads, float(trainer._account.tokens["trained"])))
    (loss, grads, tokens), (shared_loss, shared_grads, shared_tokens) = found
    torch.testing.assert_close(shared_loss, loss, atol=1e-6, rtol=1e-5)
    for shared, plain in zip(shared_grads, grads, strict=True):
        assert plain.abs().max() > 0
        torch.testing.assert_close(shared, plain, atol=1e-5 * plain.abs().max().item(), rtol=1e-4)
    lengths = output["prompt_mask"].sum(dim=1)
    distinct = torch.unique(torch.cat([output["prompt_ids"], output["prompt_mask"]], dim=1), dim=0)
    assert len(distinct) == 2
    saved = lengths.sum().item() - 2 * (lengths[0].item() - 1) - 8 if lengths.unique().numel() == 1 else None
    under_contexts = changed.get("causal_policy_context") == "context"
    assert shared_tokens < tokens and (saved is None or under_contexts or tokens - shared_tokens == saved)


def test_trains(policy, tmp_path):
    runs = []
    for share in (False, True):
        trainer = make_trainer(policy, tmp_path, share_prompt=share, loss_type="grpo")
        trainer.train()
        runs.append(parameters(trainer.model))
    assert worst_difference(*runs) < 1e-3  # Adam's first steps have the gradient's sign, which rounding can turn


def test_refused_with_checkpointing(tmp_path):
    with pytest.raises(ValueError, match="`share_prompt` must be False with `gradient_checkpointing`"):
        GCPOConfig(**options(tmp_path, share_prompt=True, gradient_checkpointing=True))
