"""
Random calls of every public function against the float64 reference: values, every gradient, metrics and errors.

`make fuzz` runs it for ten minutes (`FUZZ_MINUTES` says how long) and prints its seed. A failure is shrunk, and printed
as a script that shows it with nothing but torch and this package. A result is right where it is that of the reference
for inputs a few roundings away: that allows for what no float32 arithmetic could know, and for nothing else.
"""

import argparse
import math
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import hypothesis
import pytest
import small_tiles
import torch
from fuzz_cases import LEAVES, OPTIONS_ONLY, WEIGHTS, Case, build, cases, settings, snippet

import gcpo_kernels
from gcpo_kernels import maths, reference
from gcpo_kernels.options import LossOptions
from gcpo_kernels.testing import in_float64

EPS = 2.0**-23
PERTURBATION, DRAWS = 8 * EPS, 4  # inputs are moved by this, relatively, this many times
SPREAD, ROUNDINGS = 16.0, 64.0  # allowed: so many times what that moves the truth, and roundings of its size
# Beyond this a float32 intermediate may overflow although its result need not.
LARGE = 1e18


class Outcome(NamedTuple):
    """Results by name, gradients as "d name"; what a call raised instead."""

    values: dict[str, torch.Tensor]
    error: Exception | None = None


def call(function: Callable[..., Any], arguments: dict[str, Any], case: Case, **options: Any) -> Outcome:
    """Outputs, metrics and the gradients of a weighted sum of the outputs."""
    copies = {
        key: x.detach().requires_grad_(key in LEAVES) if isinstance(x, torch.Tensor) and x.is_floating_point() else x
        for key, x in arguments.items()
    }
    try:
        out = function(**copies, **case.options, **options)
        named = dict(zip(("value", "entropy"), out if isinstance(out, tuple) else (out,), strict=False))
        if isinstance(out, tuple) and isinstance(out[1], dict):
            named = {"loss": out[0]}
            values = {f"metric {key}": x for key, x in out[1].items()}
        else:
            values = {}
        leaves = {key: x for key, x in copies.items() if isinstance(x, torch.Tensor) and x.requires_grad}
        carrying = [x for x in named.values() if x.requires_grad]
        if carrying and leaves:
            upstream = [
                torch.full((), case.upstream * (k + 1), dtype=x.dtype).expand_as(x) for k, x in enumerate(carrying)
            ]
            grads = torch.autograd.grad(carrying, list(leaves.values()), upstream, allow_unused=True)
            values |= {f"d {key}": g for key, g in zip(leaves, grads, strict=True) if g is not None}
        return Outcome({key: x.detach() for key, x in (named | values).items()})
    except (ValueError, TypeError) as error:
        return Outcome({}, error)


def moved(arguments: dict[str, Any], generator: torch.Generator) -> dict[str, Any]:
    """Floating inputs, each a few roundings away."""
    return {
        key: x * (1 + PERTURBATION * (2.0 * torch.rand(x.shape, generator=generator, dtype=torch.float64) - 1))
        if isinstance(x, torch.Tensor) and x.dtype == torch.float64 and key not in ("mask", "context_mask")
        else x
        for key, x in arguments.items()
    }


def check(case: Case) -> None:
    """Raise AssertionError, saying what is wrong, unless the call is right."""
    arguments = build(case)
    backend = {} if case.function in OPTIONS_ONLY else {"backend": case.backend}
    with pytest.MonkeyPatch.context() as patch:
        small_tiles.apply(patch, *settings(case))
        # Memory that nothing wrote holds NaN: an element that is read before it is written shows.
        patch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
        torch.use_deterministic_algorithms(True)
        try:
            ours = call(getattr(gcpo_kernels, case.function), arguments, case, **backend)
        finally:
            torch.use_deterministic_algorithms(False)
    if case.invalid is not None:
        assert ours.error is not None, f"{case.invalid} is wrong and nothing was raised"
        assert "`" in str(ours.error), f"the error names no argument: {ours.error}"
        return
    assert ours.error is None, f"raised {type(ours.error).__name__}: {ours.error}"
    naive = getattr(reference, case.function)
    arguments.pop("offset_logp", None)  # nothing may depend on it
    exact = in_float64(arguments)
    truth = call(naive, exact, case)
    assert truth.error is None, f"the reference raised {truth.error}"
    if case.options.get("similarity") == "euclidean":
        cosine = naive(**exact, **(case.options | {"similarity": "cosine", "alpha": 1.0}))
        if bool((cosine > 0.999).any()):
            return  # 1 / (1 + sqrt(2 - 2c)) is vertical at c = 1: a rounding of c is any gradient
    generator = torch.Generator().manual_seed(case.seed)
    around = [call(naive, moved(exact, generator), case).values for _ in range(DRAWS)]
    shared = case.backend == "torch" and case.function not in (
        "linear_gcpo_loss",
        "linear_logprob",
        "selective_logprob",
    )
    plain = truth.values if shared else call(naive, arguments, case).values
    assert set(ours.values) >= {key for key, x in truth.values.items() if x.any()}, (
        f"missing: {set(truth.values) - set(ours.values)}"
    )
    outputs = [x for key, x in truth.values.items() if key in ("loss", "value", "entropy")]
    beyond = any(bool((~torch.isfinite(x) | (x.abs() >= LARGE)).any()) for x in outputs)
    for key, got in ours.values.items():
        if beyond and key.startswith("d "):
            continue  # of a result that float32 cannot hold
        want = truth.values.get(key, torch.zeros_like(got))  # a gradient that the reference does not have is 0
        near = [values.get(key, torch.zeros_like(got)) for values in around]
        unit = unit_of(key, case, arguments) if got.numel() else 1.0
        # What plain torch makes of the same inputs, where that is not what runs anyway.
        plain_error = (plain.get(key, want).double() - want).abs().nan_to_num(nan=0.0, posinf=0.0)
        unit += plain_error.amax().item() / EPS if got.numel() else 0.0
        compare(key, got, want, near, arguments, unit)


