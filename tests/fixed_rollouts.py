"""A trainer whose rollouts depend on nothing but the prompts, and what it gives the optimizer."""

import random

from transformers import TrainerCallback

from gcpo import GCPOTrainer


class FixedRollouts(GCPOTrainer):
    """
    Completions are a function of the prompt's tokens and the row's place in its group, on every layout.

    Attributes:
        cuts_off: whether all candidates of the later half of a batch are as long as may be, and do not end: on two
            processes, all that the second one has.
    """

    cuts_off = False

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields, num_generations, **kwargs):
        first = self.accelerator.process_index * len(prompt_ids)
        colliders = num_generations == 1
        repeats = self.args.num_colliders if colliders else self.num_generations
        limit = self.args.collider_max_completion_length if colliders else self.max_completion_length
        rows = []
        for k, ids in enumerate(prompt_ids):
            draw = random.Random(f"{ids}{(first + k) % repeats}{colliders}")
            length = draw.randint(1, limit)
            if self.cuts_off and not colliders and first + k >= len(prompt_ids) * self.accelerator.num_processes / 2:
                length = limit
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
