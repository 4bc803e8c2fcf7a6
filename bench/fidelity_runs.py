"""
What `bench.fidelity` measures: rollouts of one model, and each variant of the causal step run on them through
`GCPOTrainer` itself. All that touches the insides of the causal step is here.
"""

import copy
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from datasets import Dataset, concatenate_datasets
from transformers import AutoTokenizer

from bench.context_samples import sample_under
from bench.overhead_runs import load_model, reward
from gcpo import GCPOConfig, GCPOTrainer
from gcpo.causal import estimators
from gcpo.causal import step as causal_step
from gcpo.causal.colliders import Group
from gcpo.evaluation.tasks import SYSTEM_PROMPT, reasoning_gym_dataset
from gcpo.forward import representations
from gcpo.forward.generation import Rollout
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


@dataclass
class Terms:
    """Arguments of `estimate_weights`, for one prompt or several: representations are last and mean, side by side."""

    z: torch.Tensor  # (P, n, 2H)
    collider_z: torch.Tensor | None  # (P, L, 2H)
    context_z: torch.Tensor | None  # (P, n, L, m, 2H)
    collider_mask: torch.Tensor  # (P, L)

    @classmethod
    def join(cls, parts: list["Terms"]) -> "Terms":
        columns = {name: [getattr(part, name) for part in parts] for name in cls.__dataclass_fields__}
        joined: dict[str, Any] = {k: None if some[0] is None else torch.cat(some) for k, some in columns.items()}
        return cls(**joined)

    def only(self, representation: str) -> "Terms":
        half = self.z.shape[-1] // 2
        columns = slice(0, half) if representation == "last" else slice(half, None)
        z, collider_z, context_z = (
            None if x is None else x[..., columns] for x in (self.z, self.collider_z, self.context_z)
        )
        assert z is not None
        return Terms(z, collider_z, context_z, self.collider_mask)


@dataclass
class Estimate:
    """What a variant says of one prompt, and what it cost."""

    terms: Terms
    log_p: torch.Tensor | None = None  # (n, T): log p'
    clamped: torch.Tensor | None = None  # (n, T) bool
    query_logp: torch.Tensor | None = None  # (n, T)
    tokens: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    cpu_seconds: float = 0.0


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
        self._trainers: dict[str, GCPOTrainer] = {}

    def trainer(self, **options: Any) -> GCPOTrainer:
        """The trainer of the one model with these options on top of the common ones."""
        name = repr(sorted(options.items()))
        if name not in self._trainers:
            self._trainers[name] = self._make_trainer(options)
        return self._trainers[name]

    def _make_trainer(self, options: dict[str, Any]) -> GCPOTrainer:
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
            # Each variant reads candidates and colliders anew, for both representations at once.
            "reuse_rollout": False,
            **WHOLE,
            **self.options,
            **options,
        }
        trainer = GCPOTrainer(
            self.model,
            reward,
            args=GCPOConfig(**settings),
            train_dataset=self.prompts,
            processing_class=self.tokenizer,
        )
        trainer._causal.z_size *= len(REPRESENTATIONS)
        self.model.train()
        return trainer

    def roll_out(self, number: int) -> Sample:
        """Candidates, rewards and colliders of a prompt; colliders are shown whole candidates."""
        kept: dict[str, Any] = {}
        trainer = self.trainer()
        step = trainer._causal

        def keep(output: dict[str, Any], rollout: Rollout, z: torch.Tensor | None) -> None:
            kept["output"], kept["rollout"], kept["group"] = dict(output), rollout, step.make_groups(rollout)[0]
            with mock.patch.object(step.config, "seed", self.seed + 1):
                kept["other_group"] = step.make_groups(rollout)[0]

        torch.manual_seed(self.seed + number)
        with mock.patch.object(step, "extend", keep):
            trainer._generate_and_score_completions([self.prompts[number]] * self.options["num_generations"])
        return Sample(**kept)

    def estimate(self, sample: Sample, options: dict[str, Any], other_colliders: bool = False) -> Estimate:
        """Run a variant's causal step on a rollout and its colliders; `num_colliders` takes the first of them."""
        trainer = self.trainer(**options)
        group = copy.copy(sample.other_group if other_colliders else sample.group)
        group.colliders = group.colliders[: trainer.args.num_colliders]
        group.has_content = group.has_content[: trainer.args.num_colliders]
        output = dict(sample.output)
        trainer._logs["advantages"].extend(output["advantages"].tolist())  # as TRL does, for its completions table
        trainer._account.flush()
        start = time.process_time()
        given = mock.patch.object(trainer._causal, "make_groups", return_value=[group])
        with given, _keeping_terms() as kept, torch.no_grad():
            trainer._causal.extend(output, sample.rollout, None)
        spent = time.process_time() - start
        seconds, tokens = trainer._account.flush()
        estimate = Estimate(kept[0], tokens=tokens, seconds=seconds, cpu_seconds=spent)
        if trainer.args.kappa > 0:
            query, contexts, weights = (output[k] for k in ("query_logps", "context_logps", "context_weights"))
            floor = trainer.args.proj_floor
            estimate.query_logp = query
            estimate.log_p, estimate.clamped = maths.project(query, contexts, weights[:, None], floor)
        return estimate

    def sample_truth(self, sample: Sample, z: torch.Tensor, m: int) -> tuple[Terms, int, int]:
        """
        Terms of the `sampled` estimate with m outputs under every full context of whole candidates, and how many
        tokens were read and sampled for it. `z` is (1, n, 2H).
        """
        trainer = self.trainer(estimator="sampled")
        rows, read, sampled = [], 0, 0
        for i in range(z.shape[1]):
            contexts = [trainer._causal._context([sample.group], (0, i), l) for l in range(trainer.args.num_colliders)]
            drawn = sample_under(
                self.model,
                contexts,
                m,
                trainer.max_completion_length,
                trainer.temperature,
                trainer.eos_token_ids,
                self.generator,
            )
            rows.append(torch.cat([drawn.last, drawn.mean], dim=-1))
            read, sampled = read + drawn.tokens_read, sampled + drawn.tokens_sampled
        mask = torch.tensor([sample.group.has_content])
        return Terms(z, None, torch.stack(rows)[None], mask), read, sampled


@contextmanager
def _keeping_terms() -> Iterator[list[Terms]]:
    """Inside, completions get both representations side by side, and what weights are estimated from is kept."""
    kept: list[Terms] = []
    represent, estimate_weights = representations.represent, estimators.estimate_weights

    def both(hidden: torch.Tensor, mask: torch.Tensor, representation: str) -> torch.Tensor:
        return torch.cat([represent(hidden, mask, kind) for kind in REPRESENTATIONS], dim=-1)

    def keep(config: GCPOConfig, *terms: Any) -> Any:
        kept.append(Terms(*terms))
        return estimate_weights(config, *terms)

    with (
        mock.patch.object(representations, "represent", both),
        mock.patch.object(causal_step, "estimate_weights", keep),
    ):
        yield kept
