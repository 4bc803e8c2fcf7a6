"""Datasets and reward functions as a command line names them. Nothing heavy is imported before it is named."""

import functools
import importlib
import inspect
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TASK_PREFIX = "reasoning_gym:"
TASK_REWARD = "reasoning_gym"
MATH_REWARD = "gcpo.evaluation.benchmarks.math_reward"
TRL_REWARDS = ("accuracy_reward", "reasoning_accuracy_reward", "think_format_reward", "get_soft_overlong_punishment")
# What a trainer passes to every reward function, and the columns that it keeps to itself.
_TRAINER_ARGS = {"prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric", "environments"}
_UNSEEN_COLUMNS = {"prompt", "completion", "completion_ids"}
_FILE_FORMATS = {"json": "json", "jsonl": "json", "csv": "csv", "parquet": "parquet", "txt": "text", "arrow": "arrow"}


class ArgumentsError(Exception):
    """What the user asked for cannot be done; the message says what to change."""


@contextmanager
def argument_errors() -> Iterator[None]:
    """Errors that reading and checking arguments raises, as ArgumentsError: they need no traceback."""
    try:
        yield
    except ImportError as error:
        if (error.name or "").split(".")[0] in ("gcpo", "gcpo_kernels"):
            raise
        hint = "; `pip install 'gcpo[train]'` brings what the commands need"
        raise ArgumentsError(f"{error}{hint if isinstance(error, ModuleNotFoundError) else ''}") from error
    except (ValueError, TypeError, OSError) as error:
        raise ArgumentsError(str(error)) from error


@dataclass
class TaskArguments:
    """How the items of `--dataset_name reasoning_gym:NAME` are made."""

    task_size: int = field(default=1000, metadata={"help": "reasoning_gym: number of items."})
    task_seed: int = field(
        default=0, metadata={"help": "reasoning_gym: seed of the items, of the held-out ones as well."}
    )
    task_config: str | None = field(
        default=None, metadata={"help": "reasoning_gym: settings of the task as JSON, e.g. '{\"max_terms\": 3}'."}
    )
    task_system_prompt: str | None = field(
        default=None,
        metadata={"help": "reasoning_gym: text before every question. Default: asks for <answer> tags; '' for none."},
    )
    task_conversational: bool = field(
        default=True,
        metadata={
            "help": "reasoning_gym and rows of `problem` and `answer`: prompts for the chat template; off: plain text."
        },
    )

    def options(self) -> dict[str, Any]:
        """Keyword arguments of `gcpo.evaluation.tasks.reasoning_gym_dataset`."""
        from gcpo.evaluation.tasks import SYSTEM_PROMPT

        prompt = SYSTEM_PROMPT if self.task_system_prompt is None else self.task_system_prompt
        fixed = {"seed": self.task_seed, "system_prompt": prompt or None, "conversational": self.task_conversational}
        settings = parse_task_config(self.task_config)
        for name in fixed.keys() & settings.keys():
            raise ValueError(f"`--task_config` must not hold {name!r}: use `--task_{name}`.")
        return {**fixed, **settings}


def parse_task_config(text: str | None) -> dict[str, Any]:
    """The settings in `--task_config`."""
    try:
        settings = json.loads(text) if text else {}
    except json.JSONDecodeError as error:
        raise ValueError(f"`--task_config` must be a JSON object, got {text!r} ({error}).") from error
    if not isinstance(settings, dict):
        raise ValueError(f"`--task_config` must be a JSON object, got {text!r}.")
    return settings


def is_task(name: str | None) -> bool:
    """Whether a dataset's name stands for a generated task."""
    return name is not None and name.startswith(TASK_PREFIX)


def load_task(name: str, args: TaskArguments, held_out_size: int = 0) -> tuple[Any, Any]:
    """
    The items of a generated task to train on, and `held_out_size` others, none of whose questions is among the former.
    The held-out items depend on the seed and their number alone.
    """
    from gcpo.evaluation.tasks import reasoning_gym_dataset, train_and_held_out

    task, options = name.removeprefix(TASK_PREFIX), args.options()
    try:
        if held_out_size == 0:
            return reasoning_gym_dataset(task, args.task_size, **options), None
        return train_and_held_out(task, args.task_size, held_out_size, **options)
    except (ValueError, TypeError) as error:
        raise type(error)(f"`--dataset_name {name}`: {error}") from error


