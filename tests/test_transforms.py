"""torch.compile, activation checkpointing, autocast, no_grad, and the registered operators."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import gcpo_kernels
from gcpo_kernels import maths, ops
from gcpo_kernels.options import KINDS, LOSS_TYPES, HeadOptions, LossOptions
from gcpo_kernels.testing import (
    make_hidden_representations,
    make_linear_inputs,
    make_representations,
    make_token_inputs,
    with_gradients,
)
from gcpo_kernels.tokens import TokenInputs

OPTIONS = {"beta": 0.04, "kappa": 0.06, "delta": 1.5, "kl_clip": 0.3}
KL = {"bias_correction_kl": True}
HEAD = {"temperature": 0.9, "logit_softcap": 4.0}
LEAVES = ("logp", "hidden", "weight", "bias", "causal_logp", "logits", "z", "context_z")


def linear(**sizes: Any) -> dict[str, Any]:
    inputs = make_linear_inputs(**sizes)
    return {key: inputs[key] for key in ("hidden", "weight", "bias", "token_ids")}


def selective(**sizes: Any) -> dict[str, Any]:
    inputs = make_linear_inputs(**sizes)
    return {"logits": inputs["hidden"], "token_ids": inputs["token_ids"] % 13}


def loss(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    def call(**arguments: Any) -> Any:
        value, metrics = function(**arguments, **options)
        return value, *metrics.values()

    return call


CALLS: dict[str, tuple[Callable[..., Any], Callable[..., dict[str, Any]]]] = {
    "gcpo_loss": (loss(gcpo_kernels.gcpo_loss, **OPTIONS), make_token_inputs),
    "gcpo_loss, sequence": (
        loss(gcpo_kernels.gcpo_loss, importance_sampling_level="sequence", loss_type="dapo"),
        make_token_inputs,
    ),
    "linear_gcpo_loss": (loss(gcpo_kernels.linear_gcpo_loss, **OPTIONS, **HEAD), make_linear_inputs),
    "linear_gcpo_loss, sequence": (
        loss(gcpo_kernels.linear_gcpo_loss, importance_sampling_level="sequence", loss_type="dapo"),
        make_linear_inputs,
    ),
    "gcpo_loss, vespo": (loss(gcpo_kernels.gcpo_loss, **OPTIONS, **KL, loss_type="vespo"), make_token_inputs),
    "linear_gcpo_loss, vespo": (
        loss(gcpo_kernels.linear_gcpo_loss, **OPTIONS, **KL, loss_type="vespo"),
        make_linear_inputs,
    ),
    "linear_logprob": (lambda **k: gcpo_kernels.linear_logprob(**k, **HEAD, return_entropy=True), linear),
    "selective_logprob": (lambda **k: gcpo_kernels.selective_logprob(**k, return_entropy=True), selective),
    "causal_weights": (lambda **k: (gcpo_kernels.causal_weights(**k, baseline="loo"),), make_representations),
    "causal_weights_from_hidden": (
        lambda **k: (gcpo_kernels.causal_weights_from_hidden(**k),),
        make_hidden_representations,
    ),
    "leave_one_out_mean": (
        lambda z: (gcpo_kernels.leave_one_out_mean(z),),
        lambda **sizes: {"z": make_representations(**sizes)["z"]},
    ),
}


def results(function: Callable[..., Any], arguments: dict[str, Any]) -> list[torch.Tensor | None]:
    """Outputs, then gradients of a weighted sum of the outputs that carry one."""
    leaves = with_gradients(arguments, *LEAVES)
    out = function(**leaves)
    sum(((k + 1) * x).sum() for k, x in enumerate(out) if x.requires_grad).backward()
    return [*(x.detach() for x in out), *(x.grad for key, x in leaves.items() if key in LEAVES)]


def assert_same(got: list[torch.Tensor | None], want: list[torch.Tensor | None]) -> None:
    for x, y in zip(got, want, strict=True):
        assert (x is None) == (y is None)
        if x is not None:
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


@pytest.mark.hazard(19, 22)
@pytest.mark.parametrize("name", CALLS)
def test_compiled_whole(name: str, fresh_compiler: None) -> None:
    """One graph, the same values and gradients, and one more compilation at most for any further length, and one for
    any further batch size. Seen in flash-attention#911, fla#52, pytorch#171289."""
    function, make = CALLS[name]
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    first = make()
    assert_same(results(compiled, first), results(function, first))
    sizes = {"prompts": 5} if name.startswith(("causal_weights", "leave_one_out")) else {"tokens": 9}
    second = make(**sizes)
    assert_same(results(compiled, second), results(function, second))
    with torch.compiler.set_stance("fail_on_recompile"):
        for length in (8, 11, 16):
            other = make(**dict.fromkeys(sizes, length))
            assert_same(results(compiled, other), results(function, other))
    if "tokens" in sizes:
        compiled(**make(batch=6))
        with torch.compiler.set_stance("fail_on_recompile"):
            for batch in range(7, 10):
                compiled(**make(batch=batch))


