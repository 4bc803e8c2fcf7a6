"""Reward functions beside the decoding of colliders (`overlap_rewards`), which a second thread does."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def beside(task: Callable[[], None], device: torch.device) -> Iterator[None]:
    """
    Run `task`, without gradients and on this device, in a thread while the body runs in this one; leave when both have
    ended. What the body raises is raised, otherwise what the task did.
    """
    errors: list[BaseException] = []

    def work() -> None:
        try:
            if device.type != "cpu" and device.index is not None:  # a new thread begins on the first device
                torch.accelerator.set_device_index(device.index)
            with torch.no_grad():
                task()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work, name="beside")
    thread.start()
    try:
        yield
    finally:
        thread.join()
    if errors:
        raise errors[0]


def against_overlap(args: Any, gathers_weights: str | None) -> str | None:
    """
    What keeps colliders from being decoded beside rewards, in words; None: nothing does. Generation in the second
    thread must not wait for other processes, which the main one does meanwhile.

    Args:
        args: the GCPOConfig of the run.
        gathers_weights: what gathers weights from all processes for every forward, if anything does.
    """
    if gathers_weights is not None:
        return f"{gathers_weights} gathers weights from all processes for every forward"
    if not args.use_vllm:
        return None
    if args.vllm_mode != "colocate":
        return f"`vllm_mode={args.vllm_mode!r}` gathers the prompts of all processes (`'colocate'` does not)"
    if args.vllm_tensor_parallel_size > 1:
        return f"`vllm_tensor_parallel_size={args.vllm_tensor_parallel_size}` gathers the prompts of several processes"
    if args.vllm_enable_sleep_mode:
        return "`vllm_enable_sleep_mode=True` puts the engine to sleep before rewards are computed"
    return None
