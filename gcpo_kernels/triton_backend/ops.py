"""
Registered operators of the Triton backend that have no counterpart in the torch backend, whose versions of these are
plain differentiable torch: the token loss, the causal weights, the leave-one-out mean.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from gcpo_kernels import maths
from gcpo_kernels.checks import check_no_tangents
from gcpo_kernels.ops import on_device_of
from gcpo_kernels.options import LossOptions
from gcpo_kernels.tokens import TokenInputs
from gcpo_kernels.triton_backend import causal, token_loss

# TokenInputs are arguments one by one: through a list of tensors autograd takes longer.
_TOKENS = ", ".join(
    f"Tensor{'?' if name in TokenInputs._field_defaults else ''} {name}" for name in TokenInputs._fields
)


@torch.library.custom_op(
    "gcpo::triton_token_loss",
    mutates_args=(),
    schema=f"(Tensor logp, Tensor? items, float[] numbers, {_TOKENS}) -> ({', '.join(['Tensor'] * 6)})",
)
def triton_token_loss(
    logp: Tensor,  # (B, T)
    items: Tensor | None,  # `num_items_in_batch`, where it is a tensor
    numbers: list[float],  # LossOptions, packed
    *tokens: Any,  # TokenInputs, as given
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, metrics, d_logp, d_causal, per-sequence part, partial sums): see token_loss.TokenResult."""
    with on_device_of(logp):
        loss, result = token_loss.token_loss_forward(logp, TokenInputs(*tokens), LossOptions.unpack(numbers, items))
        return loss, *result


@triton_token_loss.register_fake
def _(logp, items, numbers, *tokens):
    b, t = logp.shape
    options = LossOptions.unpack(numbers)
    by_sequence = options.importance_sampling_level == "sequence"
    blocks, _ = token_loss.blocking(b, t, by_sequence)
    given = TokenInputs(*tokens)
    n_out, n_sums = token_loss.result_sizes(options.kl_clip is not None, given.kappa_weights is not None)

    def empty(*shape: Any) -> Tensor:
        return logp.new_empty(shape, dtype=torch.float32)

    return (
        empty(),
        empty(n_out),
        empty(b, t),
        empty(b, t) if given.causal_logp is not None else empty(0),
        empty(b) if by_sequence else empty(0),
        empty(n_sums, b, blocks),
    )


@torch.library.custom_op("gcpo::triton_token_loss_backward", mutates_args=())
def triton_token_loss_backward(
    grad: Tensor,  # ()
    out: Tensor,
    d_logp: Tensor,
    d_causal: Tensor,
    sequence: Tensor,
    sums: Tensor,
    mask: Tensor,
    logp_dtype: torch.dtype,
    causal_dtype: torch.dtype | None,
    numbers: list[float],
) -> tuple[Tensor, Tensor]:
    result = token_loss.TokenResult(out, d_logp, d_causal, sequence, sums)
    options = LossOptions.unpack(numbers)
    with on_device_of(d_logp):
        return token_loss.token_loss_backward(grad, result, mask, options, (logp_dtype, causal_dtype))


@triton_token_loss_backward.register_fake
def _(grad, out, d_logp, d_causal, sequence, sums, mask, logp_dtype, causal_dtype, numbers):
    return torch.empty_like(d_logp, dtype=logp_dtype), torch.empty_like(d_causal, dtype=causal_dtype)


def _token_loss_setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    logp, _, ctx.numbers, *tokens = inputs
    given = TokenInputs(*tokens)
    ctx.dtypes = (logp.dtype, None if given.causal_logp is None else given.causal_logp.dtype)
    ctx.save_for_backward(*output[1:], given.mask)
    # Else autograd would write zeros of (B, T) as the gradients of what only the backward reads.
    ctx.set_materialize_grads(False)


def _token_loss_grad(ctx: Any, grad: Tensor | None, *unused: Any) -> tuple:
    *result, mask = ctx.saved_tensors
    if grad is None:
        return (None,) * (3 + len(TokenInputs._fields))
    grad_logp, grad_causal = triton_token_loss_backward(grad, *result, mask, *ctx.dtypes, ctx.numbers)
    of_tokens = (grad_causal if name == "causal_logp" and ctx.dtypes[1] else None for name in TokenInputs._fields)
    return grad_logp, None, None, *of_tokens


triton_token_loss.register_autograd(_token_loss_grad, setup_context=_token_loss_setup)


def loss_and_metrics(logp: Tensor, given: TokenInputs, options: LossOptions) -> tuple[Tensor, dict[str, Tensor]]:
    """What `gcpo_loss` returns, from log-probabilities (B, T) and their tensors as given."""
    check_no_tangents(logp=logp, causal_logp=given.causal_logp)
    items = options.num_items_in_batch
    if items is not None and not isinstance(items, Tensor) and torch.compiler.is_compiling():
        # A number would be a constant of the operator, and compile again for every value.
        items = torch.ones((), dtype=torch.float32, device=logp.device) * items
        options = replace(options, num_items_in_batch=items)
    given = maths.weigh_by_phi(logp, given, options)
    on_device = items.to(logp.device) if isinstance(items, Tensor) else None
    loss, out, *_ = triton_token_loss(logp, on_device, options.pack(), *given.constants())
    return loss, token_loss.named_metrics(out.detach(), options.kl_clip is not None)


