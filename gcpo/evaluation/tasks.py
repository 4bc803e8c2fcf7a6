"""reasoning-gym tasks as TRL datasets, with their verifiers as reward functions."""

import difflib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import fields
from functools import lru_cache
from typing import Any

from datasets import Dataset
from reasoning_gym.factory import DATASETS, create_dataset

Completion = str | list[dict[str, Any]]

SYSTEM_PROMPT = "Answer the question. Put the final answer, and nothing else, between <answer> and </answer>."

# reasoning-gym draws item i from Random(seed + i): neighbouring seeds share all but one of their items.
HELD_OUT_SEED_OFFSET = 2**24

_NUMBER = re.compile(r"(?<![\w.])-?\d+(?:,\d{3})*(?:\.\d+)?")
_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL | re.IGNORECASE)


def reasoning_gym_dataset(
    name: str,
    size: int,
    seed: int = 0,
    *,
    conversational: bool = True,
    system_prompt: str | None = None,
    **task_config: Any,
) -> Dataset:
    """
    The first `size` items of a reasoning-gym task, as a dataset that a TRL trainer takes.

    Args:
        name: a task of reasoning-gym, for example `"chain_sum"`.
        size: number of rows. Items may repeat; `train_and_held_out` gives distinct ones.
        seed: item i depends on `seed + i` alone, so that nearby seeds overlap.
        conversational: prompts as message lists (for chat models) rather than as text.
        system_prompt: put before every question; its own message when conversational.
        **task_config: options of the task, for example `max_terms=3`.

    Returns:
        Columns `prompt` (list of messages, or str), `answer` (str; empty where a task has no single right answer),
        `task` (str) and `entry` (str, JSON: what `reasoning_gym_reward` needs).

    Raises:
        ValueError: unknown task, or a size below 1, or option values that the task refuses.
        TypeError: an option that the task does not have.
    """
    if size < 1:
        raise ValueError(f"`size` must be at least 1, got {size}.")
    items = _items(name, seed, size, task_config)
    return _as_dataset(name, list(items), conversational, system_prompt, task_config)


def train_and_held_out(
    name: str,
    num_train: int,
    num_held_out: int,
    seed: int = 0,
    *,
    conversational: bool = True,
    system_prompt: str | None = None,
    **task_config: Any,
) -> tuple[Dataset, Dataset]:
    """
    Two datasets as `reasoning_gym_dataset` makes them, drawn from distant seeds, in which no question occurs twice,
    within either or across both.

    Raises:
        ValueError: as `reasoning_gym_dataset`, and when the task has too few distinct questions.
    """
    seen: set[str] = set()
    held_out = _distinct(name, "num_held_out", num_held_out, seed + HELD_OUT_SEED_OFFSET, task_config, seen)
    train = _distinct(name, "num_train", num_train, seed, task_config, seen)
    return (
        _as_dataset(name, train, conversational, system_prompt, task_config),
        _as_dataset(name, held_out, conversational, system_prompt, task_config),
    )


def _distinct(
    name: str, count_name: str, wanted: int, seed: int, task_config: dict[str, Any], seen: set[str]
) -> list[dict[str, Any]]:
    """Items of a task whose questions are not in `seen`, and are added to it."""
    if wanted < 1:
        raise ValueError(f"`{count_name}` must be at least 1, got {wanted}.")
    chosen: list[dict[str, Any]] = []
    for item in _items(name, seed, 20 * wanted, task_config):
        if item["question"] not in seen:
            seen.add(item["question"])
            chosen.append(item)
        if len(chosen) == wanted:
            return chosen
    raise ValueError(
        f"`{count_name}` asks for {wanted} distinct questions of {name!r}, which gave {len(chosen)} in "
        f"{20 * wanted} draws; ask for fewer, or for a harder setting of the task."
    )


def extract_answer(text: str, reference: str = "") -> str:
    """
    The part of a completion that a verifier judges, stripped: what stands in the last `<answer>...</answer>`. Without
    one it depends on the right answer, `reference`: if that is a number, the last number of the text; if it has
    several lines, the whole text; otherwise the last line that is not empty.
    """
    tagged = _ANSWER.findall(text)
    if tagged:
        return tagged[-1].strip()
    text = text.strip()
    if _NUMBER.fullmatch(reference.strip()):
        numbers = _NUMBER.findall(text)
        return numbers[-1].replace(",", "") if numbers else ""
    return text if "\n" in reference.strip() else text[text.rfind("\n") + 1 :].strip()


