"""Fixtures shared by all tests, and the skipping of tests whose device is absent."""

import os

import pytest

# Before torch is imported; processes that tests start take it over. pytest-xdist's workers share the cores, where
# threads of one that wait for each other keep the others waiting: with two each, tests of the trainer take over five
# times as long.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import small_tiles as small
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles, blocks and slices of the smallest inputs."""
    small.apply(monkeypatch, small.SETTINGS["torch"])


@pytest.fixture
def fresh_compiler() -> None:
    """Compilation starts without what other tests compiled."""
    torch._dynamo.reset()


@pytest.fixture
def studies_in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of `gcpo study` are done here, unless a test asks for workers."""
    monkeypatch.setattr("gcpo.commands.study.default_workers", lambda scale: 1)
