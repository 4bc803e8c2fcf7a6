"""Wrong arguments raise ValueError or TypeError with the argument's name in backticks."""

import os
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

import gcpo_kernels
from gcpo_kernels.checks import check_context_weights
from gcpo_kernels.options import check_number
from gcpo_kernels.testing import make_linear_inputs, make_representations, make_token_inputs

# make_*_inputs: B = 5, T = 7, L = 3, H = 13, V = 37; P = 3, n = 4, L = 3, m = 2, H = 9.
NAN, INF = float("nan"), float("inf")
# Backends that exist but do not run on CPU tensors: asking for one raises, and nothing falls back.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ABSENT = () if INTERPRETED else ("triton",)


def meta(x: torch.Tensor) -> torch.Tensor:
    return x.to("meta")


def integers(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.int32)


def wider(x: torch.Tensor) -> torch.Tensor:
    """One more entry along the last dimension."""
    return torch.cat([x, x[..., :1]], dim=-1)


def longer(x: torch.Tensor) -> torch.Tensor:
    return torch.cat([x, x[:1]])


def nested(x: torch.Tensor) -> torch.Tensor:
    """One more dimension."""
    return x.unsqueeze(0).unsqueeze(0)


def listed(x: torch.Tensor) -> list:
    return x.tolist()


def complex_(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.complex64)


TENSORS = ("advantages", "old_logp", "ref_logp", "query_logp", "causal_logp", "context_logp", "context_weights")
TENSORS += ("importance_sampling_ratio", "policy_weights", "kappa_weights")
CHANGES: tuple[Callable[[torch.Tensor], Any], ...] = (meta, integers, wider, longer, nested, listed)

# Options of both losses: (argument, value), kappa and beta being 0 unless they are given.
LOSS_OPTIONS: list[tuple[str, Any]] = [
    *((name, value) for name in ("beta", "kappa", "epsilon_low", "epsilon_high") for value in (-0.1, NAN, INF, "1")),
    *((name, value) for name in ("beta", "kappa", "proj_floor") for value in (None, True)),
    *((name, value) for name in ("delta", "kl_clip") for value in (0, -1.0, NAN, INF, "1", True)),
    *(("proj_floor", value) for value in (0.0, -1e-6, 1.0, 2, NAN)),
    *(("importance_sampling_level", value) for value in ("tokens", "", None, 1)),
    *(("loss_type", value) for value in ("GRPO", "gspo", "dapo ", None, 0)),
    *(("bias_correction_kl", value) for value in (None, 1, 0.0, "True")),
    *((f"sapo_temperature_{sign}", value) for sign in ("pos", "neg") for value in (0, -1.0, NAN, INF, None, "1", True)),
    *(
        (f"vespo_{name}", value)
        for name in ("k_pos", "lambda_pos", "k_neg", "lambda_neg")
        for value in (-1.0, NAN, "1")
    ),
    *(("max_completion_length", value) for value in (0, -3, 2.5, "7", True)),
    *(("num_items_in_batch", value) for value in (-1, NAN, INF, "7", torch.ones(2), True)),
    *(("backend", value) for value in (*ABSENT, "cuda", "Torch", 1)),
]
HEAD_OPTIONS: list[tuple[str, Any]] = [
    *(("temperature", value) for value in (0, -1.0, NAN, INF, None, "1", True)),
    *(("logit_scale", value) for value in (NAN, INF, None, "1")),
    *(("logit_softcap", value) for value in (0, -2.0, NAN, INF, "1")),
    *(("backend", value) for value in (*ABSENT, "cuda", 1)),
]


def ident(value: Any) -> str:
    return value.__name__ if callable(value) else str(value).replace("\n", "")


def raises(name: str, function: Callable[..., Any], arguments: dict[str, Any], **options: Any) -> None:
    with pytest.raises((ValueError, TypeError), match=re.escape(f"`{name}")) as caught:
        function(**arguments, **options)
    assert "got" in str(caught.value) or "available" in str(caught.value), "the message does not say what it got"


LOSSES = {"gcpo_loss": make_token_inputs, "linear_gcpo_loss": make_linear_inputs}


@pytest.mark.parametrize("changed", CHANGES, ids=ident)
@pytest.mark.parametrize("name", TENSORS)
@pytest.mark.parametrize("function", LOSSES)
def test_tensors_of_the_losses(function: str, name: str, changed: Callable[[torch.Tensor], Any]) -> None:
    inputs = LOSSES[function]()
    if name == "context_logp":
        inputs["context_weights"] = None
        if changed is wider:  # more contexts are no mistake: take all but one of the tokens instead
            changed = longer
    given = inputs.get(name, torch.ones(5, 7))
    raises(name, getattr(gcpo_kernels, function), inputs | {name: changed(given)}, kappa=0.1)


