"""
The Triton backend on CPU tensors, through Triton's interpreter: `TRITON_INTERPRET=1 pytest tests/triton`.

The variable must be set before Triton is imported, and kernels cannot be compiled while it is: hence a run of their
own.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grid
import numpy
import pytest
import small_tiles as small
import torch
import triton
from packaging.version import Version

from gcpo_kernels import backends, testing

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HERE = Path(__file__).parent


def pytest_configure(config: pytest.Config) -> None:
    # NumPy's, about lanes that a mask discards.
    for module in ("triton.runtime.interpreter", "numpy"):
        config.addinivalue_line("filterwarnings", f"ignore::RuntimeWarning:{module}")


def why_not(interpreted: bool, triton_version: str, numpy_version: str) -> str:
    """Why these tests cannot run; "" if they can."""
    if not interpreted:
        return "needs TRITON_INTERPRET=1: `make test` runs these in a process of their own"
    if Version(triton_version) < Version("3.7") and Version(numpy_version) >= Version("2.4"):
        return "the interpreter of Triton 3.6 cannot convert the arrays of NumPy 2.4: constraints.txt has what it needs"
    return ""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    left_out = [item for item in items if not _runs(item)]
    items[:] = [item for item in items if _runs(item)]
    config.hook.pytest_deselected(items=left_out)
    reason = why_not(INTERPRETED, triton.__version__, numpy.__version__)
    if not reason:
        return
    skip = pytest.mark.skip(reason=reason)
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(skip)


def _runs(item: pytest.Item) -> bool:
    """Whether a case of a shared test is one that runs here (`FEWER` of test_triton_shared.py)."""
    fewer = getattr(getattr(item, "module", None), "FEWER", {})
    return item.originalname not in fewer or fewer[item.originalname](item.callspec.params)


@pytest.fixture(scope="session", autouse=True)
def _fast_interpreter() -> Iterator[None]:
    """
    The interpreter patches `triton.language` again at every call of a device function, which takes half of all time.
    Once a launch, and once for the functions of Triton's own library, is enough: those patches it never takes back.
    """
    if not INTERPRETED:
        yield
        return
    from triton.runtime import interpreter

    patched = set()

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        names = self.fn.__globals__
        if names.get("tl") is not triton.language and names["__name__"] not in patched:
            interpreter._patch_lang(self.fn)
            patched.add(names["__name__"])
        return self.rewrite()(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.InterpretedFunction, "__call__", call)
        yield


@pytest.fixture(autouse=True)
def _one_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    """`tl.fma` rounds once, as on a device; the interpreter rounds the product and then the sum."""

    def fma(self: Any, x: Any, y: Any, z: Any) -> Any:
        exact = x.data.astype("float64") * y.data.astype("float64") + z.data.astype("float64")
        return type(x)(exact.astype(z.data.dtype), z.dtype.scalar)

    if INTERPRETED:
        from triton.runtime import interpreter

        monkeypatch.setattr(interpreter.InterpreterBuilder, "create_fma", fma)


@pytest.fixture(autouse=True)
def _triton_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """`backend=None` is Triton, as on a GPU (but for float64, which goes to torch)."""
    monkeypatch.setattr(backends, "available_backends", lambda device="cpu": ("triton", "torch"))
    monkeypatch.setattr(grid, "BACKEND", "triton")


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    """Memory that nothing wrote holds NaN: an element that is read before it is written shows."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles, slices and blocks of the smallest inputs."""
    small.apply(monkeypatch, small.SETTINGS["triton"])


@pytest.fixture
def small_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer tokens where a test leaves the size to the factory."""
    monkeypatch.setattr(testing.make_linear_inputs, "__defaults__", (4, 5, 2, 13, 37))
    monkeypatch.setattr(testing.make_token_inputs, "__defaults__", (4, 5, 2))
