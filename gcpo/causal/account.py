"""Counters of where a step's time and tokens go."""

import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch

# GRPO's phases and GCPO's. "loss" is the policy's forward and backward; the optimizer runs outside all of them.
SECONDS = ("rollout", "rewards", "scoring", "colliders", "collider_rewards", "contexts", "loss")
TOKENS = (
    "generated",
    "scored_query",
    "trained",
    "trained_padding",  # positions that the forward with gradient reads beside
    "generated_colliders",
    "generated_contexts",
    "scored_colliders",
    "scored_contexts",
)


class StepAccount:
    """
    Seconds and tokens per phase since the last `flush`, of this process.

    Phases nest: time spent in an inner one is not counted for the outer one. What another thread does meanwhile is
    counted by none, because the thread that entered the outermost one spends that time on something else.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.tokens: dict[str, torch.Tensor | int] = defaultdict(int)
        self._inner = [0.0]
        self._thread: int | None = None  # which is in a phase

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        if len(self._inner) == 1:
            self._thread = threading.get_ident()
        elif threading.get_ident() != self._thread:
            yield
            return
        _synchronize()
        start = time.perf_counter()
        self._inner.append(0.0)
        try:
            yield
        finally:
            _synchronize()
            elapsed = time.perf_counter() - start
            self.seconds[name] += elapsed - self._inner.pop()
            self._inner[-1] += elapsed

    def add_tokens(self, name: str, count: torch.Tensor | int) -> None:
        """`count` may stay on its device: it is read at the next `flush`, without a sync here."""
        self.tokens[name] = self.tokens[name] + count

    def flush(self) -> tuple[dict[str, float], dict[str, float]]:
        """All seconds and tokens, zeros included, and a fresh start."""
        seconds = {name: self.seconds[name] for name in SECONDS}
        tokens = {name: float(self.tokens[name]) for name in TOKENS}
        self.seconds.clear()
        self.tokens.clear()
        return seconds, tokens


def _synchronize() -> None:
    """Wait for the accelerator, if there is one: otherwise a phase would be charged for the one before it."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
