"""
The public losses: what they take, what they give, and which backend runs them. Conventions are those of api.py.
"""

from typing import Any

import torch

from gcpo_kernels import maths, ops
from gcpo_kernels.backends import storage_dtype, triton_ops, use_triton
from gcpo_kernels.checks import (
    check_head,
    check_ids,
    check_main_grad,
    check_rank,
    check_tensor,
    check_token_arguments,
)
from gcpo_kernels.head import gather_head, group_name
from gcpo_kernels.options import HeadOptions, LossOptions, check_flag
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
    kappa_weights: torch.Tensor | None = None,
    beta: float = 0.0,
    kappa: float = 0.0,
    epsilon_low: float = 0.2,
    epsilon_high: float = 0.2,
    delta: float | None = None,
    importance_sampling_level: str = "token",
    importance_sampling_ratio: torch.Tensor | None = None,
    policy_weights: torch.Tensor | None = None,
    loss_type: str = "grpo",
    max_completion_length: int | None = None,
    num_items_in_batch: float | torch.Tensor | None = None,
    proj_floor: float = 1e-6,
    kl_clip: float | None = None,
    bias_correction_kl: bool = False,
    sapo_temperature_pos: float = 1.0,
    sapo_temperature_neg: float = 1.05,
    vespo_k_pos: float = 2.0,
    vespo_lambda_pos: float = 3.0,
    vespo_k_neg: float = 3.0,
    vespo_lambda_neg: float = 2.0,
    backend: str | None = None,
) -> tuple[torch.Tensor, Metrics]:
    r"""
    The GCPO objective (eq. 10), as a loss to minimise, from per-token log-probabilities.

    Per token, with R = exp(logp - old_logp), A the advantage (eq. 9: already multiplied by Upsilon) and
    k3(d) = exp(d) - d - 1:

        -min(R A, clip(R, 1 - epsilon_low, 1 + epsilon_high) A) w v
            + beta k3(ref_logp - logp) + kappa u k3(log p' - causal_logp)

    where p' = exp(context_logp[..., 0]) - mean_l exp(context_logp[..., l]) + exp(query_logp), clamped to
    [proj_floor, 1] (see `kl_clip`), is the causal reference (eqs. 12, 13). With kappa = 0 this is GRPO's loss. w, v and
    u are weights that are 1 unless given. Three values of `loss_type` put another policy term in place of the first
    line, as TRL defines them:

        "cispo": -min(R, epsilon_high) A logp w v, whose first factor is a constant
        "sapo":  -4 / tau sigmoid(tau (R - 1)) A w v
        "vespo": -phi A logp v

    tau is sapo_temperature_pos where A > 0, else sapo_temperature_neg. phi = exp(lambda) W^k exp(-lambda W) is a
    constant, with k and lambda those named pos where A >= 0, else those named neg, and W the ratio of the whole
    sequence: log W is the sum over its unmasked tokens of logp - old_logp, clamped to [-20, 20], and of log w, clamped
    to [log 1e-8, 20] (a w per sequence counts once); the sum is clamped to the latter range, lambda to at least 1e-4,
    and a phi that overflows is 0.

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
        kappa_weights: (B,) or (B, T) float >= 0, u: weights of the KL term to the causal reference, such as 0 for rows
            that have none. Where it is 0, context_logp, query_logp and causal_logp do not matter, NaN included.
        beta: weight of the KL term to the reference policy, >= 0.
        kappa: weight of the KL term to the causal reference, >= 0.
        epsilon_low: lower clip range of R, >= 0.
        epsilon_high: upper clip range of R, >= 0; for "cispo" the largest factor itself, such as 5.
        delta: caps the unclipped R (two-sided clipping), > 0, in the clipped term alone. None: no cap.
        importance_sampling_level: "token", or "sequence": log R averaged over a sequence's unmasked tokens.
        importance_sampling_ratio: (B, T), (B, 1) or (B,) float, w: the correction of a separate sampler. For "vespo" a
            part of phi.
        policy_weights: (B,), (B, 1) or (B, T) float, v: known weights of the policy term, such as a mask of rows that
            are too far off-policy. Neither KL term has them.
        loss_type: the policy term, and the reduction. "grpo", "sapo": mean over sequences of each one's mean over its
            unmasked tokens; "bnpo": mean over unmasked tokens; "dr_grpo": sum / (B * max_completion_length); "dapo",
            "cispo", "vespo": sum / num_items_in_batch; "luspo": sum / B, where with a ratio per sequence, too, the
            policy term counts once for every unmasked token. Denominators are at least 1.
        max_completion_length: tokens, for "dr_grpo".
        num_items_in_batch: tokens, a number or a one-element tensor, for "dapo", "cispo" and "vespo". None: the
            unmasked tokens here.
        proj_floor: lower bound of p', in (0, 1). With `kl_clip` it is min(proj_floor, exp(query_logp)).
        kl_clip: finite and > 0: clamps the log-ratio d of both k3(d) terms to [-kl_clip, kl_clip]; beyond, the term is
            constant and has no gradient. The slope e^d - 1 knows no bound otherwise, and one token that the policy
            thinks little of can outweigh a batch. It also lowers the bound of p' to exp(query_logp) where that is
            below `proj_floor`: a token that all contexts find as unlikely as the query does, such as one of
            probability 1e-8, is then left alone, which proj_floor would raise. NaN stays NaN. None: neither, as in the
            paper.
        bias_correction_kl: multiplies the KL term to the reference policy by R, with its gradient: TRL's
            `use_bias_correction_kl`. R is the token's or the sequence's, and `delta` does not cap it.
        sapo_temperature_pos, sapo_temperature_neg: tau of "sapo", > 0.
        vespo_k_pos, vespo_lambda_pos, vespo_k_neg, vespo_lambda_neg: k and lambda of "vespo", >= 0.
        backend: "triton", "torch", or None for the first of `available_backends`.

    Returns:
        The loss, a scalar, and metrics: detached float32 scalars, means over unmasked tokens: "kl", "kl_causal",
        "proj_clamped" (share of tokens whose p' left its bounds), "clip_low", "clip_high" (share of tokens clipped on
        that side; for "cispo" 0, and the share with R > epsilon_high and A > 0; for "sapo" and "vespo" 0). Terms that
        were not given are 0. "kl" is times R with `bias_correction_kl`. With `kappa_weights`, those of the causal term
        are means over unmasked tokens whose weight is not 0 (0 where there are none). With `kl_clip`, and only then,
        also "kl_clipped" and "kl_causal_clipped": shares of tokens whose log-ratio was clamped; "kl" and "kl_causal"
        are of the clamped ones.
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
        bias_correction_kl=bias_correction_kl,
        sapo_temperature_pos=sapo_temperature_pos,
        sapo_temperature_neg=sapo_temperature_neg,
        vespo_k_pos=vespo_k_pos,
        vespo_lambda_pos=vespo_lambda_pos,
        vespo_k_neg=vespo_k_neg,
        vespo_lambda_neg=vespo_lambda_neg,
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
        policy_weights=policy_weights,
        kappa_weights=kappa_weights,
    )
    check_token_arguments(tuple(logp.shape), logp, given, options)
    dtype = maths.compute_dtype(logp)
    triton = use_triton(backend, logp, *given[1:])
    given = maths.fold_weights(given, options, dtype)
    if triton:
        return triton_ops.loss_and_metrics(logp, given, options)
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
    kappa_weights: torch.Tensor | None = None,
    beta: float = 0.0,
    kappa: float = 0.0,
    epsilon_low: float = 0.2,
    epsilon_high: float = 0.2,
    delta: float | None = None,
    importance_sampling_level: str = "token",
    importance_sampling_ratio: torch.Tensor | None = None,
    policy_weights: torch.Tensor | None = None,
    loss_type: str = "grpo",
    max_completion_length: int | None = None,
    num_items_in_batch: float | torch.Tensor | None = None,
    proj_floor: float = 1e-6,
    kl_clip: float | None = None,
    bias_correction_kl: bool = False,
    sapo_temperature_pos: float = 1.0,
    sapo_temperature_neg: float = 1.05,
    vespo_k_pos: float = 2.0,
    vespo_lambda_pos: float = 3.0,
    vespo_k_neg: float = 3.0,
    vespo_lambda_neg: float = 2.0,
    offset_logp: torch.Tensor | None = None,
    main_grad: torch.Tensor | None = None,
    process_group: Any = None,
    return_scores: bool = False,
    backend: str | None = None,
) -> tuple[Any, ...]:
    """
    `gcpo_loss` from hidden states and the output layer, without ever holding (B * T, V) logits.

    Equal to `gcpo_loss(linear_logprob(hidden, weight, token_ids, ...), advantages, mask, ...)`. Gradients in hidden,
    weight and bias are made in the forward, tile by tile: three matrix products, two when the weight needs no
    gradient, one when nothing does. Weight gradients accumulate in float32. Masked tokens cost nothing. The backward
    multiplies by the upstream gradient, in place unless `retain_graph` or torch.compile forbids it, and not at all
    where that is 1. A bfloat16 gradient is rounded once more there, unless by a power of two.

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
        return_scores: also return the tokens' log-probabilities and entropies.
        others: as in `gcpo_loss`.

    Returns:
        As `gcpo_loss`, with "entropy" (nats, mean over unmasked tokens) among the metrics. With `return_scores` a third
        value, (log-probabilities, entropies): (B, T) each, in nats, detached, 0 where masked.
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
        bias_correction_kl=bias_correction_kl,
        sapo_temperature_pos=sapo_temperature_pos,
        sapo_temperature_neg=sapo_temperature_neg,
        vespo_k_pos=vespo_k_pos,
        vespo_lambda_pos=vespo_lambda_pos,
        vespo_k_neg=vespo_k_neg,
        vespo_lambda_neg=vespo_lambda_neg,
    )
    check_flag("return_scores", return_scores)
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
        policy_weights=policy_weights,
        kappa_weights=kappa_weights,
    )
    check_token_arguments(shape, hidden, given, options)
    if offset_logp is not None:
        check_tensor("offset_logp", offset_logp, shapes=(shape,), wanted="(B, T)", like=hidden)
    if main_grad is not None:
        check_main_grad(main_grad, weight, gathered=weight is not whole)
    storage = storage_dtype(hidden, weight)
    where = "triton" if use_triton(backend, hidden, weight, bias, *given[1:], storage=storage) else "torch"
    dtype = maths.compute_dtype(hidden, weight)
    given = maths.fold_weights(given, options, dtype)
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
    return (loss, metrics, (logp, entropy)) if return_scores else (loss, metrics)
