"""
The beds that studies compare methods on: prompts, rewards and the model that every run starts from. `tiny` is the
demo's, `integrating` has a model that was taught to integrate (`gcpo.study.sums`), `given` is the user's.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset

from gcpo.demo.tiny import TINY_TEMPLATES, save_tiny, tiny_model, tiny_tokenizer, warm_start
from gcpo.evaluation.rewards import load_rewards
from gcpo.evaluation.sources import TASK_PREFIX, is_task, load_named
from gcpo.evaluation.tasks import train_and_held_out
from gcpo.run.quiet import quiet
from gcpo.study import sums
from gcpo.study.rewards import open_ended_reward
from gcpo.study.scale import BEDS, StudyScale

Reward = Callable[..., list[float]]


@dataclass
class Bed:
    """
    What the runs of a study have in common.

    Attributes:
        train, held_out: rows with a column `prompt`, and what the rewards need.
        reward: scores completions; `open_ended` does where arms ask for a task without one right answer.
        dtype: that the model trains in, unless `model_init_kwargs` says otherwise.
        options: of every trainer.
        start: makes the starting model in a folder where it is not there yet, and names it as `from_pretrained` wants.
        shortest: tokens below which no completion can be right.
        made_from: what decides that model beside the scale: runs from another one are not taken for those from it.
    """

    train: Dataset
    held_out: Dataset
    reward: Reward
    open_ended: Reward
    dtype: str
    options: dict[str, Any] = field(default_factory=dict)
    start: Callable[[Path], str] = str
    shortest: int = 1
    made_from: dict[str, Any] | None = None


# Small models train on a CPU wherever they are. What their colliders are worth is always asked.
_SMALL = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "log_collider_reward": True}


def make_bed(scale: StudyScale) -> Bed:
    """
    The bed that a scale names.

    Raises:
        ValueError: there is no bed of this name; the user's model has no rewards.
    """
    if scale.model is not None:
        return _given(scale)
    if scale.bed not in BEDS:
        raise ValueError(f"`--bed` must be one of {', '.join(BEDS)}, got {scale.bed!r}.")
    return _integrating(scale) if scale.bed == "integrating" else _tiny(scale)


def _integrating(scale: StudyScale) -> Bed:
    if scale.dataset is not None or scale.reward is not None:
        raise ValueError(
            "`--bed integrating` has prompts and a reward of its own: no `--dataset_name`, no `--reward_funcs`."
        )
    recipe = sums.RECIPE
    rows = sums.dataset(scale.num_train + scale.num_held_out, seed=0)
    return Bed(
        rows.select(range(scale.num_train)),
        rows.select(range(scale.num_train, len(rows))),
        sums.reward,
        sums.rising_reward,
        "float32",
        {**_SMALL, **sums.OPTIONS},
        lambda folder: sums.start(folder / "start-integrating", recipe),
        sums.COMPLETION_TOKENS,
        asdict(recipe),
    )


def _tiny(scale: StudyScale) -> Bed:
    name = scale.dataset or f"{TASK_PREFIX}spell_backward"
    config: dict[str, Any] = {"min_word_len": 3, "max_word_len": 6} if scale.dataset is None else {}
    train, held_out = _prompts(scale, name, config)

    def start(folder: Path) -> str:
        made_from = {key: getattr(scale, key) for key in ("num_train", "num_held_out", "warm_target")}
        folder = folder / f"start-{digest({**made_from, 'dataset': scale.dataset})}"
        if not (folder / "tokenizer_config.json").exists():
            tokenizer = tiny_tokenizer([prompt[-1]["content"] for prompt in train["prompt"]])
            model = tiny_model(tokenizer)
            with quiet():
                warm_start(model, tokenizer, train, target=scale.warm_target, progress=False)
            save_tiny(model, tokenizer, folder)
        return str(folder)

    reward = _reward(scale, name)
    return Bed(train, held_out, reward, open_ended_reward, "float32", {**_SMALL, **TINY_TEMPLATES}, start)


def _given(scale: StudyScale) -> Bed:
    if scale.dataset is None:
        raise ValueError("`--dataset_name` is missing: with a model of yours, a study needs its prompts.")
    train, held_out = _prompts(scale, scale.dataset, {})
    reward = _reward(scale, scale.dataset)
    return Bed(train, held_out, reward, reward, "auto", start=lambda folder: str(scale.model))


def _reward(scale: StudyScale, name: str) -> Reward:
    rewards = load_rewards([scale.reward] if scale.reward else None, name, None)
    if not rewards:
        raise ValueError("`--reward_funcs` is missing.")
    return rewards[0]


def _prompts(scale: StudyScale, name: str, config: dict[str, Any]) -> tuple[Dataset, Dataset]:
    """Rows to train on and rows to measure on, of a task of reasoning-gym with these settings, or of a dataset."""
    if is_task(name):
        return train_and_held_out(name.removeprefix(TASK_PREFIX), scale.num_train, scale.num_held_out, 0, **config)
    splits = load_named(name)
    rows = splits["train"] if "train" in splits else next(iter(splits.values()))
    held_out = splits.get("test", rows.select(range(max(0, len(rows) - scale.num_held_out), len(rows))))
    if "test" not in splits:
        rows = rows.select(range(len(rows) - len(held_out)))
    return rows, held_out.select(range(min(scale.num_held_out, len(held_out))))


def digest(settings: Any) -> str:
    """A short name for settings: equal ones have equal names."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:12]
