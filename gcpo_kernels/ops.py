"""
Registered operators (torch.library) around the backends, with their shapes for tracing and their gradients.

They are opaque to torch.compile, which therefore neither unrolls their loops nor breaks the graph, and run with
autocast off: the type of the matrix products is an argument (`storage`), decided by the caller.
"""

from typing import Any

import torch
from torch import Tensor

from gcpo_kernels import linear, torch_backend
from gcpo_kernels.maths import compute_dtype
from gcpo_kernels.options import HeadOptions, LossOptions
from gcpo_kernels.tokens import TokenInputs

_NAMESPACE = "gcpo"
# Operators that wait for the device, to know which tokens count: a CUDA graph cannot hold them.
_SYNCS = (torch.Tag.cudagraph_unsafe,)


def _without_autocast(x: Tensor) -> torch.autocast:
    return torch.autocast(x.device.type, enabled=False)


def on_device_of(x: Tensor) -> torch.accelerator.device_index:
    """Triton launches on the current device, wherever the tensors are: make that theirs. On a CPU nothing happens."""
    return torch.accelerator.device_index(x.device.index)


def _tiles(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, storage: torch.dtype, packed: list[float], *where: str
) -> linear.Tiles:
    """`where`: the backend, and the name of the process group that the vocabulary is divided over, "" for none."""
    backend, group = where
    head = HeadOptions.unpack(packed)
    dtype = compute_dtype(hidden, weight)
    if backend == "triton":
        from gcpo_kernels.triton_backend.linear import TritonTiles

        tiles: linear.Tiles = TritonTiles(weight, bias, head, dtype, storage)
    else:
        tiles = torch_backend.TorchTiles(weight, bias, head, dtype, storage)
    if not group:
        return tiles
    from gcpo_kernels.vocab_parallel import ShardedTiles, find_shards

    return ShardedTiles.around(tiles, find_shards(group, hidden, weight))


# ---------------------------------------------------------------------------------------------------------------------
# linear_logprob
# ---------------------------------------------------------------------------------------------------------------------


@torch.library.custom_op(f"{_NAMESPACE}::linear_logprob", mutates_args=())
def linear_logprob(
    hidden: Tensor,  # (N, H)
    weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    token_ids: Tensor,  # (N,)
    storage: torch.dtype,
    head: list[float],  # HeadOptions, packed
    backend: str = "torch",
    group: str = "",
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities, entropies, and the former once more for the Triton backend's backward (else empty)."""
    with _without_autocast(hidden), on_device_of(hidden):
        tiles = _tiles(hidden, weight, bias, storage, head, backend, group)
        logp, entropy = linear.linear_logprob_forward(hidden, tiles, token_ids)
        # What the caller gets, the caller may change.
        return logp, entropy, logp.clone() if backend == "triton" else logp.new_empty(0)


@linear_logprob.register_fake
def _(hidden, weight, bias, token_ids, storage, head, backend="torch", group=""):
    def like() -> Tensor:
        return hidden.new_empty(token_ids.shape, dtype=compute_dtype(hidden, weight))

    return like(), like(), like() if backend == "triton" else like().new_empty(0)


@torch.library.custom_op(f"{_NAMESPACE}::linear_logprob_backward", mutates_args=(), tags=_SYNCS)
def linear_logprob_backward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    token_ids: Tensor,
    logp: Tensor,  # (N,), from the forward, or empty
    g_logp: Tensor,  # (N,)
    g_entropy: Tensor | None,  # (N,)
    storage: torch.dtype,
    head: list[float],
    need: list[bool],
    backend: str = "torch",
    group: str = "",
) -> tuple[Tensor, Tensor, Tensor]:
    with _without_autocast(hidden), on_device_of(hidden):
        tiles = _tiles(hidden, weight, bias, storage, head, backend, group)
        needed = (need[0], need[1], need[2])
        offset = logp if len(logp) == len(hidden) else None
        return linear.linear_logprob_backward(hidden, tiles, token_ids, offset, g_logp, g_entropy, needed)


def _fake_gradients(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, need: list[bool], weight_dtype: torch.dtype | None = None
) -> tuple[Tensor, ...]:
    def like(x: Tensor | None, needed: bool, dtype: torch.dtype | None = None) -> Tensor:
        if x is None or not needed:
            return weight.new_empty(0)
        return torch.empty(x.shape, dtype=dtype or linear.gradient_dtype(x.dtype), device=x.device)

    return like(hidden, need[0]), like(weight, need[1], weight_dtype), like(bias, need[2])