def load_named(name: str, config: str | None = None, streaming: bool = False) -> Mapping[str, Any]:
    """The splits of a dataset: a folder written by `save_to_disk`, a data file or folder, or a name on the hub."""
    from datasets import Dataset, load_dataset, load_from_disk
    from datasets.exceptions import DatasetsError

    path = Path(name)
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        saved = load_from_disk(name)
        return {"train": saved} if isinstance(saved, Dataset) else saved
    if path.is_file():
        builder = _FILE_FORMATS.get(path.suffix.lstrip("."))
        if builder is None:
            endings = ", ".join(f".{ending}" for ending in _FILE_FORMATS)
            raise ValueError(f"`--dataset_name` must end in one of {endings} if it is a file, got {name!r}.")
        try:
            return load_dataset(builder, data_files=name, streaming=streaming)
        except (DatasetsError, OSError, ValueError, StopIteration) as error:
            # The reader of JSON says by an empty StopIteration that there is no row.
            reason = str(error.__cause__ or error) or "it holds no rows"
            raise ValueError(f"`--dataset_name`: cannot read {name!r} ({_one_line(reason)}).") from error
    if not path.exists() and (name.startswith((".", "/", "~")) or path.suffix.lstrip(".") in _FILE_FORMATS):
        raise FileNotFoundError(f"`--dataset_name`: there is no file or folder {name!r}.")
    try:
        return load_dataset(name, name=config, streaming=streaming)
    except (DatasetsError, OSError, ValueError) as error:
        raise ValueError(
            f"`--dataset_name` must be a dataset on the hub, a path, or {TASK_PREFIX}NAME, got {name!r} "
            f"({error.__cause__ if isinstance(error, DatasetsError) and error.__cause__ else error})."
        ) from error


def take_split(splits: Mapping[str, Any], flag: str, name: str) -> Any:
    """One split, or an error that says which there are."""
    if name not in splits:
        raise ValueError(f"`--{flag}` must be one of {', '.join(map(repr, splits))}, got {name!r}.")
    return splits[name]


def column_names(dataset: Any) -> list[str]:
    """The columns of a dataset; those of its first row where a stream does not know them before."""
    return list(dataset.column_names or next(iter(dataset), {}))


def ask_problems(dataset: Any, conversational: bool) -> Any:
    """
    Rows of `problem` and `answer` with the prompt that asks for it, and the answer as text; any other dataset as it is.

    Raises:
        ValueError: a row whose problem or answer is neither text nor a number; of a stream, when it comes up.
    """
    columns = set(column_names(dataset))
    if "prompt" in columns or not {"problem", "answer"} <= columns:
        return dataset
    from gcpo.evaluation.benchmarks import ask_math

    # Under another name first: a column of numbers would turn the text put into it back into numbers.
    given = "__given_answer"
    return dataset.rename_column("answer", given).map(
        lambda row, index: ask_math(
            {"problem": row["problem"], "answer": row[given]}, conversational, f"The dataset's row {index + 1}"
        ),
        with_indices=True,
        remove_columns=[given],
    )


def check_answers(dataset: Any, rewards: Iterable[Callable[..., Any]]) -> None:
    """Refuse a row without an answer where answers are compared as mathematics, before a completion is."""
    from gcpo.evaluation.benchmarks import as_text, math_reward

    if math_reward in rewards and hasattr(dataset, "__len__"):
        for number, answer in enumerate(dataset["answer"], 1):
            as_text(answer, "answer", f"The dataset's row {number}")


def check_output(path: str | Path) -> None:
    """Refuse a file that could not be written, before what is to be written to it has been worked out."""
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"`--output` must be a file, got the folder {str(path)!r}.")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"`--output` must be in a folder that exists, got {str(path)!r}.")
    existed = path.exists()
    try:
        path.open("a").close()
    except OSError as error:
        raise ValueError(f"`--output` must be a file that can be written, got {str(path)!r} ({error}).") from error
    if not existed:  # nothing is left behind where what follows fails
        path.unlink()


def check_model(name: str | None) -> str:
    """The model's name, unless it is missing or a path to nothing (which the hub would be asked for)."""
    if name is None:
        raise ValueError("`--model_name_or_path` is missing: a model's name on the hub, or a folder.")
    if (name.startswith((".", "/", "~")) or name.count("/") > 1) and not Path(name).exists():
        raise FileNotFoundError(f"`--model_name_or_path` must be a name on the hub or a folder, got {name!r}.")
    return name


def check_chat_template(tokenizer: Any, dataset: Any, model: str) -> None:
    """Refuse messages for a model that has no template to write them with, before the first step does."""
    first: dict[str, Any] = next(iter(dataset), {})
    if not isinstance(first.get("prompt"), list) or getattr(tokenizer, "chat_template", None) is not None:
        return
    try:  # tokenizers of mistral-common need no template
        tokenizer.apply_chat_template(first["prompt"], add_generation_prompt=True, tokenize=True, return_dict=True)
    except ValueError as error:
        raise ValueError(
            f"{model!r} has no chat template and the prompts are messages: choose an instruct model, or plain text "
            f"(for {TASK_PREFIX}NAME and for rows of problem and answer: --no_task_conversational)."
        ) from error


