"""
The check that every implementation passes before it is timed: value and gradients against float64, where plain PyTorch
in the case's own type says how large an error may be. Both are made a block of rows at a time, so that they exist at
any size.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch.nn import functional as F

from bench.baselines import Implementation
from bench.peers import loss_arguments
from bench.registry import LEAVES, Case, Tensors
from gcpo_kernels import reference
from gcpo_kernels.testing import assert_close_to_truth, assert_gradient, in_float64

# Of float32, in a mean of terms that may cancel, beside twice plain PyTorch's error, which luck can make 0.
_SUM_ROUNDINGS = {torch.float32: 2**8, torch.bfloat16: 2**14, torch.float16: 2**14}
# Times plain PyTorch's error and a rounding of the type: what another library's error may be.
_OTHERS = 16
# Bytes of a block of logits in float64.
_BLOCK_BYTES = {"cpu": 256 << 20, "other": 2 << 30}


@dataclass
class Outcome:
    """A value, (), (B, T) or (P, n), and gradients by the name of the tensor."""

    value: torch.Tensor
    gradients: dict[str, torch.Tensor] = field(default_factory=dict)


@dataclass
class Verdict:
    """
    Attributes:
        errors: root-mean-square error of each result over the root mean square of the truth.
        problem: what is wrong; "" if nothing is.
    """

    errors: dict[str, float]
    problem: str = ""


def outcome(run: Callable[[], torch.Tensor], case: Case, leaves: Tensors) -> Outcome:
    """What an implementation gives."""
    if not case.with_gradient:
        with torch.no_grad():
            return Outcome(run())
    value = run()
    names = LEAVES[case.op]
    gradients = torch.autograd.grad(value, [leaves[name] for name in names])
    return Outcome(value.detach(), dict(zip(names, gradients, strict=True)))


def expected(case: Case, x: Tensors, computes_less: bool = False, exact: bool = True) -> Outcome:
    """The truth, in float64; with `exact` False plain PyTorch's result in the case's own type."""
    wanted = in_float64(x) if exact and case.op in ("token_loss", "causal_weights") else x
    if case.op == "causal_weights":
        return Outcome(reference.causal_weights(wanted["z"], wanted["context_z"]))
    if case.op == "token_loss":
        logp = wanted["logp"].detach().requires_grad_()
        value = _loss(case, wanted, logp)
        return Outcome(value.detach(), {"logp": torch.autograd.grad(value, logp)[0]})
    head = _Head(case, x, torch.float64 if exact else case.dtype)
    logp = head.logp().requires_grad_()
    if case.op == "scoring":
        return Outcome(logp.detach())
    if computes_less:
        value = -logp.mean()
    else:
        rest = {name: t for name, t in x.items() if name not in ("hidden", "weight", "logits")}
        value = _loss(case, in_float64(rest) if exact else rest, logp)
    upstream = torch.autograd.grad(value, logp)[0]
    return Outcome(value.detach(), head.gradients(upstream))


def _loss(case: Case, x: Tensors, logp: torch.Tensor) -> torch.Tensor:
    return reference.gcpo_loss(logp, **loss_arguments(x), **case.options)[0]


class _Head:
    """From hidden states and weight, or from logits, to log-probabilities and back, by blocks of rows."""

    def __init__(self, case: Case, x: Tensors, dtype: torch.dtype):
        self.ids = x["token_ids"]
        self.dtype = dtype
        self.source = "logits" if case.op == "logits_loss" else "hidden"
        self.rows = x[self.source].detach()  # (B, T, H), or (B, T + 1, V) of which the last position is not used
        self.weight = None if self.source == "logits" else x["weight"].detach().to(dtype).requires_grad_()
        budget = _BLOCK_BYTES["cpu" if self.ids.device.type == "cpu" else "other"]
        step = max(1, budget // (8 * case.vocab))
        self.blocks = [
            (row, slice(first, min(first + step, case.tokens)))
            for row in range(case.batch)
            for first in range(0, case.tokens, step)
        ]

    def _block(self, at: tuple[int, slice]) -> tuple[torch.Tensor, torch.Tensor]:
        """The leaf that a block's gradient is of, and its log-probabilities."""
        leaf = self.rows[at].to(self.dtype).requires_grad_()
        logits = leaf if self.weight is None else F.linear(leaf, self.weight)
        logp = reference.selective_logprob(logits, self.ids[at])
        assert isinstance(logp, torch.Tensor)
        return leaf, logp

    def logp(self) -> torch.Tensor:
        """(B, T)."""
        with torch.no_grad():
            return torch.cat([self._block(at)[1] for at in self.blocks]).view(self.ids.shape)

    def gradients(self, upstream: torch.Tensor) -> Tensors:
        """For d loss / d logp = upstream, (B, T)."""
        d_rows = torch.zeros_like(self.rows, dtype=self.dtype)
        # Parts are added in float32 at least: one product over all rows would round once.
        wide = torch.float64 if self.dtype == torch.float64 else torch.float32
        d_weight = None if self.weight is None else torch.zeros_like(self.weight, dtype=wide)
        for at in self.blocks:
            leaf, logp = self._block(at)
            leaves = [leaf] if self.weight is None else [leaf, self.weight]
            d_rows[at], *rest = torch.autograd.grad(logp, leaves, upstream[at])
            if d_weight is not None:
                d_weight += rest[0]
        return {self.source: d_rows} | ({} if d_weight is None else {"weight": d_weight.to(self.dtype)})


