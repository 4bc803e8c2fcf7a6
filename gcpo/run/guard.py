"""Gradients that are not finite never reach a parameter."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

# So many steps in a row without a finite gradient: the model itself is broken, and no later step will mend it.
PATIENCE = 5


class SkipNonFiniteSteps(TrainerCallback):
    """
    Leaves out an optimizer step whose gradients hold NaN or inf: parameters and the optimizer's state stay as they are.

    One bad row (overflowing logits, a loss of inf) is enough to make every gradient NaN, and one such step to lose the
    model. A skipped step is warned of, with its number, and counted in `skipped`. All processes decide alike.

    Args:
        log: called at every step with "skipped_steps" and 1.0 or 0.0, whose mean is the share of steps left out.

    Raises:
        FloatingPointError: from `train()`, after `PATIENCE` such steps in a row.
    """

    def __init__(self, log: Callable[[str, float], None] | None = None) -> None:
        self.log = log
        self.skipped = 0
        self._in_a_row = 0

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if args.fp16:  # steps that overflow are part of loss scaling, and left out by it
            return
        model: torch.nn.Module = kwargs["model"]
        parameters = [(name, p) for name, p in model.named_parameters() if p.grad is not None]
        finite = [torch.isfinite(_local(p.grad)).all().to(args.device) for _, p in parameters]
        skip = _any_process(~torch.stack(finite).all() if finite else torch.zeros((), device=args.device))
        if self.log is not None:
            self.log("skipped_steps", float(skip))
        if not skip:
            self._in_a_row = 0
            return
        self.skipped += 1
        self._in_a_row += 1
        broken = [name for (name, _), is_finite in zip(parameters, finite, strict=True) if not is_finite]
        where = f"step {state.global_step + 1}: gradients that are not finite" + (
            f", in {len(broken)} of {len(parameters)} parameters, such as {broken[0]}" if broken else " elsewhere"
        )
        if self._in_a_row >= PATIENCE:
            raise FloatingPointError(
                f"{where}, for the {self._in_a_row}th step in a row. No such step was taken: the parameters are those "
                f"after step {state.global_step - self._in_a_row + 1}. Look for NaN or inf in the model's logits."
            )
        warnings.warn(f"{where}. This step is left out.", stacklevel=2)
        for _, parameter in parameters:
            parameter.grad = None  # optimizers pass over what has no gradient, their momentum included


def _local(x: Any) -> torch.Tensor:
    """This process's part of a gradient that may be a DTensor."""
    return x.to_local() if hasattr(x, "to_local") else x


def _any_process(mine: torch.Tensor) -> bool:
    """Whether it holds on any process."""
    flag = mine.float()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
    return bool(flag)