@torch.library.custom_op("gcpo::triton_causal_weights", mutates_args=())
def triton_causal_weights(
    z: Tensor,  # (P, n, H), or hidden states (B, T, H) with an index
    index: Tensor | None,  # (B,) int64
    context_z: Tensor,  # (P, n, L, m, H)
    context_mask: Tensor | None,
    alpha: float,
    baseline: str,
    similarity: str,
) -> tuple[Tensor, Tensor]:
    """Upsilon (P, n), and what the backward needs."""
    arguments = _causal(z, index, context_z, context_mask, alpha, baseline, similarity)
    with on_device_of(z):
        upsilon, saved = causal.causal_weights_forward(arguments)
    rows = arguments.row_index
    if index is not None and rows is not None:  # a row outside the tensor is not read, and shows
        wrong = torch.ne(index.view(upsilon.shape), rows).any(dim=1, keepdim=True)
        upsilon = torch.where(wrong, torch.nan, upsilon)
    return upsilon, saved


def _causal(z: Tensor, index: Tensor | None, context_z: Tensor, *options: Any) -> causal.CausalArguments:
    if index is not None:
        p, n = context_z.shape[:2]
        z = z.unflatten(0, (p, n))
        index = index.view(p, n).clamp(0, max(z.shape[2] - 1, 0))
    return causal.CausalArguments(z, index, context_z, *options)


@triton_causal_weights.register_fake
def _(z, index, context_z, context_mask, alpha, baseline, similarity):
    p, n = context_z.shape[:2]
    return z.new_empty((p, n), dtype=torch.float32), z.new_empty((3, p * n), dtype=torch.float32)


@torch.library.custom_op("gcpo::triton_causal_weights_backward", mutates_args=())
def triton_causal_weights_backward(
    g: Tensor,  # (P, n)
    z: Tensor,
    index: Tensor | None,
    context_z: Tensor,
    context_mask: Tensor | None,
    saved: Tensor,
    alpha: float,
    baseline: str,
    similarity: str,
    need_context: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients in z, of its shape, and in context_z (empty if not needed)."""
    arguments = _causal(z, index, context_z, context_mask, alpha, baseline, similarity)
    with on_device_of(z):
        d_rows, d_context = causal.causal_weights_backward(g, arguments, saved, need_context)
    if index is None:
        return d_rows, d_context
    d_z = torch.zeros(z.shape, dtype=z.dtype, device=z.device)
    rows = arguments.row_index
    assert rows is not None
    d_z[torch.arange(len(index), device=z.device), rows.flatten()] = d_rows.flatten(0, 1)
    return d_z, d_context


@triton_causal_weights_backward.register_fake
def _(g, z, index, context_z, context_mask, saved, alpha, baseline, similarity, need_context):
    d_z = torch.empty(z.shape, dtype=z.dtype, device=z.device)
    shape = context_z.shape if need_context else (0,)
    return d_z, torch.empty(shape, dtype=context_z.dtype, device=z.device)


def _causal_setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    z, index, context_z, context_mask, *ctx.options = inputs
    ctx.save_for_backward(z, index, context_z, context_mask, output[1])
    ctx.set_materialize_grads(False)


def _causal_grad(ctx: Any, g: Tensor | None, unused: Any) -> tuple:
    z, index, context_z, context_mask, saved = ctx.saved_tensors
    if g is None:
        return (None,) * 7
    need = ctx.needs_input_grad
    d_z, d_context = triton_causal_weights_backward(
        g, z, index, context_z, context_mask, saved, *ctx.options, bool(need[2])
    )
    return (d_z if need[0] else None, None, d_context if need[2] else None, None, None, None, None)


triton_causal_weights.register_autograd(_causal_grad, setup_context=_causal_setup)


@torch.library.custom_op("gcpo::triton_leave_one_out", mutates_args=())
def triton_leave_one_out(z: Tensor, dtype: torch.dtype) -> Tensor:
    with on_device_of(z):
        return causal.leave_one_out(z, dtype)


@triton_leave_one_out.register_fake
def _(z, dtype):
    return torch.empty(z.shape, dtype=dtype, device=z.device)


def _leave_one_out_setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.dtype = inputs[0].dtype


def _leave_one_out_grad(ctx: Any, g: Tensor) -> tuple:
    return triton_leave_one_out(g, ctx.dtype), None


triton_leave_one_out.register_autograd(_leave_one_out_grad, setup_context=_leave_one_out_setup)
