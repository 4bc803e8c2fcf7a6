"""The rows that `gcpo eval` measures on, and what judges their completions."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from gcpo.evaluation.rewards import check_answers, load_rewards
from gcpo.evaluation.sources import TaskArguments, ask_problems, is_task, load_named, load_task, take_split
from gcpo.run.prompts import check_prompts

BENCHMARK_PREFIX = "benchmark:"


def load_questions(
    name: str,
    task: TaskArguments,
    *,
    config: str | None = None,
    split: str | None = None,
    reward_func: str | None = None,
    data_dir: Path | None = None,
    allow_code: bool = False,
) -> tuple[Any, Callable[..., list[float]]]:
    """
    A dataset and its verifier.

    Args:
        name: `benchmark:NAME`, `reasoning_gym:NAME`, a path, or a name on the hub.
        task: how a task's items are made; all of them are held-out ones.
        reward_func: name of the verifier; the benchmark's or task's own when None.
        allow_code: whether a verifier may run programs.

    Raises:
        ValueError: there is no such dataset or verifier, or a row cannot be asked or judged.
    """
    if name.startswith(BENCHMARK_PREFIX):
        from gcpo.evaluation.benchmarks import BENCHMARKS, load_benchmark, verifier

        benchmark = name.removeprefix(BENCHMARK_PREFIX)
        own = None if reward_func or benchmark not in BENCHMARKS else verifier(benchmark, allow_code)
        dataset = load_benchmark(benchmark, data_dir, task.task_conversational)  # after what may be refused
        if own is not None:
            return dataset, own
    elif is_task(name):
        size, task.task_size = task.task_size, 1
        dataset = load_task(name, task, held_out_size=size)[1]
    else:
        splits = load_named(name, config)
        wanted = split or ("test" if "test" in splits or len(splits) > 1 else next(iter(splits)))
        dataset = ask_problems(take_split(splits, "dataset_test_split", wanted), task.task_conversational)
        check_prompts(dataset)
    rewards = load_rewards([reward_func] if reward_func else None, name, dataset.column_names)
    if not rewards:
        raise ValueError("`--reward_funcs` is missing.")
    check_answers(dataset, rewards)
    return dataset, rewards[0]
