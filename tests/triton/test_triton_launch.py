"""What is launched: one-dimensional grids, as many launches as documented, and nothing that waits for the device."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import triton
from torch.utils._python_dispatch import TorchDispatchMode

import gcpo_kernels
from gcpo_kernels import linear, ops
from gcpo_kernels.options import LossOptions
from gcpo_kernels.testing import make_linear_inputs, make_representations, make_token_inputs, with_gradients
from gcpo_kernels.tokens import TokenInputs
from gcpo_kernels.triton_backend import causal, gate, token_loss
from gcpo_kernels.triton_backend import ops as triton_ops
from gcpo_kernels.triton_backend.token_kernels import MOST_BLOCKS

LARGEST_OTHER_AXIS = 65_535
Launches = list[tuple[str, tuple[int, ...]]]


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[Launches]:
    """(kernel, grid) of every launch; nothing runs."""
    from triton.runtime.interpreter import InterpretedFunction

    seen: Launches = []

    def record(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        seen.append((self.fn.__name__, tuple(grid)))

    monkeypatch.setattr(InterpretedFunction, "run", record)
    yield seen
    assert seen, "nothing was launched"
    assert all(len(grid) == 1 and 0 < grid[0] < 2**31 for _, grid in seen)


def names(launches: Launches) -> list[str]:
    return [name.removesuffix("_kernel") for name, _ in launches]


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_token_loss(level: str, launches: Launches) -> None:
    inputs = with_gradients(make_token_inputs(), "logp", "causal_logp")
    loss, _ = gcpo_kernels.gcpo_loss(**inputs, kappa=0.1, importance_sampling_level=level)
    loss.backward()
    assert names(launches) == ["token_loss", "token_loss_finish", "token_loss_backward"]


def test_causal_weights(launches: Launches) -> None:
    inputs = with_gradients(make_representations(), "z", "context_z")
    del inputs["context_mask"]
    gcpo_kernels.causal_weights(**inputs).sum().backward()
    gcpo_kernels.leave_one_out_mean(inputs["z"]).sum().backward()
    forward = ["causal_weights", "causal_weights_finish"]
    assert names(launches) == [*forward, "causal_weights_backward", "leave_one_out", "leave_one_out"]


AGAIN = ["redo_list", "product", "combine_scores", "product", "combine_exponentials"]
PASSES = {
    "two_reads": ["logprob_forward", "token_loss", "logprob_backward"],
    "one_read": ["softmax_once", *AGAIN, "token_loss"],
    "epilogue": ["target_logits", "product", "combine_exponentials", *AGAIN, "token_loss"],
}


@pytest.mark.parametrize("kernel", PASSES)
def test_linear_loss(kernel: str, launches: Launches, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the gate says is what runs; where there is nothing to estimate with, logits are read twice."""
    monkeypatch.setattr(gate, "choose", lambda operation, *rest: kernel)
    inputs = with_gradients(make_linear_inputs(), "hidden", "weight")
    loss, _ = gcpo_kernels.linear_gcpo_loss(**inputs)
    assert names(launches) == [*PASSES[kernel], "token_loss", "token_loss_finish"]
    launches.clear()
    loss.backward()  # times the upstream gradient, each gradient in place
    assert names(launches) == ["scale", "scale"]
    launches.clear()
    gcpo_kernels.linear_gcpo_loss(**inputs | {"old_logp": None})
    assert names(launches) == [*PASSES["two_reads"], "token_loss", "token_loss_finish"]


@pytest.mark.parametrize("kernel", ["product", "slices"])
def test_scoring(kernel: str, launches: Launches, monkeypatch: pytest.MonkeyPatch) -> None:
    """A chunk: two launches, or one a slice, of which the smallest inputs have one."""
    monkeypatch.setattr(gate, "choose", lambda operation, *rest: kernel)
    inputs = make_linear_inputs()
    scoring = {"product": ["product", "combine_scores"], "slices": ["logprob_forward"]}[kernel]
    gcpo_kernels.linear_gcpo_loss(**inputs)
    assert names(launches) == [*scoring, "token_loss", "token_loss_finish"]
    launches.clear()
    with torch.no_grad():
        gcpo_kernels.linear_logprob(*(inputs[key] for key in ("hidden", "weight", "token_ids")))
    assert names(launches) == scoring


