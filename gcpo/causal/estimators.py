"""The causal weights Upsilon of a group, from the representations z of its completions (eq. 11)."""

import torch

from gcpo.causal.options import CausalOptions
from gcpo.causal.port import WeightInputs
from gcpo_kernels import causal_weights
from gcpo_kernels.group import context_difference


def estimate_weights(options: CausalOptions, inputs: WeightInputs) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """
    Upsilon (P, n), with 1 where it is undefined, and metrics about it. `upsilon/unit_...` are those of the weights over
    their mean; the others, but for the share that is undefined, are of eq. 11. Both are there with each `weight_scale`.

    "loo" reads Zbar_i as the mean of what context x_{i,0} shows, the other candidates and c_0, and Zprime_i as the
    same with the collider averaged out: their difference is (z_{c_0} - mean_l z_{c_l}) / n. "scored" takes y_i's own
    representation under each context, "sampled" those of fresh outputs.
    """
    z, collider_z, context_z = inputs.z, inputs.collider_z, inputs.context_z
    p, n, hidden = z.shape
    if options.estimator == "loo":
        assert collider_z is not None
        samples = (collider_z / n)[:, None, :, None, :].expand(p, n, -1, 1, hidden)
    else:
        assert context_z is not None
        samples = context_z
    mask = inputs.collider_mask[:, None, :, None].expand(samples.shape[:4])
    upsilon = causal_weights(
        z,
        samples,
        alpha=options.alpha,
        baseline=options.group_baseline,
        similarity=options.similarity,
        context_mask=mask,
    )
    defined = torch.isfinite(upsilon)
    unit = _unit(upsilon, defined, options.alpha)
    weights = upsilon if options.weight_scale == "alpha" else unit
    zbar = z.mean(dim=1, keepdim=True)
    difference = context_difference(samples, mask)
    cosine = torch.cosine_similarity(difference, zbar.expand_as(difference), dim=-1)
    ratio = difference.norm(dim=-1) / zbar.norm(dim=-1).clamp(min=1e-12)
    metrics = {
        "upsilon/fallback": (~torch.isfinite(weights)).float().mean(),
        "upsilon/near_zero": (upsilon[defined].abs() < 0.1).float().mean(),
        "upsilon/mean": upsilon[defined].mean(),
        **_spread("upsilon/", upsilon),
        **_spread("upsilon/unit_", unit),
        "projection/cosine": cosine.nanmean(),
        "projection/norm_ratio": ratio.nanmean(),
    }
    return torch.where(torch.isfinite(weights), weights, 1.0), metrics


# Of the mean similarity: divided by less, weights are noise, and by a negative one they turn advantages round.
_LEAST_MEAN = 1e-3


def _unit(upsilon: torch.Tensor, defined: torch.Tensor, alpha: float) -> torch.Tensor:
    """Upsilon over its mean, so that the mean is 1 and alpha has no say; NaN everywhere without a mean to speak of."""
    mean = upsilon[defined].mean()
    if alpha == 0 or not mean / alpha > _LEAST_MEAN:
        return torch.full_like(upsilon, torch.nan)
    return upsilon / mean


def _spread(prefix: str, values: torch.Tensor) -> dict[str, torch.Tensor]:
    """Standard deviation, smallest and largest of those that are defined, if any are."""
    finite = values[values.isfinite()]
    if not len(finite):
        return {}
    found = {"std": finite.std(unbiased=False), "min": finite.min(), "max": finite.max()}
    return {prefix + name: value for name, value in found.items()}
