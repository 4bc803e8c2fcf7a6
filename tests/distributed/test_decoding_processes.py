"""Decoding after keys and values on two processes, whole models and sharded ones."""

import importlib.util
from pathlib import Path

import pytest
from launching import launch
from test_layouts import accelerate
from tiny_policy import save_policy

needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed")


@pytest.mark.slow
@pytest.mark.parametrize("config", ["ddp", "fsdp2", pytest.param("zero3", marks=needs_deepspeed)])
def test_processes_decode_together(config: str, tmp_path: Path) -> None:
    """However much each has to read, and whatever ends first on it."""
    policy = save_policy(tmp_path / "policy")
    out = launch(accelerate(config), "run_decoding.py", policy, str(tmp_path / "run"), config)
    assert out.count("decoded:") == 1
