"""
The maths of GCPO in plain torch, as the torch backend and the loop over tiles run it.

Everything here is differentiable, careful about rounding and overflow, and runs in float64 when given float64. The
public functions of `gcpo_kernels.api` check their arguments and choose a backend; these do not. What all of it must
equal is `gcpo_kernels.reference`, which shares no code with it. Equation numbers are the paper's (arXiv 2508.05428).

Shapes: B sequences, T tokens, L contexts, V vocabulary, H hidden size, P prompts, n candidates per prompt, m samples.
"""

from typing import Any

import torch

from gcpo_kernels.options import HeadOptions, LossOptions
from gcpo_kernels.tokens import TokenInputs

COSINE_EPS = 1e-8


def compute_dtype(*tensors: torch.Tensor | None) -> torch.dtype:
    """float64 if any tensor is, else float32: the type that all arithmetic is done in."""
    return torch.float64 if any(x is not None and x.dtype == torch.float64 for x in tensors) else torch.float32


# ---------------------------------------------------------------------------------------------------------------------
# The causal reference (eqs. 12, 13)
# ---------------------------------------------------------------------------------------------------------------------


def project(
    query_logp: torch.Tensor,  # (...)
    context_logp: torch.Tensor,  # (..., L)
    context_weights: torch.Tensor | None,  # broadcasts with context_logp
    proj_floor: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    log p' and whether p' was clamped, each of shape (...), where p' = exp(a) - sum_l w_l exp(b_l) + exp(c) with
    a = context_logp[..., 0], b_l = context_logp[..., l], c = query_logp, clamped to [proj_floor, 1].

    All exponents are taken relative to the largest log-probability involved, so that nothing overflows and p' keeps
    its relative precision however improbable the token is. A context of weight 0 does not matter, NaN included, except
    that context 0 always serves as a.
    """
    first = context_logp[..., 0]
    if context_weights is None:
        weights = context_logp.new_full((), 1.0 / context_logp.shape[-1]).expand_as(context_logp)
    else:
        weights = context_weights.to(context_logp.dtype).expand_as(context_logp)
    counted = weights != 0
    inside = context_logp.masked_fill(~counted, -torch.inf)
    top = torch.maximum(torch.maximum(first, query_logp), inside.amax(dim=-1))
    top = top.masked_fill(top == -torch.inf, 0.0)  # every probability is 0: so is the sum
    mean = torch.where(counted, weights * torch.exp(inside - top.unsqueeze(-1)), 0.0).sum(dim=-1)
    # The difference first: with one context it is exactly 0, and p' exactly the query's probability.
    total = torch.exp(first - top) - mean + torch.exp(query_logp - top)
    # `total <= 0` is false for NaN, which therefore comes out as NaN.
    log_proj = torch.where(total <= 0, -torch.inf, top + torch.log(total))
    low = torch.log(torch.tensor(proj_floor, dtype=torch.float64)).item()
    clamped = (log_proj < low) | (log_proj > 0.0)
    return log_proj.clamp(min=low, max=0.0), clamped


# ---------------------------------------------------------------------------------------------------------------------
# The per-token objective (eq. 10)
# ---------------------------------------------------------------------------------------------------------------------


def k3(d: torch.Tensor) -> torch.Tensor:
    """Schulman's estimator of KL(p || q) from a sample of p, with d = log q - log p: exp(d) - d - 1 >= 0."""
    return torch.expm1(d) - d


def beyond_kl_clip(d: torch.Tensor, kl_clip: float) -> torch.Tensor:
    """Where the log-ratio d of a KL term leaves [-kl_clip, kl_clip]. NaN does not, so that it shows in the loss."""
    return d.abs() > kl_clip


def clip_kl_ratio(d: torch.Tensor, options: LossOptions) -> torch.Tensor:
    """d within [-kl_clip, kl_clip], and a constant beyond: no gradient passes there. Without a kl_clip d itself."""
    if options.kl_clip is None:
        return d
    return torch.where(beyond_kl_clip(d, options.kl_clip), d.detach().sign() * options.kl_clip, d)


def k3_slope(d: torch.Tensor, options: LossOptions) -> torch.Tensor:
    """The derivative of k3(clip_kl_ratio(d))."""
    slope = torch.expm1(d)
    return slope if options.kl_clip is None else torch.where(beyond_kl_clip(d, options.kl_clip), 0.0, slope)


def token_weights(mask: torch.Tensor, options: LossOptions, dtype: torch.dtype) -> torch.Tensor:
    """
    (B, T) weights w, 0 where masked, such that the loss is sum(w * per-token loss): TRL's reductions.

    grpo: mean over sequences of the mean over a sequence's tokens; bnpo: mean over tokens; dr_grpo: sum / (B *
    max_completion_length); dapo: sum / num_items_in_batch. Denominators are at least 1.
    """
    ones = (mask != 0).to(dtype)
    if options.loss_type == "grpo":
        return ones / (ones.sum(dim=1, keepdim=True).clamp(min=1.0) * max(mask.shape[0], 1))
    if options.loss_type == "dr_grpo":
        assert options.max_completion_length is not None
        return ones / (max(mask.shape[0], 1) * options.max_completion_length)
    if options.loss_type == "dapo" and options.num_items_in_batch is not None:
        items = options.num_items_in_batch
        if isinstance(items, torch.Tensor):  # of any rank: it must not broadcast
            return ones / items.reshape(()).to(device=mask.device, dtype=dtype).clamp(min=1.0)
        return ones / max(items, 1)
    return ones / ones.sum().clamp(min=1.0)


def log_ratio(logp: torch.Tensor, inputs: TokenInputs, level: str) -> torch.Tensor:
    """log R of each token, (B, T): its own, or ("sequence") the mean of its sequence's, with the gradient of that."""
    ratio = logp - (logp.detach() if inputs.old_logp is None else inputs.old_logp)
    if level == "token":
        return ratio
    count = inputs.mask.sum(dim=1, keepdim=True).clamp(min=1)
    return (torch.where(inputs.mask, ratio, 0.0).sum(dim=1, keepdim=True) / count).expand_as(ratio)


def causal_target(
    logp: torch.Tensor, inputs: TokenInputs, options: LossOptions
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """log p' of each token and whether it was clamped; (None, None) without contexts."""
    if inputs.context_logp is None:
        return None, None
    query = inputs.query_logp if inputs.query_logp is not None else inputs.old_logp
    query = logp.detach() if query is None else query
    return project(query, inputs.context_logp, inputs.context_weights, options.proj_floor)


# exp of what lies above overflows.
LARGEST_LOG = {torch.float32: 88.72283, torch.float64: 709.78271}


def bounded_log_ratio(log_ratio: torch.Tensor, inputs: TokenInputs, options: LossOptions) -> torch.Tensor:
    """
    log R, kept from overflowing for tokens whose loss does not grow with R there: with an advantage of at least 0 the
    clip has taken over long before, or `delta` has, or the sampler's correction is 0. Their loss is what it was, and
    their derivative 0, not 0 * inf. Where the loss itself is infinite it stays so.
    """
    bounded = log_ratio.clamp(max=LARGEST_LOG[log_ratio.dtype])
    if options.delta is None:
        bounded = torch.where(inputs.advantages < 0, log_ratio, bounded)
    if inputs.importance_sampling_ratio is not None:
        bounded = torch.where(inputs.importance_sampling_ratio == 0, log_ratio.clamp(max=0.0), bounded)
    return bounded


def token_objective(
    logp: torch.Tensor,
    log_ratio: torch.Tensor,
    log_proj: torch.Tensor | None,
    inputs: TokenInputs,
    options: LossOptions,
) -> torch.Tensor:
    """
    Loss of each token (eq. 10, to minimise), before the reduction; all arguments of one shape:

        -min(R A, clip(R, 1 - eps_low, 1 + eps_high) A) w + beta k3(log pi_ref - log pi) + kappa k3(log p' - log pi)

    `delta` caps the unclipped R from above, as in TRL. With `kl_clip`, the log-ratios of both k3 terms are clamped to
    [-kl_clip, kl_clip]. `token_objective_gradient` is its derivative.
    """
    ratio = torch.exp(bounded_log_ratio(log_ratio, inputs, options))
    clipped = ratio.clamp(1.0 - options.epsilon_low, 1.0 + options.epsilon_high)
    capped = ratio if options.delta is None else ratio.clamp(max=options.delta)
    loss = -torch.minimum(capped * inputs.advantages, clipped * inputs.advantages)
    if inputs.importance_sampling_ratio is not None:
        loss = loss * inputs.importance_sampling_ratio
    if options.beta != 0.0 and inputs.ref_logp is not None:
        loss = loss + options.beta * k3(clip_kl_ratio(inputs.ref_logp - logp, options))
    if options.kappa != 0.0 and log_proj is not None:
        causal_logp = logp if inputs.causal_logp is None else inputs.causal_logp
        loss = loss + options.kappa * k3(clip_kl_ratio(log_proj - causal_logp, options))
    return loss


def token_objective_gradient(
    logp: torch.Tensor,
    log_ratio: torch.Tensor,
    log_proj: torch.Tensor | None,
    inputs: TokenInputs,
    options: LossOptions,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """
    Derivatives of `token_objective` in log R, in logp at fixed R, and in causal_logp (None where there is none).

    For backends that make gradients in the forward, where autograd does not reach. Ties are split as autograd's: half
    to each side of the minimum.
    """
    ratio = torch.exp(bounded_log_ratio(log_ratio, inputs, options))
    unclipped = (ratio >= 1.0 - options.epsilon_low) & (ratio <= 1.0 + options.epsilon_high)
    clipped = ratio.clamp(1.0 - options.epsilon_low, 1.0 + options.epsilon_high)
    capped, uncapped = ratio, torch.ones_like(unclipped)
    if options.delta is not None:
        capped, uncapped = ratio.clamp(max=options.delta), ratio <= options.delta
    left, right = capped * inputs.advantages, clipped * inputs.advantages
    passes = torch.where(left < right, uncapped.to(ratio), torch.where(left > right, unclipped.to(ratio), 0.0))
    tie = 0.5 * (uncapped.to(ratio) + unclipped.to(ratio))
    passes = torch.where(left == right, tie, passes)
    d_ratio = -passes * ratio * inputs.advantages
    if inputs.importance_sampling_ratio is not None:
        d_ratio = d_ratio * inputs.importance_sampling_ratio
    d_logp = torch.zeros_like(d_ratio)
    d_causal = None
    if options.beta != 0.0 and inputs.ref_logp is not None:
        d_logp = d_logp - options.beta * k3_slope(inputs.ref_logp - logp, options)
    if options.kappa != 0.0 and log_proj is not None:
        if inputs.causal_logp is None:
            d_logp = d_logp - options.kappa * k3_slope(log_proj - logp, options)
        else:
            d_causal = -options.kappa * k3_slope(log_proj - inputs.causal_logp, options)
    return d_ratio, d_logp, d_causal


def objective(
    logp: torch.Tensor, inputs: TokenInputs, options: LossOptions
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The reduced loss of eq. 10 and its metrics, from the policy's (B, T) log-probabilities."""
    logp = torch.where(inputs.mask, logp, 0.0)
    ratio = log_ratio(logp, inputs, options.importance_sampling_level)
    log_proj, clamped = causal_target(logp, inputs, options)
    per_token = token_objective(logp, ratio, log_proj, inputs, options)
    weights = token_weights(inputs.mask, options, logp.dtype)
    loss = torch.where(inputs.mask, per_token * weights, 0.0).sum()
    with torch.no_grad():
        metrics = objective_metrics(logp, ratio, log_proj, clamped, inputs, options)
    return loss, metrics


def objective_metrics(
    logp: torch.Tensor,
    log_ratio: torch.Tensor,
    log_proj: torch.Tensor | None,
    clamped: torch.Tensor | None,
    inputs: TokenInputs,
    options: LossOptions,
) -> dict[str, torch.Tensor]:
    """
    Means over unmasked tokens, as float32 scalars: "kl" (k3 to the reference), "kl_causal" (k3 to p'), "proj_clamped"
    (share of tokens whose p' left [proj_floor, 1]), "clip_low" and "clip_high" (share of tokens whose gradient a clip
    side stopped, as TRL counts them). A term that was not given is 0. With `kl_clip`, both k3 are of the clamped
    log-ratios, and "kl_clipped" and "kl_causal_clipped" are the shares of tokens whose log-ratio was clamped.
    """
    count = inputs.mask.sum().clamp(min=1)

    def mean(x: torch.Tensor) -> torch.Tensor:
        return (torch.where(inputs.mask, x.to(logp.dtype), 0.0).sum() / count).to(torch.float32)

    zero = torch.zeros((), dtype=torch.float32, device=logp.device)
    ratio = torch.exp(log_ratio)
    if options.delta is not None:
        ratio = ratio.clamp(max=options.delta)
    causal_logp = logp if inputs.causal_logp is None else inputs.causal_logp
    ref_ratio = None if inputs.ref_logp is None else inputs.ref_logp - logp
    causal_ratio = None if log_proj is None else log_proj - causal_logp
    metrics = {
        "kl": zero if ref_ratio is None else mean(k3(clip_kl_ratio(ref_ratio, options))),
        "kl_causal": zero if causal_ratio is None else mean(k3(clip_kl_ratio(causal_ratio, options))),
        "proj_clamped": zero if clamped is None else mean(clamped),
        "clip_low": mean((ratio < 1.0 - options.epsilon_low) & (inputs.advantages < 0)),
        "clip_high": mean((ratio > 1.0 + options.epsilon_high) & (inputs.advantages > 0)),
    }
    if options.kl_clip is not None:
        for name, d in (("kl_clipped", ref_ratio), ("kl_causal_clipped", causal_ratio)):
            metrics[name] = zero if d is None else mean(beyond_kl_clip(d, options.kl_clip))
    return metrics


# ---------------------------------------------------------------------------------------------------------------------
# Log-probabilities
# ---------------------------------------------------------------------------------------------------------------------


def head_logits(u: torch.Tensor, head: HeadOptions) -> torch.Tensor:
    """softcap(logit_scale * u) / temperature, softcap(x) = c tanh(x / c)."""
    logits = u * head.logit_scale
    if head.logit_softcap is not None:
        logits = head.logit_softcap * torch.tanh(logits / head.logit_softcap)
    return logits / head.temperature


def masked_mean(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean of x where mask is true (0 where it nowhere is), as a float32 scalar."""
    return (torch.where(mask, x, 0.0).sum() / mask.sum().clamp(min=1)).to(torch.float32)


# ---------------------------------------------------------------------------------------------------------------------
# Advantages and causal weights (eqs. 8, 11)
# ---------------------------------------------------------------------------------------------------------------------


def group_advantages(
    rewards: torch.Tensor,  # (B,)
    group_size: int,
    *,
    scale: str = "group",
    eps: float = 1e-4,
) -> torch.Tensor:
    """
    A of eq. 8, (B,): (r - mean) / (std + eps) within each group of `group_size` consecutive rewards.

    The std is the unbiased one. NaN rewards are left out of the statistics and get 0; so do groups of equal rewards.
    """
    grouped = rewards.to(compute_dtype(rewards)).view(-1, group_size)
    scored = ~torch.isnan(grouped)
    centred = torch.where(scored, grouped - grouped.nanmean(dim=1, keepdim=True), 0.0)
    # Equal rewards can differ from their own rounded mean: the comparison is exact, a std is not.
    high = torch.where(scored, grouped, -torch.inf).amax(dim=1, keepdim=True)
    low = torch.where(scored, grouped, torch.inf).amin(dim=1, keepdim=True)
    if scale == "group":
        count = scored.sum(dim=1, keepdim=True)
        std = (centred.square().sum(dim=1, keepdim=True) / (count - 1).clamp(min=1)).sqrt()
        centred = centred / (std + eps)
    elif scale == "batch":
        every = torch.where(scored, grouped - grouped.nanmean(), 0.0)
        std = (every.square().sum() / (scored.sum() - 1).clamp(min=1)).sqrt()
        centred = centred / (std + eps)
    return torch.where(high > low, centred, 0.0).reshape(-1)


def leave_one_out_mean(z: torch.Tensor) -> torch.Tensor:  # (P, n, H) -> (P, n, H)
    """mean_{k != i} z_k for every i. With n = 1 there is no other candidate and the mean is NaN."""
    z = z.to(compute_dtype(z))
    return (z.sum(dim=1, keepdim=True) - z) / (z.shape[1] - 1)


def context_difference(context_z: torch.Tensor, context_mask: torch.Tensor | None) -> torch.Tensor:
    """Zbar_i - Zprime_i of eq. 11, (P, n, H), from (P, n, L, m, H); 0 where context 0, or every context, is empty."""
    dtype = compute_dtype(context_z)
    if context_mask is None:
        per_context = context_z.mean(dim=3, dtype=dtype)  # (P, n, L, H)
        return per_context[:, :, 0] - per_context.mean(dim=2)
    keep = context_mask.bool()
    total = torch.where(keep.unsqueeze(-1), context_z, 0.0).sum(dim=3, dtype=dtype)  # (P, n, L, H)
    count = keep.sum(dim=3)  # (P, n, L)
    first = total[:, :, 0] / count[:, :, 0, None].clamp(min=1)
    per_context = total / count.unsqueeze(-1).clamp(min=1)
    filled = (count > 0).sum(dim=2)  # contexts that hold a sample: the mean over l is over those
    average = per_context.sum(dim=2) / filled.unsqueeze(-1).clamp(min=1)
    return torch.where((count[:, :, 0] > 0).unsqueeze(-1), first - average, 0.0)


def _norm(x: torch.Tensor) -> torch.Tensor:
    """|x| over the last dimension, with gradient 0 rather than NaN at 0."""
    square = x.square().sum(dim=-1)
    zero = square == 0
    return torch.where(zero, 0.0, torch.sqrt(torch.where(zero, 1.0, square)))


def similarity_of_cosine(cosine: torch.Tensor, similarity: str) -> torch.Tensor:
    """s as a function of the cosine: on unit vectors the squared distance is 2 - 2 cosine."""
    if similarity == "cosine":
        return cosine
    distance2 = (2.0 - 2.0 * cosine).clamp(min=0.0)
    if similarity == "gaussian":
        return torch.exp(-distance2 / 2.0)
    zero = distance2 == 0
    return 1.0 / (1.0 + torch.where(zero, 0.0, torch.sqrt(torch.where(zero, 1.0, distance2))))


def causal_weights(
    z: torch.Tensor,  # (P, n, H)
    context_z: torch.Tensor,  # (P, n, L, m, H)
    *,
    alpha: float = 2.0,
    baseline: str = "mean",
    similarity: str = "cosine",
    context_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Upsilon of eq. 11, (P, n): alpha * s(z_i, Zbar_i - Zprime_i + zbar)."""
    dtype = compute_dtype(z, context_z)
    z = z.to(dtype)
    zbar = leave_one_out_mean(z) if baseline == "loo" else z.mean(dim=1, keepdim=True)
    target = context_difference(context_z, context_mask).to(dtype) + zbar
    dot = (z * target).sum(dim=-1)
    cosine = dot / (_norm(z) * _norm(target)).clamp(min=COSINE_EPS)
    # Rounding can take it past 1: its value is bounded then, its derivative is what it is just below.
    cosine = cosine + (cosine.clamp(-1.0, 1.0) - cosine).detach()
    return alpha * similarity_of_cosine(cosine, similarity)


def causal_weights_from_hidden(
    hidden: torch.Tensor,  # (P * n, T, H)
    last_index: torch.Tensor,  # (P * n,)
    context_z: torch.Tensor,  # (P, n, L, m, H)
    **options: Any,
) -> torch.Tensor:
    """`causal_weights` of row `last_index[i]` of each sequence's hidden states."""
    rows = hidden[torch.arange(len(last_index), device=hidden.device), last_index]
    return causal_weights(rows.unflatten(0, context_z.shape[:2]), context_z, **options)
