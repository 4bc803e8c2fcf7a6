"""GRPO and GCPO from one checkpoint, with one seed, on a CPU: two runs, their held-out scores and what a step costs."""

import json
import statistics
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, ProgressCallback
from trl import GRPOConfig, GRPOTrainer

from gcpo import GCPOConfig, GCPOTrainer
from gcpo.causal.account import SECONDS, TOKENS
from gcpo.demo.settings import Scale
from gcpo.demo.tiny import TINY_TEMPLATES, save_smollm2, save_tiny, tiny_model, tiny_tokenizer, warm_start
from gcpo.evaluation.tasks import reasoning_gym_reward, train_and_held_out
from gcpo.reports.plots import save_overview
from gcpo.run.machine import environment
from gcpo.run.meter import AccountedGRPOTrainer
from gcpo.run.progress import StepProgress
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
class Settings(Scale):
    """One size of the demo, on a task of reasoning-gym."""

    task: str = "spell_backward"


_TINY = Settings(steps=120, prompts_per_step=16, num_colliders=4, num_held_out=256, warm_target=0.35)
_SMOLLM2 = Settings(
    task="chain_sum",
    steps=3,
    prompts_per_step=1,
    learning_rate=5e-6,
    num_held_out=24,
    num_samples=1,
    completion_tokens=32,
    num_train=64,
    warm_target=0.0,
    eval_batch_size=24,
)
# By model, and whether it is to be quick.
PRESETS = {
    ("tiny", False): _TINY,
    ("tiny", True): replace(_TINY, steps=32, prompts_per_step=8, num_colliders=2, num_held_out=128, warm_target=0.25),
    ("smollm2", False): _SMOLLM2,
    ("smollm2", True): replace(_SMOLLM2, steps=1, num_held_out=8),
}


class RewardProgress(StepProgress):
    """The progress with the reward beside it, in place of a line of metrics per step."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if self.training_bar is not None and "reward" in (logs or {}):
            self.training_bar.set_postfix(reward=f"{logs['reward']:.3f}")


def compare(name: str, settings: Settings, seed: int, output: Path) -> dict[str, Any]:
    """
    Train and measure both methods, and write `demo.json`, `demo.png`, the model and both runs to `output`.

    Args:
        name: "tiny" or "smollm2".
        settings: how much to do.
        seed: of the data, the model, the batches and the sampling.
        output: folder, made where it is missing.

    Returns:
        What the JSON holds: settings, evaluations, a summary per method and every logged step.

    Raises:
        ValueError: fewer than one step, or an unknown task.
    """
    began = time.perf_counter()
    if settings.steps < 1:
        raise ValueError(f"`--steps` must be at least 1, got {settings.steps}.")
    task_config = TASKS[name].get(settings.task, {})
    output.mkdir(parents=True, exist_ok=True)
    folder = output / name
    with quiet():
        train, held_out = train_and_held_out(
            settings.task, settings.num_train, settings.num_held_out, seed, **task_config
        )
        warm = _prepare_model(name, folder, train, settings, seed)
        before = settings.measure(_load(folder), folder, held_out, reasoning_gym_reward, seed)
        evaluations, histories = {"before": asdict(before)}, {}
        for method in ("GRPO", "GCPO"):
            options = settings.trainer_options(output / method.lower(), seed)
            if method == "GCPO":
                options |= settings.causal_options() | (TINY_TEMPLATES if name == "tiny" else {})
            trainer = _train(method, options, folder, train)
            histories[method] = [entry for entry in trainer.state.log_history if "reward" in entry]
            after = settings.measure(trainer.model, folder, held_out, reasoning_gym_reward, seed)
            evaluations[method] = asdict(after)
            del trainer
    result = {
        "model": name,
        "seed": seed,
        "settings": asdict(settings),
        "task_config": task_config,
        "warm_start": warm,
        "evaluations": evaluations,
        "summary": summarize(histories),
        "seconds_total": time.perf_counter() - began,
        "environment": environment(),
        "history": histories,
    }
    (output / "demo.json").write_text(json.dumps(result, indent=1) + "\n")
    save_overview([Run(method, log=log) for method, log in histories.items()], output / "demo.png")
    return result


def summarize(histories: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """
    Per method, from one dict of metrics per step: the last reward, medians over steps of the time of a step and of its
    phases (seconds; the first step, which warms up, is left out of longer runs) and of its tokens, and the ratio of
    step times GCPO / GRPO.
    """
    summary: dict[str, Any] = {}
    for method, history in histories.items():
        settled = Run(method, log=history[1:] if len(history) > 2 else history)
        last = history[-10:]
        summary[method] = {
            "last_reward": statistics.fmean(step["reward"] for step in last),
            "last_reward_steps": len(last),
            "step_seconds": settled.median("step_time"),
            "seconds": {name: settled.median(f"gcpo/seconds/{name}") for name in SECONDS},
            "tokens": {name: settled.median(f"gcpo/tokens/{name}") for name in TOKENS},
        }
    times = [summary.get(method, {}).get("step_seconds") for method in ("GCPO", "GRPO")]
    summary["overhead"] = times[0] / times[1] if all(times) else None
    return summary


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
    target, candidates = settings.warm_target, settings.num_generations
    done = warm_start(model, tokenizer, train, target=target, num_candidates=candidates, seed=seed)
    if not done.reached_target:
        print(f"It got to pass@1 {done.pass_at_1:.2f} only: rewards may be too rare for either method to learn from.")
    save_tiny(model, tokenizer, folder)
    return asdict(done)


def _load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def _train(method: str, options: dict[str, Any], folder: Path, train: Dataset) -> GRPOTrainer:
    build, configure = (GCPOTrainer, GCPOConfig) if method == "GCPO" else (AccountedGRPOTrainer, GRPOConfig)
    on_cpu: dict[str, Any] = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False}
    for_report: dict[str, Any] = {"log_completions": True, "num_completions_to_print": 0}
    trainer = build(
        _load(folder),
        reasoning_gym_reward,
        args=configure(**options, **on_cpu, **for_report, disable_tqdm=False),
        train_dataset=train,
        processing_class=AutoTokenizer.from_pretrained(folder),
    )
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(RewardProgress(method))
    trainer.train()
    return trainer
