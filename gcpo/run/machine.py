"""This machine: what is installed, its devices, and whether the kernels compute the right numbers on them."""

import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

import gcpo_kernels
from gcpo._version import __version__
from gcpo_kernels import reference
from gcpo_kernels.testing import (
    assert_close_to_truth,
    assert_gradient,
    in_float64,
    make_hidden_representations,
    make_linear_inputs,
    make_representations,
    make_token_inputs,
    with_gradients,
)


@dataclass(frozen=True)
class Case:
    """A call of a public function: its tensors, the names of those with a gradient, and its other arguments."""

    name: str
    tensors: dict[str, Any]
    differentiable: tuple[str, ...]
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """
    How far a function is from the float64 reference on this machine: the largest error of what it returns over the
    largest value, the same of its gradients (the worst tensor's), and what is wrong, empty if nothing is.
    """

    name: str
    value: float
    gradient: float
    problem: str = ""


def cases() -> Iterator[Case]:
    """One call of every public differentiable function, at sizes that no block divides."""
    loss = {"beta": 0.04, "kappa": 0.06, "delta": 1.4}
    head = {"temperature": 0.9, "logit_softcap": 20.0}
    tokens = make_token_inputs(8, 37)
    linear = make_linear_inputs(6, 37, hidden=72, vocab=1013)
    of_head = {name: linear[name] for name in ("hidden", "weight", "bias", "token_ids")}
    logits = {"logits": of_head["hidden"] @ of_head["weight"].T, "token_ids": of_head["token_ids"]}
    representations = make_representations(hidden=72)
    yield Case("gcpo_loss", tokens, ("logp", "causal_logp"), loss)
    yield Case("linear_gcpo_loss", linear, ("hidden", "weight", "bias", "causal_logp"), loss | head)
    yield Case("linear_logprob", of_head, ("hidden", "weight", "bias"), head)
    yield Case("selective_logprob", logits, ("logits",), {"temperature": 0.9})
    yield Case("causal_weights", representations, ("z", "context_z"))
    yield Case("causal_weights_from_hidden", make_hidden_representations(hidden=72), ("hidden", "context_z"))
    yield Case("leave_one_out_mean", {"z": representations["z"]}, ("z",))


def check(case: Case, device: torch.device) -> Outcome:
    """Compare the backend of a device, in float32, with the float64 reference on the CPU."""
    cpu = torch.device("cpu")
    try:
        truth = _evaluate(getattr(reference, case.name), in_float64(case.tensors), case, cpu)
        plain = _evaluate(getattr(reference, case.name), case.tensors, case, device)
        found = _evaluate(getattr(gcpo_kernels, case.name), case.tensors, case, device)
    except Exception as error:  # a kernel that does not compile is a finding, whatever it raises
        nan = float("nan")
        return Outcome(case.name, nan, nan, f"{type(error).__name__}: {error}".split("\n")[0])
    errors = [relative_error(a, b) for a, b in zip(found, truth, strict=True)]
    problem = ""
    try:
        assert_close_to_truth(found[0], truth[0], plain[0])
        for name, *tensors in zip(case.differentiable, found[1:], truth[1:], plain[1:], strict=True):
            assert_gradient(*tensors, what=f"gradient in {name}")
    except AssertionError as error:
        problem = str(error)
    return Outcome(case.name, errors[0], max(errors[1:]), problem)


def relative_error(found: torch.Tensor, truth: torch.Tensor) -> float:
    """Largest difference over the largest value; NaN if there is one in either."""
    difference = (found.cpu().double() - truth).abs().amax()
    return float(difference / truth.abs().amax().clamp(min=1e-30))


def _evaluate(function: Any, tensors: dict[str, Any], case: Case, device: torch.device) -> list[torch.Tensor]:
    """What a function returns, and the gradients of a fixed combination of that."""
    tensors = with_gradients({name: x.to(device) for name, x in tensors.items()}, *case.differentiable)
    out = function(**tensors, **case.options)
    out = out[0] if isinstance(out, tuple) else out
    combination = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(device, out.dtype)
    gradients = torch.autograd.grad((out * combination).sum(), [tensors[name] for name in case.differentiable])
    return [out.detach(), *gradients]


def default_device() -> torch.device:
    """The accelerator that torch would use, or the CPU."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return accelerator or torch.device("cpu")


def describe(device: torch.device) -> str:
    """Name, count and memory of the devices of one kind."""
    gib = 2**30
    if device.type in ("cuda", "xpu"):
        backend: Any = torch.cuda if device.type == "cuda" else torch.xpu
        kind = f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
        properties = backend.get_device_properties(device)
        memory = f"{properties.total_memory / gib:.0f} GiB each"
        return f"{kind if device.type == 'cuda' else 'XPU'}: {backend.device_count()} x {properties.name}, {memory}"
    if device.type != "cpu":
        return device.type.upper()
    try:
        memory = f", {os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / gib:.0f} GiB"
    except (AttributeError, ValueError, OSError):  # not every system tells
        memory = ""
    return f"CPU: {platform.machine()}, {torch.get_num_threads()} threads{memory}"


def installed(package: str) -> str | None:
    """Version of a package, None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def environment() -> dict[str, Any]:
    """Versions and the machine, as the demo and the studies write them beside their results."""
    versions = {"gcpo": __version__} | {name: version(name) for name in ("torch", "transformers", "trl")}
    place = {"python": platform.python_version(), "machine": platform.machine()}
    return {**versions, **place, "threads": torch.get_num_threads()}
