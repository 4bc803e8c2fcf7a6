"""Fixtures shared by all tests, and the skipping of tests whose device is absent."""

import pytest
import torch

from gcpo_kernels import torch_backend


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of three tokens, blocks of one or two rows, slices of eight rows of the vocabulary."""
    monkeypatch.setattr(torch_backend, "_TILE_BYTES", {"cpu": 0, "other": 0})
    monkeypatch.setattr(torch_backend, "_MIN_TILE_ROWS", {"cpu": 3, "other": 3})
    monkeypatch.setattr(torch_backend, "_BLOCK_ELEMENTS", {"cpu": 80, "other": 80})
    monkeypatch.setattr(torch_backend, "_WIDEN_ROWS", 8)


@pytest.fixture
def fresh_compiler() -> None:
    """Compilation starts without what other tests compiled."""
    torch._dynamo.reset()
