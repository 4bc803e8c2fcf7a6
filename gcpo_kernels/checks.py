"""Checks of tensor arguments: every message names the argument, what it got and what it wants."""

from typing import Any

import torch
from torch.autograd import forward_ad

from gcpo_kernels.options import BASELINES, SIMILARITIES, LossOptions, check_choice, check_number
from gcpo_kernels.tokens import TokenInputs


def check_tensor(
    name: str,
    x: Any,
    *,
    shapes: tuple[tuple[int, ...], ...] = (),
    wanted: str = "",
    floating: bool = True,
    like: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    `x`, once it is known to be a tensor of one of `shapes` (called `wanted`, without numbers: text that holds a size
    makes torch.compile take it for a constant), floating or not as asked, on the device of `like`.
    """
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"`{name}` must be a tensor, got {type(x).__name__}.")
    if floating and x.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise TypeError(f"`{name}` must be float32, bfloat16, float16 or float64, got {x.dtype}.")
    if shapes and tuple(x.shape) not in shapes:
        sizes = " or ".join(map(str, shapes))
        raise ValueError(f"`{name}` must have shape {wanted} = {sizes}, got {tuple(x.shape)}.")
    if like is not None and x.device != like.device:
        raise ValueError(f"`{name}` must be on {like.device}, got {x.device}.")
    return x


def check_no_tangents(**tensors: torch.Tensor | None) -> None:
    """The operators have backward derivatives only; forward-mode ones would come out as 0."""
    if torch.compiler.is_compiling():
        return
    for name, x in tensors.items():
        if x is not None and forward_ad.unpack_dual(x).tangent is not None:
            raise RuntimeError(f"`{name}` must have no forward-mode tangent (only backward works), got one.")


def check_rank(name: str, x: Any, ranks: tuple[int, ...], wanted: str) -> torch.Tensor:
    check_tensor(name, x)
    if x.dim() not in ranks:
        raise ValueError(f"`{name}` must have shape {wanted}, got {tuple(x.shape)}.")
    return x


def check_ids(name: str, x: Any, shape: tuple[int, ...], wanted: str, like: torch.Tensor) -> torch.Tensor:
    check_tensor(name, x, floating=False, like=like)
    if x.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"`{name}` must be int64, got {x.dtype}.")
    if tuple(x.shape) != shape:
        raise ValueError(f"`{name}` must have shape {wanted} = {shape}, got {tuple(x.shape)}.")
    return x.long()


def check_mask(name: str, x: Any, shape: tuple[int, ...], wanted: str, like: torch.Tensor) -> torch.Tensor:
    check_tensor(name, x, floating=False, like=like)
    if x.is_complex():
        raise TypeError(f"`{name}` must be bool, integer or float, got {x.dtype}.")
    if tuple(x.shape) != shape:
        raise ValueError(f"`{name}` must have shape {wanted} = {shape}, got {tuple(x.shape)}.")
    return x


def check_causal(
    shape: tuple[int, ...],
    like: torch.Tensor,
    context_z: Any,
    alpha: Any,
    baseline: Any,
    similarity: Any,
    context_mask: Any,
) -> None:
    """Check the arguments of the causal weights against (P, n, H) = shape."""
    check_number("alpha", alpha)
    check_choice("baseline", baseline, BASELINES)
    check_choice("similarity", similarity, SIMILARITIES)
    check_rank("context_z", context_z, (5,), "(P, n, L, m, H)")
    check_tensor("context_z", context_z, like=like)
    p, n, hidden = shape
    if (context_z.shape[0], context_z.shape[1], context_z.shape[4]) != (p, n, hidden):
        raise ValueError(
            f"`context_z` must have shape (P, n, L, m, H) = ({p}, {n}, L, m, {hidden}), got {tuple(context_z.shape)}."
        )
    if 0 in context_z.shape[2:4]:
        raise ValueError(f"`context_z` must hold at least one context and sample, got {tuple(context_z.shape)}.")
    if context_mask is not None:
        check_mask("context_mask", context_mask, tuple(context_z.shape[:4]), "(P, n, L, m)", like)


def check_contexts(shape: tuple[int, ...], like: torch.Tensor, context_logp: Any) -> None:
    check_rank("context_logp", context_logp, (3,), "(B, T, L)")
    check_tensor("context_logp", context_logp, like=like)
    if tuple(context_logp.shape[:2]) != shape or context_logp.shape[2] < 1:
        raise ValueError(
            f"`context_logp` must have shape (B, T, L) = ({shape[0]}, {shape[1]}, L) with L >= 1, "
            f"got {tuple(context_logp.shape)}."
        )


def check_context_weights(weights: Any, context_logp: torch.Tensor, *tokens: torch.Tensor) -> None:
    """
    (L,), or (B, L) whose values matter in rows where some token counts: where all of `tokens`, (B, T) or (B, 1), are
    not 0. On the device of context_logp (B, T, L).
    """
    b, _, contexts = context_logp.shape
    shapes, wanted = ((contexts,), (b, contexts)), "(L,) or (B, L)"
    check_tensor("context_weights", weights, shapes=shapes, wanted=wanted, like=context_logp)
    if _looks(weights):
        check_weights("context_weights", weights if weights.dim() == 1 else weights[_rows_of(tokens, weights)])


def _rows_of(tokens: tuple[torch.Tensor, ...], weights: torch.Tensor) -> torch.Tensor:
    """(B,) bool: of weights (B, L), which rows have a token where all of `tokens` are not 0."""
    counts = weights.new_ones(len(weights), 1, dtype=torch.bool)
    for x in tokens:
        counts = counts & (x != 0)
    return counts.any(dim=1)


def _looks(x: torch.Tensor) -> bool:
    """Whether values are looked at: on a device that would be a sync, and launches."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def check_head(hidden: torch.Tensor, weight: Any, bias: Any, group: str) -> None:
    check_rank("weight", weight, (2,), "(V, H)")
    check_tensor("weight", weight, like=hidden)
    # No rows on one process of a group: all of them must hear of it (`find_shards`), or the others would wait.
    if weight.shape[1] != hidden.shape[-1] or (weight.shape[0] < 1 and not group):
        raise ValueError(f"`weight` must have shape (V, H) = (V, {hidden.shape[-1]}), got {tuple(weight.shape)}.")
    if bias is not None:
        check_tensor("bias", bias, shapes=((weight.shape[0],),), wanted="(V,)", like=hidden)


def check_main_grad(main_grad: Any, weight: torch.Tensor, gathered: bool) -> None:
    check_tensor("main_grad", main_grad, shapes=(tuple(weight.shape),), wanted="(V, H)", like=weight)
    if main_grad.dtype != torch.float32:
        raise TypeError(f"`main_grad` must be float32, got {main_grad.dtype}.")
    if main_grad.requires_grad:
        raise ValueError(
            "`main_grad` is added to in place and must have no gradient of its own, got one that needs it."
        )
    if gathered:
        raise ValueError("`main_grad` goes with a plain tensor as `weight`, got a DTensor.")
    if torch.compiler.is_compiling():
        raise ValueError(
            "`main_grad` is written in the backward, which torch.compile does not allow, got one under it."
        )


def check_weights(name: str, x: torch.Tensor) -> None:
    if not bool(((x >= 0) & (x < torch.inf)).all()):
        raise ValueError(f"`{name}` must be finite and at least 0, got {x.tolist()}.")


def check_token_arguments(
    shape: tuple[int, ...],
    like: torch.Tensor,
    given: TokenInputs,
    options: LossOptions,
) -> None:
    """Check every per-token argument of the losses against (B, T) = shape."""
    b = shape[0]
    mask, advantages = check_mask("mask", given.mask, shape, "(B, T)", like), given.advantages
    per_row = ((b,), shape)
    check_tensor("advantages", advantages, shapes=per_row, wanted="(B,) or (B, T)", like=like)
    for name in ("old_logp", "ref_logp", "query_logp", "causal_logp"):
        if (x := getattr(given, name)) is not None:
            check_tensor(name, x, shapes=(shape,), wanted="(B, T)", like=like)
    if (ratio := given.importance_sampling_ratio) is not None:
        wanted = "(B, T), (B, 1) or (B,)"
        check_tensor("importance_sampling_ratio", ratio, shapes=(shape, (b, 1), (b,)), wanted=wanted, like=like)
    if given.policy_weights is not None:
        wanted = "(B,), (B, 1) or (B, T)"
        check_tensor("policy_weights", given.policy_weights, shapes=((b,), (b, 1), shape), wanted=wanted, like=like)
    context_logp, weights = given.context_logp, given.context_weights
    if context_logp is not None:
        check_contexts(shape, like, context_logp)
    if (kappa_weights := given.kappa_weights) is not None:
        if context_logp is None:
            raise ValueError("`kappa_weights` needs `context_logp`, got None.")
        check_tensor("kappa_weights", kappa_weights, shapes=per_row, wanted="(B,) or (B, T)", like=like)
        kappa_weights = kappa_weights if kappa_weights.dim() == 2 else kappa_weights[:, None]
        if _looks(kappa_weights):
            check_weights("kappa_weights", kappa_weights.expand(shape)[mask != 0])
    if weights is not None:
        if context_logp is None:
            raise ValueError("`context_weights` needs `context_logp`, got None.")
        read = (mask,) if kappa_weights is None else (mask, kappa_weights)
        check_context_weights(weights, context_logp, *read)
    if options.beta > 0 and given.ref_logp is None:
        raise ValueError(f"`beta` = {options.beta} needs `ref_logp`, got None.")
    if options.kappa > 0 and context_logp is None:
        raise ValueError(f"`kappa` = {options.kappa} needs `context_logp`, got None.")