@pytest.mark.parametrize("name", ["gcpo_loss", "linear_gcpo_loss"])
def test_compiled_with_a_number_of_items(name: str, fresh_compiler: None) -> None:
    """One more compilation at most for any number of tokens, which changes at every step."""

    def function(items: float, **arguments: Any) -> torch.Tensor:
        return getattr(gcpo_kernels, name)(**arguments, loss_type="dapo", num_items_in_batch=items)[0]

    inputs = CALLS[name][1]()
    for values in ((17, 19, 23), (17.5, 19.5, 23.5)):
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(function, fullgraph=True, backend=counter)
        for items in values:
            torch.testing.assert_close(compiled(items, **inputs), function(items, **inputs))
        assert counter.frame_count <= 2


def test_compiled_without_gradients(fresh_compiler: None) -> None:
    function = loss(gcpo_kernels.linear_gcpo_loss, kappa=0.06)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    inputs = make_linear_inputs()
    with torch.no_grad():
        assert_same(list(compiled(**inputs)), list(function(**inputs)))


def test_compiled_with_a_frozen_head_and_autocast(fresh_compiler: None) -> None:
    def function(**arguments: Any) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return gcpo_kernels.linear_gcpo_loss(**arguments, **OPTIONS)[0]

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    grads = []
    for f in (compiled, function):
        inputs = with_gradients(make_linear_inputs(), "hidden")
        f(**inputs).backward()
        grads.append(inputs["hidden"].grad)
    assert grads[1].any()
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize(("name", "compilations"), [("gcpo_loss", 2), ("linear_gcpo_loss", 4)])
def test_compiled_with_a_schedule(name: str, compilations: int, fresh_compiler: None) -> None:
    """
    A scheduled kappa, beta and kl_clip do not break the graph. `gcpo_loss` compiles once more for all values; the
    operator of `linear_gcpo_loss` takes numbers as constants, and compiles for each.
    """

    def function(value: float, **arguments: Any) -> torch.Tensor:
        return getattr(gcpo_kernels, name)(**arguments, kappa=value, beta=value, kl_clip=10 * value)[0]

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, backend=counter)
    inputs = CALLS[name][1]()
    for value in (0.01, 0.02, 0.03):
        torch.testing.assert_close(compiled(value, **inputs), function(value, **inputs))
    assert counter.frame_count <= compilations


@pytest.mark.hazard(19)
def test_marked_dynamic(fresh_compiler: None) -> None:
    """Lengths declared dynamic compile once (flash-attention#911)."""
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(CALLS["linear_gcpo_loss"][0], fullgraph=True, backend=counter)
    for tokens in (7, 9, 12):
        inputs = with_gradients(make_linear_inputs(tokens=tokens), "hidden", "weight", "bias")
        for key, x in inputs.items():
            if x.shape[:2] == inputs["mask"].shape:
                torch._dynamo.mark_dynamic(inputs[key], 1)
        compiled(**inputs)[0].backward()
    assert counter.frame_count == 1


@pytest.mark.hazard(22)
@pytest.mark.slow
@pytest.mark.parametrize("name", ["gcpo_loss", "linear_gcpo_loss"])
def test_compiled_with_inductor(name: str, fresh_compiler: None) -> None:
    """Seen in pytorch#147828."""
    function, make = CALLS[name]
    compiled = torch.compile(function, fullgraph=True, backend="inductor")
    assert_same(results(compiled, make()), results(function, make()))


@pytest.mark.hazard(22)
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", CALLS)
def test_checkpointed(name: str, reentrant: bool) -> None:
    """Seen in pytorch#177396."""
    function, make = CALLS[name]

    def checkpointed(**arguments: Any) -> Any:
        keys = list(arguments)
        # Inside the checkpoint there is more than the function: its inputs are made there, as a model's are.
        return checkpoint(
            lambda *values: function(**{k: v * 1 if k in LEAVES else v for k, v in zip(keys, values, strict=True)}),
            *arguments.values(),
            use_reentrant=reentrant,
        )

    assert_same(results(checkpointed, make()), results(function, make()))


