"""
Registered operators of the Triton backend that have no counterpart in the torch backend, whose versions of these are
plain differentiable torch: the token loss, the causal weights, the leave-one-out mean.
"""

from typing import Any

import torch
from torch import Tensor

from gcpo_kernels.ops import on_device_of
from gcpo_kernels.options import LOSS_TYPES, LossOptions
from gcpo_kernels.triton_backend import causal, token_loss
from gcpo_kernels.triton_backend.token_loss import metric_places as metric_places


def loss_numbers(options: LossOptions) -> list[float]:
    """LossOptions as an operator takes them: numbers, with `num_items_in_batch` left to a tensor if it is one."""
    items = options.num_items_in_batch
    return [
        options.beta,
        options.kappa,
        options.epsilon_low,
        options.epsilon_high,
        0.0 if options.delta is None else options.delta,
        options.proj_floor,
        float(LOSS_TYPES.index(options.loss_type)),
        float(options.importance_sampling_level == "sequence"),
        float(options.max_completion_length or 0),
        -1.0 if items is None or isinstance(items, Tensor) else float(items),
        0.0 if options.kl_clip is None else options.kl_clip,
    ]


def _options(numbers: list[float], items: Tensor | None) -> LossOptions:
    return LossOptions(
        beta=numbers[0],
        kappa=numbers[1],
        epsilon_low=numbers[2],
        epsilon_high=numbers[3],
        delta=numbers[4] or None,
        proj_floor=numbers[5],
        loss_type=LOSS_TYPES[int(numbers[6])],
        importance_sampling_level="sequence" if numbers[7] else "token",
        max_completion_length=int(numbers[8]) or None,
        num_items_in_batch=items if items is not None else (None if numbers[9] < 0 else numbers[9]),
        kl_clip=numbers[10] or None,
    )


@torch.library.custom_op("gcpo::triton_token_loss", mutates_args=())
def triton_token_loss(
    logp: Tensor,  # (B, T), and the rest as in TokenTensors
    mask: Tensor,
    advantages: Tensor,
    old_logp: Tensor | None,
    ref_logp: Tensor | None,
    query_logp: Tensor | None,
    causal_logp: Tensor | None,
    importance_sampling_ratio: Tensor | None,
    context_logp: Tensor | None,
    context_weights: Tensor | None,
    items: Tensor | None,
    numbers: list[float],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss and metrics, d_logp, d_causal, per-sequence part, partial sums): see token_loss.TokenResult."""
    tensors = token_loss.TokenTensors(
        logp,
        mask,
        advantages,
        old_logp,
        ref_logp,
        query_logp,
        causal_logp,
        importance_sampling_ratio,
        context_logp,
        context_weights,
    )
    with on_device_of(logp):
        return tuple(token_loss.token_loss_forward(tensors, _options(numbers, items)))  # type: ignore[return-value]


@triton_token_loss.register_fake
def _(
    logp, mask, advantages, old_logp, ref_logp, query_logp, causal_logp, ratio, context_logp, weights, items, numbers
):
    b, t = logp.shape
    by_sequence = bool(numbers[7])
    blocks, _ = token_loss.blocking(b, t, by_sequence)
    n_out, n_sums = token_loss.result_sizes(numbers[10] > 0)

    def empty(*shape: Any) -> Tensor:
        return logp.new_empty(shape, dtype=torch.float32)

    return (
        empty(n_out),
        empty(b, t),
        empty(b, t) if causal_logp is not None else empty(0),
        empty(b) if by_sequence else empty(0),
        empty(n_sums, b, blocks),
    )


@torch.library.custom_op("gcpo::triton_token_loss_backward", mutates_args=())
def triton_token_loss_backward(
    grad: Tensor,  # as `out`: only the loss's counts
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
    with on_device_of(d_logp):
        return token_loss.token_loss_backward(grad, result, mask, _options(numbers, None), (logp_dtype, causal_dtype))


@triton_token_loss_backward.register_fake
def _(grad, out, d_logp, d_causal, sequence, sums, mask, logp_dtype, causal_dtype, numbers):
    return torch.empty_like(d_logp, dtype=logp_dtype), torch.empty_like(d_causal, dtype=causal_dtype)


def _token_loss_setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    logp, mask, causal_logp, ctx.numbers = inputs[0], inputs[1], inputs[6], inputs[-1]
    ctx.dtypes = (logp.dtype, None if causal_logp is None else causal_logp.dtype)
    ctx.save_for_backward(*output, mask)


def _token_loss_grad(ctx: Any, grad: Tensor, *unused: Any) -> tuple:
    out, d_logp, d_causal, sequence, sums, mask = ctx.saved_tensors
    grad_logp, grad_causal = triton_token_loss_backward(
        grad, out, d_logp, d_causal, sequence, sums, mask, *ctx.dtypes, ctx.numbers
    )
    grads: list[Any] = [None] * 12
    grads[0] = grad_logp
    grads[6] = grad_causal if ctx.dtypes[1] is not None else None
    return tuple(grads)


triton_token_loss.register_autograd(_token_loss_grad, setup_context=_token_loss_setup)


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


def _causal_grad(ctx: Any, g: Tensor, unused: Any) -> tuple:
    z, index, context_z, context_mask, saved = ctx.saved_tensors
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
