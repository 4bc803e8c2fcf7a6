"""Fixtures shared by all tests, and the skipping of tests whose device is absent."""

import pytest
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
