"""`gcpo demo`: GRPO and GCPO from one checkpoint, side by side, on a CPU."""

import os

# Read when torch is loaded. Threads that spin while they wait, the default, slow each other down many times over as
# soon as anything else runs on the machine.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import json
import platform
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
import trl
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, ProgressCallback
from trl import GRPOConfig, GRPOTrainer

from gcpo import GCPOConfig, GCPOTrainer, __version__
from gcpo.demo.table import RewardProgress, print_table, summarize
from gcpo.demo.tiny import TINY_TEMPLATES, save_smollm2, save_tiny, tiny_model, tiny_tokenizer, warm_start
from gcpo.evaluation.evaluate import EvalResult, evaluate_pass_at_k
from gcpo.evaluation.tasks import reasoning_gym_reward, train_and_held_out
from gcpo.reports.plots import save_overview
from gcpo.run.meter import AccountedGRPOTrainer
from gcpo.run.quiet import quiet
from gcpo.run.records import Run

# Options of a task with which a model is right some of the time; of other tasks, their defaults.
TASKS: dict[str, dict[str, dict[str, Any]]] = {
    "tiny": {"spell_backward": {"min_word_len": 3, "max_word_len": 6}},
    "smollm2": {
        "spell_backward": {"min_word_len": 3, "max_word_len": 4},
        "chain_sum": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1},
    },
}


@dataclass(frozen=True)
class Settings:
    """One size of the demo. Counts are of prompts, except where they say otherwise."""

    task: str
    steps: int
    prompts_per_step: int
    learning_rate: float
    num_held_out: int
    num_samples: int
    completion_tokens: int
    num_train: int = 2000
    num_generations: int = 8
    num_colliders: int = 4
    beta: float = 0.02
    warm_target: float = 0.0
    eval_batch_size: int = 512