@pytest.mark.parametrize("penalty", [False, True])
def test_no_silent_second_derivative(penalty: bool) -> None:
    """The linear loss makes its gradients in the forward: a graph of them is refused, whatever it is asked for with."""
    inputs = with_gradients(make_linear_inputs(), "hidden", "weight")
    value = gcpo_kernels.linear_gcpo_loss(**inputs, kappa=0.06)[0]
    value = value.square() if penalty else value
    torch.autograd.grad(value, inputs["hidden"], retain_graph=True)
    with pytest.raises(RuntimeError, match="`linear_gcpo_loss` has no second derivative, got `create_graph=True`"):
        torch.autograd.grad(value, inputs["hidden"], create_graph=True)


def assert_no_silent_tangent(name: str) -> None:
    """A forward-mode derivative is refused, by dual numbers and by torch.func."""
    function, make = CALLS[name]
    inputs = make()
    leaf = next(key for key in inputs if key in LEAVES)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(inputs[leaf], torch.ones_like(inputs[leaf]))
        with pytest.raises((RuntimeError, NotImplementedError), match=r"tangent|forward mode AD"):
            function(**(inputs | {leaf: dual}))
        function(**inputs)  # without a tangent of their own they are left alone
    with pytest.raises(RuntimeError, match=r"tangent|functorch"):
        torch.func.jvp(lambda x: function(**(inputs | {leaf: x})), (inputs[leaf],), (inputs[leaf],))


@pytest.mark.parametrize("name", ["linear_gcpo_loss", "linear_logprob", "selective_logprob"])
def test_no_silent_tangent(name: str) -> None:
    assert_no_silent_tangent(name)


def test_operators_that_sync_stay_out_of_cuda_graphs() -> None:
    for operator in (ops.linear_loss, ops.linear_logprob_backward):
        assert torch.Tag.cudagraph_unsafe in operator._opoverload.tags


def assert_default_dtype_is_unused(name: str) -> None:
    function, make = CALLS[name]
    inputs = make()
    want = results(function, inputs)
    try:
        torch.set_default_dtype(torch.bfloat16)
        assert_same(results(function, inputs), want)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("name", CALLS)
def test_default_dtype_is_unused(name: str) -> None:
    """Code that loads a model in bfloat16 may set it for a while."""
    assert_default_dtype_is_unused(name)


@pytest.mark.parametrize("name", CALLS)
def test_without_gradients(name: str) -> None:
    """no_grad and inference_mode give the same values, and outputs that need no gradient."""
    function, make = CALLS[name]
    with_graph = function(**with_gradients(make(), *LEAVES))
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            out = function(**make())
        for x, y in zip(out, with_graph, strict=True):
            torch.testing.assert_close(x, y.detach(), rtol=1e-6, atol=1e-7)
            assert not x.requires_grad


@pytest.mark.parametrize("name", [name for name in CALLS if not name.startswith("linear")])
def test_autocast_does_not_touch_what_has_no_product(name: str) -> None:
    function, make = CALLS[name]
    want = results(function, make())
    with torch.autocast("cpu", torch.bfloat16):
        got = results(function, make())
    assert all((x is None and y is None) or torch.equal(x, y) for x, y in zip(got, want, strict=True))