def load_reward(name: str) -> Callable[..., list[float]]:
    """A reward function by its name in `--reward_funcs`."""
    if name == TASK_REWARD:
        from gcpo.evaluation.tasks import reasoning_gym_reward

        return reasoning_gym_reward
    if name in TRL_REWARDS:
        import trl.rewards

        if name == "get_soft_overlong_punishment":  # the values of `trl grpo`
            return trl.rewards.get_soft_overlong_punishment(max_completion_len=1280, soft_punish_cache=256)
        return getattr(trl.rewards, name)
    if "/" in name or ":" in name or name.startswith(".") or name.endswith(".py"):
        raise ValueError(f"`--reward_funcs` must be a dotted path such as rewards.letters, not a file, got {name!r}.")
    module, dot, attribute = name.rpartition(".")
    if not dot:
        choices = ", ".join((*TRL_REWARDS, TASK_REWARD))
        raise ValueError(f"`--reward_funcs` must be one of {choices}, or a dotted path, got {name!r}.")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        reward = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"`--reward_funcs`: cannot import {name!r} ({error}).") from error
    if not callable(reward):
        raise TypeError(f"`--reward_funcs`: {name!r} must be a function, got {type(reward).__name__}.")
    return reward


def load_rewards(
    names: list[str] | None, dataset_name: str | None, columns: Iterable[str] | None, with_model: bool = False
) -> list[Callable[..., list[float]]]:
    """
    The reward functions of `--reward_funcs`. Where none is named: a generated task's own scorer, and math-verify for
    rows with an answer, unless they are judged `with_model`.

    Raises:
        ValueError: an unknown name, a function that asks for a column that the dataset does not have, or one that does
            not take all that it is passed.
        TypeError: a path to something that cannot be called.
    """
    given = set(columns) if columns is not None else None
    if not names:
        answers = "answer" in (given or ()) and not with_model
        names = [TASK_REWARD] if is_task(dataset_name) else [MATH_REWARD] if answers else []
    rewards = [load_reward(name) for name in names]
    passed = (_TRAINER_ARGS - {"environments"}) | ((given or set()) - _UNSEEN_COLUMNS)
    for name, reward in zip(names, rewards, strict=True):
        try:
            parameters = inspect.signature(reward).parameters
        except (TypeError, ValueError):  # of a callable in C
            continue
        extra = passed - set(parameters)
        if extra and all(parameter.kind is not parameter.VAR_KEYWORD for parameter in parameters.values()):
            raise ValueError(f"`--reward_funcs`: {name} must take **kwargs, it is passed {', '.join(sorted(extra))}.")
        wanted = {
            parameter.name
            for parameter in parameters.values()
            if parameter.default is parameter.empty
            and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        }
        missing = wanted - _TRAINER_ARGS - (given - _UNSEEN_COLUMNS) if given is not None else set()
        if given is not None and missing:
            raise ValueError(
                f"`--reward_funcs`: {name} needs the dataset's column {', '.join(sorted(missing))}; "
                f"it has {', '.join(sorted(given))}."
            )
    return rewards


def checked(reward: Callable[..., Any]) -> Callable[..., Any]:
    """`reward`, which stops the run with one line where it does not return a number, or None, for each completion."""
    from gcpo._trl import get_callable_name, is_async_callable

    name = get_callable_name(reward)  # what its rewards are logged under

    def check(returned: Any, completions: Any) -> list[float | None]:
        try:
            scores = [None if score is None else float(score) for score in returned]
        except (TypeError, ValueError):  # nothing to go through, or something in it is no number
            scores = []
        if len(scores) != len(completions):
            raise ArgumentsError(
                f"`--reward_funcs`: '{name}' must return a list with a number for each of {len(completions)} "
                f"completions, it returned {_one_line(repr(returned))[:200]}."
            )
        return scores

    call: Callable[..., Any]
    if is_async_callable(reward):

        @functools.wraps(reward)
        async def call(*, completions: Any, **kwargs: Any) -> Any:
            return check(await reward(completions=completions, **kwargs), completions)

    else:

        @functools.wraps(reward)
        def call(*, completions: Any, **kwargs: Any) -> Any:
            return check(reward(completions=completions, **kwargs), completions)

    call.__name__ = name
    return call


def _one_line(text: str) -> str:
    return " ".join(text.split())
