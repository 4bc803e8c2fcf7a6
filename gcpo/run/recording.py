"""A run's record of itself: its options, every logged step and, if asked for, samples (gcpo/run/records.py)."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import trl
from transformers import TrainerCallback

from gcpo import __version__
from gcpo.run import records
from gcpo.run.redaction import redacted

if TYPE_CHECKING:
    from gcpo.run.meter import AccountedGRPOTrainer


class RunRecorder(TrainerCallback):
    """
    Writes what `gcpo report` and `gcpo diagnose` read, on the main process, while a run goes on, if its trainer keeps
    an account.
    """

    def __init__(self, trainer: "AccountedGRPOTrainer"):
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not (state.is_world_process_zero and self.trainer.keeps_account):
            return
        if state.global_step >= state.max_steps:  # nothing left to do or to record
            return
        folder = Path(args.output_dir)
        if state.global_step == 0:  # another run in the same folder starts over; a resumed one goes on
            for name in (records.LOG, records.SAMPLES):
                (folder / name).unlink(missing_ok=True)
        versions = {"gcpo": __version__, "trl": trl.__version__}
        options = redacted(args.to_dict())
        records.write_config(folder, {"trainer": type(self.trainer).__name__, "versions": versions, **options})

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero and state.log_history and self.trainer.keeps_account:
            records.append_line(Path(args.output_dir) / records.LOG, state.log_history[-1])


def groups_of_last_rollout(
    logs: dict[str, Any], num_generations: int, colliders: list[list[str]] | None
) -> list[dict[str, Any]]:
    """
    The prompts of a rollout from what TRL keeps for its completions table: for each its candidates with reward, A,
    Upsilon and B, and its colliders.

    Args:
        logs: the trainer's `_logs`; `advantages` are B.
        num_generations: n.
        colliders: L texts for each prompt; None for GRPO.
    """
    count = len(logs["prompt"])
    rewards = {name: list(values) for name, values in logs["rewards"].items()}
    extra = {name: list(values) for name, values in logs["extra"].items()}
    advantages = list(logs["advantages"])
    upsilon, plain = extra.get("upsilon"), extra.get("plain_advantage", advantages)
    completions, prompts = list(logs["completion"]), list(logs["prompt"])
    groups = []
    for start in range(0, count - num_generations + 1, num_generations):
        rows = range(start, start + num_generations)
        candidates = [
            {
                "text": text_of(completions[k]),
                "rewards": {name: values[k] for name, values in rewards.items()},
                "A": plain[k],
                "upsilon": upsilon[k] if upsilon else None,
                "B": advantages[k],
            }
            for k in rows
        ]
        shown = colliders[start // num_generations] if colliders and start // num_generations < len(colliders) else []
        groups.append({"prompt": text_of(prompts[start]), "candidates": candidates, "colliders": shown})
    return groups


def text_of(message: Any) -> str:
    """A prompt or completion as text, whether TRL holds it as text or as messages."""
    if isinstance(message, str):
        return message
    return "\n".join(str(part.get("content") or "") for part in message)