@pytest.mark.parametrize("changed", CHANGES, ids=ident)
def test_offset(changed: Callable[[torch.Tensor], Any]) -> None:
    inputs = make_linear_inputs()
    raises("offset_logp", gcpo_kernels.linear_gcpo_loss, inputs | {"offset_logp": changed(inputs["old_logp"])})


@pytest.mark.parametrize(
    "changed",
    [*CHANGES, torch.Tensor.double, torch.Tensor.bfloat16, lambda x: x.clone().requires_grad_(), lambda x: x.T],
    ids=ident,
)
def test_main_grad(changed: Callable[[torch.Tensor], Any]) -> None:
    inputs = make_linear_inputs()
    raises("main_grad", gcpo_kernels.linear_gcpo_loss, inputs | {"main_grad": changed(inputs["weight"])})


@pytest.mark.parametrize("changed", [meta, wider, longer, nested, listed, complex_], ids=ident)
@pytest.mark.parametrize("function", LOSSES)
def test_mask(function: str, changed: Callable[[torch.Tensor], Any]) -> None:
    inputs = LOSSES[function]()
    with pytest.raises((ValueError, TypeError), match=r"`(mask|hidden)`"):
        getattr(gcpo_kernels, function)(**(inputs | {"mask": changed(inputs["mask"])}))


@pytest.mark.parametrize("changed", [integers, nested, listed, complex_], ids=ident)
def test_logp(changed: Callable[[torch.Tensor], Any]) -> None:
    inputs = make_token_inputs()
    raises("logp", gcpo_kernels.gcpo_loss, inputs | {"logp": changed(inputs["logp"])})


@pytest.mark.parametrize(("name", "value"), LOSS_OPTIONS, ids=ident)
@pytest.mark.parametrize("function", LOSSES)
def test_options_of_the_losses(function: str, name: str, value: Any) -> None:
    raises(name, getattr(gcpo_kernels, function), LOSSES[function](), **{name: value})


@pytest.mark.parametrize("function", LOSSES)
@pytest.mark.parametrize(
    ("named", "without", "options"),
    [
        ("ref_logp", "ref_logp", {"beta": 0.1}),
        ("context_logp", "context_logp", {"kappa": 0.1}),
        ("context_weights", "context_logp", {}),
        ("kappa_weights", "context_logp", {}),
        ("max_completion_length", None, {"loss_type": "dr_grpo"}),
    ],
)
def test_what_an_option_needs(function: str, named: str, without: str | None, options: dict[str, Any]) -> None:
    inputs = LOSSES[function]()
    if without is not None:
        inputs[without] = None
    if named in ("context_logp", "kappa_weights"):
        inputs["context_weights"] = None
    if named == "kappa_weights":
        inputs["kappa_weights"] = torch.ones(5, 7)
    raises(named, getattr(gcpo_kernels, function), inputs, **options)


@pytest.mark.parametrize("value", [-1e-3, -INF])
@pytest.mark.parametrize("function", LOSSES)
def test_negative_context_weights(function: str, value: float) -> None:
    inputs = LOSSES[function]()
    inputs["context_weights"][0, 1] = value
    inputs["mask"][0, 1] = 0  # a row matters where any of its tokens does
    assert inputs["mask"][0].any()
    raises("context_weights", getattr(gcpo_kernels, function), inputs, kappa=0.1)


def test_weights_are_checked_where_they_are() -> None:
    """Not on torch's default device."""
    inputs = LOSSES["gcpo_loss"]()
    weights, kappa_weights = inputs["context_weights"], torch.ones(5, 1)
    with torch.device("meta"):
        check_context_weights(weights, inputs["context_logp"], inputs["mask"], kappa_weights)
        weights[0, 1] = -1.0
        with pytest.raises(ValueError, match="`context_weights`"):
            check_context_weights(weights, inputs["context_logp"], inputs["mask"], kappa_weights)


@pytest.mark.parametrize("value", [-1e-3, -INF, INF, NAN])
@pytest.mark.parametrize("by_token", [True, False])
@pytest.mark.parametrize("function", LOSSES)
def test_wrong_kappa_weights(function: str, by_token: bool, value: float) -> None:
    """At tokens that count; elsewhere they may hold anything, and so may context_weights of rows left out by them."""
    weights = torch.ones(5, 7) if by_token else torch.ones(5)
    weights[-1] = value
    inputs = LOSSES[function]() | {"kappa_weights": weights}
    assert not inputs["mask"][-1].any()
    loss, _ = getattr(gcpo_kernels, function)(**inputs, kappa=0.1)
    assert torch.isfinite(loss)
    weights[-1], weights[0], inputs["context_weights"][0] = 1.0, 0.0, value
    loss, _ = getattr(gcpo_kernels, function)(**inputs, kappa=0.1)
    assert torch.isfinite(loss)
    weights[0] = value
    raises("kappa_weights", getattr(gcpo_kernels, function), inputs, kappa=0.1)