def operator_calls() -> dict[str, tuple[Any, tuple]]:
    """Each registered operator, with arguments as the public functions pass them."""
    inputs = make_linear_inputs(3, 4, dtype=torch.float32)
    head = HeadOptions(0.9, 1.0, 4.0).pack()
    hidden = inputs["hidden"].flatten(0, 1).requires_grad_()
    weight, bias = inputs["weight"].requires_grad_(), inputs["bias"].requires_grad_()
    ids = inputs["token_ids"].flatten()
    score = torch.linspace(-1, 1, len(ids))
    options = LossOptions(beta=0.04, kappa=0.06, kl_clip=0.3)
    tokens = TokenInputs(**{key: inputs[key] for key in TokenInputs._fields if key in inputs}).clean(torch.float32)
    frozen = tuple(x.detach() for x in (hidden, weight, bias))
    per_token = (list(tokens), maths.token_weights(tokens.mask, options, torch.float32))
    linear_loss = (*frozen, ids, *per_token, None, torch.float32, None, head, options.pack())
    by_sequence = replace(options, importance_sampling_level="sequence").pack()
    weighted = tokens._replace(kappa_weights=tokens.old_logp.abs(), sampler_log=tokens.old_logp)
    vespo = (*frozen, ids, list(weighted), *linear_loss[5:-1], replace(options, loss_type="vespo").pack())
    logits = inputs["hidden"].detach().requires_grad_()
    small = inputs["token_ids"] % 13
    scores = score.view(small.shape)
    return {
        "linear_logprob": (ops.linear_logprob, (hidden, weight, bias, ids, torch.float32, head)),
        "linear_logprob, no bias": (ops.linear_logprob, (hidden, weight, None, ids, torch.float32, head)),
        "linear_logprob_backward": (
            ops.linear_logprob_backward,
            (*frozen, ids, score, score, score, torch.float32, head, [True, False, True]),
        ),
        "linear_logprob_backward, no entropy": (
            ops.linear_logprob_backward,
            (*frozen, ids, score, score, None, torch.float32, head, [True, True, True]),
        ),
        "linear_loss": (ops.linear_loss, (*linear_loss, [True, True, True])),
        "linear_loss, sequence": (ops.linear_loss, (*linear_loss[:-1], by_sequence, [False, True, False])),
        "linear_loss, vespo": (ops.linear_loss, (*vespo, [True, True, True])),
        "linear_loss, offset and float32": (
            ops.linear_loss,
            (*linear_loss[:6], tokens.ref_logp, torch.float32, torch.float32, *linear_loss[9:], [True] * 3),
        ),
        "linear_loss, no gradients": (ops.linear_loss, (*linear_loss, [False, False, False])),
        "selective_logprob": (ops.selective_logprob, (logits, small, 0.9)),
        "selective_logprob_backward": (ops.selective_logprob_backward, (logits.detach(), small, scores, scores, 0.9)),
    }


def test_options_survive_their_packing() -> None:
    """Operators take numbers: what comes out of them is what went in, with every option away from its default."""
    given: dict[str, Any] = {"beta": 0.1, "kappa": 0.2, "epsilon_low": 0.3, "epsilon_high": 0.4, "delta": 1.5}
    given |= {"importance_sampling_level": "sequence", "loss_type": "dapo", "max_completion_length": 9}
    given |= {"num_items_in_batch": 11, "proj_floor": 0.01, "kl_clip": 0.5, "bias_correction_kl": True}
    given |= {"sapo_temperature_pos": 0.7, "sapo_temperature_neg": 0.8}
    given |= {"vespo_k_pos": 0.1, "vespo_lambda_pos": 0.2, "vespo_k_neg": 0.3, "vespo_lambda_neg": 0.4}
    assert set(given) == set(LossOptions.__dataclass_fields__)
    for options in (LossOptions(**given), LossOptions(), LossOptions(loss_type="dapo", num_items_in_batch=0)):
        assert LossOptions.unpack(options.pack()) == options
    items = torch.tensor(11)
    options = replace(LossOptions(**given), num_items_in_batch=items)
    assert LossOptions.unpack(options.pack(), items) == options
    assert LossOptions.unpack(options.pack()) == replace(options, num_items_in_batch=None)
    changed = {name for name in given if getattr(options.per_token(), name) != given[name]}
    assert changed == {"loss_type", "max_completion_length", "num_items_in_batch"}
    for loss_type in LOSS_TYPES:
        options = LossOptions(loss_type=loss_type, max_completion_length=9)
        assert LossOptions.unpack(options.pack()) == options
        assert options.per_token().kind == options.kind == (loss_type if loss_type in KINDS else "clipped")
    for head in (HeadOptions(), HeadOptions(0.9, -2.0, 4.0)):
        assert HeadOptions.unpack(head.pack()) == head


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", operator_calls())
def test_operators_keep_their_contract(name: str, dtype: torch.dtype) -> None:
    """Schema, fake tensors, autograd registration and ahead-of-time dispatch agree with what the operator does."""
    operator, arguments = operator_calls()[name]
    cast = ("hidden", "weight", "bias", "logits")
    schema = [argument.name for argument in operator._opoverload._schema.arguments][: len(arguments)]
    arguments = tuple(
        x.detach().to(dtype).requires_grad_(x.requires_grad) if key in cast and x is not None else x
        for key, x in zip(schema, arguments, strict=True)
    )
    utils = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(operator, arguments, test_utils=utils, atol=1e-3, rtol=1e-2)