@pytest.mark.hazard(12)
@pytest.mark.parametrize("rows", [LARGEST_OTHER_AXIS + 1, 200_000])
def test_more_rows_than_other_axes_hold(rows: int, launches: Launches) -> None:
    """Seen in triton#3299, Liger#1294."""
    x = torch.zeros(rows, 1)
    gcpo_kernels.gcpo_loss(x, x[:, 0], x)
    gcpo_kernels.causal_weights(x[:, :, None], x[:, :, None, None, None])
    gcpo_kernels.leave_one_out_mean(x[:, :, None])
    gcpo_kernels.selective_logprob(x, torch.zeros(rows, dtype=torch.int64))
    finish = -(-rows // causal.FINISH_TILE[1])
    assert [grid for _, grid in launches] == [(rows,), (1,), (rows,), (finish,), (rows,), (rows,)]


@pytest.mark.parametrize(
    ("shape", "by_sequence", "blocks"),
    [
        ((1, 1), False, 1),
        ((1, 512), False, 1),
        ((1, 513), False, 2),
        ((1, 1024), False, 2),
        ((1, 2048), False, 4),
        ((1, 2049), False, 5),
        ((512, 2048), False, 4),
        ((1, 8192), False, 16),
        ((511, 32_768), False, 64),
        ((512, 32_768), False, 8),
        ((1, 100_000), False, 49),
        ((1, 100_000), True, 1),
    ],
)
def test_programs_per_sequence(shape: tuple[int, int], by_sequence: bool, blocks: int, launches: Launches) -> None:
    """The whole length is covered, and the finishing kernel has room for every part."""
    x = torch.zeros(shape)
    level = "sequence" if by_sequence else "token"
    gcpo_kernels.gcpo_loss(x, x[:, 0], x, importance_sampling_level=level)
    assert launches[0] == ("token_loss_kernel", (shape[0] * blocks,))
    assert token_loss.blocking(*shape, by_sequence)[0] == blocks


@pytest.mark.parametrize("batch", [1, 512])
def test_no_program_is_idle(batch: int) -> None:
    """The last of a sequence's programs has tokens, as the kernels share them out."""
    for tokens in [*range(1, 5000), *range(5000, 200_000, 487)]:
        blocks, block_t = token_loss.blocking(batch, tokens, False)
        share = triton.cdiv(triton.cdiv(tokens, blocks), block_t) * block_t
        assert (blocks - 1) * share < tokens <= blocks * share, tokens
        assert blocks <= (8 if batch == 512 else MOST_BLOCKS.value)


class Inside(TorchDispatchMode):
    """Looks at what torch does, inside the operators too."""

    OPERATORS = (
        triton_ops.triton_token_loss,
        triton_ops.triton_token_loss_backward,
        triton_ops.triton_causal_weights,
        triton_ops.triton_causal_weights_backward,
        triton_ops.triton_leave_one_out,
        ops.selective_logprob,
        ops.selective_logprob_backward,
    )

    def __init__(self) -> None:
        super().__init__()
        self._implementations = {operator._opoverload: operator._init_fn for operator in self.OPERATORS}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in self._implementations:
            with self:
                return self._implementations[func](*args, **kwargs)
        self.look(func.overloadpacket.__name__, func, args, kwargs)
        return func(*args, **kwargs)

    def look(self, name: str, func: Any, args: tuple, kwargs: Any) -> None:
        raise NotImplementedError


class NoSync(Inside):
    """Raises where the host would wait for a number from the device."""

    FORBIDDEN = ("_local_scalar_dense", "item", "nonzero", "masked_select", "is_nonzero", "equal", "unique", "_to_copy")

    def look(self, name: str, func: Any, args: tuple, kwargs: Any) -> None:
        waits = name in self.FORBIDDEN
        if name == "_to_copy":
            waits = kwargs.get("device") is not None
        if name in ("index", "index_put_"):  # where the index is a mask, its length is only known on the device
            waits = any(x is not None and x.dtype == torch.bool for x in args[1])
        if waits:
            raise AssertionError(f"{func} waits for the device")


class KernelsOnly(Inside):
    """Raises where a device would run anything but our kernels: torch allocates, and looks at what is there."""

    ALLOWED = ("empty", "new_empty", "empty_like", "detach", "view", "unsqueeze", "expand", "select", "unflatten")

    def look(self, name: str, func: Any, args: tuple, kwargs: Any) -> None:
        nothing = (name == "to" and args[1] == args[0].dtype) or (name == "contiguous" and args[0].is_contiguous())
        if name not in self.ALLOWED and not nothing:
            raise AssertionError(f"{func} is a launch")


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_token_loss_is_three_launches(level: str, launches: Launches) -> None:
    """Nothing is converted before, and no zeros are written for outputs that only the backward reads."""
    inputs = with_gradients(make_token_inputs(), "logp", "causal_logp")
    del inputs["context_weights"]  # only on a CPU are they checked for their values
    upstream = torch.tensor(1.0)
    with KernelsOnly():
        loss, _ = gcpo_kernels.gcpo_loss(**inputs, kappa=0.1, beta=0.1, importance_sampling_level=level)
        torch.autograd.grad(loss, [inputs["logp"], inputs["causal_logp"]], upstream)
    assert names(launches) == ["token_loss", "token_loss_finish", "token_loss_backward"]


@pytest.mark.parametrize("dtype", [None, torch.bool, torch.float32], ids=str)
def test_causal_weights_are_three_launches(dtype: torch.dtype | None, launches: Launches) -> None:
    """And one more each way with a mask."""
    inputs = with_gradients(make_representations(), "z", "context_z")
    inputs["context_mask"] = None if dtype is None else inputs["context_mask"].to(dtype)
    upstream, like_z = torch.ones(3, 4), torch.ones(3, 4, 9)
    with KernelsOnly():
        out = gcpo_kernels.causal_weights(**inputs)
        torch.autograd.grad(out, [inputs["z"], inputs["context_z"]], upstream)
        torch.autograd.grad(gcpo_kernels.leave_one_out_mean(inputs["z"]), inputs["z"], like_z)
    first = [] if dtype is None else ["coefficients"]
    kernels = [*first, "causal_weights", "causal_weights_finish", *first, "causal_weights_backward"]
    assert names(launches) == [*kernels, "leave_one_out", "leave_one_out"]


def test_selective_logprob_is_two_launches(launches: Launches, monkeypatch: pytest.MonkeyPatch) -> None:
    """No zeros for the entropies, which have no gradient."""
    monkeypatch.setattr(linear, "check_token_ids", lambda ids, vocab: ids)  # on a CPU alone it looks at them
    logits, upstream = torch.randn(4, 5, 37, requires_grad=True), torch.ones(4, 5)
    ids = torch.ones(4, 5, dtype=torch.int64)
    with KernelsOnly():
        torch.autograd.grad(gcpo_kernels.selective_logprob(logits, ids), logits, upstream)
    assert names(launches) == ["logprob_forward", "logprob_backward"]


def test_the_mode_sees_syncs() -> None:
    x = torch.ones(3)
    for wait in (lambda: x.sum().item(), lambda: bool(x.any()), lambda: x.nonzero(), lambda: x[x > 0]):
        with pytest.raises(AssertionError, match="waits"), NoSync():
            wait()


@pytest.mark.parametrize("kind", ["grpo", "bnpo", "dr_grpo", "dapo", "sapo", "vespo"])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_token_loss_does_not_sync(level: str, kind: str, launches: Launches) -> None:
    inputs = with_gradients(make_token_inputs(), "logp", "causal_logp")
    del inputs["context_weights"]  # only on a CPU are they checked for their values
    options = {"max_completion_length": 7, "num_items_in_batch": torch.tensor(9), "kappa": 0.1, "delta": 1.5}
    inputs |= {"policy_weights": torch.ones(5)} if kind in ("sapo", "vespo") else {}
    with NoSync():
        loss, _ = gcpo_kernels.gcpo_loss(**inputs, **options, loss_type=kind, importance_sampling_level=level)
        loss.backward()


def test_launchers_do_not_sync(launches: Launches) -> None:
    """With weights of contexts too, and under the linear loss, where tokens of one tile come from any sequence."""
    inputs = make_token_inputs()
    logp, tokens = inputs.pop("logp"), TokenInputs(**inputs, kappa_weights=inputs["advantages"].abs())
    with NoSync():
        token_loss.token_loss_forward(logp, tokens, LossOptions(kappa=0.1, importance_sampling_level="sequence"))


@pytest.mark.parametrize("baseline", ["mean", "loo"])
@pytest.mark.parametrize("masked", [False, True])
def test_causal_weights_do_not_sync(masked: bool, baseline: str, launches: Launches) -> None:
    inputs = with_gradients(make_representations(), "z", "context_z")
    mask = inputs.pop("context_mask")
    with NoSync():
        out = gcpo_kernels.causal_weights(**inputs, context_mask=mask if masked else None, baseline=baseline)
        out.sum().backward()
        gcpo_kernels.leave_one_out_mean(inputs["z"]).sum().backward()


def test_representations_are_not_copied(launches: Launches) -> None:
    """Strides go to the kernel: no contiguous copy of what it reads is made."""
    inputs = make_representations(2, 3, 4, 2, 64)
    views = {key: inputs[key].transpose(0, 1).contiguous().transpose(0, 1) for key in ("z", "context_z")}
    arguments = causal.CausalArguments(views["z"], None, views["context_z"], None, 2.0, "mean", "cosine")
    seen: list[int] = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            seen.append(out.numel())
            return out

    with Sizes():
        causal.causal_weights_forward(arguments)
    assert max(seen) < views["z"].numel()
