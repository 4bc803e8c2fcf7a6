"""
The maths of the losses in plain torch, as the torch backend and the loop over tiles run it; groups' is in group.py.

Everything here is differentiable, careful about rounding and overflow, and runs in float64 when given float64. The
public functions (losses.py, api.py) check their arguments and choose a backend; these do not. What all of it must equal
is `gcpo_kernels.reference`, which shares no code with it. Equation numbers are the paper's (arXiv 2508.05428).

Shapes: B sequences, T tokens, L contexts, V vocabulary.
"""

import math

import torch

from gcpo_kernels.options import HeadOptions, LossOptions
from gcpo_kernels.tokens import TokenInputs


def compute_dtype(*tensors: torch.Tensor | None) -> torch.dtype:
    """float64 if any tensor is, else float32: the type that all arithmetic is done in."""
    return torch.float64 if any(x is not None and x.dtype == torch.float64 for x in tensors) else torch.float32


# ---------------------------------------------------------------------------------------------------------------------
# The causal reference (eqs. 12, 13)
# ---------------------------------------------------------------------------------------------------------------------


# With a floor at the query's probability: what log p' is where that is 0, and how much of exp(a) may be left of
# exp(a) - mean_l exp(b_l) where contexts agree. A rounded mean of equal numbers need not be that number.
LOWEST_LOG = -1e30
AGREEMENT = 1e-6


def project(
    query_logp: torch.Tensor,  # (...)
    context_logp: torch.Tensor,  # (..., L)
    context_weights: torch.Tensor | None,  # broadcasts with context_logp
    proj_floor: float,
    floor_at_query: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    log p' and whether p' was clamped, each of shape (...), where p' = exp(a) - sum_l w_l exp(b_l) + exp(c) with
    a = context_logp[..., 0], b_l = context_logp[..., l], c = query_logp, clamped to [proj_floor, 1]; with
    `floor_at_query`, to [min(proj_floor, exp(c)), 1].

    All exponents are taken relative to the largest log-probability involved, so that nothing overflows and p' keeps
    its relative precision however improbable the token is. A context of weight 0 does not matter, NaN included, except
    that context 0 always serves as a.

    With `floor_at_query`, a first and a mean context that agree (AGREEMENT) leave exactly exp(c), which is not clamped;
    and where exp(c) is 0, log p' is at least LOWEST_LOG, so that it stays finite.
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
    a = torch.exp(first - top)
    mean = torch.where(counted, weights * torch.exp(inside - top.unsqueeze(-1)), 0.0).sum(dim=-1)
    # The difference first: with one context it is exactly 0, and p' exactly the query's probability.
    difference = a - mean
    if floor_at_query:
        difference = torch.where(difference.abs() <= AGREEMENT * a, 0.0, difference)
    total = difference + torch.exp(query_logp - top)
    # `total <= 0` is false for NaN, which therefore comes out as NaN.
    log_proj = torch.where(total <= 0, -torch.inf, top + torch.log(total))
    low = torch.log(torch.tensor(proj_floor, dtype=torch.float64)).item()
    if floor_at_query:
        # By the difference: the rounding of a logarithm would put a p' that is the query's on either side of it.
        clamped = torch.where(query_logp < low, difference < 0.0, log_proj < low) | (log_proj > 0.0)
        return torch.maximum(log_proj, query_logp.clamp(min=LOWEST_LOG, max=low)).clamp(max=0.0), clamped
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

    grpo, sapo: mean over sequences of the mean over a sequence's tokens; bnpo: mean over tokens; dr_grpo: sum / (B *
    max_completion_length); dapo, cispo, vespo: sum / num_items_in_batch; luspo: sum / B. Denominators are at least 1.
    """
    ones = (mask != 0).to(dtype)
    if options.reduction == "grpo":
        return ones / (ones.sum(dim=1, keepdim=True).clamp(min=1.0) * max(mask.shape[0], 1))
    if options.reduction == "luspo":
        return ones / max(mask.shape[0], 1)
    if options.reduction == "dr_grpo":
        assert options.max_completion_length is not None
        return ones / (max(mask.shape[0], 1) * options.max_completion_length)
    if options.reduction == "dapo" and options.num_items_in_batch is not None:
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
    """log p' of each token and whether it was clamped, with `kl_clip` at the query; (None, None) without contexts."""
    if inputs.context_logp is None:
        return None, None
    query = inputs.query_logp if inputs.query_logp is not None else inputs.old_logp
    query = logp.detach() if query is None else query
    # Where the pull is bounded at all, a token that contexts find as unlikely as the query does must not be pulled.
    at_query = options.kl_clip is not None
    return project(query, inputs.context_logp, inputs.context_weights, options.proj_floor, at_query)


