"""The same data on one or two processes, in one or two micro-batches: the same gradients."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_policy import save_policy, worst_difference

# (processes, micro-batches): 8 rows, two groups of 4, a step. In the last, every group straddles both processes and
# both micro-batches.
LAYOUTS = [(1, 1), (1, 2), (2, 1), (2, 2)]


def launch(processes: int, policy: str, out: Path, settings: dict) -> dict:
    arguments = [str(Path(__file__).with_name("run_layout.py")), policy, str(out), json.dumps(settings)]
    command = [sys.executable]
    if processes > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command += ["-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--master-port", str(port)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run([*command, *arguments], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(out, weights_only=True)


@pytest.mark.slow
@pytest.mark.parametrize("changed", [{"loss_type": "dapo"}, {"loss_type": "grpo", "estimator": "scored"}])
def test_layouts_give_the_same_gradients(changed, tmp_path):
    policy = save_policy(tmp_path / "policy")
    results = []
    for processes, micro in LAYOUTS:
        settings = {
            **changed,
            "per_device_train_batch_size": 8 // processes // micro,
            "gradient_accumulation_steps": micro,
        }
        results.append(launch(processes, policy, tmp_path / f"{processes}x{micro}.pt", settings))
    reference = results[0]["gradients"]
    assert all(gradient.abs().max() > 1e-4 for gradient in reference.values())
    for layout, result in zip(LAYOUTS, results, strict=True):
        assert worst_difference(reference, result["gradients"]) < 1e-5, layout
        names = ["gcpo/upsilon/mean", "reward", "gcpo/tokens/generated", "gcpo/tokens/generated_colliders"]
        if layout[1] == 1:  # like TRL's own, it is a mean of means where there are several micro-batches
            names.append("gcpo/kl_causal")
        for name in names:
            ours, theirs = result["history"][0][name], results[0]["history"][0][name]
            assert ours == pytest.approx(theirs, rel=1e-4), (layout, name)