def unit_of(key: str, case: Case, arguments: dict[str, Any]) -> float | torch.Tensor:
    """The size of a term before others are taken from it: expm1(d) - d knows d, not d * d / 2, to a rounding."""
    if case.function == "causal_reference_logprob" and key == "value":
        # p' is a difference of probabilities, and known to a rounding of the largest of them.
        exact = in_float64(arguments)
        largest = torch.maximum(exact["query_logp"], exact["context_logp"].amax(dim=-1))
        log_proj = reference.causal_reference_logprob(**exact, **case.options)
        return (largest - log_proj).exp().nan_to_num(nan=1.0, posinf=1.0).clamp(min=1.0)
    if not key.startswith("d ") and key != "loss":
        return 1.0
    if case.function in WEIGHTS:  # z / (|z||t|) - cosine z / |z|^2 may cancel
        if case.function == "causal_weights":
            z = arguments["z"]
        else:
            last = arguments["last_index"]
            z = arguments["hidden"][torch.arange(len(last)), last]
        both = (x.double().norm(dim=-1).flatten() for x in (z, arguments["context_z"]))
        norms = torch.stack([norm.nan_to_num(nan=math.inf, posinf=math.inf).min() for norm in both])
        unit = abs(case.upstream * case.options["alpha"]) * max(1.0, 4.0 / max(norms.min().item(), 1e-30))
        if case.options["similarity"] == "euclidean":  # 1 - c, which is divided by, is known to a rounding of 1
            options = case.options | {"similarity": "cosine", "alpha": 1.0}
            naive = getattr(reference, case.function)
            closest = naive(**in_float64(arguments), **options).nan_to_num(nan=-1.0).max().item()
            unit *= max(1.0, 0.5 / (1.0 - closest))
        return unit
    if "mask" not in arguments:
        return abs(case.upstream) + rounded_operands(key, case, arguments)
    options = LossOptions(**{key: x for key, x in case.options.items() if key in LossOptions.__dataclass_fields__})
    weights = maths.token_weights(arguments["mask"], options, torch.float64)
    unit = weights.sum().item() * (1.0 if key == "loss" else abs(case.upstream))
    return unit + rounded_operands(key, case, arguments)


def rounded_operands(key: str, case: Case, arguments: dict[str, Any]) -> float | torch.Tensor:
    """
    Triton takes the gradient in the logits, D, as an operand of the products, rounded to float16 where those are:
    D @ weight, D^T @ hidden and D^T @ 1 are known to such a rounding of their terms, however much of those cancels.
    """
    if key not in ("d hidden", "d weight", "d bias") or case.backend != "triton" or set(case.dtypes) != {"float16"}:
        return 0.0
    exact = in_float64(arguments)
    hidden, weight = exact["hidden"], exact["weight"]
    logits = exact | {"hidden": hidden @ weight.T, "weight": torch.eye(len(weight), dtype=torch.float64)}
    d = call(getattr(reference, case.function), logits, case).values.get("d hidden")
    if d is None or not d.numel():
        return 0.0
    half = torch.finfo(torch.float16)
    d = d.nan_to_num(posinf=0.0, neginf=0.0).abs()
    d = d + half.tiny * d.amax()  # scaled by the largest: what lies below the normal numbers is coarser
    rows, states = d.flatten(0, -2), hidden.nan_to_num().abs().flatten(0, -2)
    terms = {"d hidden": d @ weight.abs(), "d weight": rows.T @ states, "d bias": rows.sum(dim=0)}[key]
    return terms * (half.eps / (4 * EPS))