def check(case: Case, got: Outcome, truth: Outcome, plain: Outcome, ours: bool = True) -> Verdict:
    """
    How far a result is from the truth, and whether that is within the budget: the project's own, for `ours`; for
    others, whose rounding is not ours to judge, what no mistake would pass.
    """
    results: dict[str, tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]]
    results = {"value": (got.value, truth.value, plain.value)}
    results |= {name: (got.gradients.get(name), g, plain.gradients[name]) for name, g in truth.gradients.items()}
    errors: dict[str, float] = {}
    problems = []
    for name, (found, want, yardstick) in results.items():
        if found is None or found.numel() != want.numel():
            errors[name] = math.nan
            problems.append(f"{name}: {'missing' if found is None else f'shape {tuple(found.shape)}'}")
            continue
        found, yardstick = found.detach().view(want.shape), yardstick.detach().view(want.shape)
        size = max(want.abs().item(), 0.1) if want.dim() == 0 else max(_rms(want), 1e-300)
        errors[name], plain_error = _rms(found.double() - want) / size, _rms(yardstick.double() - want) / size
        try:
            if not ours:
                limit = _OTHERS * (plain_error + torch.finfo(case.dtype).eps)
                assert errors[name] <= limit, f"{name}: relative error {errors[name]:.2e} exceeds {limit:.2e}"
            elif want.dim() == 0:  # of size 1, if its terms do not cancel
                limit = 2 * plain_error + _SUM_ROUNDINGS[case.dtype] * 2**-23
                assert errors[name] <= limit, f"{name}: relative error {errors[name]:.2e} exceeds {limit:.2e}"
            elif name == "value":
                assert_close_to_truth(found.float(), want, yardstick, what=name)
            else:
                assert_gradient(found, want, yardstick, what=f"gradient of {name}")
        except AssertionError as error:
            problems.append(str(error))
    return Verdict(errors, "; ".join(problems))


def _rms(x: torch.Tensor) -> float:
    return (torch.linalg.vector_norm(x) / max(x.numel(), 1) ** 0.5).item()


class Gate:
    """The expected results of a case, made when first asked for."""

    def __init__(self, case: Case, x: Tensors):
        self.case, self.x = case, x
        self._made: dict[bool, tuple[Outcome, Outcome]] = {}

    def check(self, implementation: Implementation, got: Outcome) -> Verdict:
        less = implementation.computes_less
        if less not in self._made:
            self._made[less] = tuple(expected(self.case, self.x, less, exact) for exact in (True, False))  # type: ignore
        verdict = check(self.case, got, *self._made[less], ours=implementation.ours)
        return Verdict(verdict.errors) if implementation.approximate else verdict
