"""The registered operators of the Triton backend, autocast, what it refuses, and second derivatives."""

from typing import Any

import budget
import pytest
import test_layout
import test_transforms
import torch

import gcpo_kernels
from gcpo_kernels import ops
from gcpo_kernels.options import LossOptions
from gcpo_kernels.testing import make_linear_inputs, make_representations, make_token_inputs
from gcpo_kernels.tokens import TokenInputs
from gcpo_kernels.triton_backend import ops as triton_ops


def operator_calls() -> dict[str, tuple[Any, tuple]]:
    """Every operator of triton_backend/ops.py, and those of ops.py with backend="triton"."""
    calls = {}
    for name, (operator, arguments) in test_transforms.operator_calls().items():
        if operator is ops.selective_logprob_backward:
            logits, ids, *rest = arguments
            scores = ops.selective_logprob(logits, ids, 0.9, "triton")
            arguments = (logits, ids, *rest, *(x.detach() for x in scores))
        calls[name] = (operator, (*arguments, "triton"))
    inputs = make_token_inputs(3, 4, 2)
    for key in ("logp", "causal_logp"):
        inputs[key].requires_grad_()
    logp, tokens = inputs.pop("logp"), TokenInputs(**inputs)
    few = TokenInputs(inputs["mask"], inputs["advantages"])
    full = LossOptions(beta=0.1, kappa=0.1, delta=1.5, loss_type="dapo", kl_clip=0.3).pack()
    plain = LossOptions(importance_sampling_level="sequence").pack()
    calls["token_loss"] = (triton_ops.triton_token_loss, (logp, torch.tensor(11), full, *tokens))
    calls["token_loss, few"] = (triton_ops.triton_token_loss, (logp, None, plain, *few))
    for name, numbers in (("token", full), ("sequence", plain)):
        saved = [x.detach() for x in triton_ops.triton_token_loss(logp, None, numbers, *tokens)[1:]]
        rest = (inputs["mask"], torch.float32, torch.float16, numbers)
        calls[f"token_loss_backward, {name}"] = (
            triton_ops.triton_token_loss_backward,
            (torch.tensor(0.7), *saved, *rest),
        )
    given = make_representations(2, 3)
    z, context_z, mask = given["z"].requires_grad_(), given["context_z"].requires_grad_(), given["context_mask"]
    hidden = torch.randn(6, 4, z.shape[-1], requires_grad=True)
    index = torch.tensor([0, 3, 1, 2, 3, 0])
    for name, rows, where, keep, options in (
        ("z", z, None, None, (2.0, "mean", "cosine")),
        ("mask", z, None, mask, (1.5, "loo", "gaussian")),
        ("index", hidden, index, mask, (2.0, "mean", "euclidean")),
    ):
        arguments = (rows, where, context_z, keep)
        calls[f"causal_weights, {name}"] = (triton_ops.triton_causal_weights, (*arguments, *options))
        frozen = tuple(None if x is None else x.detach() for x in arguments)
        upsilon, saved = triton_ops.triton_causal_weights(*frozen, *options)
        calls[f"causal_weights_backward, {name}"] = (
            triton_ops.triton_causal_weights_backward,
            (torch.ones_like(upsilon), *frozen, saved, *options, name != "mask"),
        )
    calls["leave_one_out"] = (triton_ops.triton_leave_one_out, (z, torch.float32))
    return calls


NAMES = [
    *test_transforms.operator_calls(),
    *("token_loss", "token_loss, few", "token_loss_backward, token", "token_loss_backward, sequence"),
    *(f"causal_weights{way}, {what}" for way in ("", "_backward") for what in ("z", "mask", "index")),
    "leave_one_out",
]


@pytest.mark.parametrize("name", NAMES)
def test_operators_keep_their_contract(name: str) -> None:
    """Schema, fake tensors, autograd registration and ahead-of-time dispatch agree with what the operator does."""
    operator, arguments = operator_calls()[name]
    utils = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(operator, arguments, test_utils=utils, atol=1e-4, rtol=1e-3)


def test_every_operator_is_checked() -> None:
    assert set(operator_calls()) == set(NAMES)
    registered = {
        x
        for module in (ops, triton_ops)
        for x in vars(module).values()
        if isinstance(x, torch._library.custom_ops.CustomOpDef)
    }
    assert registered == {operator for operator, _ in operator_calls().values()}