def compare(
    key: str,
    got: torch.Tensor,
    want: torch.Tensor,
    around: list[torch.Tensor],
    arguments: dict[str, Any],
    unit: float | torch.Tensor,
) -> None:
    assert got.shape == want.shape, f"{key}: shape {tuple(got.shape)}, wanted {tuple(want.shape)}"
    given = arguments.get(key.removeprefix("d "))
    if key.startswith("d ") and given is not None:
        assert got.dtype == given.dtype, f"{key}: {got.dtype}, wanted {given.dtype}"
    if not want.numel():
        return
    want = want.double()
    largest = min(LARGE, torch.finfo(got.dtype).max / 4)
    spread = torch.stack([torch.nan_to_num(x.double() - want, nan=math.inf).abs() for x in around]).amax(dim=0)
    usable = torch.isfinite(want) & torch.isfinite(spread) & (want.abs() < largest)
    size = want[usable].abs().max().item() if usable.any() else 0.0
    rounding = torch.finfo(got.dtype).eps if got.dtype != torch.float64 else EPS
    allowed = SPREAD * spread + ROUNDINGS * EPS * size + rounding * want.abs() + 4 * EPS * unit
    allowed = allowed + torch.finfo(got.dtype).tiny * (1.0 if got.dtype != torch.float16 else 2.0**-10) + 1e-30
    # In a tensor that holds numbers beyond float32, sums over them are lost; elsewhere everything finite must be.
    overflow = bool((~torch.isfinite(want) | (want.abs() >= largest)).any())
    # An infinity is what the type makes of a number beyond it: as wrong as the largest that it holds, and no more.
    error = (got.double().clamp(-torch.finfo(got.dtype).max, torch.finfo(got.dtype).max) - want).abs()
    wrong = usable & ~(error <= allowed)
    if overflow:
        wrong = wrong & torch.isfinite(got) & (allowed < 1e-3 * size)
    lost = torch.isnan(want) & torch.isfinite(got) & (not key.startswith("d "))
    if bool((wrong | lost).any()):
        at = tuple((wrong | lost).nonzero()[0].tolist())
        raise AssertionError(
            f"{key}{list(at)}: got {got[at].item():.9g}, wanted {want[at].item():.9g} within {allowed[at].item():.3g}"
        )


class Failure(Exception):
    """A call that is wrong, as small as it could be made."""

    def __init__(self, case: Case, message: str):
        super().__init__(message)
        self.case = case


def fuzz(seconds: float, seed: int, backend: str) -> int:
    """Calls tried within `seconds`. Raises Failure with the smallest wrong one."""
    count = 0
    failing: list[tuple[Case, str]] = []
    deadline = time.monotonic() + seconds
    chunk = 0
    while time.monotonic() < deadline:

        @hypothesis.seed(seed * 100_003 + chunk)
        @hypothesis.settings(
            max_examples=40,
            deadline=None,
            database=None,
            suppress_health_check=list(hypothesis.HealthCheck),
            phases=[hypothesis.Phase.generate, hypothesis.Phase.shrink],
            report_multiple_bugs=False,
        )
        @hypothesis.given(cases(backend))
        def run(case: Case) -> None:
            nonlocal count
            count += 1
            try:
                check(case)
            except AssertionError as error:
                failing.append((case, str(error)))  # the last one that fails is the smallest
                raise

        try:
            run()
        except AssertionError:
            raise Failure(*failing[-1]) from None
        chunk += 1
    return count


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=None, help="default: drawn, and printed")
    parser.add_argument(
        "--backend",
        choices=("both", "torch", "triton"),
        default="both",
        help="triton: on its interpreter, which has to be chosen with TRITON_INTERPRET=1; both: a quarter of the time",
    )
    args = parser.parse_args()
    seed = random.SystemRandom().randrange(10**6) if args.seed is None else args.seed
    minutes = args.minutes * (0.75 if args.backend == "both" else 1.0)
    backend = "torch" if args.backend == "both" else args.backend
    print(f"fuzz: backend={backend} minutes={minutes:g} seed={seed}", flush=True)
    try:
        count = fuzz(60 * minutes, seed, backend)
    except Failure as failure:
        print(f"fuzz: wrong: {failure}\n\n{snippet(failure.case)}")
        return 1
    print(f"fuzz: {count} calls are right", flush=True)
    if args.backend != "both":
        return 0
    # Once Triton is imported it is too late to choose its interpreter. It warns of lanes that a mask discards.
    again = [sys.executable, "-W", "ignore", __file__, "--backend", "triton", "--seed", str(seed)]
    again += ["--minutes", f"{args.minutes - minutes:g}"]
    return subprocess.run(again, env={**os.environ, "TRITON_INTERPRET": "1"}).returncode


if __name__ == "__main__":
    sys.exit(main())
