"""Going on after a kill: what of TRL's trainer and of ours belongs in a checkpoint, and how a run goes on from it."""

import warnings
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import send_to_device
from transformers.trainer import TRAINER_STATE_NAME
from trl import GRPOTrainer

from gcpo.run.checkpoints import REFERENCE, check_same_model, last_complete_checkpoint, load_reference, save_reference
from gcpo.run.cycle import changed_settings, cycle_settings


class ResumableGRPOTrainer(GRPOTrainer):
    """
    TRL's GRPOTrainer, whose checkpoints also hold what a run needs to go on as if it had not stopped: where it is in
    the cycle of `steps_per_generation * num_iterations` micro-batches that share a rollout, that rollout if the
    cycle is not over, what was to be logged next, and the reference model where `sync_ref_model` moves it.
    `train(resume_from_checkpoint=True)` takes the newest whole checkpoint in `output_dir`.

    Where a setting that the cycle depends on is another one now, a run goes on as GRPOTrainer would: with a fresh
    rollout and a cycle that begins, after one warning that names the settings.

    vLLM keeps random states of its own, which no checkpoint holds: with it a resumed run is a valid one, not the same.
    """

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_complete_checkpoint(self.args.output_dir)
            if resume_from_checkpoint is None:
                raise ValueError(f"`resume_from_checkpoint=True`: no whole checkpoint in {self.args.output_dir!r}.")
        if resume_from_checkpoint:
            check_same_model(resume_from_checkpoint, self.accelerator.unwrap_model(self.model))
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _get_train_sampler(self, dataset: Any = None) -> Any:
        self._train_sampler = super()._get_train_sampler(dataset)
        return self._train_sampler

    def _init_training_state(
        self, max_steps: int, steps_per_epoch: int, num_epochs: int, *args: Any, **kwargs: Any
    ) -> tuple[int, int]:
        epochs_trained, steps_trained = super()._init_training_state(
            max_steps, steps_per_epoch, num_epochs, *args, **kwargs
        )
        finished = self.state.global_step >= max_steps
        # Where no completions are made, the table of the last step's is not to be written over.
        self.log_completions = self.args.log_completions and not finished
        if finished:  # no epoch is left to begin: `max_steps` is looked at after a step, so one more would be made
            return num_epochs, 0
        sampler = getattr(self, "_train_sampler", None)
        if sampler is not None:
            # It draws the order of every epoch from one stream, which a new process starts from its beginning.
            for _ in range(epochs_trained):
                next(iter(sampler), None)
        return epochs_trained, steps_trained

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        # A folder of this step that a killed run left must not look whole while it is written over.
        if self.args.should_save:
            folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
            (folder / TRAINER_STATE_NAME).unlink(missing_ok=True)
        super()._save_checkpoint(model, trial)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        torch.save(self._state_of_cycle(), self._own_state(output_dir))
        self._save_reference(Path(output_dir) / REFERENCE)
        # trainer_state.json comes next, and says that the checkpoint is whole: of all processes.
        self.accelerator.wait_for_everyone()

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)
        if checkpoint is None:
            return
        self._load_reference(Path(checkpoint) / REFERENCE)
        path = self._own_state(checkpoint)
        state = torch.load(path, weights_only=True, map_location="cpu") if path.is_file() else None
        continues = self._continues_cycle(checkpoint, state)
        if state is not None and continues:
            # Here, for torch.load knows no device "cpu:0", which accelerate names the CPUs of several processes.
            self._load_state_of_cycle(send_to_device(state, self.accelerator.device))
        else:
            self._step, self._buffered_inputs = 0, None

    def _state_of_cycle(self) -> dict[str, Any]:
        """What this process adds to a checkpoint."""
        cycle = self.args.steps_per_generation * self.num_iterations
        return {
            "settings": self._cycle_settings(),
            "step": self._step,
            "rollout": self._buffered_inputs if self._step % cycle else None,
            "metrics": dict(self._metrics["train"]),
            "loss": self._tr_loss,
            "last_logged": self._globalstep_last_logged,
            # TRL writes these after trainer_state.json, where a kill can come between.
            "entropy": (self.entropy_coef, self._last_world_entropy),
        }

    def _cycle_settings(self) -> dict[str, str]:
        return cycle_settings(self.args, self.accelerator.num_processes, self.reward_func_names)

    def _load_state_of_cycle(self, state: dict[str, Any]) -> None:
        self._step, self._buffered_inputs = state["step"], state["rollout"]
        self._metrics["train"].update(state["metrics"])
        self._tr_loss, self._globalstep_last_logged = state["loss"], state["last_logged"]
        if self.use_adaptive_entropy:
            self.entropy_coef, self._last_world_entropy = state["entropy"]

    def _continues_cycle(self, checkpoint: str, state: dict[str, Any] | None) -> bool:
        """Whether the run goes on within the cycle of a checkpoint: on all processes or on none."""
        changed = []
        if state is not None:
            saved, current = state.get("settings"), self._cycle_settings()
            changed = (
                ["it does not say with which"]  # of a release that did not keep them
                if saved is None
                else changed_settings(saved, current, keeps_rollout=state["rollout"] is not None)
            )
        stops = torch.tensor([state is None or bool(changed)], device=self.accelerator.device)
        if not self.accelerator.gather(stops).any():
            return True
        # One of TRL's own lacks what ours add, and promises nothing.
        if state is not None and self.accelerator.is_main_process:
            reason = "; ".join(changed) or "the state of another process is missing"
            warnings.warn(
                f"{checkpoint} was made with other settings: {reason}. The run goes on with a fresh rollout, as "
                "GRPOTrainer would, and not as if it had not stopped.",
                stacklevel=2,
            )
        return False

    def _save_reference(self, path: Path) -> None:
        if not self.args.sync_ref_model or not self.args.should_save:
            return
        if self._dist.is_fsdp or self._dist.is_zero3:
            warnings.warn(
                "`sync_ref_model` with sharded parameters (FSDP, DeepSpeed ZeRO-3): checkpoints do not hold the "
                "reference model. A resumed run would begin again with the one that training began with.",
                stacklevel=2,
            )
        else:
            save_reference(self.accelerator.unwrap_model(self.ref_model), path)

    def _load_reference(self, path: Path) -> None:
        if not self.args.sync_ref_model:
            return
        if path.is_file():
            load_reference(self.accelerator.unwrap_model(self.ref_model), path)
        elif self.accelerator.is_main_process:
            warnings.warn(
                f"{path.parent} does not hold the reference model that `sync_ref_model` moves: the run goes on with "
                "the one that training began with, as GRPOTrainer would.",
                stacklevel=2,
            )

    def _own_state(self, folder: str) -> Path:
        return Path(folder) / f"gcpo_state_{self.accelerator.process_index}.pt"
