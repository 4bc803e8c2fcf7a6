"""
The public functions but for the losses (losses.py): what they take, what they give, and which backend runs them.

Conventions. B sequences, T tokens, L contexts, V vocabulary, H hidden size, P prompts, n candidates per prompt, m
samples. "float" is float32, bfloat16 or float16 (float64 too on the torch backend); arithmetic and results are float32
(float64 for float64 input). Log-probabilities are natural logarithms. No input is modified. Wrong shapes, types,
devices and option values raise ValueError or TypeError naming the argument. Equations are those of arXiv 2508.05428.
"""

from typing import Any

import torch

from gcpo_kernels import group, maths, ops
from gcpo_kernels.backends import storage_dtype, triton_ops, use_triton
from gcpo_kernels.checks import (
    check_causal,
    check_context_weights,
    check_contexts,
    check_head,
    check_ids,
    check_no_tangents,
    check_rank,
)
from gcpo_kernels.head import gather_head, group_name
from gcpo_kernels.options import ADVANTAGE_SCALES, HeadOptions, check_choice, check_count, check_flag, check_number


def linear_logprob(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    token_ids: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    return_entropy: bool = False,
    process_group: Any = None,
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """
    Log-probabilities of tokens from hidden states and the output layer, without ever holding (N, V) logits.

    logit = softcap(logit_scale * (hidden @ weight.T + bias)) / temperature, softcap(u) = c tanh(u / c).

    Args:
        hidden: (B, T, H) or (N, H) float; carries gradient.
        weight: (V, H) float; carries gradient. A DTensor (FSDP2's, say) is gathered, once, and its gradient is the mean
            over its processes, each of which has tokens of its own.
        token_ids: (B, T) or (N,) int64 in [0, V). Outside, ValueError on a CPU, NaN on other devices.
        bias: (V,) float; carries gradient.
        temperature: > 0.
        logit_scale: multiplies logits before the softcap.
        logit_softcap: c > 0. None: no softcap.
        return_entropy: also return the entropy of each token's distribution, in nats, with its gradient.
        process_group: processes (a `torch.distributed.ProcessGroup`) that share the vocabulary. `weight` and `bias` are
            then this process's rows, in the order of ranks, not necessarily as many on each; hidden, token_ids (which
            count from the whole vocabulary's first token) and all else are the same on every process, and so are the
            results. Gradients are those of the whole, those in weight and bias this process's rows of it.
        backend: as in `gcpo_loss`.

    Returns:
        (B, T) or (N,) log-probabilities, or (log-probabilities, entropies).
    """
    head = HeadOptions(temperature, logit_scale, logit_softcap)
    shared = group_name(process_group)
    weight, bias = gather_head(weight, bias, shared)
    check_rank("hidden", hidden, (2, 3), "(B, T, H) or (N, H)")
    token_ids = check_ids("token_ids", token_ids, tuple(hidden.shape[:-1]), "of hidden without H", hidden)
    check_head(hidden, weight, bias, shared)
    check_no_tangents(hidden=hidden, weight=weight, bias=bias)
    storage = storage_dtype(hidden, weight)
    logp, entropy, _ = ops.linear_logprob(
        hidden.flatten(0, -2),
        weight,
        bias,
        token_ids.flatten(),
        storage,
        head.pack(),
        "triton" if use_triton(backend, hidden, weight, bias, storage=storage) else "torch",
        shared,
    )
    logp, entropy = logp.view(token_ids.shape), entropy.view(token_ids.shape)
    return (logp, entropy) if return_entropy else logp


def selective_logprob(
    logits: torch.Tensor,
    token_ids: torch.Tensor,
    *,
    temperature: float = 1.0,
    return_entropy: bool = False,
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """
    log_softmax(logits / temperature) at token_ids, for trainers that hold logits already: no second (N, V) tensor
    in the forward, one in the backward (the gradient).

    Args:
        logits: (B, T, V) or (N, V) float, any strides; carries gradient.
        token_ids: (B, T) or (N,) int64 in [0, V). Outside, ValueError on a CPU, NaN on other devices.
        temperature: > 0.
        return_entropy: also return the entropy of each token's distribution, in nats, with its gradient.
        backend: as in `gcpo_loss`.

    Returns:
        (B, T) or (N,) log-probabilities, or (log-probabilities, entropies).
    """
    HeadOptions(temperature)
    check_rank("logits", logits, (2, 3), "(B, T, V) or (N, V)")
    token_ids = check_ids("token_ids", token_ids, tuple(logits.shape[:-1]), "of logits without V", logits)
    check_no_tangents(logits=logits)
    name = "triton" if use_triton(backend, logits) else "torch"
    logp, entropy, *_ = ops.selective_logprob(logits, token_ids, float(temperature), name)
    return (logp, entropy) if return_entropy else logp


def causal_weights(
    z: torch.Tensor,
    context_z: torch.Tensor,
    *,
    alpha: float = 2.0,
    baseline: str = "mean",
    similarity: str = "cosine",
    context_mask: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """
    The causal weights Upsilon (eq. 11): alpha * s(z_i, Zbar_i - Zprime_i + zbar).

    Zbar_i = mean_j context_z[:, i, 0, j]; Zprime_i = mean_l mean_j context_z[:, i, l, j]; zbar is the group's mean
    (`baseline="mean"`) or that of the other candidates ("loo", NaN for n = 1). The cosine is `z.t / max(|z||t|, 1e-8)`.

    Args:
        z: (P, n, H) float, representations of the candidates; carries gradient.
        context_z: (P, n, L, m, H) float, representations of m samples under each context; carries gradient.
        alpha: scale of the weights.
        baseline: "mean" or "loo".
        similarity: "cosine"; or, with c the cosine, "euclidean" 1 / (1 + sqrt(2 - 2c)), "gaussian" exp(-(2 - 2c) / 2).
        context_mask: (P, n, L, m) bool, samples that exist. Means run over those; where an i has none under context 0,
            or none at all, Zbar_i - Zprime_i is 0.
        backend: as in `gcpo_loss`.

    Returns:
        (P, n) weights. NaN or inf in z or in samples that exist comes out as NaN.
    """
    check_rank("z", z, (3,), "(P, n, H)")
    check_causal(tuple(z.shape), z, context_z, alpha, baseline, similarity, context_mask)
    if use_triton(backend, z, context_z):
        check_no_tangents(z=z, context_z=context_z)
        return triton_ops.triton_causal_weights(z, None, context_z, context_mask, float(alpha), baseline, similarity)[0]
    return group.causal_weights(
        z, context_z, alpha=alpha, baseline=baseline, similarity=similarity, context_mask=context_mask
    )


def causal_weights_from_hidden(
    hidden: torch.Tensor,
    last_index: torch.Tensor,
    context_z: torch.Tensor,
    *,
    alpha: float = 2.0,
    baseline: str = "mean",
    similarity: str = "cosine",
    context_mask: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """
    `causal_weights` with z_i read in place: row `last_index[i]` of sequence i's hidden states.

    The Triton backend makes no gathered copy of z.

    Args:
        hidden: (B, T, H) float with B = P * n, group-major; carries gradient, which is 0 but in the rows read.
        last_index: (B,) int64 in [0, T): each sequence's last real token. Outside: ValueError on a CPU; on other
            devices the Triton backend gives NaN for the group.
        others: as in `causal_weights`.

    Returns:
        (P, n) weights.
    """
    check_rank("hidden", hidden, (3,), "(B, T, H)")
    check_rank("context_z", context_z, (5,), "(P, n, L, m, H)")
    p, n = context_z.shape[:2]
    if p * n != hidden.shape[0]:
        raise ValueError(f"`hidden` must have B = P * n = {p * n} sequences, got {hidden.shape[0]}.")
    last_index = check_ids("last_index", last_index, (p * n,), "(B,)", hidden)
    if last_index.device.type == "cpu" and last_index.numel() and not torch.compiler.is_compiling():
        low, high = last_index.aminmax()
        if low < 0 or high >= hidden.shape[1]:
            raise ValueError(f"`last_index` must be in [0, {hidden.shape[1]}), got values from {low} to {high}.")
    check_causal((p, n, hidden.shape[2]), hidden, context_z, alpha, baseline, similarity, context_mask)
    if use_triton(backend, hidden, context_z):
        check_no_tangents(hidden=hidden, context_z=context_z)
        return triton_ops.triton_causal_weights(
            hidden, last_index, context_z, context_mask, float(alpha), baseline, similarity
        )[0]
    return group.causal_weights_from_hidden(
        hidden,
        last_index,
        context_z,
        alpha=alpha,
        baseline=baseline,
        similarity=similarity,
        context_mask=context_mask,
    )


def leave_one_out_mean(z: torch.Tensor, *, backend: str | None = None) -> torch.Tensor:
    """mean_{k != i} z_k for each i: (P, n, H) from (P, n, H) float; NaN for n = 1. Carries gradient."""
    check_rank("z", z, (3,), "(P, n, H)")
    if use_triton(backend, z):
        check_no_tangents(z=z)
        return triton_ops.triton_leave_one_out(z, torch.float32)
    return group.leave_one_out_mean(z)


def group_advantages(
    rewards: torch.Tensor, group_size: int, *, scale: str = "group", eps: float = 1e-4
) -> torch.Tensor:
    """
    Group-relative advantages (eq. 8): (r - mean) / (std + eps) within each group.

    Args:
        rewards: (B,) float, group-major: rows p * n .. p * n + n - 1 belong to prompt p. NaN rewards are left out of
            the statistics and get advantage 0.
        group_size: n; divides B.
        scale: "group", "batch" (std over all rewards), or "none" (no division), as TRL's `scale_rewards`.
        eps: added to the std, >= 0.

    Returns:
        (B,) advantages; 0 for groups of equal rewards.
    """
    check_rank("rewards", rewards, (1,), "(B,)")
    check_count("group_size", group_size)
    if rewards.shape[0] % group_size:
        raise ValueError(f"`group_size` must divide the number of rewards, {rewards.shape[0]}, got {group_size}.")
    check_choice("scale", scale, ADVANTAGE_SCALES)
    check_number("eps", eps, low=0.0)
    return group.group_advantages(rewards, group_size, scale=scale, eps=eps)


def causal_reference_logprob(
    query_logp: torch.Tensor,
    context_logp: torch.Tensor,
    *,
    context_weights: torch.Tensor | None = None,
    proj_floor: float = 1e-6,
    floor_at_query: bool = False,
) -> torch.Tensor:
    """
    log p', the causal reference's log-probability of each token (eq. 13), for looking at: `gcpo_loss` fuses it.

    p' = exp(context_logp[..., 0]) - mean_l exp(context_logp[..., l]) + exp(query_logp), clamped to [proj_floor, 1], or
    with `floor_at_query` to [min(proj_floor, exp(query_logp)), 1].

    Args:
        query_logp: (B, T) float, log pi_old under the query alone.
        context_logp: (B, T, L) float, log pi_old under the contexts x_{i,l}.
        context_weights: (L,) or (B, L) float >= 0, the weights of the mean over l, as in `gcpo_loss`. None: 1 / L each.
        proj_floor: lower bound of p', in (0, 1).
        floor_at_query: lower the bound to exp(query_logp) where that is smaller, as `gcpo_loss` does with a `kl_clip`.

    Returns:
        (B, T) float32 (float64 for float64 input), in nats, at most 0 and at least log proj_floor; with
        `floor_at_query` at least the smaller of that and query_logp, and finite where query_logp is -inf.

    Raises:
        TypeError, ValueError: an argument of a wrong type, shape, device or value; the message names it.
    """
    check_rank("query_logp", query_logp, (2,), "(B, T)")
    check_number("proj_floor", proj_floor, above=0.0, below=1.0)
    check_flag("floor_at_query", floor_at_query)
    check_contexts(tuple(query_logp.shape), query_logp, context_logp)
    dtype = maths.compute_dtype(query_logp, context_logp)
    weights = context_weights
    if weights is not None:
        check_context_weights(weights, context_logp)
        weights = weights.to(dtype).unsqueeze(-2)
    return maths.project(query_logp.to(dtype), context_logp.to(dtype), weights, proj_floor, floor_at_query)[0]