@pytest.mark.parametrize("function", ["linear_gcpo_loss", "linear_logprob"])
def test_autocast_is_a_cast_of_the_operands(function: str) -> None:
    """float16 autocast of float32 operands gives what float16 operands give, and float32 gradients."""
    inputs = make_linear_inputs(3, 4, 2)
    keys = ("hidden", "weight", "bias", "token_ids")
    inputs = {key: x for key, x in inputs.items() if function != "linear_logprob" or key in keys}
    rounded = {key: x.half().float() if key in ("hidden", "weight") else x for key, x in inputs.items()}
    with torch.autocast("cpu", torch.float16):
        ours, grads = budget.outcome(getattr(gcpo_kernels, function), inputs)
    want, true_grads = budget.outcome(getattr(gcpo_kernels, function), rounded)
    for key, x in want.items():
        torch.testing.assert_close(ours[key], x, rtol=1e-5, atol=1e-6)
    for key, x in true_grads.items():
        if x is not None:
            assert grads[key].dtype == torch.float32
            torch.testing.assert_close(grads[key], x, rtol=2e-3, atol=2e-4)  # the tile's gradient is float16


CALLS = {name: (function, make) for name, (function, make, _) in test_layout.CALLS.items()}


@pytest.mark.hazard(21)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_refused_types(name: str, dtype: torch.dtype) -> None:
    """One argument of a type that the backend does not take is enough (triton#11584)."""
    function, make = CALLS[name]
    for key, x in make().items():
        if x.is_floating_point() and key != "mask":
            with pytest.raises(TypeError, match="`backend`"):
                function(**(make() | {key: x.to(dtype)}), backend="triton")


@pytest.mark.hazard(21)
@pytest.mark.parametrize("name", ["linear_gcpo_loss", "linear_logprob"])
def test_refused_autocast(name: str) -> None:
    """Seen in triton#11584."""
    function, make = CALLS[name]
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(TypeError, match="`backend`"):
        function(**make(), backend="triton")


@pytest.mark.parametrize("square", [False, True])
@pytest.mark.parametrize("name", CALLS)
def test_no_silent_second_derivative(name: str, square: bool, small_inputs: None) -> None:
    """Gradients do not know how they depend on the inputs: asking for that raises. A mean's gradient is a mean."""
    function, make = CALLS[name]
    inputs = {key: x.requires_grad_(key in budget.LEAVES) for key, x in make().items()}
    leaf = next(x for x in inputs.values() if x.requires_grad)

    def second_derivative(backend: str) -> torch.Tensor:
        out = test_layout.total(function(**inputs, backend=backend))
        out = out.square() if square else out
        (first,) = torch.autograd.grad(out, leaf, create_graph=True)
        return torch.autograd.grad(first.square().sum(), leaf)[0]

    if name == "leave_one_out_mean":
        if not square:  # linear: its gradient is a constant
            return
        torch.testing.assert_close(second_derivative("triton"), second_derivative("torch"), rtol=1e-4, atol=1e-5)
        return
    with pytest.raises(RuntimeError):
        second_derivative("triton")


@pytest.mark.parametrize("name", test_transforms.CALLS)
def test_no_silent_tangent(name: str, small_inputs: None) -> None:
    test_transforms.assert_no_silent_tangent(name)


@pytest.mark.parametrize("name", test_transforms.CALLS)
def test_default_dtype_is_unused(name: str, small_inputs: None) -> None:
    test_transforms.assert_default_dtype_is_unused(name)


@pytest.mark.parametrize("name", NAMES)
def test_launched_on_the_device_of_the_tensors(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton launches on the current device: each operator makes it that of its tensors, and puts it back."""
    from triton.runtime.interpreter import InterpretedFunction

    operator, arguments = operator_calls()[name]
    current: list[int | None] = []
    launches = 0

    class Current:
        def __init__(self, index: int | None):
            self.index = index

        def __enter__(self) -> None:
            current.append(self.index)

        def __exit__(self, *raised: object) -> None:
            current.pop()

    def launch(self: Any, *args: Any, **kwargs: Any) -> None:
        nonlocal launches
        launches += 1
        assert current, "launched on whatever device is current"

    monkeypatch.setattr(torch.accelerator, "device_index", Current)
    monkeypatch.setattr(InterpretedFunction, "run", launch)
    operator(*arguments)
    assert launches and not current


def test_items_that_change(fresh_compiler: None) -> None:
    """One more compilation at most for any `num_items_in_batch`; other numbers are the operator's constants."""
    test_transforms.test_compiled_with_a_number_of_items("gcpo_loss", None)


def test_scheduled_options(fresh_compiler: None) -> None:
    """A kappa and beta that change between calls do not break the graph."""

    def function(value: float, **arguments: Any) -> torch.Tensor:
        return gcpo_kernels.gcpo_loss(**arguments, kappa=value, beta=value)[0]

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    inputs = make_token_inputs(3, 4, 2)
    for value in (0.01, 0.02, 0.03):
        torch.testing.assert_close(compiled(value, **inputs), function(value, **inputs))
