"""A short run of the fuzzer on the Triton backend."""

import os

from fuzz import fuzz

SECONDS = float(os.environ.get("FUZZ_SECONDS", "8"))


def test_random_calls_are_right() -> None:
    assert fuzz(SECONDS, seed=0, backend="triton") >= 3
