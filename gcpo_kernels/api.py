"""
The public functions: what they take, what they give, and which backend runs them.

Conventions. B sequences, T tokens, L contexts, V vocabulary, H hidden size, P prompts, n candidates per prompt, m
samples. "float" is float32, bfloat16 or float16 (float64 too on the torch backend); arithmetic and results are float32
(float64 for float64 input). Log-probabilities are natural logarithms. No input is modified. Wrong shapes, types,
devices and option values raise ValueError or TypeError naming the argument. Equations are those of arXiv 2508.05428.
"""

from typing import Any

import torch

from gcpo_kernels import maths, ops
from gcpo_kernels.backends import storage_dtype, triton_ops, use_triton
from gcpo_kernels.checks import (
    check_causal,
    check_contexts,
    check_head,
    check_ids,
    check_main_grad,
    check_no_tangents,
    check_rank,
    check_tensor,
    check_token_arguments,
)
from gcpo_kernels.head import gather_head, group_name
from gcpo_kernels.options import (
    ADVANTAGE_SCALES,
    HeadOptions,
    LossOptions,
    check_choice,
    check_count,
    check_number,
)
from gcpo_kernels.tokens import TokenInputs

Metrics = dict[str, torch.Tensor]


def gcpo_loss(
    logp: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    *,
    old_logp: torch.Tensor | None = None,
    ref_logp: torch.Tensor | None = None,
    context_logp: torch.Tensor | None = None,
    context_weights: torch.Tensor | None = None,
    query_logp: torch.Tensor | None = None,
    causal_logp: torch.Tensor | None = None,
    beta: float = 0.0,
    kappa: float = 0.0,
    epsilon_low: float = 0.2,
    epsilon_high: float = 0.2,
    delta: float | None = None,
    importance_sampling_level: str = "token",
    importance_sampling_ratio: torch.Tensor | None = None,
    loss_type: str = "grpo",
    max_completion_length: int | None = None,
    num_items_in_batch: float | torch.Tensor | None = None,
    proj_floor: float = 1e-6,
    kl_clip: float | None = None,
    backend: str | None = None,
) -> tuple[torch.Tensor, Metrics]:
    r"""
    The GCPO objective (eq. 10), as a loss to minimise, from per-token log-probabilities.

    Per token, with R = exp(logp - old_logp), A the advantage (eq. 9: already multiplied by Upsilon) and
    k3(d) = exp(d) - d - 1:

        -min(R A, clip(R, 1 - epsilon_low, 1 + epsilon_high) A) w
            + beta k3(ref_logp - logp) + kappa k3(log p' - causal_logp)

    where p' = exp(context_logp[..., 0]) - mean_l exp(context_logp[..., l]) + exp(query_logp), clamped to
    [proj_floor, 1], is the causal reference (eqs. 12, 13). With kappa = 0 this is GRPO's loss.

    Args:
        logp: (B, T) float, log pi_theta of the tokens; carries gradient.
        advantages: (B,) or (B, T) float; a constant.
        mask: (B, T) bool, int or float 0/1. Where it is 0 nothing matters, whatever the other arguments hold there.
        old_logp: (B, T) float, log pi_old. None: `logp.detach()`.
        ref_logp: (B, T) float, log pi_ref. Needed when beta > 0.
        context_logp: (B, T, L) float, log pi_old of the tokens under the contexts x_{i,l}. Needed when kappa > 0.
        context_weights: (L,) or (B, L) float >= 0, the weights of the mean over l, used as given. None: 1 / L each.
            Where a weight is 0 the context's scores are ignored, NaN included; index 0 still serves as the context
            x_i.
        query_logp: (B, T) float, log pi_old under the query alone. None: `old_logp`.
        causal_logp: (B, T) float, log pi_theta under the context x_i; carries gradient. None: `logp`.
        beta: weight of the KL term to the reference policy, >= 0.
        kappa: weight of the KL term to the causal reference, >= 0.
        epsilon_low: lower clip range of R, >= 0.
        epsilon_high: upper clip range of R, >= 0.
        delta: caps the unclipped R (two-sided clipping), > 0. None: no cap.
        importance_sampling_level: "token", or "sequence": log R averaged over a sequence's unmasked tokens.
        importance_sampling_ratio: (B, T), (B, 1) or (B,) float, w: the correction of a separate sampler.
        loss_type: "grpo": mean over sequences of each one's mean over its unmasked tokens; "bnpo": mean over unmasked
            tokens; "dr_grpo": sum / (B * max_completion_length); "dapo": sum / num_items_in_batch. Denominators are
            at least 1.
        max_completion_length: tokens, for "dr_grpo".
        num_items_in_batch: tokens, a number or a one-element tensor, for "dapo". None: the unmasked tokens here.
        proj_floor: lower bound of p', in (0, 1).
        kl_clip: finite and > 0: clamps the log-ratio d of both k3(d) terms to [-kl_clip, kl_clip]; beyond, the term is
            constant and has no gradient. The slope e^d - 1 knows no bound otherwise, and one token that the policy
            thinks little of can outweigh a batch. NaN stays NaN. None: no clamp, as in the paper.
        backend: "triton", "torch", or None for the first of `available_backends`.

    Returns:
        The loss, a scalar, and metrics: detached float32 scalars, means over unmasked tokens: "kl", "kl_causal",
        "proj_clamped" (share of tokens whose p' was clamped), "clip_low", "clip_high" (share of tokens clipped on
        that side). Terms that were not given are 0. With `kl_clip`, and only then, also "kl_clipped" and
        "kl_causal_clipped": shares of tokens whose log-ratio was clamped; "kl" and "kl_causal" are of the clamped ones.
    """
    options = LossOptions(
        beta=beta,
        kappa=kappa,
        epsilon_low=epsilon_low,
        epsilon_high=epsilon_high,
        delta=delta,
        importance_sampling_level=importance_sampling_level,
        loss_type=loss_type,
        max_completion_length=max_completion_length,
        num_items_in_batch=num_items_in_batch,
        proj_floor=proj_floor,
        kl_clip=kl_clip,
    )
    check_rank("logp", logp, (2,), "(B, T)")
    given = TokenInputs(
        mask,
        advantages,
        old_logp=old_logp,
        ref_logp=ref_logp,
        query_logp=query_logp,
        causal_logp=causal_logp,
        importance_sampling_ratio=importance_sampling_ratio,
        context_logp=context_logp,
        context_weights=context_weights,
    )
    check_token_arguments(tuple(logp.shape), logp, given, options)
    if use_triton(backend, logp, *given[1:]):
        return triton_ops.loss_and_metrics(logp, given, options)
    dtype = maths.compute_dtype(logp)
    return maths.objective(logp.to(dtype), given.clean(dtype), options)


