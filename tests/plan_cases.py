"""
Random options, each with a run of a tiny policy whose logged tokens `gcpo.planning.counts` must give exactly.

    python tests/plan_cases.py --count 200
"""

import argparse
import random
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from tiny_policy import SHORT_TEMPLATES, count_low, options, prompts, save_policy
from transformers import AutoModelForCausalLM, AutoTokenizer

from gcpo import GCPOConfig, GCPOTrainer
from gcpo.causal.account import TOKENS
from gcpo.planning.architecture import Architecture
from gcpo.planning.counts import Counts, abilities_of, count_cycle

CHOICES: dict[str, list[Any]] = {
    "estimator": ["loo", "loo", "scored", "sampled", "none"],
    "kappa": [0.0, 0.06, 0.06],
    "context_attention": [None, "full", "parallel"],
    "num_kl_contexts": [None, 1, 2],
    "kl_fraction": [1.0, 0.25, 0.5],
    "candidate_context_tokens": [None, 2, 64],
    "share_prefix": [True, True, False],
    "reuse_rollout": [True, False],
    "pack_tokens": [1, 120, 1024],
    "num_colliders": [1, 2, 3],
    "collider_max_completion_length": [1, 4],
    "representation": ["last", "mean"],
    "num_estimator_samples": [1, 2],
    "mask_truncated_completions": [False, False, True],
    "mask_truncated_colliders": [False, True],
    "shuffle_candidates": [False, True],
    "causal_policy_context": ["query", "query", "context"],
    "kl_target": ["projection", "projection", "context", "ensemble"],
    "beta": [0.0, 0.0, 0.1],
    "num_iterations": [1, 1, 2],
    "gradient_accumulation_steps": [1, 2],
    "steps_per_generation": [None, 1, 2],
    "fused_loss": [None, None, False, True],
    "padding_free": [None, None, False, True],
    "loss_type": ["dapo", "dapo", "grpo", "bnpo"],
    "max_completion_length": [1, 3, 6],
}


def draw_options(seed: int) -> dict[str, Any]:
    """Options that GCPOConfig takes."""
    draw = random.Random(seed)
    chosen = {name: draw.choice(values) for name, values in CHOICES.items()}
    if chosen["context_attention"] == "parallel":
        chosen["causal_policy_context"] = "query"
        chosen["estimator"] = "loo" if chosen["estimator"] == "sampled" else chosen["estimator"]
    return {"per_device_train_batch_size": 8, **chosen}


class Recording(GCPOTrainer):
    """Keeps what was generated, as the script of a plan: the token ids by rollout."""

    keeps_account = True

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.keeps_account = True  # with the causal parts off, too
        self.rollouts: list[tuple] = []
        self.outputs: list[dict[str, list]] = []
        self.orders: list[list[int]] = []
        self.ending_ids = self._policy.ending_ids
        if self.args.is_causal:
            self.builder, sample_states = self._causal.builder, self._policy.sample_states

            def keep(*args: Any) -> tuple:
                result = sample_states(*args)
                self.outputs[-1]["contexts"] = result[0]
                return result

            self._policy.sample_states = keep

    def _generate(self, prompts: list[Any]) -> tuple:
        result = super()._generate(prompts)
        self.rollouts.append((prompts, result[0], result[1]))
        self.outputs.append({})
        return result

    def causal_terms(self, *args: Any) -> Any:
        terms = super().causal_terms(*args)
        self.outputs[-1]["colliders"] = [ids for group in terms.groups for ids in group.colliders]
        return terms

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        draw, drawn = torch.randperm, []

        def randperm(*args: Any, **kwargs: Any) -> torch.Tensor:
            drawn.append(draw(*args, **kwargs))
            return drawn[-1]

        count = len(self.rollouts)
        with patch.object(torch, "randperm", randperm):
            inputs = super()._prepare_inputs(generation_batch)
        if len(self.rollouts) > count:  # TRL shuffles it last
            self.orders.append(drawn[-1].tolist())
        return inputs

    def order(self, number: int) -> list[int]:
        return self.orders[number]

    def rollout(self, number: int) -> tuple:
        return self.rollouts[number]

    def output(self, rollout: int, phase: str, number: int) -> list[int]:
        return self.outputs[rollout][phase][number]


def run_and_count(
    model: Any, tokenizer: Any, folder: Path, changed: dict[str, Any], num_prompts: int = 32
) -> tuple[dict[str, float], Counts]:
    """Tokens that the steps of a cycle logged, by kind, and the plan of the same cycle."""
    given = {"num_colliders": 3, "collider_max_completion_length": 6, **SHORT_TEMPLATES, **changed}
    config = GCPOConfig(**options(folder, **given))
    every = config.steps_per_generation * config.num_iterations
    # Steps until rollouts and steps begin together again.
    config.max_steps = next(k for k in range(1, every + 1) if k * config.gradient_accumulation_steps % every == 0)
    trainer = Recording(model, count_low, args=config, train_dataset=prompts(num_prompts), processing_class=tokenizer)
    trainer.train()
    logged = dict.fromkeys(TOKENS, 0.0)
    for step in trainer.state.log_history[: config.max_steps]:
        for kind in TOKENS:
            logged[kind] += step[f"gcpo/tokens/{kind}"]
    abilities = abilities_of(config, Architecture.from_config(model.config))
    return logged, count_cycle(config, trainer, abilities)


def wrong(logged: dict[str, float], counts: Counts) -> dict[str, tuple[float, int]]:
    """Kinds of tokens that the two differ in."""
    return {kind: (logged[kind], counts.tokens[kind]) for kind in TOKENS if logged[kind] != counts.tokens[kind]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0, help="of the first case")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp())
    name = save_policy(folder / "policy")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(name), AutoTokenizer.from_pretrained(name)
    failed = 0
    for seed in range(args.seed, args.seed + args.count):
        found = wrong(*run_and_count(model, tokenizer, folder, draw_options(seed)))
        if found:
            failed += 1
            print(f"{seed}: {found} with {draw_options(seed)}", file=sys.stderr)
    print(f"{args.count - failed} of {args.count} random options: the plan's tokens are those of the run")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
