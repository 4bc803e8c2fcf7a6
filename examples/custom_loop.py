"""
GCPO in a training loop of your own: PyTorch, transformers, no trainer.

    python examples/custom_loop.py HuggingFaceTB/SmolLM2-135M-Instruct --steps 20

The model learns to add two numbers. Every step samples n answers per question, rewards them, lets `CausalStep` draw the
integrated answers (colliders) and read what it needs, and takes one optimizer step on GRPO's loss with the advantages
weighed by Upsilon (eq. 11) plus the second KL term (eq. 12).
"""

import argparse
import random
import re
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from gcpo import CausalOptions, CausalStep, ModelPolicy
from gcpo.causal.loss import causal_kl_loss
from gcpo_kernels import gcpo_loss, group_advantages


def questions(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Rows of a dataset: a conversation as `prompt`, and a column that the reward function gets."""
    draw, rows = random.Random(seed), []
    for _ in range(count):
        a, b = draw.randint(1, 20), draw.randint(1, 20)
        question = f"What is {a} + {b}? Answer with the number alone."
        rows.append({"prompt": [{"role": "user", "content": question}], "answer": a + b})
    return rows


def right_sum(completions: list[Any], answer: list[int], **columns: Any) -> list[float]:
    """1 where the last number of a completion is the answer; a tenth for any number at all."""
    found = [re.findall(r"-?\d+", completion[0]["content"]) for completion in completions]
    return [
        1.0 if numbers and int(numbers[-1][:9]) == wanted else 0.1 * bool(numbers)
        for numbers, wanted in zip(found, answer, strict=True)
    ]


def train(
    model: Any,
    tokenizer: Any,
    options: CausalOptions,
    rows: list[dict[str, Any]],
    reward_func: Any,
    *,
    steps: int,
    prompts_per_step: int = 2,
    num_generations: int = 4,
    max_completion_length: int = 16,
    learning_rate: float = 1e-5,
) -> list[float]:
    """Train in place; returns the mean reward of every step."""
    policy = ModelPolicy(
        model,
        tokenizer,
        options,
        num_generations=num_generations,  # n
        max_completion_length=max_completion_length,  # T at most
        reward_func=reward_func,
    )
    causal_step = CausalStep(policy, options, policy.builder)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    history = []
    for step in range(steps):
        start = step * prompts_per_step % len(rows)
        # P prompts with n candidates each: B = P * n rows, those of a prompt next to each other.
        rollout = policy.rollout(rows[start : start + prompts_per_step])
        rewards = policy.reward(rollout.inputs, rollout.prompts, rollout.completion_ids)  # (B,)
        terms = causal_step.terms(rollout, length=max(map(len, rollout.completion_ids)))
        advantages = terms.weigh(group_advantages(rewards, num_generations))  # (B,): A_i * Upsilon_i
        logp, mask = policy.logps(rollout)  # (B, T) both, logp with gradient
        loss, metrics = gcpo_loss(logp, advantages, mask, loss_type="dapo")
        if terms.kl is not None:  # with kappa=0 there is no second term
            second_kl, kl_metrics = causal_kl_loss(terms.kl, options, logp, mask, loss_type="dapo")
            loss, metrics = loss + second_kl, metrics | kl_metrics
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        history.append(rewards.mean().item())
        shown = f"step {step}: reward {history[-1]:.3f}, Upsilon {policy.metrics.get('upsilon/mean', 1.0):.2f}"
        print(f"{shown}, second KL {metrics['kl_causal'].item():.4f}")
    return history


def main(arguments: list[str] | None = None) -> list[float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or name of a causal language model with a chat template")
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_args(arguments)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    options = CausalOptions(collider_max_completion_length=32)
    return train(model.float(), tokenizer, options, questions(64), right_sum, steps=args.steps)


if __name__ == "__main__":
    main()