PRESETS = {
    ("tiny", False): Settings(
        "spell_backward",
        steps=120,
        prompts_per_step=16,
        learning_rate=2e-4,
        num_held_out=256,
        num_samples=4,
        completion_tokens=12,
        warm_target=0.35,
    ),
    ("tiny", True): Settings(
        "spell_backward",
        steps=32,
        prompts_per_step=8,
        learning_rate=2e-4,
        num_held_out=128,
        num_samples=4,
        completion_tokens=12,
        num_colliders=2,
        warm_target=0.25,
    ),
    ("smollm2", False): Settings(
        "chain_sum",
        steps=3,
        prompts_per_step=1,
        learning_rate=5e-6,
        num_held_out=24,
        num_samples=1,
        completion_tokens=32,
        num_train=64,
        num_colliders=2,
        eval_batch_size=24,
    ),
}
PRESETS["smollm2", True] = replace(PRESETS["smollm2", False], steps=1, num_held_out=8)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `gcpo demo`."""
    parser.add_argument("--quick", action="store_true", help="about a minute instead of about four")
    parser.add_argument(
        "--model",
        choices=("tiny", "smollm2"),
        default="tiny",
        help="tiny: 0.7M parameters, made on the spot. smollm2: SmolLM2-135M-Instruct, a few steps",
    )
    parser.add_argument("--task", help="a reasoning-gym task with short answers (default: one that suits the model)")
    parser.add_argument("--steps", type=int, help="training steps of each method")
    parser.add_argument("--seed", type=int, default=0, help="of the data, the model, the batches and the sampling")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/demo"), help="for the plot, the JSON, the model")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """
    Run the demo, print its table and write `demo.json` and `demo.png` to `args.output_dir`.

    Returns:
        What the JSON holds: settings, evaluations, a summary per method and every logged step.
    """
    began = time.perf_counter()
    settings = PRESETS[args.model, args.quick]
    settings = replace(
        settings, task=args.task or settings.task, steps=settings.steps if args.steps is None else args.steps
    )
    if settings.steps < 1:
        raise ValueError(f"`--steps` must be at least 1, got {settings.steps}.")
    task_config = TASKS[args.model].get(settings.task, {})
    args.output_dir.mkdir(parents=True, exist_ok=True)
    with quiet():
        train, held_out = train_and_held_out(
            settings.task,
            settings.num_train,
            settings.num_held_out,
            args.seed,
            **task_config,
        )
        folder = args.output_dir / args.model
        warm = _prepare_model(args.model, folder, train, settings, args.seed)
        evaluations = {"before": _evaluate(_load(folder), folder, held_out, settings, args.seed)}
        histories = {}
        for method in ("GRPO", "GCPO"):
            trainer = _train(method, folder, train, settings, args)
            histories[method] = [entry for entry in trainer.state.log_history if "reward" in entry]
            evaluations[method] = _evaluate(trainer.model, folder, held_out, settings, args.seed)
            del trainer
    result = {
        "model": args.model,
        "seed": args.seed,
        "settings": asdict(settings),
        "task_config": task_config,
        "warm_start": warm,
        "evaluations": {name: asdict(value) for name, value in evaluations.items()},
        "summary": summarize(histories),
        "seconds_total": time.perf_counter() - began,
        "environment": {
            "gcpo": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "trl": trl.__version__,
            "python": platform.python_version(),
            "machine": platform.machine(),
            "threads": torch.get_num_threads(),
        },
        "history": histories,
    }
    (args.output_dir / "demo.json").write_text(json.dumps(result, indent=1) + "\n")
    save_overview([Run(name, log=log) for name, log in histories.items()], args.output_dir / "demo.png")
    print_table(result)
    print(f"\nNumbers: {args.output_dir / 'demo.json'}   Plot: {args.output_dir / 'demo.png'}")
    print(f"A page with samples: gcpo report {args.output_dir}")
    return result


def _prepare_model(name: str, folder: Path, train: Dataset, settings: Settings, seed: int) -> dict[str, Any] | None:
    """Put the checkpoint that both methods start from into `folder`; what the warm start did, if there was one."""
    if name == "smollm2":
        if not (folder / "config.json").exists():
            print("Unpacking SmolLM2-135M-Instruct")
            save_smollm2(folder)
        return None
    tokenizer = tiny_tokenizer([prompt[-1]["content"] for prompt in train["prompt"]])
    model = tiny_model(tokenizer, seed)
    print(f"A model of {model.num_parameters() / 1e6:.2f}M parameters learns {settings.task!r} partway")
    done = warm_start(
        model,
        tokenizer,
        train,
        target=settings.warm_target,
        num_candidates=settings.num_generations,
        seed=seed,
    )
    if not done.reached_target:
        print(f"It got to pass@1 {done.pass_at_1:.2f} only: rewards may be too rare for either method to learn from.")
    save_tiny(model, tokenizer, folder)
    return asdict(done)


def _load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def _train(method: str, folder: Path, train: Dataset, settings: Settings, args: argparse.Namespace) -> GRPOTrainer:
    options: dict[str, Any] = {
        "output_dir": str(args.output_dir / method.lower()),
        "seed": args.seed,
        "max_steps": settings.steps,
        "learning_rate": settings.learning_rate,
        "lr_scheduler_type": "constant",
        "per_device_train_batch_size": settings.prompts_per_step * settings.num_generations,
        "num_generations": settings.num_generations,
        "max_completion_length": settings.completion_tokens,
        "beta": settings.beta,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": False,
        "logging_steps": 1,
        "log_completions": True,  # for `gcpo report`
        "num_completions_to_print": 0,
    }
    if method == "GCPO":
        options["num_colliders"] = settings.num_colliders
        options["collider_max_completion_length"] = settings.completion_tokens
        options.update(TINY_TEMPLATES if args.model == "tiny" else {})
    build, configure = (GCPOTrainer, GCPOConfig) if method == "GCPO" else (AccountedGRPOTrainer, GRPOConfig)
    trainer = build(
        _load(folder),
        reasoning_gym_reward,
        args=configure(**options),
        train_dataset=train,
        processing_class=AutoTokenizer.from_pretrained(folder),
    )
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(RewardProgress(method))
    trainer.train()
    return trainer


def _evaluate(model: Any, folder: Path, held_out: Dataset, settings: Settings, seed: int) -> EvalResult:
    return evaluate_pass_at_k(
        model,
        AutoTokenizer.from_pretrained(folder),
        held_out,
        reasoning_gym_reward,
        num_samples=settings.num_samples,
        max_new_tokens=settings.completion_tokens,
        batch_size=settings.eval_batch_size,
        seed=seed,
    )


if __name__ == "__main__":
    _parser = argparse.ArgumentParser(description=__doc__)
    add_arguments(_parser)
    run(_parser.parse_args())
