"""How much the demo and the studies train and measure, and the trainer's options that follow from it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import AutoTokenizer

from gcpo.evaluation.evaluate import EvalResult, evaluate_pass_at_k


@dataclass(frozen=True)
class Scale:
    """How much to train and to measure. Counts are of prompts, except where they say otherwise."""

    steps: int
    prompts_per_step: int = 8
    num_generations: int = 8
    num_colliders: int = 2
    completion_tokens: int = 12
    num_held_out: int = 128
    num_samples: int = 4
    num_train: int = 2000
    learning_rate: float = 2e-4
    beta: float = 0.02
    warm_target: float = 0.3
    eval_batch_size: int = 512

    def trainer_options(self, folder: Path, seed: int) -> dict[str, Any]:
        """Options of GRPOConfig for one run, whose output goes to `folder`."""
        return {
            "output_dir": str(folder),
            "seed": seed,
            "max_steps": self.steps,
            "learning_rate": self.learning_rate,
            "lr_scheduler_type": "constant",
            "per_device_train_batch_size": self.prompts_per_step * self.num_generations,
            "num_generations": self.num_generations,
            "max_completion_length": self.completion_tokens,
            "beta": self.beta,
            "save_strategy": "no",
            "report_to": "none",
            "logging_steps": 1,
        }

    def causal_options(self) -> dict[str, Any]:
        """What GCPOConfig takes beside them."""
        return {"num_colliders": self.num_colliders, "collider_max_completion_length": self.completion_tokens}

    def measure(
        self, model: Any, folder: str | Path, held_out: Dataset, reward: Any, seed: int, progress: bool = True
    ) -> EvalResult:
        """Score a model, with the tokenizer in `folder`, on prompts that it does not train on, at temperature 1."""
        return evaluate_pass_at_k(
            model,
            AutoTokenizer.from_pretrained(folder),
            held_out,
            reward,
            num_samples=self.num_samples,
            max_new_tokens=self.completion_tokens,
            batch_size=self.eval_batch_size,
            seed=seed,
            progress=progress,
        )
