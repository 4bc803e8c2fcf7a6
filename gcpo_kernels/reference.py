"""
What every function must compute, written straight from the equations (arXiv 2508.05428): the oracle of the tests, of
the benchmarks' checks and of `gcpo doctor`.

It is for reading and for comparing with. It is naive where the package is careful: it holds (N, V) logits, leaves
gradients to autograd and checks nothing. It shares no code with what it judges: it imports torch alone, and of both
packages only `gcpo doctor` imports it. Functions have the names and arguments of the public ones, without those that
change no result. Float64 inputs give the truth; narrower ones are computed in float32, as plain torch would.

Where an equation leaves something open, the convention is in a comment that begins with "Convention".
"""

import math
from typing import Any

import torch
from torch import Tensor


def _wide(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if torch.float64 in [x.dtype for x in tensors] else torch.float32


# ---------------------------------------------------------------------------------------------------------------------
# The objective (eqs. 10, 12, 13)
# ---------------------------------------------------------------------------------------------------------------------


def k3(d: Tensor) -> Tensor:
    """exp(d) - d - 1."""
    return torch.expm1(d) - d


def k3_times(d: Tensor, log_ratio: Tensor) -> Tensor:
    """
    k3(d) R. Convention: exp(d) R is taken at once where d is large, because with an R that is next to 0 the product may
    be a number where exp(d) is none; and 0 times an R that no number can hold is 0.
    """
    large = d > 1.0
    near, far = torch.where(large, 0.0, d), torch.where(large, d, 1.0)
    log_ratio = torch.where((d == 0) & (log_ratio > 0), 0.0, log_ratio)
    whole = (far + torch.where(large, log_ratio, 0.0)).exp() * (1.0 - (far + 1.0) * (-far).exp())
    return torch.where(large, whole, k3(near) * torch.where(large, 0.0, log_ratio).exp())


def projection(
    query_logp: Tensor,  # (...)
    context_logp: Tensor,  # (..., L)
    context_weights: Tensor | None,  # (..., L) or (L,); None: 1 / L each
    proj_floor: float,
) -> tuple[Tensor, Tensor]:
    """log p' of eq. 13 and whether p' was clamped, (...) each: p' = exp(a) - sum_l w_l exp(b_l) + exp(c)."""
    b = context_logp.exp()
    a, c = b[..., 0], query_logp.exp()
    if context_weights is None:
        mean = b.mean(dim=-1)
    else:
        # Convention: a context of weight 0 does not exist, whatever its score is, but context 0 still serves as a.
        mean = torch.where(context_weights != 0, context_weights * b, 0.0).sum(dim=-1)
    p = a - mean + c
    return p.clamp(proj_floor, 1.0).log(), (p < proj_floor) | (p > 1.0)


def projection_floored_at_query(
    query_logp: Tensor,  # (...)
    context_logp: Tensor,  # (..., L)
    context_weights: Tensor | None,  # (..., L) or (L,); None: 1 / L each
    proj_floor: float,
) -> tuple[Tensor, Tensor]:
    """`projection`, clamped to [min(proj_floor, exp(c)), 1]: the floor where there is a `kl_clip`."""
    counts = torch.ones_like(context_logp) if context_weights is None else context_weights.expand_as(context_logp)
    scores = [query_logp[..., None], context_logp[..., :1], context_logp.masked_fill(counts == 0, -math.inf)]
    # Convention: p' is in units of the largest probability, because the floor may be one that no number can hold.
    top = torch.cat(scores, dim=-1).amax(dim=-1, keepdim=True)
    top = torch.where(top == -math.inf, 0.0, top)
    c, a, b = ((x - top).exp() for x in scores)
    share = torch.full_like(b, 1.0 / b.shape[-1]) if context_weights is None else counts
    difference = a[..., 0] - torch.where(counts != 0, share * b, 0.0).sum(dim=-1)
    # Convention: what is left of a where contexts agree but for a rounding is nothing.
    p = torch.where(difference.abs() <= 1e-6 * a[..., 0], 0.0, difference) + c[..., 0]
    top = top[..., 0]
    log_low = query_logp.clamp(max=math.log(proj_floor))
    low = (log_low - top).exp()
    # Convention: log p' is finite where the query's probability is 0.
    log_p = torch.where(p <= low, log_low.clamp(min=-1e30), top + p.log())
    return log_p.clamp(max=0.0), (p < low) | (log_p > 0.0)


def causal_reference_logprob(
    query_logp: Tensor,
    context_logp: Tensor,
    *,
    context_weights: Tensor | None = None,
    proj_floor: float = 1e-6,
    floor_at_query: bool = False,
) -> Tensor:
    """log p', (B, T); context_weights are (L,) or (B, L)."""
    dtype = _wide(query_logp, context_logp)
    weights = None if context_weights is None else context_weights.to(dtype)
    weights = weights[:, None] if weights is not None and weights.dim() == 2 else weights
    function = projection_floored_at_query if floor_at_query else projection
    return function(query_logp.to(dtype), context_logp.to(dtype), weights, proj_floor)[0]


def gcpo_loss(
    logp: Tensor,  # (B, T)
    advantages: Tensor,  # (B,) or (B, T)
    mask: Tensor,  # (B, T)
    *,
    old_logp: Tensor | None = None,
    ref_logp: Tensor | None = None,
    context_logp: Tensor | None = None,
    context_weights: Tensor | None = None,
    query_logp: Tensor | None = None,
    causal_logp: Tensor | None = None,
    kappa_weights: Tensor | None = None,
    beta: float = 0.0,
    kappa: float = 0.0,
    epsilon_low: float = 0.2,
    epsilon_high: float = 0.2,
    delta: float | None = None,
    importance_sampling_level: str = "token",
    importance_sampling_ratio: Tensor | None = None,
    policy_weights: Tensor | None = None,
    loss_type: str = "grpo",
    max_completion_length: int | None = None,
    num_items_in_batch: float | Tensor | None = None,
    proj_floor: float = 1e-6,
    kl_clip: float | None = None,
    bias_correction_kl: bool = False,
    sapo_temperature_pos: float = 1.0,
    sapo_temperature_neg: float = 1.05,
    vespo_k_pos: float = 2.0,
    vespo_lambda_pos: float = 3.0,
    vespo_k_neg: float = 3.0,
    vespo_lambda_neg: float = 2.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Eq. 10. Tokens that are masked are dropped at once: what follows is about the N that are left."""
    keep = mask != 0
    batch, row = mask.shape[0], keep.nonzero()[:, 0]  # (N,): the sequence that each token is in
    count = keep.sum(dim=1)  # (B,)
    dtype = _wide(logp)

    def tokens(x: Tensor) -> Tensor:
        """(B, T), or (B, 1) or (B,) for one value per sequence, as (N,); (B, T, L) as (N, L)."""
        x = x.to(dtype)
        return x[keep] if x.shape[:2] == mask.shape else x.flatten()[row]

    def per_sequence(x: Tensor) -> Tensor:
        """Sums over the tokens of each sequence, (B,)."""
        return x.new_zeros(batch).index_add(0, row, x)

    logp = tokens(logp)
    old = logp.detach() if old_logp is None else tokens(old_logp.detach())
    log_ratio = token_log_ratio = logp - old
    if importance_sampling_level == "sequence":
        log_ratio = (per_sequence(log_ratio) / count.clamp(min=1))[row]
    # Convention: a ratio that no number of this type can hold is a very large one. Infinity would turn the clipped
    # side's slope of 0, an advantage of 0 and a correction of 0 into NaN.
    ratio = log_ratio.clamp(max=0.9 * math.log(torch.finfo(dtype).max)).exp()
    low, high = 1.0 - epsilon_low, 1.0 + epsilon_high
    advantage = tokens(advantages.detach())
    sampler = torch.ones_like(logp) if importance_sampling_ratio is None else tokens(importance_sampling_ratio.detach())

    zero = torch.zeros_like(logp)
    names = ("kl", "kl_causal", "proj_clamped", "clip_low", "clip_high")
    shares = dict.fromkeys((*names, "kl_clipped", "kl_causal_clipped") if kl_clip is not None else names, zero)
    if loss_type == "cispo":
        loss = -ratio.detach().clamp(max=epsilon_high) * advantage * logp * sampler
        shares["clip_high"] = (ratio > epsilon_high) & (advantage > 0)
    elif loss_type == "sapo":
        tau = torch.where(advantage > 0, zero + sapo_temperature_pos, zero + sapo_temperature_neg)
        loss = -4.0 / tau * torch.sigmoid(tau * (ratio - 1.0)) * advantage * sampler
    elif loss_type == "vespo":
        log_w = per_sequence(token_log_ratio.detach().clamp(-20.0, 20.0))
        # Convention: a correction per sequence is the sequence's, and counts once.
        log_sampler = sampler.log().clamp(math.log(1e-8), 20.0)
        once = importance_sampling_ratio is not None and importance_sampling_ratio.shape != mask.shape
        log_w = log_w + per_sequence(log_sampler) / (count.clamp(min=1) if once else 1)
        log_w = log_w.clamp(math.log(1e-8), 20.0)[row]
        k = torch.where(advantage >= 0, zero + vespo_k_pos, zero + vespo_k_neg)
        rate = torch.where(advantage >= 0, zero + vespo_lambda_pos, zero + vespo_lambda_neg).clamp(min=1e-4)
        phi = (rate + k * log_w - rate * log_w.exp()).exp()
        # Convention: what no number of this type can hold is 0 here, as in TRL.
        loss = -torch.where(phi.isinf(), 0.0, phi).detach() * advantage * logp
    else:
        capped = ratio if delta is None else ratio.clamp(max=delta)
        loss = -torch.minimum(capped * advantage, ratio.clamp(low, high) * advantage) * sampler
        shares["clip_low"], shares["clip_high"] = (capped < low) & (advantage < 0), (capped > high) & (advantage > 0)
    if policy_weights is not None:
        loss = loss * tokens(policy_weights.detach())

    def clipped(name: str, d: Tensor) -> Tensor:
        if kl_clip is None:
            return d
        shares[f"{name}_clipped"] = d.abs() > kl_clip
        return d.clamp(-kl_clip, kl_clip)

    if ref_logp is not None:
        d = clipped("kl", tokens(ref_logp.detach()) - logp)
        term = k3_times(d, log_ratio) if bias_correction_kl else k3(d)
        shares["kl"] = term
        loss = loss + beta * term if beta else loss
    share = torch.ones_like(logp) if kappa_weights is None else tokens(kappa_weights.detach())
    there = share != 0
    if context_logp is not None:
        query = old if query_logp is None else tokens(query_logp.detach())
        weights = None if context_weights is None else context_weights.detach().to(dtype)
        weights = weights[row] if weights is not None and weights.dim() == 2 else weights
        project = projection if kl_clip is None else projection_floored_at_query
        log_p, shares["proj_clamped"] = project(query, tokens(context_logp.detach()), weights, proj_floor)
        d = log_p - (logp if causal_logp is None else tokens(causal_logp))
        # Convention: where its weight is 0 the term does not exist, whatever the scores are.
        term = k3(clipped("kl_causal", torch.where(there, d, 0.0)))
        shares["kl_causal"] = term
        loss = loss + kappa * share * term if kappa else loss

    if loss_type in ("grpo", "sapo"):
        total = (per_sequence(loss) / count.clamp(min=1)).sum() / max(batch, 1)
    elif loss_type == "dr_grpo":
        assert max_completion_length is not None
        total = loss.sum() / (max(batch, 1) * max_completion_length)
    elif loss_type == "luspo":
        total = loss.sum() / max(batch, 1)
    elif loss_type in ("dapo", "cispo", "vespo") and num_items_in_batch is not None:
        total = loss.sum() / max(float(num_items_in_batch), 1.0)
    else:
        total = loss.sum() / max(len(row), 1)
    means = {}
    for name, x in shares.items():
        x = x.detach().to(dtype)
        x = x[there] if name in ("kl_causal", "proj_clamped", "kl_causal_clipped") else x
        means[name] = (x.sum() / max(len(x), 1)).float()
    return total, means


# ---------------------------------------------------------------------------------------------------------------------
# Log-probabilities
# ---------------------------------------------------------------------------------------------------------------------


def head_logits(
    u: Tensor, *, temperature: float = 1.0, logit_scale: float = 1.0, logit_softcap: float | None = None
) -> Tensor:
    """softcap(logit_scale * u) / temperature, softcap(x) = c tanh(x / c)."""
    u = logit_scale * u
    return (u if logit_softcap is None else logit_softcap * torch.tanh(u / logit_softcap)) / temperature


def selective_logprob(
    logits: Tensor,  # (..., V)
    token_ids: Tensor,  # (...)
    *,
    temperature: float = 1.0,
    return_entropy: bool = False,
) -> Any:
    """log_softmax(logits / temperature) at token_ids, and its entropy where that is asked for."""
    logprobs = torch.log_softmax(logits.to(_wide(logits)) / temperature, dim=-1)
    logp = logprobs.gather(-1, token_ids[..., None])[..., 0]
    # Convention: 0 log 0 = 0, and its derivative is 0.
    terms = logprobs.exp() * logprobs.masked_fill(logprobs == -math.inf, 0.0)
    return (logp, -terms.sum(dim=-1)) if return_entropy else logp


def linear_logprob(
    hidden: Tensor,  # (..., H)
    weight: Tensor,  # (V, H)
    token_ids: Tensor,  # (...)
    *,
    bias: Tensor | None = None,
    return_entropy: bool = False,
    **head: Any,
) -> Any:
    """`selective_logprob` of the logits that an output layer makes of hidden states; `head` is for `head_logits`."""
    dtype = _wide(hidden, weight)
    u = hidden.to(dtype) @ weight.to(dtype).T
    u = u if bias is None else u + bias.to(dtype)
    return selective_logprob(head_logits(u, **head), token_ids, return_entropy=return_entropy)


def linear_gcpo_loss(
    hidden: Tensor,  # (B, T, H) or (B * T, H)
    weight: Tensor,  # (V, H)
    token_ids: Tensor,  # (B, T) or (B * T,)
    advantages: Tensor,
    mask: Tensor,  # (B, T)
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    return_scores: bool = False,
    **others: Any,
) -> Any:
    """`gcpo_loss` of the `linear_logprob` of the tokens that are not masked, with their mean entropy."""
    keep = mask != 0
    kept = hidden.reshape(*mask.shape, weight.shape[1])[keep]
    head = {"temperature": temperature, "logit_scale": logit_scale, "logit_softcap": logit_softcap}
    ids = token_ids.reshape(mask.shape)[keep]
    logp, entropy = linear_logprob(kept, weight, ids, bias=bias, return_entropy=True, **head)
    whole = logp.new_zeros(mask.shape).masked_scatter(keep, logp)
    loss, metrics = gcpo_loss(whole, advantages, mask, **others)
    metrics["entropy"] = (entropy.detach().sum() / max(len(kept), 1)).float()
    scores = (whole.detach(), torch.zeros_like(whole).masked_scatter(keep, entropy.detach()))
    return (loss, metrics, scores) if return_scores else (loss, metrics)


# ---------------------------------------------------------------------------------------------------------------------
# Advantages and causal weights (eqs. 8, 11)
# ---------------------------------------------------------------------------------------------------------------------


def group_advantages(rewards: Tensor, group_size: int, *, scale: str = "group", eps: float = 1e-4) -> Tensor:
    """
    (B,) from (B,): (r - mean) / (std + eps) in each group, with the unbiased std.

    Conventions: NaN rewards are not there, and get 0; so does a group of equal rewards, one of a single reward too.
    """
    rewards = rewards.to(_wide(rewards))
    out = torch.zeros_like(rewards)
    every = rewards[~rewards.isnan()]
    for start in range(0, len(rewards), group_size):
        group = rewards[start : start + group_size]
        there = group[~group.isnan()]
        if len(there.unique()) < 2:
            continue
        std = {"group": there, "batch": every}[scale].std() if scale != "none" else None
        centred = there - there.mean()
        out[start : start + group_size][~group.isnan()] = centred if std is None else centred / (std + eps)
    return out


def leave_one_out_mean(z: Tensor) -> Tensor:
    """(P, n, H) from (P, n, H): the mean of z_k over k != i."""
    z = z.to(_wide(z))
    n = z.shape[1]
    means = [z[:, [k for k in range(n) if k != i]].mean(dim=1) for i in range(n)]
    # Convention: what is not a number shows in its whole group, at its own place too, which the mean does not read.
    return torch.where(z.isnan().any(dim=1, keepdim=True), torch.nan, torch.stack(means, dim=1)) if n else z


def causal_weights(
    z: Tensor,  # (P, n, H)
    context_z: Tensor,  # (P, n, L, m, H)
    *,
    alpha: float = 2.0,
    baseline: str = "mean",
    similarity: str = "cosine",
    context_mask: Tensor | None = None,  # (P, n, L, m)
) -> Tensor:
    """Upsilon of eq. 11, (P, n): alpha * s(z_i, Zbar_i - Zprime_i + zbar)."""
    dtype = _wide(z, context_z)
    z, context_z = z.to(dtype), context_z.to(dtype)
    zbar = leave_one_out_mean(z) if baseline == "loo" else z.mean(dim=1, keepdim=True)
    if context_mask is None:
        difference = context_z[:, :, 0].mean(dim=2) - context_z.mean(dim=(2, 3))
    else:
        # Convention: means are over samples that exist, and over contexts that hold one; without any under context 0
        # the difference is 0.
        difference = torch.zeros_like(z)
        for p in range(z.shape[0]):
            for i in range(z.shape[1]):
                held = [x[there != 0] for x, there in zip(context_z[p, i], context_mask[p, i], strict=True)]
                if len(held[0]):
                    means = torch.stack([x.mean(dim=0) for x in held if len(x)])
                    difference[p, i] = means[0] - means.mean(dim=0)
    target = difference + zbar
    # Convention: the denominator is at least 1e-8, so that a vector of zeros gives 0.
    norms = torch.linalg.vector_norm(z, dim=-1) * torch.linalg.vector_norm(target, dim=-1)
    cosine = (z * target).sum(dim=-1) / norms.clamp(min=1e-8)
    if similarity == "cosine":
        return alpha * cosine
    # Of unit vectors; rounding may take a cosine past 1. Convention: at a distance of 0 the root has derivative 0.
    distance2 = (2.0 - 2.0 * cosine).clamp(min=0.0)
    if similarity == "gaussian":
        return alpha * torch.exp(-distance2 / 2.0)
    apart = distance2 != 0
    return alpha / (1.0 + torch.where(apart, distance2, 1.0).sqrt() * apart)


def causal_weights_from_hidden(hidden: Tensor, last_index: Tensor, context_z: Tensor, **options: Any) -> Tensor:
    """`causal_weights` of row `last_index[i]` (P * n,) of each sequence's hidden states (P * n, T, H)."""
    rows = torch.stack([x[at] for x, at in zip(hidden, last_index, strict=True)]) if len(hidden) else hidden[:, 0]
    return causal_weights(rows.view(*context_z.shape[:2], hidden.shape[-1]), context_z, **options)
