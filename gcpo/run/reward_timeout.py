"""A time limit for reward functions: what has no reward in time has none, and training goes on."""

import asyncio
import functools
import signal
import threading
import warnings
from collections.abc import Callable
from types import FrameType
from typing import Any

from torch import nn

from gcpo._trl import get_callable_name, is_async_callable


class _TimeIsUp(BaseException):
    """Not an Exception, so that a reward function that catches everything and tries again does not catch it."""


def with_timeout(reward_func: Callable[..., Any], seconds: float) -> Callable[..., Any]:
    """
    `reward_func`, stopped when one call (one generation batch) takes longer than `seconds`.

    A call that is stopped gives None for each of its completions, with a warning: the trainer counts that as no reward,
    gives those completions advantage 0, and logs the share of groups without any as `gcpo/groups_without_reward`.

    A synchronous function is interrupted by a signal, as Ctrl-C would: Python code, sleeps and reads of sockets stop at
    once, an extension in C only when it returns (a regular expression that backtracks is one: what may hang in such
    code belongs in a process of its own). It must run in the main thread of a POSIX process, where trainers call
    reward functions. An asynchronous one is cancelled.

    Args:
        reward_func: a reward function as TRL takes it.
        seconds: > 0.

    Raises:
        TypeError: `reward_func` is not a function, or is a model, or `seconds` is not a number.
        ValueError: `seconds` is not above 0 and finite, or the platform has no signals to interrupt a thread with.
    """
    if isinstance(reward_func, nn.Module) or not callable(reward_func):  # TRL itself calls models
        raise TypeError(f"`reward_func` must be a function, not a model or its name, got {type(reward_func).__name__}.")
    if isinstance(seconds, bool) or not isinstance(seconds, int | float):
        raise TypeError(f"`seconds` must be a number, got {type(seconds).__name__}.")
    if not 0 < seconds < threading.TIMEOUT_MAX:
        raise ValueError(f"`seconds` must be finite and above 0, got {seconds}.")
    name = get_callable_name(reward_func)  # what its rewards are logged under

    def without_reward(completions: Any) -> list[None]:
        warnings.warn(
            f"The reward function '{name}' took longer than {seconds:g} s for {len(completions)} completions and was "
            "stopped: they count as having no reward.",
            stacklevel=3,
        )
        return [None] * len(completions)

    if is_async_callable(reward_func):

        @functools.wraps(reward_func)
        async def limited_async(*, completions: Any, **kwargs: Any) -> Any:
            try:
                return await asyncio.wait_for(reward_func(completions=completions, **kwargs), seconds)
            except TimeoutError:
                return without_reward(completions)

        limited_async.__name__ = name
        return limited_async
    # Not SIGALRM, which the functions themselves may use (math-verify does), nor one that a cluster sends to jobs.
    number = getattr(signal, "SIGRTMAX", None)
    if number is None:
        raise ValueError("`reward_func` cannot be given a time limit on a platform without real-time signals.")

    @functools.wraps(reward_func)
    def limited(*, completions: Any, **kwargs: Any) -> Any:
        if threading.current_thread() is not threading.main_thread():
            raise RuntimeError(f"`with_timeout` interrupts the main thread, and '{name}' was called from another one.")
        running = True

        def interrupt(signal_number: int, frame: FrameType | None) -> None:
            if running:
                raise _TimeIsUp

        before = signal.signal(number, interrupt)
        watch = threading.Timer(seconds, signal.pthread_kill, (threading.get_ident(), number))
        watch.daemon = True
        watch.start()
        try:
            return reward_func(completions=completions, **kwargs)
        except _TimeIsUp:
            return without_reward(completions)
        finally:
            running = False
            watch.cancel()
            watch.join()  # after it no signal comes, and the handler may go
            signal.signal(number, before)

    limited.__name__ = name
    return limited
