"""
One of two processes that decode after keys and values in the middle of a training run, under the launcher's layout.
Started by test_decoding_processes.py with a model's folder and one for the run.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from run_layouts import build, pretend_cpus_are_gpus
from transformers import TrainerCallback

from gcpo.causal.port import Continuation
from gcpo.run.leaving import leave

# What each process decodes: as many rows, of which one has more in common and more to read than the other.
PROMPTS = (
    [[20, 21, 22, 23, 24], [20, 21, 22, 23, 24], [30, 31], [40, 41, 42, 43]],
    [[50, 51], [52, 53], [54, 55], [56, 57]],
)
GREEDY = ([False, True, False, True], [False] * 4)
SETTINGS: dict[str, Any] = {"limit": 9, "temperature": None}


class Check(TrainerCallback):
    """After the first step: decoding after the keys and values of prompts' beginnings gives what whole prompts give."""

    trainer: Any

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step != 1:
            return
        policy = self.trainer._policy
        mine, greedy = PROMPTS[policy.rank], GREEDY[policy.rank]
        with torch.no_grad():
            read = policy.read([Continuation([], ids[:1], 0) for ids in mine], keep=True)
        pieces = {ids[0]: one.own for ids, one in zip(mine, read, strict=True)}  # equal prompts share theirs
        rows = [Continuation([pieces[ids[0]]], ids[1:], 1) for ids in mine]
        found = []
        for flags in (None, greedy):
            got = policy.decode(rows, policy.rank, greedy=flags, **SETTINGS)
            assert got == policy.generate(mine, policy.rank, greedy=flags, **SETTINGS), (policy.rank, flags, got)
            found.append(got)
        assert [a != b for a, b in zip(*found, strict=True)] == greedy and policy.can_decode
        everyone = policy.gather_lists([found])
        if policy.rank == 0:
            print("decoded:", everyone, flush=True)


def main() -> None:
    torch.set_num_threads(1)
    policy, folder, config = sys.argv[1:]
    if config != "ddp":
        pretend_cpus_are_gpus(config == "zero3")
    rest = {"use_cpu": config == "ddp", "per_device_train_batch_size": 4, "gradient_checkpointing": True}
    trainer = build(policy, Path(folder), fixed=False, learning_rate=0.05, **rest)
    check = Check()
    check.trainer = trainer
    trainer.add_callback(check)
    trainer.train()
    torch.distributed.destroy_process_group()
    leave()


if __name__ == "__main__":
    main()
