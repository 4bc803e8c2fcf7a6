"""How far two estimates of the same quantity agree: correlations, differences, signs and order."""

import math

import pandas as pd
import torch

from gcpo_kernels import maths

# Where |log p' - log p| of the truth is less, its sign is not compared.
SMALL = 0.01


def pearson(x: torch.Tensor, y: torch.Tensor) -> float:
    """Correlation of two tensors of any one shape; NaN where either is constant."""
    x, y = x.double().flatten(), y.double().flatten()
    spread = [float((v - v.mean()).norm()) for v in (x, y)]
    scale = [float(v.norm()) for v in (x, y)]
    if any(s <= 1e-9 * size or s == 0 for s, size in zip(spread, scale, strict=True)):
        return math.nan
    return float((x - x.mean()) @ (y - y.mean())) / (spread[0] * spread[1])


def spearman(x: torch.Tensor, y: torch.Tensor) -> float:
    """Correlation of ranks, ties sharing theirs."""
    ranks = [torch.tensor(pd.Series(v.flatten().tolist()).rank().to_numpy()) for v in (x, y)]
    return pearson(*ranks)


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """Mean of the values that are defined, and its standard error."""
    kept = torch.tensor([value for value in values if not math.isnan(value)], dtype=torch.float64)
    if not len(kept):
        return math.nan, math.nan
    return float(kept.mean()), float(kept.std() / len(kept) ** 0.5) if len(kept) > 1 else math.nan


def compare_upsilon(
    ours: torch.Tensor, truth: torch.Tensor, advantages: torch.Tensor, bases: tuple[torch.Tensor, torch.Tensor]
) -> dict[str, float]:
    """
    Agreement of two Upsilon (P, n), given A (P, n): over all candidates, and within groups, where alone it changes
    which candidate is pushed more.

    Args:
        bases: what each is without a projection, Zbar = Zprime. "pearson_projection" is that of what is left when it is
            taken away: all estimates share z, and most of any correlation is that.

    Returns:
        "order_b" is the share of a group's pairs, of different A * Upsilon by the truth, that both put in one order.
    """
    centred = [x - x.mean(dim=1, keepdim=True) for x in (ours, truth)]
    ranks, ranks_error = mean_and_error([spearman(x, y) for x, y in zip(ours, truth, strict=True)])
    b, true_b = advantages * ours, advantages * truth
    order, true_order = ((x[:, :, None] - x[:, None, :]).sign() for x in (b, true_b))
    return {
        "pearson": pearson(ours, truth),
        "spearman": spearman(ours, truth),
        "pearson_within": pearson(centred[0], centred[1]),
        "spearman_within": ranks,
        "spearman_within_error": ranks_error,
        "mad": float((ours - truth).abs().mean()),
        "mad_within": float((centred[0] - centred[1]).abs().mean()),
        "pearson_projection": pearson(ours - bases[0], truth - bases[1]),
        "sign_b": float((b.sign() == true_b.sign())[advantages != 0].double().mean()),
        "order_b": float((order == true_order)[true_order != 0].double().mean()),
        "mean": float(ours.mean()),
        "std_within": float(centred[0].square().mean().sqrt()),
        "std_projection": float((ours - bases[0]).std()),
    }


def compare_log_p(
    ours: torch.Tensor, truth: torch.Tensor, query_logp: torch.Tensor, clamped: torch.Tensor
) -> dict[str, float]:
    """
    Agreement of two log p' (tokens,) of the same tokens, and of what the second KL term makes of them on-policy: with
    d = log p' - log p, its gradient is 1 - exp(d), and d's sign is where the term pushes the token's probability.
    "sign_d" counts tokens whose true |d| is at least `SMALL`, "sign_d_weighted" all, by the size of their gradient.
    """
    d, true_d = ours - query_logp, truth - query_logp
    agree = (d.sign() == true_d.sign()).double()
    large, weight = true_d.abs() >= SMALL, torch.expm1(true_d).abs().clamp(max=1.0).double()
    size = maths.k3(d)
    return {
        "pearson": pearson(ours, truth),
        "mad": float((ours - truth).abs().mean()),
        "pearson_d": pearson(d, true_d),
        "spearman_d": spearman(d, true_d),
        "sign_d": float(agree[large].mean()),
        "sign_d_weighted": float((agree * weight).sum() / weight.sum()),
        "large": float(large.double().mean()),
        "clamped": float(clamped.double().mean()),
        "k3_mean": float(size.mean()),
        "k3_median": float(size.median()),
        "k3_mean_unclamped": float(size[~clamped].mean()),
    }