def test_return_scores_is_a_flag() -> None:
    raises("return_scores", gcpo_kernels.linear_gcpo_loss, make_linear_inputs(), return_scores=1)


def test_no_context_at_all() -> None:
    inputs = make_token_inputs()
    inputs |= {"context_logp": inputs["context_logp"][..., :0], "context_weights": None}
    raises("context_logp", gcpo_kernels.gcpo_loss, inputs, kappa=0.1)


HEAD_TENSORS = [
    *(("hidden", change) for change in (integers, wider, longer, nested, listed)),
    *(("weight", change) for change in (meta, integers, wider, nested, listed)),
    *(("bias", change) for change in (meta, integers, wider, nested, listed)),
    *(("token_ids", change) for change in (meta, wider, longer, nested, listed)),
    *(("token_ids", change) for change in (torch.Tensor.float, torch.Tensor.bool, complex_)),
]


@pytest.mark.parametrize(("name", "changed"), HEAD_TENSORS, ids=ident)
@pytest.mark.parametrize("function", ["linear_gcpo_loss", "linear_logprob"])
def test_tensors_of_the_head(function: str, name: str, changed: Callable[[torch.Tensor], Any]) -> None:
    inputs = make_linear_inputs()
    if function == "linear_logprob":
        inputs = {key: inputs[key] for key in ("hidden", "weight", "bias", "token_ids")}
    wanted = {"hidden": r"`(hidden|weight|token_ids|mask)`"}.get(name, f"`{name}`")
    with pytest.raises((ValueError, TypeError), match=wanted):
        getattr(gcpo_kernels, function)(**(inputs | {name: changed(inputs[name])}))


@pytest.mark.parametrize(("name", "value"), HEAD_OPTIONS, ids=ident)
@pytest.mark.parametrize("function", ["linear_gcpo_loss", "linear_logprob"])
def test_options_of_the_head(function: str, name: str, value: Any) -> None:
    inputs = make_linear_inputs()
    if function == "linear_logprob":
        inputs = {key: inputs[key] for key in ("hidden", "weight", "bias", "token_ids")}
    raises(name, getattr(gcpo_kernels, function), inputs, **{name: value})


@pytest.mark.parametrize("token", [-1, -100, 37, 2**40, -(2**63)])
def test_tokens_outside_the_vocabulary(token: int) -> None:
    inputs = make_linear_inputs()
    inputs["token_ids"][0, 3] = token
    raises("token_ids", gcpo_kernels.linear_gcpo_loss, inputs)
    head = {key: inputs[key] for key in ("hidden", "weight", "bias", "token_ids")}
    raises("token_ids", gcpo_kernels.linear_logprob, head)
    logits = torch.randn(5, 7, 37)
    raises("token_ids", gcpo_kernels.selective_logprob, {"logits": logits, "token_ids": inputs["token_ids"]})


SELECTIVE: list[tuple[str, Any]] = [
    ("logits", torch.randn(7)),
    ("logits", torch.randn(1, 5, 7, 37)),
    ("logits", torch.ones(5, 37, dtype=torch.int64)),
    ("token_ids", torch.zeros(4, dtype=torch.int64)),
    ("token_ids", torch.zeros(5, 1, dtype=torch.int64)),
    ("token_ids", torch.zeros(5)),
    ("token_ids", torch.zeros(5, dtype=torch.int64, device="meta")),
    *((name, value) for name, value in HEAD_OPTIONS if not name.startswith("logit_")),
]


@pytest.mark.parametrize(("name", "value"), SELECTIVE, ids=lambda x: x if isinstance(x, str) else "value")
def test_selective_logprob(name: str, value: Any) -> None:
    arguments = {"logits": torch.randn(5, 37), "token_ids": torch.zeros(5, dtype=torch.int64)}
    raises(name, gcpo_kernels.selective_logprob, arguments | {name: value})


WEIGHTS: list[tuple[str, Any]] = [
    *(("z", change) for change in (integers, nested, listed)),
    *(("context_z", change) for change in (meta, integers, wider, longer, nested, listed)),
    *(("context_mask", change) for change in (meta, wider, longer, nested, listed, complex_)),
    *(("alpha", value) for value in (NAN, INF, None, "2", True)),
    *(("baseline", value) for value in ("median", None, 0)),
    *(("similarity", value) for value in ("dot", None, 0)),
    *(("backend", value) for value in (*ABSENT, "numpy", 1)),
    ("context_z", lambda x: x[:, :, :0]),
    ("context_z", lambda x: x[:, :, :, :0]),
]


@pytest.mark.parametrize(("name", "value"), WEIGHTS, ids=ident)
def test_causal_weights(name: str, value: Any) -> None:
    inputs: dict[str, Any] = dict(make_representations())
    inputs[name] = value(inputs[name]) if callable(value) else value
    raises(name, gcpo_kernels.causal_weights, inputs)


