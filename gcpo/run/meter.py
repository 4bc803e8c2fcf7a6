"""Where a step's time and tokens go: a trainer that counts them and logs them per optimizer step."""

import json
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gcpo.causal.account import StepAccount
from gcpo.run.records import LOG, SAMPLES, append_line, groups_of_last_rollout, start_record
from gcpo.run.resume import ResumableGRPOTrainer

# TRL's table of completions, but for images: columns, and those that there are several of.
_COLUMNS = ("prompt", "completion", "advantages")
_GROUPED_COLUMNS = ("rewards", "extra")


class AccountedGRPOTrainer(ResumableGRPOTrainer):
    """
    TRL's GRPOTrainer, which also logs where its time and tokens go: `gcpo/seconds/PHASE` of the main process and
    `gcpo/tokens/KIND` of all processes, per optimizer step, and leaves a record of the run in its output folder
    (`gcpo.run.records`). GCPOTrainer builds on it; to compare the two, use it as is.

    Attributes:
        keeps_account: whether to do so. GCPOTrainer does with its causal parts on; with them off, only if this is set
            to True before training.
    """

    keeps_account = True
    _logs_are_of_training = False  # what TRL keeps for its completions table
    _resumed_colliders: list[list[str]] | None = None  # of a rollout that a checkpoint held

    @cached_property
    def _accounts(self) -> dict[bool, StepAccount]:
        """By whether the model is training: evaluation has counters of its own, which nothing reads."""
        return {True: StepAccount(), False: StepAccount()}

    @property
    def _account(self) -> StepAccount:
        return self._accounts[self.model.training]

    def _init_training_state(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        begins_at = super()._init_training_state(*args, **kwargs)
        step = self.state.global_step
        if self._writes_record and step < self.state.max_steps:  # a finished run has nothing to record
            folder, name = Path(self.args.output_dir), type(self).__name__
            start_record(folder, name, self.args.to_dict(), resumed=step > 0)
        return begins_at

    @property
    def _writes_record(self) -> bool:
        return self.keeps_account and self.is_world_process_zero()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        super().log(logs, start_time)
        if not self._writes_record:
            return
        folder = Path(self.args.output_dir)
        append_line(folder / LOG, self.state.log_history[-1])
        if self.log_completions and self._logs_are_of_training:
            groups = groups_of_last_rollout(self._logs, self.num_generations, self._collider_texts())
            append_line(folder / SAMPLES, {"step": self.state.global_step, "groups": groups})

    def _collider_texts(self) -> list[list[str]] | None:
        """The colliders of each prompt of the last rollout; None where there are none."""
        return self._resumed_colliders

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        self._logs_are_of_training = self.model.training
        return super()._generate_and_score_completions(inputs)

    def _generate(self, prompts: list[Any]) -> tuple:
        with self._account.phase("rollout"):
            result = super()._generate(prompts)
        self._account.add_tokens("generated", sum(map(len, result[1])))
        return result

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> torch.Tensor:
        with self._account.phase("rewards"):
            return super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)

    def _get_per_token_logps_and_entropies(
        self, model: nn.Module, input_ids: torch.Tensor, attention_mask: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple:
        call = super()._get_per_token_logps_and_entropies
        if torch.is_grad_enabled():
            self._account.add_tokens("trained", attention_mask.sum())
            self._account.add_tokens("trained_padding", (attention_mask == 0).sum())
            return call(model, input_ids, attention_mask, *args, **kwargs)
        self._account.add_tokens("scored_query", attention_mask.sum())
        with self._account.phase("scoring"):
            return call(model, input_ids, attention_mask, *args, **kwargs)

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        account = self._accounts[True]  # the model may be in evaluation mode until TRL sets it to training
        with account.phase("loss"):
            output = super().training_step(model, inputs, num_items_in_batch)
        if self._step % self.current_gradient_accumulation_steps == 0:
            seconds, tokens = account.flush()
            if not self.keeps_account:
                return output
            total = torch.tensor(list(tokens.values()), dtype=torch.float32, device=self.accelerator.device)
            total = self.accelerator.reduce(total, reduction="sum").tolist()
            for name, value in seconds.items():
                self._metrics["train"][f"gcpo/seconds/{name}"].append(value)
            for name, value in zip(tokens, total, strict=True):
                self._metrics["train"][f"gcpo/tokens/{name}"].append(value)
        return output

    def _state_of_cycle(self) -> dict[str, Any]:
        state = super()._state_of_cycle()
        if self.log_completions and state["rollout"] is not None:  # which is in the completions tables to come
            columns: dict[str, Any] = {name: list(self._logs[name]) for name in _COLUMNS}
            columns |= {name: {key: list(rows) for key, rows in self._logs[name].items()} for name in _GROUPED_COLUMNS}
            state["completions"] = json.dumps(
                [columns, self._logs_are_of_training, self._collider_texts()], default=str
            )
        return state

    def _load_state_of_cycle(self, state: dict[str, Any]) -> None:
        super()._load_state_of_cycle(state)
        if "completions" not in state:
            return
        columns, self._logs_are_of_training, self._resumed_colliders = json.loads(state["completions"])
        for name in _COLUMNS:
            self._logs[name].extend(columns[name])
        for name in _GROUPED_COLUMNS:
            for key, rows in columns[name].items():
                self._logs[name][key].extend(rows)
