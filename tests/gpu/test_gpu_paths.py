"""
The ways from hidden states to a loss on a GPU, in bfloat16: what the gate may choose, at sizes that fill blocks and at
sizes that do not, by descriptors where the device has them.
"""

from functools import partial
from typing import Any

import budget
import grid
import pytest
import torch

import gcpo_kernels
from gcpo_kernels.testing import make_linear_inputs
from gcpo_kernels.triton_backend import gate, product

pytestmark = pytest.mark.gpu
# (H, V): descriptors and whole parts of the vocabulary; descriptors and a part that ends within; pointers.
SIZES = ((256, 4096), (256, 4104), (72, 5003))
HEADS = (*grid.HEADS, {"temperature": 0.8, "logit_scale": -0.7})


def on_gpu(inputs: dict[str, Any]) -> dict[str, Any]:
    return {key: x.cuda() if isinstance(x, torch.Tensor) else x for key, x in inputs.items()}


def take(monkeypatch: pytest.MonkeyPatch, operation: str, kernel: str) -> None:
    monkeypatch.setattr(gate, "choose", lambda op, *rest: kernel if op == operation else gate.KERNELS[op][0])


@pytest.mark.parametrize("by", [0.0, 20.0, -200.0, float("nan")])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("kernel", gate.KERNELS["loss"])
def test_loss(kernel: str, sizes: tuple[int, int], by: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Estimates that are right, off by what costs nothing, and off by what has to be done again."""
    take(monkeypatch, "loss", kernel)
    inputs = on_gpu(make_linear_inputs(4, 75, 2, *sizes, dtype=torch.bfloat16))
    offset = inputs["old_logp"] + by
    offset[::2] = inputs["old_logp"][::2]
    monkeypatch.setattr(gcpo_kernels, "linear_gcpo_loss", partial(gcpo_kernels.linear_gcpo_loss, offset_logp=offset))
    budget.compare("linear_gcpo_loss", inputs, beta=0.04, kappa=0.06)


@pytest.mark.parametrize("head", HEADS, ids=str)
@pytest.mark.parametrize("kernel", gate.KERNELS["loss"])
def test_heads(kernel: str, head: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    take(monkeypatch, "loss", kernel)
    inputs = on_gpu(make_linear_inputs(4, 40, 2, *SIZES[1], dtype=torch.bfloat16))
    inputs |= {"bias": None} if "bias" in head else {}
    options = {key: value for key, value in head.items() if key != "bias"}
    budget.compare("linear_gcpo_loss", inputs, importance_sampling_level="sequence", kappa=0.06, **options)


@pytest.mark.parametrize("head", HEADS, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("kernel", gate.KERNELS["scoring"])
def test_scoring(kernel: str, sizes: tuple[int, int], head: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    take(monkeypatch, "scoring", kernel)
    inputs = on_gpu(make_linear_inputs(4, 75, 2, *sizes, dtype=torch.bfloat16))
    call = {key: inputs[key] for key in ("hidden", "weight", "bias", "token_ids")}
    call["bias"] = None if "bias" in head else call["bias"]
    options = {key: value for key, value in head.items() if key != "bias"}
    budget.compare("linear_logprob", call, **options, return_entropy=True)


@pytest.mark.parametrize("kernel", gate.KERNELS["loss"])
def test_runs_repeat(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    take(monkeypatch, "loss", kernel)
    results = []
    for _ in range(2):
        inputs = on_gpu(make_linear_inputs(4, 75, 2, *SIZES[0], dtype=torch.bfloat16))
        leaves = {key: inputs[key].requires_grad_() for key in ("hidden", "weight", "bias")}
        loss, _ = gcpo_kernels.linear_gcpo_loss(**inputs, beta=0.04, kappa=0.06)
        results.append([loss.detach(), *torch.autograd.grad(loss, list(leaves.values()))])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_descriptors_are_used_where_the_device_has_them() -> None:
    x = torch.empty(64, 256, dtype=torch.bfloat16, device="cuda")
    blocks, by_descriptor = product.choose_blocks(x, x)
    assert by_descriptor == (torch.cuda.get_device_capability()[0] in (9, 10) and torch.version.hip is None)
    assert not product.choose_blocks(x[:, 1:], x)[1]
    assert blocks.m >= 64