@linear_logprob_backward.register_fake
def _(hidden, weight, bias, token_ids, logp, g_logp, g_entropy, storage, head, need, backend="torch", group=""):
    return _fake_gradients(hidden, weight, bias, need)


def _linear_logprob_setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    hidden, weight, bias, token_ids, *ctx.options = inputs
    ctx.save_for_backward(hidden, weight, bias, token_ids, output[2])
    # Without a gradient in the entropies, the backward needs one pass over the logits instead of two.
    ctx.set_materialize_grads(False)


def _linear_logprob_grad(ctx: Any, g_logp: Tensor | None, g_entropy: Tensor | None, unused: Any) -> tuple:
    hidden, weight, bias, token_ids, logp = ctx.saved_tensors
    if g_logp is None:
        g_logp = torch.zeros_like(token_ids, dtype=compute_dtype(hidden, weight))
    need = list(ctx.needs_input_grad[:3])
    storage, head, *where = ctx.options
    if weight.dim() != 2:
        raise RuntimeError(
            "`weight` was put away between forward and backward (DeepSpeed ZeRO-3 does that), got shape "
            f"{tuple(weight.shape)}: read it, and call this function, in the forward of the module that was wrapped."
        )
    grads = linear_logprob_backward(
        hidden, weight, bias, token_ids, logp, g_logp, g_entropy, storage, head, need, *where
    )
    inputs = (hidden, weight, bias)
    found = (g.to(x.dtype) if n else None for g, n, x in zip(grads, need, inputs, strict=True))
    return (*found, None, None, None, None, None)


linear_logprob.register_autograd(_linear_logprob_grad, setup_context=_linear_logprob_setup)


# ---------------------------------------------------------------------------------------------------------------------
# linear_gcpo_loss
# ---------------------------------------------------------------------------------------------------------------------


@torch.library.custom_op(f"{_NAMESPACE}::linear_loss", mutates_args=(), tags=_SYNCS)
def linear_loss(
    hidden: Tensor,  # (B * T, H)
    weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    token_ids: Tensor,  # (B * T,)
    tokens: list[Tensor | None],  # TokenInputs, clean
    weights: Tensor,  # (B, T)
    offset: Tensor | None,  # (B, T): estimates of the log-probabilities, for speed only; None: old_logp, if it is given
    storage: torch.dtype,
    weight_dtype: torch.dtype | None,  # of the weight's gradient; None: the weight's
    head: list[float],  # HeadOptions, packed
    loss: list[float],  # LossOptions, packed; their reduction is in the weights
    need: list[bool],  # gradients of hidden, weight, bias
    backend: str = "torch",
    group: str = "",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Log-probabilities, entropies, and the gradients of sum(weights * per-token loss): three matrix products."""
    inputs, options = TokenInputs(*tokens), LossOptions.unpack(loss)  # type: ignore[arg-type]
    with _without_autocast(hidden), on_device_of(hidden):
        tiles = _tiles(hidden, weight, bias, storage, head, backend, group)
        needed = (need[0], need[1], need[2])
        return linear.linear_loss(hidden, tiles, token_ids, inputs, weights, options, needed, offset, weight_dtype)


@linear_loss.register_fake
def _(
    hidden, weight, bias, token_ids, tokens, weights, offset, storage, weight_dtype, head, loss, need, *where, **named
):
    dtype = compute_dtype(hidden, weight)
    scores = (hidden.new_empty(weights.shape, dtype=dtype) for _ in range(2))
    return (*scores, *_fake_gradients(hidden, weight, bias, need, weight_dtype))


class LossWithGradients(torch.autograd.Function):
    """A scalar whose gradients are known already: the forward made them, the backward scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        value: Tensor,  # ()
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        d_hidden: Tensor,
        d_weight: Tensor,
        d_bias: Tensor,
        main_grad: Tensor | None,  # (V, H) float32: receives the weight's gradient in the weight's place
        backend: str,
    ) -> Tensor:
        ctx.save_for_backward(d_hidden, d_weight, d_bias)
        ctx.main_grad, ctx.backend = main_grad, backend
        ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        compiling = torch.compiler.is_compiling()
        if torch.is_grad_enabled() and not compiling:  # compiled functions refuse by themselves
            raise RuntimeError(
                "`linear_gcpo_loss` has no second derivative, got `create_graph=True`: use `gcpo_loss` with "
                "`backend='torch'`, of log-probabilities from plain torch."
            )
        # Without `retain_graph` nobody will ask again: what was saved may become what is returned.
        once = not compiling and not torch._C._autograd._get_current_graph_task_keep_graph()
        need, gradients = list(ctx.needs_input_grad[1:4]), ctx.saved_tensors
        if ctx.main_grad is not None and need[1]:
            ctx.main_grad.addcmul_(gradients[1], grad.to(torch.float32).expand_as(gradients[1]))
            need[1] = False
        scaled = (
            _times(d, grad, dtype, ctx.backend if once else "") if needed else None
            for d, dtype, needed in zip(gradients, ctx.dtypes, need, strict=True)
        )
        return (grad, *scaled, None, None, None, None, None)


