"""Output layers spread over two processes: a vocabulary divided by hand, weights divided by FSDP2 and ZeRO-3."""

import importlib.util
import sys

import pytest
from launching import launch

needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed")


@pytest.mark.slow
@pytest.mark.parametrize(
    "checks",
    [
        pytest.param(["vocabulary-torch", "vocabulary-triton", "dtensor", "fsdp2"], id="torch"),
        pytest.param(["zero3"], id="deepspeed", marks=needs_deepspeed),
    ],
)
def test_heads_on_two_processes(checks: list[str]) -> None:
    # Both backends in one run: Triton's interpreter must be chosen before Triton is imported, and torch ignores it.
    out = launch([sys.executable, "-m", "torch.distributed.run"], "run_heads.py", *checks, TRITON_INTERPRET="1")
    assert [line for line in out.splitlines() if line.startswith("passed")] == [f"passed: {name}" for name in checks]
