"""
What `bench.fidelity` measures: rollouts of one model, and each variant of the causal step run on them through
the policy of `GCPOTrainer`.
"""

import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, concatenate_datasets
from transformers import AutoTokenizer

from bench.context_samples import sample_under
from bench.overhead_runs import load_model, reward
from gcpo import GCPOConfig, GCPOTrainer
from gcpo.causal.port import CausalTerms, Group, Rollout, WeightInputs
from gcpo.evaluation.tasks import SYSTEM_PROMPT, reasoning_gym_dataset
from gcpo_kernels import maths

REPRESENTATIONS = ("last", "mean")
# What the savings are measured against, stated in full: GCPOConfig's defaults are savings themselves.
WHOLE: dict[str, Any] = {
    "context_attention": "full",
    "candidate_context_tokens": None,
    "num_kl_contexts": None,
    "kl_fraction": 1.0,
}


@dataclass
class Sample:
    """One prompt's rollout: what TRL made of it, and two draws of colliders."""

    output: dict[str, Any]  # advantages are A
    rollout: Rollout
    group: Group
    other_group: Group

    @property
    def mask(self) -> torch.Tensor:
        """(n, T) bool: tokens of the candidates."""
        return self.output["completion_mask"].bool()


# What an Upsilon is estimated from, by representation: for one prompt, or for several that were joined.
Inputs = dict[str, WeightInputs]


def join(parts: list[Inputs]) -> Inputs:
    """Those of several prompts as one."""
    return {kind: _join([part[kind] for part in parts]) for kind in REPRESENTATIONS}


def _join(parts: list[WeightInputs]) -> WeightInputs:
    columns = {name: [getattr(part, name) for part in parts] for name in vars(parts[0])}
    joined: dict[str, Any] = {name: None if some[0] is None else torch.cat(some) for name, some in columns.items()}
    return WeightInputs(**joined)


@dataclass
class Estimate:
    """What a variant says of one prompt, and what a step of it with representation "last" cost."""

    inputs: Inputs
    log_p: torch.Tensor | None = None  # (n, T): log p'
    clamped: torch.Tensor | None = None  # (n, T) bool
    query_logp: torch.Tensor | None = None  # (n, T)
    tokens: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    cpu_seconds: float = 0.0


class DrawingTrainer(GCPOTrainer):
    """Draws colliders for a rollout twice, and stops there: its advantages stay A."""

    def causal_terms(self, rollout: Rollout, *args: Any) -> CausalTerms:
        self.rollout = rollout
        seed = self._policy.step_seed
        self.groups, self.other_groups = (self._causal.make_groups(rollout, seed + draw) for draw in range(2))
        return CausalTerms(self.groups, slice(0, len(rollout.prompts)))


