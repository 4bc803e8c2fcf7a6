"""How far a phase has come: a bar on a terminal, and no more than ten lines in a log."""

import sys
import time
from typing import Any

from tqdm.auto import tqdm
from tqdm.notebook import tqdm_notebook
from transformers import ProgressCallback
from transformers.trainer_utils import has_length

_PARTS = 10


class ProgressLines:
    """What this package uses of tqdm's bars, as a line for every tenth of `total`, and one where it ends before."""

    def __init__(self, total: int, desc: str, unit: str):
        self.total, self.desc, self.unit = total, desc, unit
        self.n = self._shown = 0
        self._postfix = ""
        self._begun = time.perf_counter()

    def __enter__(self) -> "ProgressLines":
        return self

    def __exit__(self, *exception: Any) -> None:
        self.close()

    def update(self, n: int = 1) -> None:
        before, self.n = self.n, self.n + n
        if self.total and _PARTS * self.n // self.total > _PARTS * before // self.total:
            self._show()

    def set_description(self, desc: str) -> None:
        self.desc = desc

    def set_postfix(self, **values: Any) -> None:
        self._postfix = "".join(f", {name} {value}" for name, value in values.items())

    def write(self, text: str) -> None:
        print(text, flush=True)

    def close(self) -> None:
        if self.n > self._shown:
            self._show()

    def _show(self) -> None:
        self._shown = self.n
        seconds = time.perf_counter() - self._begun
        done = f"{self.desc}: {self.n} of {self.total} {self.unit}s, {seconds:.0f} s{self._postfix}"
        print(done, file=sys.stderr, flush=True)


def progress_bar(total: int, desc: str, unit: str, disable: bool = False, leave: bool = True) -> Any:
    """
    A bar of tqdm's on a terminal and in a notebook, `ProgressLines` elsewhere: a bar that cannot go back to the start
    of its line adds one each time it is drawn. With `disable`, a bar that shows nothing.
    """
    if disable or sys.stderr.isatty() or issubclass(tqdm, tqdm_notebook):
        return tqdm(total=total, desc=desc, unit=unit, disable=disable, leave=leave, dynamic_ncols=True)
    return ProgressLines(total, desc, unit)


class StepProgress(ProgressCallback):
    """transformers' progress of a training and of its evaluations, by `progress_bar`."""

    def __init__(self, name: str = "training"):
        super().__init__()
        self.name = name
        self.training_bar: Any = None
        self.prediction_bar: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.training_bar = progress_bar(state.max_steps, self.name, "step")
        self.current_step = 0

    def on_prediction_step(
        self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero and has_length(eval_dataloader) and self.prediction_bar is None:
            leave = self.training_bar is None
            self.prediction_bar = progress_bar(len(eval_dataloader), "evaluation", "step", leave=leave)
        super().on_prediction_step(args, state, control, eval_dataloader, **kwargs)
