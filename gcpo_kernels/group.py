"""
Advantages and causal weights (eqs. 8, 11) in plain torch, as the torch backend runs them: the maths of groups.

As in maths.py: differentiable, careful about rounding and overflow, checked by the public functions, and equal to
`gcpo_kernels.reference`. Shapes: P prompts, n candidates per prompt, L contexts, m samples, H hidden size.
"""

from typing import Any

import torch

from gcpo_kernels.maths import compute_dtype

COSINE_EPS = 1e-8


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