# exp of what lies above overflows.
LARGEST_LOG = {torch.float32: 88.72283, torch.float64: 709.78271}


# What the clamps of `vespo_phi` keep: a sequence's ratio, in logs, as TRL has it.
PHI_LOG_RANGE = (math.log(1e-8), 20.0)


def bounded_log_ratio(log_ratio: torch.Tensor, inputs: TokenInputs, options: LossOptions) -> torch.Tensor:
    """
    log R, kept from overflowing for tokens whose policy term does not grow with R there: with an advantage of at least
    0 the clip has taken over long before, or `delta` has, or the sampler's correction is 0, or it is no clipped term at
    all. Their loss is what it was, and their derivative 0, not 0 * inf. Where the loss itself is infinite it stays so.
    """
    bounded = log_ratio.clamp(max=LARGEST_LOG[log_ratio.dtype])
    if options.delta is None and options.kind == "clipped":
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

        -min(R A, clip(R, 1 - eps_low, 1 + eps_high) A) w + beta k3(log pi_ref - log pi) + kappa u k3(log p' - log pi)

    `delta` caps the unclipped R from above, as in TRL. In place of the clipped term, other kinds of loss have

        cispo: -min(R, eps_high) A w log pi, whose first factor is a constant
        sapo:  -4 / tau sigmoid(tau (R - 1)) A w, with tau by the sign of A
        vespo: -A w log pi, with phi in A already (`weigh_by_phi`)

    With `bias_correction_kl` the reference's k3 is times R. With `kl_clip`, the log-ratios of both k3 terms are clamped
    to [-kl_clip, kl_clip]. The weights are w = importance_sampling_ratio (`fold_weights`) and u = kappa_weights.
    `token_objective_gradient` is the derivative.
    """
    if options.kind == "vespo":
        loss = -inputs.advantages * logp
    elif options.kind == "cispo":
        capped = torch.exp(bounded_log_ratio(log_ratio, inputs, options)).clamp(max=options.epsilon_high)
        loss = -capped.detach() * inputs.advantages * logp
    elif options.kind == "sapo":
        ratio = torch.exp(bounded_log_ratio(log_ratio, inputs, options))
        tau = sapo_temperature(inputs.advantages, options)
        loss = -4.0 / tau * torch.sigmoid(tau * (ratio - 1.0)) * inputs.advantages
    else:
        ratio = torch.exp(bounded_log_ratio(log_ratio, inputs, options))
        clipped = ratio.clamp(1.0 - options.epsilon_low, 1.0 + options.epsilon_high)
        capped = ratio if options.delta is None else ratio.clamp(max=options.delta)
        loss = -torch.minimum(capped * inputs.advantages, clipped * inputs.advantages)
    if inputs.importance_sampling_ratio is not None:
        loss = loss * inputs.importance_sampling_ratio
    if options.beta != 0.0 and inputs.ref_logp is not None:
        loss = loss + options.beta * reference_kl(inputs.ref_logp - logp, log_ratio, options)
    if options.kappa != 0.0 and log_proj is not None:
        term = options.kappa * k3(clip_kl_ratio(causal_ratio(logp, log_proj, inputs), options))
        loss = loss + (term if inputs.kappa_weights is None else term * inputs.kappa_weights)
    return loss


def sapo_temperature(advantages: torch.Tensor, options: LossOptions) -> torch.Tensor:
    pos, neg = (advantages.new_full((), x) for x in (options.sapo_temperature_pos, options.sapo_temperature_neg))
    return torch.where(advantages > 0, pos, neg)


def reference_kl(d: torch.Tensor, log_ratio: torch.Tensor, options: LossOptions) -> torch.Tensor:
    """k3 of the log-ratio d to the reference, clamped; with `bias_correction_kl` times R."""
    d = clip_kl_ratio(d, options)
    if not options.bias_correction_kl:
        return k3(d)
    # In the exponent where d is large: there R is small, and their product need not overflow with exp(d).
    large, top = d > 2.0, LARGEST_LOG[d.dtype]
    near, far = torch.where(large, 0.0, d), torch.where(large, d, 2.0)
    kl = k3(near)
    kl = kl * torch.exp(torch.where(kl == 0.0, log_ratio.clamp(max=top), log_ratio))  # 0 is not to meet an infinity
    product = torch.exp(torch.where(large, far + log_ratio, 0.0)) * (1.0 - (far + 1.0) * torch.exp(-far))
    return torch.where(large, product, kl)


def reference_kl_slope(d: torch.Tensor, log_ratio: torch.Tensor, options: LossOptions) -> torch.Tensor:
    """The derivative of `reference_kl` in d at fixed R."""
    slope = k3_slope(d, options)
    if not options.bias_correction_kl:
        return slope
    near = slope * torch.exp(log_ratio)
    far = torch.exp(d + log_ratio) * -torch.expm1(-d)
    return torch.where(slope == 0.0, 0.0, torch.where(d > 2.0, far, near))


def causal_ratio(logp: torch.Tensor, log_proj: torch.Tensor, inputs: TokenInputs) -> torch.Tensor:
    """log p' - log pi, the log-ratio of the causal KL, and 0 where its weight is 0: nothing matters there, nor NaN."""
    difference = log_proj - (logp if inputs.causal_logp is None else inputs.causal_logp)
    return difference if inputs.kappa_weights is None else torch.where(inputs.kappa_weights != 0, difference, 0.0)


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
    d_ratio, d_logp = policy_term_gradient(log_ratio, inputs, options)
    d_causal = None
    if options.beta != 0.0 and inputs.ref_logp is not None:
        difference = inputs.ref_logp - logp
        d_logp = d_logp - options.beta * reference_kl_slope(difference, log_ratio, options)
        if options.bias_correction_kl:
            d_ratio = d_ratio + options.beta * reference_kl(difference, log_ratio, options)
    if options.kappa != 0.0 and log_proj is not None:
        slope = -options.kappa * k3_slope(causal_ratio(logp, log_proj, inputs), options)
        slope = slope if inputs.kappa_weights is None else slope * inputs.kappa_weights
        if inputs.causal_logp is None:
            d_logp = d_logp + slope
        else:
            d_causal = slope
    return d_ratio, d_logp, d_causal


def policy_term_gradient(
    log_ratio: torch.Tensor, inputs: TokenInputs, options: LossOptions
) -> tuple[torch.Tensor, torch.Tensor]:
    """Derivatives of the policy term in log R and in logp at fixed R."""
    correction = 1.0 if inputs.importance_sampling_ratio is None else inputs.importance_sampling_ratio
    zeros = torch.zeros_like(log_ratio)
    if options.kind == "vespo":
        return zeros, -inputs.advantages * correction
    ratio = torch.exp(bounded_log_ratio(log_ratio, inputs, options))
    if options.kind == "cispo":
        return zeros, -ratio.clamp(max=options.epsilon_high) * inputs.advantages * correction
    if options.kind == "sapo":
        u = sapo_temperature(inputs.advantages, options) * (ratio - 1.0)
        # sigmoid(-u), not 1 - sigmoid(u), which loses its digits as u grows.
        return -4.0 * torch.sigmoid(u) * torch.sigmoid(-u) * ratio * inputs.advantages * correction, zeros
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
    return d_ratio * correction, zeros


def objective(
    logp: torch.Tensor, inputs: TokenInputs, options: LossOptions
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The reduced loss of eq. 10 and its metrics, from the policy's (B, T) log-probabilities."""
    logp = torch.where(inputs.mask, logp, 0.0)
    inputs = weigh_by_phi(logp, inputs, options)
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
    (share of tokens whose p' was clamped), "clip_low" and "clip_high" (share of tokens whose gradient a clip
    side stopped, as TRL counts them; in cispo those whose factor was capped are "clip_high"). A term that was not given
    is 0. With `kl_clip`, both k3 are of the clamped log-ratios, and "kl_clipped" and "kl_causal_clipped" are the shares
    of tokens whose log-ratio was clamped. With `bias_correction_kl`, "kl" is times R. With kappa_weights, the three of
    the causal term are means over the tokens whose weight is not 0.
    """

    def mean(x: torch.Tensor, mask: torch.Tensor = inputs.mask) -> torch.Tensor:
        return masked_mean(x.to(logp.dtype), mask)

    zero = torch.zeros((), dtype=torch.float32, device=logp.device)
    counted = inputs.mask if inputs.kappa_weights is None else inputs.mask & (inputs.kappa_weights != 0)
    metrics = dict.fromkeys(("kl", "kl_causal", "proj_clamped", "clip_low", "clip_high"), zero)
    if options.kl_clip is not None:
        metrics |= {"kl_clipped": zero, "kl_causal_clipped": zero}
    if inputs.ref_logp is not None:
        d = inputs.ref_logp - logp
        metrics["kl"] = mean(reference_kl(d, log_ratio, options))
        if options.kl_clip is not None:
            metrics["kl_clipped"] = mean(beyond_kl_clip(d, options.kl_clip))
    if log_proj is not None and clamped is not None:
        d = causal_ratio(logp, log_proj, inputs)
        metrics["kl_causal"] = mean(k3(clip_kl_ratio(d, options)), counted)
        metrics["proj_clamped"] = mean(clamped, counted)
        if options.kl_clip is not None:
            metrics["kl_causal_clipped"] = mean(beyond_kl_clip(d, options.kl_clip), counted)
    ratio = torch.exp(log_ratio)
    if options.kind == "cispo":
        metrics["clip_high"] = mean((ratio > options.epsilon_high) & (inputs.advantages > 0))
    elif options.kind == "clipped":
        if options.delta is not None:
            ratio = ratio.clamp(max=options.delta)
        metrics["clip_low"] = mean((ratio < 1.0 - options.epsilon_low) & (inputs.advantages < 0))
        metrics["clip_high"] = mean((ratio > 1.0 + options.epsilon_high) & (inputs.advantages > 0))
    return metrics


# ---------------------------------------------------------------------------------------------------------------------
# Weights of the policy term
# ---------------------------------------------------------------------------------------------------------------------


def fold_weights(given: TokenInputs, options: LossOptions, dtype: torch.dtype) -> TokenInputs:
    """
    The same with one weight of the policy term, in place of `importance_sampling_ratio`: its product with
    `policy_weights`. In vespo it is the latter alone, and `sampler_log` holds what the former adds to the log of a
    sequence's ratio: the clamped log of each token's, or an even share of the sequence's own.
    """
    weights, ratio = given.policy_weights, given.importance_sampling_ratio
    if options.kind != "vespo":
        if weights is None:
            return given
        if ratio is not None:
            weights, ratio = (x.detach().to(dtype) for x in (weights, ratio))
            weights = (weights if weights.dim() == 2 else weights[:, None]) * (
                ratio if ratio.dim() == 2 else ratio[:, None]
            )
        return given._replace(importance_sampling_ratio=weights, policy_weights=None)
    log = None
    if ratio is not None:
        log = ratio.detach().to(dtype).log().clamp(*PHI_LOG_RANGE)
        if tuple(log.shape) != tuple(given.mask.shape):
            log = log.reshape(-1, 1) / (given.mask != 0).sum(dim=1, keepdim=True).clamp(min=1)
            log = log.expand(given.mask.shape)
    return given._replace(importance_sampling_ratio=weights, policy_weights=None, sampler_log=log)


def weigh_by_phi(logp: torch.Tensor, given: TokenInputs, options: LossOptions) -> TokenInputs:
    """
    In vespo, the same with advantages (B,) or (B, T) times phi; else as it is. Scores are (B, T) log-probabilities,
    clean or not.

    phi = exp(lambda) w^k exp(-lambda w), a constant, with log w the sum over a sequence's tokens of log R and
    `sampler_log`, each clamped and so is their sum; k and lambda go by the sign of the advantage. TRL's
    `get_gamma_weights`, but that NaN stays NaN.
    """
    if options.kind != "vespo":
        return given
    logp, given, keep = logp.detach(), given.constants(), given.mask != 0
    dtype = compute_dtype(logp)
    logs = logp.to(dtype) - (logp if given.old_logp is None else given.old_logp).to(dtype)
    logs = logs.clamp(-PHI_LOG_RANGE[1], PHI_LOG_RANGE[1])
    if given.sampler_log is not None:
        logs = logs + given.sampler_log
    log_w = torch.where(keep, logs, 0.0).sum(dim=1).clamp(*PHI_LOG_RANGE)
    advantages = given.advantages.to(dtype)
    log_w = log_w if advantages.dim() == 1 else log_w[:, None]
    positive = advantages >= 0

    def by_sign(pos: float, neg: float) -> torch.Tensor:
        return torch.where(positive, advantages.new_full((), pos), advantages.new_full((), neg))

    k = by_sign(options.vespo_k_pos, options.vespo_k_neg)
    scale = by_sign(options.vespo_lambda_pos, options.vespo_lambda_neg).clamp(min=1e-4)
    phi = torch.exp(scale + k * log_w - scale * torch.exp(log_w))
    return given._replace(advantages=advantages * torch.where(phi == torch.inf, 0.0, phi), sampler_log=None)


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