def _times(d: Tensor, grad: Tensor, dtype: torch.dtype, backend: str) -> Tensor:
    """d * grad of type `dtype`. Where a backend is named d may become the result, and does where grad is 1."""
    if backend and d.dtype == dtype and type(d) is torch.Tensor:  # not a tensor without data, for one
        if backend == "triton":
            from gcpo_kernels.triton_backend.scale import scale_

            with on_device_of(d):
                return scale_(d, grad)
        if d.device.type == "cpu" and grad == 1:
            return d
    # `grad` expanded: as a 0-dim tensor it would be rounded to a bfloat16 gradient's type before the product.
    return torch.mul(d, grad.expand_as(d), out=torch.empty_like(d, dtype=dtype))


# ---------------------------------------------------------------------------------------------------------------------
# selective_logprob
# ---------------------------------------------------------------------------------------------------------------------


@torch.library.custom_op(f"{_NAMESPACE}::selective_logprob", mutates_args=())
def selective_logprob(
    logits: Tensor,  # (N, V) or (B, T, V)
    token_ids: Tensor,  # (N,) or (B, T)
    temperature: float,
    backend: str = "torch",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probabilities, entropies, and two tensors that the Triton backend's backward goes on from (else empty)."""
    with _without_autocast(logits), on_device_of(logits):
        if backend == "triton":
            from gcpo_kernels.triton_backend.logprob import logprob_forward

            linear.check_token_ids(token_ids, logits.shape[-1])
            return tuple(logprob_forward(logits, token_ids, HeadOptions(temperature)))  # type: ignore[return-value]
        scores = torch_backend.selective_forward(logits, token_ids, temperature)
        return (*scores, logits.new_empty(0), logits.new_empty(0))


@selective_logprob.register_fake
def _(logits, token_ids, temperature, backend="torch"):
    def like() -> Tensor:
        return logits.new_empty(token_ids.shape, dtype=compute_dtype(logits))

    if backend == "triton":
        return like(), like(), like(), like()
    return like(), like(), logits.new_empty(0), logits.new_empty(0)


@torch.library.custom_op(f"{_NAMESPACE}::selective_logprob_backward", mutates_args=())
def selective_logprob_backward(
    logits: Tensor,
    token_ids: Tensor,
    g_logp: Tensor,
    g_entropy: Tensor | None,
    temperature: float,
    logp: Tensor | None = None,  # these four: the forward's outputs, for the Triton backend
    entropy: Tensor | None = None,
    peak: Tensor | None = None,
    total: Tensor | None = None,
    backend: str = "torch",
) -> Tensor:
    with _without_autocast(logits), on_device_of(logits):
        d_logits = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
        if backend == "triton":
            from gcpo_kernels.triton_backend.logprob import RowScores, logprob_backward

            given = [x for x in (logp, entropy, peak, total) if x is not None]
            scores = RowScores(*given)
            logprob_backward(logits, token_ids, HeadOptions(temperature), scores, g_logp, g_entropy, d_logits)
        else:
            torch_backend.selective_forward(logits, token_ids, temperature, g_logp, g_entropy, d_logits)
        return d_logits


@selective_logprob_backward.register_fake
def _(logits, token_ids, g_logp, g_entropy, temperature, *rest, **named):
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


def _selective_setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    logits, token_ids, ctx.temperature, ctx.backend = inputs
    ctx.save_for_backward(logits, token_ids, *output)
    ctx.set_materialize_grads(False)  # without a gradient in the entropies there is less to compute


def _selective_grad(ctx: Any, g_logp: Tensor | None, g_entropy: Tensor | None, *unused: Any) -> tuple:
    logits, token_ids, *scores = ctx.saved_tensors
    if g_logp is None:
        g_logp = torch.zeros_like(token_ids, dtype=compute_dtype(logits))
    grad = selective_logprob_backward(logits, token_ids, g_logp, g_entropy, ctx.temperature, *scores, ctx.backend)
    return grad, None, None, None


selective_logprob.register_autograd(_selective_grad, setup_context=_selective_setup)