class Lab:
    """
    Args:
        folder: model and tokenizer to load, in float32.
        tasks: of reasoning-gym, with this many prompts of each.
        options: of GCPOConfig, the same for all variants.
        seed: of rollouts and colliders.
    """

    def __init__(self, folder: Path, tasks: list[str], per_task: int, options: dict[str, Any], seed: int):
        self.model = load_model(folder, torch.float32)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        parts = [reasoning_gym_dataset(task, per_task, seed, system_prompt=SYSTEM_PROMPT) for task in tasks]
        self.prompts: Dataset = concatenate_datasets(parts)
        self.options, self.seed = options, seed
        self.generator = torch.Generator().manual_seed(seed)  # of the truth's samples
        self._output_dir = tempfile.TemporaryDirectory()
        self._trainers: dict[str, DrawingTrainer] = {}

    def trainer(self, **options: Any) -> DrawingTrainer:
        """The trainer of the one model with these options on top of the common ones."""
        name = repr(sorted(options.items()))
        if name not in self._trainers:
            self._trainers[name] = self._make_trainer(options)
        return self._trainers[name]

    def _make_trainer(self, options: dict[str, Any]) -> DrawingTrainer:
        n = self.options["num_generations"]
        settings = {
            "output_dir": self._output_dir.name,
            "per_device_train_batch_size": n,
            "gradient_accumulation_steps": 1,
            "gradient_checkpointing": False,
            "bf16": False,
            "use_cpu": not torch.cuda.is_available(),
            "report_to": "none",
            "save_strategy": "no",
            "disable_tqdm": True,
            "seed": self.seed,
            "reuse_rollout": False,  # each variant reads candidates and colliders anew
            **WHOLE,
            **self.options,
            **options,
        }
        trainer = DrawingTrainer(
            self.model,
            reward,
            args=GCPOConfig(**settings),
            train_dataset=self.prompts,
            processing_class=self.tokenizer,
        )
        self.model.train()
        return trainer

    def roll_out(self, number: int) -> Sample:
        """Candidates, rewards and colliders of a prompt; colliders are shown whole candidates."""
        trainer = self.trainer()
        torch.manual_seed(self.seed + number)
        output = trainer._generate_and_score_completions([self.prompts[number]] * self.options["num_generations"])
        return Sample(output, trainer.rollout, trainer.groups[0], trainer.other_groups[0])

    def terms(self, sample: Sample, options: dict[str, Any], other_colliders: bool = False) -> CausalTerms:
        """A variant's causal step on a rollout and its colliders; `num_colliders` takes the first of them."""
        trainer = self.trainer(**options)
        group, colliders = sample.other_group if other_colliders else sample.group, trainer.args.num_colliders
        group = replace(group, colliders=group.colliders[:colliders], has_content=group.has_content[:colliders])
        return trainer._causal.terms(sample.rollout, sample.mask.shape[1], groups=[group])

    def estimate(self, sample: Sample, options: dict[str, Any], other_colliders: bool = False) -> Estimate:
        """What a variant says, in a step for each representation."""
        trainer = self.trainer(**options)
        trainer._account.flush()
        start = time.process_time()
        terms = self.terms(sample, options, other_colliders)
        spent = time.process_time() - start
        seconds, tokens = trainer._account.flush()
        mean = self.terms(sample, {**options, "representation": "mean"}, other_colliders)
        assert terms.weight_inputs is not None and mean.weight_inputs is not None
        inputs = {"last": terms.weight_inputs, "mean": mean.weight_inputs}
        estimate = Estimate(inputs, tokens=tokens, seconds=seconds, cpu_seconds=spent)
        if terms.kl is not None:
            query, contexts, weights = terms.kl.query_logp, terms.kl.context_logp, terms.kl.context_weights
            floor = trainer.args.proj_floor
            estimate.query_logp = query
            estimate.log_p, estimate.clamped = maths.project(query, contexts, weights[:, None], floor)
        return estimate

    def sample_truth(self, sample: Sample, z: dict[str, torch.Tensor], m: int) -> tuple[Inputs, int, int]:
        """
        Inputs of the `sampled` estimate with m outputs under every full context of whole candidates, and how many
        tokens were read and sampled for it. `z` is (1, n, H), by representation.
        """
        trainer = self.trainer(estimator="sampled")
        drawn = []
        for i in range(len(sample.group.candidates)):
            contexts = [trainer._causal.context([sample.group], (0, i), l) for l in range(trainer.args.num_colliders)]
            drawn.append(
                sample_under(
                    self.model,
                    contexts,
                    m,
                    trainer.max_completion_length,
                    trainer.temperature,
                    trainer.eos_token_ids,
                    self.generator,
                )
            )
        mask = torch.tensor([sample.group.has_content])
        inputs = {
            kind: WeightInputs(z[kind], None, torch.stack([getattr(row, kind) for row in drawn])[None], mask)
            for kind in REPRESENTATIONS
        }
        return inputs, sum(row.tokens_read for row in drawn), sum(row.tokens_sampled for row in drawn)
