"""
One of the processes of a run on several: trains each of the runs asked for, evaluates, and saves model and metrics.
Started by `accelerate launch`, with a JSON list of runs; the tests call its functions for runs in one process.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from fixed_rollouts import FixedRollouts
from peft import LoraConfig
from tiny_policy import SHORT_TEMPLATES, count_low, options, prompts
from transformers import TrainerCallback

from gcpo import GCPOConfig, GCPOTrainer
from gcpo.run.leaving import leave

# Not the default, by which an adapter's product is zero until the second step: its reference is then another model.
ADAPTER = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", "init_lora_weights": False}


def build(
    policy: str,
    folder: Path,
    *,
    fixed: bool = True,
    cuts_off: bool = False,
    adapter: bool = False,
    lost: str = "",
    by_rank: dict[str, list] | None = None,
    **rest: Any,
) -> GCPOTrainer:
    """
    A trainer for two steps of plain SGD.

    Args:
        policy: folder of the model.
        fixed: whether rollouts depend on the prompts alone, or are sampled.
        cuts_off: of `FixedRollouts`.
        adapter: whether an adapter trains, and not the model.
        lost: what the process of rank 1 does instead of its second step: "killed", or "hangs".
        by_rank: options that differ between processes.
        **rest: options.
    """
    settings = {
        "optim": "sgd",
        "learning_rate": 0.5,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "shuffle_dataset": False,
        "kappa": 0.5,
        "beta": 0.1,
        "num_colliders": 3,
        "collider_max_completion_length": 5,
        # What is drawn must not depend on the number of processes.
        "context_attention": "full",
        "num_kl_contexts": 1,
        "kl_fraction": 0.5,
        "ddp_find_unused_parameters": False,
        **SHORT_TEMPLATES,
        **rest,
        **{name: values[int(os.environ.get("RANK", "0"))] for name, values in (by_rank or {}).items()},
    }
    torch.manual_seed(0)  # an adapter's parameters are drawn
    trainer = (CountedRows if fixed else GCPOTrainer)(
        model=policy,
        reward_funcs=count_low,
        args=GCPOConfig(**options(folder, **settings)),
        train_dataset=prompts(16),
        eval_dataset=prompts(4),
        callbacks=[LoseProcess(lost)] if lost else None,
        peft_config=LoraConfig(**ADAPTER) if adapter else None,
    )
    if fixed:
        trainer.cuts_off = cuts_off
    return trainer


def train(trainer: GCPOTrainer, folder: Path) -> None:
    """The steps, an evaluation, and the model, the logged metrics and the loss phase's options in `folder`."""
    trainer.train()
    put_away = [name for name, parameter in trainer.model.named_parameters() if not parameter.numel()]
    metrics = trainer.evaluate()
    trainer.save_model(str(folder / "model"))
    if isinstance(trainer, CountedRows):
        (folder / f"rows-{trainer.accelerator.process_index}.json").write_text(json.dumps(trainer.rows_read))
    if trainer.accelerator.is_main_process:
        history = [entry for entry in trainer.state.log_history if "loss" in entry]
        own = [trainer.fuses_loss, trainer.leaves_padding_out]
        found = {"train": history, "eval": metrics, "own": own, "put_away": put_away}
        (folder / "metrics.json").write_text(json.dumps(found))


class CountedRows(FixedRollouts):
    """Keeps how many rows the forwards of its losses read; only our own forwards are seen."""

    def __init__(self, *args: Any, **kwargs: Any):
        self.rows_read: list[int] = []
        super().__init__(*args, **kwargs)

    def _count_read(self, rows: Any) -> None:
        super()._count_read(rows)
        if self.model.training and torch.is_grad_enabled():
            self.rows_read.append(len(rows.ids))


class LoseProcess(TrainerCallback):
    """The process of rank 1 is killed, or hangs, after its first step."""

    def __init__(self, how: str):
        self.how = how

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if os.environ["RANK"] == "1":
            print("rank 1 is lost", flush=True)
            if self.how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(600)


def pretend_cpus_are_gpus(with_deepspeed: bool) -> None:
    """
    accelerate shards models (FSDP, DeepSpeed) on accelerators only, and its CPU path knows plain data parallelism only:
    let it take a CPU process for a GPU's, with gloo between them.
    """
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    PartialState._prepare_backend = lambda self, *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)
    if with_deepspeed:
        import deepspeed.comm.torch
        from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload

        deepspeed.comm.torch.build_shm_op = lambda: None  # compiled at first use, in minutes; gloo does as well
        # ZeRO-3 puts away large parameters only, and a model of this size has none.
        DeepSpeedZeRoOffload.mark_persistent_parameters = lambda self, *thresholds: []


def main() -> None:
    torch.set_num_threads(1)
    runs = json.loads(sys.argv[1])
    if not all(run["use_cpu"] for run in runs):
        by_launcher = os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"
        pretend_cpus_are_gpus(by_launcher or any("deepspeed" in run for run in runs))
    for run in runs:
        folder, refused = Path(run.pop("folder")), run.pop("refused", False)
        try:
            train(build(run.pop("policy"), folder, **run), folder)
        except ValueError as error:
            if not refused:
                raise
            (folder / f"refused-{os.environ['RANK']}.txt").write_text(str(error))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    leave()


if __name__ == "__main__":
    main()
