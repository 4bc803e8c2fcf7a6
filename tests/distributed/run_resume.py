"""Three steps with a checkpoint after each, and the last two of them again: with and without what one process kept."""

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from tiny_policy import SHORT_TEMPLATES, count_low, options, prompts

from gcpo import GCPOConfig, GCPOTrainer
from gcpo.run.leaving import leave


def train(policy: str, folder: Path, checkpoint: str | None = None) -> Any:
    """Losses, and the warnings about the checkpoint."""
    settings = {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "num_iterations": 2,  # the first checkpoint is in the middle of the updates that share a rollout
        "max_steps": 3,
        "beta": 0.5,
        "sync_ref_model": True,
        "ref_model_sync_steps": 1,
        "num_colliders": 2,
        "collider_max_completion_length": 4,
        "ddp_backend": "gloo",
        **({} if checkpoint else {"save_strategy": "steps", "save_steps": 1}),
    }
    config = GCPOConfig(**options(folder, **SHORT_TEMPLATES, **settings))
    trainer = GCPOTrainer(policy, count_low, args=config, train_dataset=prompts())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train(resume_from_checkpoint=checkpoint)
    told = [str(warning.message) for warning in caught if "made with other settings" in str(warning.message)]
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], told


def main() -> None:
    torch.set_num_threads(1)
    policy, folder = sys.argv[1], Path(sys.argv[2])
    checkpoint = folder / "out" / "checkpoint-1"
    found = [train(policy, folder), train(policy, folder, str(checkpoint))]
    torch.distributed.barrier()
    if torch.distributed.get_rank() == 0:
        (checkpoint / "gcpo_state_1.pt").unlink()
    torch.distributed.barrier()
    found.append(train(policy, folder, str(checkpoint)))
    (folder / f"found-{torch.distributed.get_rank()}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()
    leave()


if __name__ == "__main__":
    main()