def reasoning_gym_reward(
    completions: list[Completion], task: list[str], entry: list[str], **kwargs: Any
) -> list[float]:
    """
    Score completions with the verifiers of their tasks. A TRL reward function.

    Args:
        completions: B texts, or B lists of messages, of which the last one is judged.
        task: B task names (the dataset's column).
        entry: B JSON strings (the dataset's column).
        **kwargs: ignored; TRL passes the other columns.

    Returns:
        B scores, 1.0 for a right answer. Many tasks give part of it to a nearly right one. The answer is found as
        `extract_answer` says; one that the verifier fails on scores 0.
    """
    scores = []
    for completion, name, packed in zip(completions, task, entry, strict=True):
        content = json.loads(packed, object_hook=_untag)
        item = content["item"]
        scorer = _scorer(name, json.dumps(_tag(content["config"]), sort_keys=True))
        try:
            scores.append(float(scorer(extract_answer(judged_text(completion), item["answer"] or ""), item)))
        except Exception:  # some verifiers raise on an answer that they cannot parse
            scores.append(0.0)
    return scores


def _items(name: str, seed: int, size: int, task_config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    source = _source(name, seed=seed, size=size, **task_config)
    return (source[index] for index in range(size))


def _source(name: str, **options: Any) -> Any:
    if name not in DATASETS:
        close = difflib.get_close_matches(str(name), DATASETS, n=3, cutoff=0.5)
        hint = f"Did you mean {' or '.join(map(repr, close))}?" if close else f"It has {len(DATASETS)} tasks."
        raise ValueError(f"`name` must be a task of reasoning-gym, got {name!r}. {hint}")
    known = {field.name for field in fields(DATASETS[name][1])}
    unknown = sorted(set(options) - known)
    if unknown:
        raise TypeError(f"{name!r} has no option {', '.join(unknown)}; it has {', '.join(sorted(known))}.")
    try:
        return create_dataset(name, **options)
    except AssertionError as error:
        raise ValueError(f"{name!r} refuses the options {options}: {error}") from error


@lru_cache(maxsize=256)
def _scorer(name: str, config: str) -> Callable[[str, dict[str, Any]], float]:
    return _source(name, **json.loads(config, object_hook=_untag)).score_answer


def _as_dataset(
    name: str, items: list[dict[str, Any]], conversational: bool, system_prompt: str | None, task_config: dict[str, Any]
) -> Dataset:
    rows = []
    for item in items:
        prompt = as_prompt(item["question"], conversational, system_prompt)
        entry = json.dumps(_tag({"item": item, "config": task_config}))
        rows.append({"prompt": prompt, "answer": item["answer"] or "", "task": name, "entry": entry})
    return Dataset.from_list(rows)


def as_prompt(question: str, conversational: bool, system_prompt: str | None = None) -> Completion:
    """A question as messages for a chat template, or as text."""
    if conversational:
        system = [{"role": "system", "content": system_prompt}] if system_prompt else []
        return [*system, {"role": "user", "content": question}]
    return f"{system_prompt}\n\n{question}" if system_prompt else question


def judged_text(completion: Completion) -> str:
    """The text of a completion, or of its last message."""
    return completion if isinstance(completion, str) else completion[-1].get("content") or ""


# JSON has neither tuples nor keys other than strings, and some verifiers compare with what they stored.
def _tag(value: Any) -> Any:
    if isinstance(value, dict):
        if all(isinstance(key, str) for key in value):
            return {key: _tag(inner) for key, inner in value.items()}
        return {"__pairs__": [[_tag(key), _tag(inner)] for key, inner in value.items()]}
    if isinstance(value, tuple):
        return {"__tuple__": [_tag(inner) for inner in value]}
    return [_tag(inner) for inner in value] if isinstance(value, list) else value


def _untag(value: dict[str, Any]) -> Any:
    if "__tuple__" in value:
        return tuple(value["__tuple__"])
    return dict(value["__pairs__"]) if "__pairs__" in value else value
