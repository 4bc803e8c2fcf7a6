"""Datasets as a command line names them. Nothing heavy is imported before it is named."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gcpo.run.inputs import one_line

TASK_PREFIX = "reasoning_gym:"
_FILE_FORMATS = {"json": "json", "jsonl": "json", "csv": "csv", "parquet": "parquet", "txt": "text", "arrow": "arrow"}


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
        wrong = f"`--task_config` must be a JSON object, got {self.task_config!r}"
        try:
            settings = json.loads(self.task_config) if self.task_config else {}
        except json.JSONDecodeError as error:
            raise ValueError(f"{wrong} ({error}).") from error
        if not isinstance(settings, dict):
            raise ValueError(f"{wrong}.")
        for name in fixed.keys() & settings.keys():
            raise ValueError(f"`--task_config` must not hold {name!r}: use `--task_{name}`.")
        return {**fixed, **settings}


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
            raise ValueError(f"`--dataset_name`: cannot read {name!r} ({one_line(reason)}).") from error
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


def load_splits(args: Any, mixture: Any, with_eval: bool) -> tuple[Any, Any | None]:
    """
    The training split and, with evaluation on, the held-out one.

    Args:
        args: TRL's ScriptArguments, with TaskArguments and `task_eval_size`.
        mixture: TRL's DatasetMixtureConfig; its datasets come before `args.dataset_name`.
        with_eval: whether a held-out split is needed.
    """
    if mixture.datasets:
        from trl import get_dataset

        splits = get_dataset(mixture)
    elif args.dataset_name is None:
        raise ValueError(f"`--dataset_name` is missing: a dataset's name or path, or {TASK_PREFIX}NAME.")
    elif is_task(args.dataset_name):
        return load_task(args.dataset_name, args, args.task_eval_size if with_eval else 0)
    else:
        splits = load_named(args.dataset_name, args.dataset_config, args.dataset_streaming)
    train = take_split(splits, "dataset_train_split", args.dataset_train_split)
    held_out = take_split(splits, "dataset_test_split", args.dataset_test_split) if with_eval else None
    return (
        ask_problems(train, args.task_conversational),
        None if held_out is None else ask_problems(held_out, args.task_conversational),
    )