def test_causal_weights_of_other_candidates() -> None:
    inputs = make_representations()
    raises("context_z", gcpo_kernels.causal_weights, inputs | {"z": inputs["z"][:, :3]})


REST: list[tuple[str, str, tuple, dict[str, Any]]] = [
    ("z", "leave_one_out_mean", (torch.randn(3, 4),), {}),
    ("z", "leave_one_out_mean", (torch.ones(3, 4, 5, dtype=torch.int64),), {}),
    ("backend", "leave_one_out_mean", (torch.randn(3, 4, 5),), {"backend": "cuda"}),
    ("rewards", "group_advantages", (torch.randn(2, 4), 4), {}),
    ("rewards", "group_advantages", (torch.ones(8, dtype=torch.int64), 4), {}),
    ("rewards", "group_advantages", ([1.0, 2.0], 2), {}),
    ("group_size", "group_advantages", (torch.randn(8), 3), {}),
    ("group_size", "group_advantages", (torch.randn(8), 0), {}),
    ("group_size", "group_advantages", (torch.randn(8), 4.0), {}),
    ("group_size", "group_advantages", (torch.randn(8), True), {}),
    ("scale", "group_advantages", (torch.randn(8), 4), {"scale": "std"}),
    ("scale", "group_advantages", (torch.randn(8), 4), {"scale": True}),
    ("eps", "group_advantages", (torch.randn(8), 4), {"eps": -1e-4}),
    ("eps", "group_advantages", (torch.randn(8), 4), {"eps": NAN}),
    ("query_logp", "causal_reference_logprob", (torch.randn(8), torch.randn(8, 3)), {}),
    ("context_logp", "causal_reference_logprob", (torch.randn(2, 3), torch.randn(2, 3)), {}),
    ("context_logp", "causal_reference_logprob", (torch.randn(2, 3), torch.randn(2, 4, 3)), {}),
    ("context_logp", "causal_reference_logprob", (torch.randn(2, 3), torch.randn(2, 3, 0)), {}),
    *(
        (name, "causal_reference_logprob", (torch.randn(2, 3), torch.randn(2, 3, 4)), {name: value})
        for name, value in (
            ("proj_floor", 0),
            ("floor_at_query", 1),
            ("floor_at_query", None),
            ("context_weights", [0.25] * 4),
            ("context_weights", torch.ones(3)),
            ("context_weights", torch.ones(3, 4)),
            ("context_weights", torch.ones(2, 3, 4)),
            ("context_weights", torch.ones(4, dtype=torch.int64)),
            ("context_weights", torch.tensor([0.5, -0.1, 0.3, 0.3])),
            ("context_weights", torch.tensor([0.5, NAN, 0.3, 0.2])),
            ("context_weights", torch.ones(4, device="meta")),
        )
    ),
]


@pytest.mark.parametrize(("name", "function", "arguments", "options"), REST)
def test_the_rest(name: str, function: str, arguments: tuple, options: dict[str, Any]) -> None:
    with pytest.raises((ValueError, TypeError), match=re.escape(f"`{name}`")):
        getattr(gcpo_kernels, function)(*arguments, **options)


@pytest.mark.hazard(30)
def test_available_backends() -> None:
    """Seen in Liger#51."""
    for device in ("cpu", torch.device("cpu")):
        available = gcpo_kernels.available_backends(device)
        assert "torch" in available
        assert INTERPRETED or available == ("torch",)


@pytest.mark.parametrize(
    ("bounds", "inside", "outside", "wanted"),
    [
        ({}, (-1e30, 0, 7), (NAN, INF, -INF), "finite"),
        ({"low": 0.0}, (0.0, 2), (-1e-9, INF, NAN), "finite and at least 0"),
        ({"above": 0.0, "high": 1.0}, (1e-9, 1), (0.0, 1.1, NAN), "finite and above 0 and at most 1"),
        ({"low": 0.0, "high": 1.0}, (0, 1.0), (-0.1, 1.1, NAN), "finite and at least 0 and at most 1"),
        ({"above": 0.0, "below": 1.0}, (0.5,), (0, 1.0, NAN), "finite and above 0 and below 1"),
    ],
)
def test_bounds_of_a_number(
    bounds: dict[str, float], inside: tuple[float, ...], outside: tuple[float, ...], wanted: str
) -> None:
    for value in inside:
        check_number("kappa", value, **bounds)
    for value in outside:
        with pytest.raises(ValueError, match=re.escape(f"`kappa` must be {wanted}, got {value}.")):
            check_number("kappa", value, **bounds)
    for wrong in ("1", True, None):
        with pytest.raises(TypeError, match="`kappa` must be a number, got"):
            check_number("kappa", wrong, **bounds)
