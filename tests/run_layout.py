"""
One process of a run whose rollouts depend on nothing but the prompts: trains two steps of plain SGD and saves the
gradients of the first. Started by test_distributed.py, alone or under torch.distributed.run, with a JSON of options.
"""

import json
import random
import sys
from pathlib import Path

import torch
from tiny_policy import SHORT_TEMPLATES, count_low, options, prompts
from transformers import TrainerCallback

from gcpo import GCPOConfig, GCPOTrainer


class FixedRollouts(GCPOTrainer):
    """Completions are a function of the prompt's tokens and the row's place in its group, on every layout."""

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields, num_generations, **kwargs):
        first = self.accelerator.process_index * len(prompt_ids)
        colliders = num_generations == 1
        repeats = self.args.num_colliders if colliders else self.num_generations
        limit = self.args.collider_max_completion_length if colliders else self.max_completion_length
        rows = []
        for k, ids in enumerate(prompt_ids):
            draw = random.Random(f"{ids}{(first + k) % repeats}{colliders}")
            length = draw.randint(1, limit)
            row = [draw.randrange(5, len(self._tokenizer)) for _ in range(length)]
            rows.append([*row[:-1], self._tokenizer.eos_token_id] if length < limit else row)
        return rows, None


class KeepGradients(TrainerCallback):
    """The gradients of the first optimizer step, as the optimizer sees them."""

    def __init__(self):
        self.gradients = {}

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if not self.gradients:
            named = getattr(model, "module", model).named_parameters()
            self.gradients = {name: parameter.grad.clone() for name, parameter in named}


def main() -> None:
    policy, out, extra = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
    settings = {
        "optim": "sgd",
        "learning_rate": 0.5,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "shuffle_dataset": False,
        "kappa": 0.5,
        "beta": 0.1,
        "num_colliders": 3,
        "collider_max_completion_length": 5,
        "ddp_find_unused_parameters": False,
        **SHORT_TEMPLATES,
        **extra,
    }
    trainer = FixedRollouts(
        model=policy,
        reward_funcs=count_low,
        args=GCPOConfig(**options(Path(out).parent, **settings)),
        train_dataset=prompts(16),
    )
    keep = KeepGradients()
    trainer.add_callback(keep)
    trainer.train()
    if trainer.accelerator.is_main_process:
        history = [entry for entry in trainer.state.log_history if "loss" in entry]
        torch.save({"gradients": keep.gradients, "history": history}, out)


if __name__ == "__main__":
    main()
