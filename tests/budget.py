"""
One case of a public function on a backend, within the error budget: values and every gradient against the float64
reference, where plain torch in the same types says how large an error may be.
"""

from collections.abc import Callable
from typing import Any

import torch

import gcpo_kernels
from gcpo_kernels import reference
from gcpo_kernels.testing import assert_close_to_truth, assert_gradient, in_float64, with_gradients

LEAVES = ("logp", "hidden", "weight", "bias", "causal_logp", "logits", "z", "context_z")
# Epsilons allowed in a sum of terms of size 1 that may cancel, beside twice plain torch's error, which luck can make 0.
SUM_ROUNDINGS = 2**8
HALF_ROUNDINGS = 2**14  # where the operands of products are rounded to 16 bits


def _plain_linear_logprob(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    token_ids: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    return_entropy: bool = False,
    **head: Any,
) -> Any:
    """What a training loop without this package writes: logits in the operands' type, float32 from there on."""
    logits = torch.nn.functional.linear(hidden, weight, bias).float()
    return reference.selective_logprob(reference.head_logits(logits, **head), token_ids, return_entropy=return_entropy)


def _plain_linear_loss(
    hidden: torch.Tensor, weight: torch.Tensor, token_ids: torch.Tensor, bias: torch.Tensor | None = None, **rest: Any
) -> Any:
    head = {key: rest.pop(key) for key in ("temperature", "logit_scale", "logit_softcap") if key in rest}
    logp, entropy = _plain_linear_logprob(hidden, weight, token_ids, bias=bias, return_entropy=True, **head)
    loss, metrics = reference.gcpo_loss(logp, **rest)
    kept = entropy.detach()[rest["mask"] != 0]
    return loss, metrics | {"entropy": kept.sum() / max(len(kept), 1)}


PLAIN: dict[str, Callable[..., Any]] = {
    "linear_logprob": _plain_linear_logprob,
    "linear_gcpo_loss": _plain_linear_loss,
}


def outcome(
    function: Callable[..., Any], arguments: dict[str, Any], **options: Any
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor | None]]:
    """
    Outputs by name, and the gradients of a weighted sum of those that carry one. A loss is doubled: gradients made in
    the forward are rounded there, and a power of two rounds them no further.
    """
    leaves = with_gradients(arguments, *LEAVES)
    out = function(**leaves, **options)
    if isinstance(out, tuple) and isinstance(out[1], dict):
        out = {"loss": out[0], **out[1]}
    elif not isinstance(out, dict):
        out = dict(zip(("value", "entropy"), out if isinstance(out, tuple) else (out,), strict=False))
    total = torch.zeros((), dtype=torch.float64, device=next(iter(out.values())).device)
    for x in out.values():
        if x.requires_grad:
            last = 1.7 if x.dim() else 2.0
            weights = torch.linspace(-1.0, last, x.numel() + 1, device=x.device)[1:]
            total = total + (x * weights.view(x.shape).to(x.dtype)).sum()
    if total.requires_grad:
        total.backward()
    grads = {key: x.grad for key, x in leaves.items() if key in LEAVES and x is not None}
    return {key: x.detach() for key, x in out.items()}, grads


def compare(function: str, arguments: dict[str, Any], backend: str = "triton", **options: Any) -> None:
    """Raise AssertionError unless the function named is right on `backend`, in every output and every gradient."""
    ours, grads = outcome(getattr(gcpo_kernels, function), arguments, **options, backend=backend)
    naive = getattr(reference, function)
    truth, true_grads = outcome(naive, in_float64(arguments), **options)
    plain, plain_grads = outcome(PLAIN.get(function, naive), arguments, **options)
    assert set(ours) == set(truth)
    narrow = any(
        isinstance(x, torch.Tensor) and x.dtype in (torch.float16, torch.bfloat16)
        for key, x in arguments.items()
        if key in ("hidden", "weight")
    )
    sums = HALF_ROUNDINGS if narrow else SUM_ROUNDINGS
    for key, want in truth.items():
        assert ours[key].dtype == torch.float32, key
        if want.dim() == 0:  # a loss or a metric; of size 1 if its terms do not cancel
            error, size = (ours[key].double() - want.double()).abs().item(), max(want.abs().item(), 0.1)
            allowed = 2 * (plain[key].double() - want.double()).abs().item() + sums * 2**-23 * size
            assert error <= allowed, f"{key}: error {error:.3e} exceeds {allowed:.3e}"
        else:
            assert_close_to_truth(ours[key], want, plain[key], what=key)
    for key, want in true_grads.items():
        if want is None or not want.any():  # causal_logp without kappa: None, or zeros
            assert key == "causal_logp"
            assert not options["kappa"]
            assert grads[key] is None or not grads[key].any()
            continue
        assert grads[key] is not None, key
        assert grads[key].dtype == arguments[key].dtype, key
        assert_gradient(grads[key], want, plain_grads[key], what=key)
