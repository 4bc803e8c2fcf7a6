"""What the torch backend is for: no (N, V) tensor is ever held, and no product is made twice or for masked tokens."""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import gcpo_kernels
from gcpo_kernels import ops, torch_backend
from gcpo_kernels.testing import make_linear_inputs, with_gradients

TOKENS, HIDDEN, VOCAB = 512, 24, 701
OPERATORS = (
    ops.linear_logprob,
    ops.linear_logprob_backward,
    ops.linear_loss,
    ops.selective_logprob,
    ops.selective_logprob_backward,
)


class Recorder(TorchDispatchMode):
    """Sizes of the tensors made, in elements of storage, and multiplications in matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []
        self.products = 0
        self._implementations = {operator._opoverload: operator._init_fn for operator in OPERATORS}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        if func in self._implementations:  # see what it does, rather than what it returns
            with self:
                return self._implementations[func](*args, **(kwargs or {}))
        inputs = {x.untyped_storage().data_ptr() for x in args if isinstance(x, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in inputs:
                self.sizes.append(x.untyped_storage().nbytes() // x.element_size())
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            a, b = [x for x in args if isinstance(x, torch.Tensor)][-2:]
            self.products += a.shape[0] * a.shape[1] * b.shape[1]
        return out


@pytest.fixture
def tiles(monkeypatch: pytest.MonkeyPatch) -> int:
    rows = 40
    monkeypatch.setattr(torch_backend, "_TILE_BYTES", {"cpu": 0})
    monkeypatch.setattr(torch_backend, "_MIN_TILE_ROWS", {"cpu": rows})
    return rows


def linear_inputs(masked: str, *leaves: str, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    inputs = make_linear_inputs(8, TOKENS // 8, 2, HIDDEN, VOCAB, masked=masked, dtype=dtype)
    return with_gradients(inputs, *leaves)


def test_the_recorder_sees() -> None:
    """The plain way holds (N, V) tensors, and makes three products."""
    inputs = linear_inputs("none", "hidden", "weight")
    with Recorder() as seen:
        logits = inputs["hidden"].flatten(0, 1) @ inputs["weight"].T
        logits.log_softmax(-1).gather(1, inputs["token_ids"].view(-1, 1)).sum().backward()
    assert max(seen.sizes) == TOKENS * VOCAB
    assert sum(size == TOKENS * VOCAB for size in seen.sizes) >= 3
    assert seen.products == 3 * TOKENS * VOCAB * HIDDEN


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("masked", ["none", "ragged"])
@pytest.mark.parametrize(
    ("leaves", "products"),
    [
        (("hidden", "weight", "bias"), 3),
        (("hidden", "weight"), 3),
        (("hidden",), 2),
        (("weight",), 2),
        ((), 1),
    ],
)
def test_linear_loss(
    leaves: tuple[str, ...], products: int, masked: str, level: str, dtype: torch.dtype, tiles: int
) -> None:
    inputs = linear_inputs(masked, *leaves, dtype=dtype)
    with Recorder() as seen:
        loss, _ = gcpo_kernels.linear_gcpo_loss(**inputs, kappa=0.1, beta=0.1, importance_sampling_level=level)
        if leaves:
            loss.backward()
    scored = inputs["mask"].sum().item()
    # A sequence longer than a tile, with a ratio per sequence, is scored before its gradients are made.
    again = 0
    if leaves and level == "sequence":
        lengths = inputs["mask"].sum(dim=1)
        again = lengths[lengths > tiles].sum().item()
        assert again > 0
    assert seen.products == (products * scored + again) * VOCAB * HIDDEN
    assert max(seen.sizes) < TOKENS * VOCAB / 4
    assert max(seen.sizes) <= max(tiles * VOCAB, VOCAB * HIDDEN, 8 * TOKENS * 2, TOKENS * HIDDEN)


@pytest.mark.parametrize(
    ("leaves", "products"), [(("hidden", "weight", "bias"), 4), (("hidden",), 3), (("weight",), 3), ((), 1)]
)
def test_linear_logprob(leaves: tuple[str, ...], products: int, tiles: int) -> None:
    inputs = linear_inputs("none", *leaves)
    call = {key: inputs[key] for key in ("hidden", "weight", "bias", "token_ids")}
    with Recorder() as seen:
        logp, entropy = gcpo_kernels.linear_logprob(**call, return_entropy=True)
        if leaves:
            (logp - 0.1 * entropy).sum().backward()
    assert seen.products == products * TOKENS * VOCAB * HIDDEN
    assert max(seen.sizes) <= max(tiles * VOCAB, VOCAB * HIDDEN, TOKENS * HIDDEN)


def test_tokens_without_upstream_gradient_cost_nothing(tiles: int) -> None:
    inputs = linear_inputs("ragged", "hidden", "weight")
    call = {key: inputs[key] for key in ("hidden", "weight", "token_ids")}
    logp = gcpo_kernels.linear_logprob(**call)
    scored = inputs["mask"].sum().item()
    with Recorder() as seen:
        (logp * inputs["mask"]).sum().backward()
    assert seen.products == 3 * scored * VOCAB * HIDDEN


def test_selective_logprob(tiles: int) -> None:
    """No second (N, V) tensor in the forward, one in the backward: the gradient. Slices are not copied whole."""
    whole = torch.randn(4, TOKENS // 4 + 1, VOCAB, dtype=torch.bfloat16)
    logits = whole[:, :-1].detach().requires_grad_()
    ids = torch.randint(0, VOCAB, (4, TOKENS // 4))
    with Recorder() as forward:
        logp, entropy = gcpo_kernels.selective_logprob(logits, ids, return_entropy=True)
    with Recorder() as backward:
        (logp - 0.1 * entropy).sum().backward()
    assert max(forward.sizes) < TOKENS * VOCAB / 4
    assert sum(size >= TOKENS * VOCAB / 4 for size in backward.sizes) == 1