def linear_gcpo_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    token_ids: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    old_logp: torch.Tensor | None = None,
    ref_logp: torch.Tensor | None = None,
    context_logp: torch.Tensor | None = None,
    context_weights: torch.Tensor | None = None,
    query_logp: torch.Tensor | None = None,
    causal_logp: torch.Tensor | None = None,
    beta: float = 0.0,
    kappa: float = 0.0,
    epsilon_low: float = 0.2,
    epsilon_high: float = 0.2,
    delta: float | None = None,
    importance_sampling_level: str = "token",
    importance_sampling_ratio: torch.Tensor | None = None,
    loss_type: str = "grpo",
    max_completion_length: int | None = None,
    num_items_in_batch: float | torch.Tensor | None = None,
    proj_floor: float = 1e-6,
    kl_clip: float | None = None,
    offset_logp: torch.Tensor | None = None,
    main_grad: torch.Tensor | None = None,
    process_group: Any = None,
    backend: str | None = None,
) -> tuple[torch.Tensor, Metrics]:
    """
    `gcpo_loss` from hidden states and the output layer, without ever holding (B * T, V) logits.

    Equal to `gcpo_loss(linear_logprob(hidden, weight, token_ids, ...), advantages, mask, ...)`. Gradients in hidden,
    weight and bias are made in the forward, tile by tile: three matrix products, two when the weight needs no
    gradient, one when nothing does. Weight gradients accumulate in float32. Masked tokens cost nothing. The backward
    multiplies by the upstream gradient, in place unless `retain_graph` or torch.compile forbids it, and not at all
    where that is 1.

    Args:
        hidden: (B, T, H) or (B * T, H) float; row t is what predicts token t.
        weight: (V, H) float.
        token_ids: (B, T) or (B * T,) int64, in [0, V) where the mask is not 0.
        advantages, mask: as in `gcpo_loss`; the mask gives B and T.
        bias: (V,) float.
        temperature, logit_scale, logit_softcap, process_group: as in `linear_logprob`; a DTensor as weight, too.
        offset_logp: (B, T) float, any estimate of the tokens' log-probabilities, such as a sampler's or an older
            policy's, for speed alone: where it is within 27 nats, the Triton backend reads each logit once instead of
            twice. No result depends on it, whatever it holds, NaN included. None: `old_logp`, if it is given.
        main_grad: (V, H) float32, contiguous: the backward adds the weight's gradient to it, in float32, and the weight
            itself gets none, as trainers want that keep gradients in float32 beside a bfloat16 weight. Every backward
            adds, one for other inputs alone too. Not under torch.compile, nor with a DTensor as weight. None: the
            weight gets its gradient.
        others: as in `gcpo_loss`.

    Returns:
        As `gcpo_loss`, with "entropy" (nats, mean over unmasked tokens) among the metrics.
    """
    options = LossOptions(
        beta=beta,
        kappa=kappa,
        epsilon_low=epsilon_low,
        epsilon_high=epsilon_high,
        delta=delta,
        importance_sampling_level=importance_sampling_level,
        loss_type=loss_type,
        max_completion_length=max_completion_length,
        num_items_in_batch=num_items_in_batch,
        proj_floor=proj_floor,
        kl_clip=kl_clip,
    )
    head = HeadOptions(temperature, logit_scale, logit_softcap)
    group = group_name(process_group)
    whole = weight
    weight, bias = gather_head(weight, bias, group)
    check_rank("hidden", hidden, (2, 3), "(B, T, H) or (B * T, H)")
    check_tensor("mask", mask, floating=False, like=hidden)
    if mask.dim() != 2:
        raise ValueError(f"`mask` must have shape (B, T), got {tuple(mask.shape)}.")
    shape = tuple(mask.shape)
    lead = tuple(hidden.shape[:-1])
    if lead not in (shape, (shape[0] * shape[1],)):
        raise ValueError(
            f"`hidden` must have shape (B, T, H) or (B * T, H) with (B, T) = {shape}, got {lead} before H."
        )
    token_ids = check_ids("token_ids", token_ids, lead, "(B, T)", hidden)
    check_head(hidden, weight, bias, group)
    given = TokenInputs(
        mask,
        advantages,
        old_logp=old_logp,
        ref_logp=ref_logp,
        query_logp=query_logp,
        causal_logp=causal_logp,
        importance_sampling_ratio=importance_sampling_ratio,
        context_logp=context_logp,
        context_weights=context_weights,
    )
    check_token_arguments(shape, hidden, given, options)
    if offset_logp is not None:
        check_tensor("offset_logp", offset_logp, shapes=(shape,), wanted="(B, T)", like=hidden)
    if main_grad is not None:
        check_main_grad(main_grad, weight, gathered=weight is not whole)
    storage = storage_dtype(hidden, weight)
    where = "triton" if use_triton(backend, hidden, weight, bias, *given[1:], storage=storage) else "torch"
    dtype = maths.compute_dtype(hidden, weight)
    inputs = given.clean(dtype)
    grad = torch.is_grad_enabled()
    logp, entropy, *gradients = ops.linear_loss(
        hidden.detach().flatten(0, -2),
        weight.detach(),
        None if bias is None else bias.detach(),
        token_ids.flatten(),
        [None if x is None else x.detach() for x in inputs],
        maths.token_weights(inputs.mask, options, dtype),
        None if offset_logp is None else offset_logp.detach(),
        storage,
        None if main_grad is None else torch.float32,
        head.pack(),
        options.per_token().pack(),
        [grad and x is not None and x.requires_grad for x in (hidden, weight, bias)],
        where,
        group,
    )
    # The value again from the log-probabilities, on (B, T): it also carries the gradient in causal_logp.
    if where == "triton":
        value, metrics = triton_ops.loss_and_metrics(logp, given, options)
    else:
        value, metrics = maths.objective(logp, inputs, options)
    metrics["entropy"] = maths.masked_mean(entropy, inputs.mask)
    loss = ops.LossWithGradients.apply(value, hidden.flatten(0, -2), weight, bias, *gradients, main_grad, where)
    return loss, metrics


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
    group = group_name(process_group)
    weight, bias = gather_head(weight, bias, group)
    check_rank("hidden", hidden, (2, 3), "(B, T, H) or (N, H)")
    token_ids = check_ids("token_ids", token_ids, tuple(hidden.shape[:-1]), "of hidden without H", hidden)
    check_head(hidden, weight, bias, group)
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
        group,
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
    return maths.causal_weights(
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
    return maths.causal_weights_from_hidden(
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
    return maths.leave_one_out_mean(z)


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
    return maths.group_advantages(rewards, group_size, scale=scale, eps=eps)


def causal_reference_logprob(
    query_logp: torch.Tensor, context_logp: torch.Tensor, *, proj_floor: float = 1e-6
) -> torch.Tensor:
    """
    log p', the causal reference's log-probability of each token (eq. 13), for looking at: `gcpo_loss` fuses it.

    Args:
        query_logp: (B, T) float, log pi_old under the query alone.
        context_logp: (B, T, L) float, log pi_old under the contexts x_{i,l}.
        proj_floor: lower bound of p', in (0, 1).

    Returns:
        (B, T), in [log proj_floor, 0].
    """
    check_rank("query_logp", query_logp, (2,), "(B, T)")
    check_number("proj_floor", proj_floor, above=0.0, below=1.0)
    check_contexts(tuple(query_logp.shape), query_logp, context_logp)
    dtype = maths.compute_dtype(query_logp, context_logp)
    return maths.project(query_logp.to(dtype), context_logp.to(dtype), None, proj_floor)[0]
