"""Reward functions as a command line names them."""

import functools
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Iterable
from typing import Any

from gcpo.evaluation.sources import is_task
from gcpo.run.inputs import ArgumentsError, one_line

TASK_REWARD = "reasoning_gym"
MATH_REWARD = "gcpo.evaluation.benchmarks.math_reward"
TRL_REWARDS = ("accuracy_reward", "reasoning_accuracy_reward", "think_format_reward", "get_soft_overlong_punishment")
# What a trainer passes to every reward function, and the columns that it keeps to itself.
_PASSED = {"prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric"}
_UNSEEN_COLUMNS = {"prompt", "completion", "completion_ids"}


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
    for name, reward in zip(names, rewards, strict=True):
        _check_signature(name, reward, given)
    return rewards


def _check_signature(name: str, reward: Callable[..., Any], columns: set[str] | None) -> None:
    try:
        parameters = inspect.signature(reward).parameters.values()
    except (TypeError, ValueError):  # of a callable in C
        return
    passed = _PASSED | ((columns or set()) - _UNSEEN_COLUMNS)
    extra = passed - {parameter.name for parameter in parameters}
    if extra and all(parameter.kind is not parameter.VAR_KEYWORD for parameter in parameters):
        raise ValueError(f"`--reward_funcs`: {name} must take **kwargs, it is passed {', '.join(sorted(extra))}.")
    wanted = {
        parameter.name
        for parameter in parameters
        if parameter.default is parameter.empty
        and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    }
    missing = wanted - passed - {"environments"}
    if columns is not None and missing:
        raise ValueError(
            f"`--reward_funcs`: {name} needs the dataset's column {', '.join(sorted(missing))}; "
            f"it has {', '.join(sorted(columns))}."
        )


def check_answers(dataset: Any, rewards: Iterable[Callable[..., Any]]) -> None:
    """Refuse a row without an answer where answers are compared as mathematics, before a completion is."""
    from gcpo.evaluation.benchmarks import as_text, math_reward

    if math_reward in rewards and hasattr(dataset, "__len__"):
        for number, answer in enumerate(dataset["answer"], 1):
            as_text(answer, "answer", f"The dataset's row {number}")


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
                f"completions, it returned {one_line(repr(returned))[:200]}."
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
