"""
The method in plain Python: floats, lists and loops, written from the equations and from nothing else in the package.

Slow and unstable (it exponentiates what it is given), but short enough to be checked by eye against the paper.
"""

from itertools import pairwise
from math import exp, log, nan, sqrt, tanh
from typing import Any


def projected(
    a: float, bs: list[float], weights: list[float], c: float, floor: float, at_query: bool = False
) -> tuple[float, bool]:
    """log p' of eq. 13 and whether p' was clamped; `at_query`: from below at exp(c) where that is less than `floor`."""
    floor = min(floor, exp(c)) if at_query else floor
    p = exp(a) - sum(w * exp(b) for w, b in zip(weights, bs, strict=True) if w != 0) + exp(c)
    return log(min(max(p, floor), 1.0)), not floor <= p <= 1.0


def k3(d: float) -> float:
    return exp(d) - d - 1.0


def clip(x: float, low: float, high: float) -> float:
    return min(max(x, low), high)


def loss(arguments: dict[str, Any], options: dict[str, Any]) -> tuple[float, dict[str, float]]:
    """Eq. 10, token by token, from nested lists: every argument is (B, T), or (B, T, L), or None."""
    logp, mask = arguments["logp"], arguments["mask"]
    batch, tokens = len(logp), len(logp[0]) if logp else 0
    beta, kappa = options.get("beta", 0.0), options.get("kappa", 0.0)
    low, high = 1.0 - options.get("epsilon_low", 0.2), 1.0 + options.get("epsilon_high", 0.2)
    delta, kind = options.get("delta"), options.get("loss_type", "grpo")
    clips = kind in ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")

    def get(name: str, default: Any = None) -> Any:
        return default if arguments.get(name) is None else arguments[name]

    old = get("old_logp", logp)
    query, causal = get("query_logp", old), get("causal_logp", logp)
    sums = dict.fromkeys(("kl", "kl_causal", "proj_clamped", "clip_low", "clip_high"), 0.0)
    bound = options.get("kl_clip")
    if bound is not None:
        sums |= {"kl_clipped": 0.0, "kl_causal_clipped": 0.0}

    def clipped_k3(d: float, counted: str) -> float:
        if bound is None:
            return k3(d)
        sums[counted] += not -bound <= d <= bound
        return k3(clip(d, -bound, bound))

    per_sequence, counts, counted = [], [], 0
    for i in range(batch):
        real = [t for t in range(tokens) if mask[i][t]]
        counts.append(len(real))
        mean_log_ratio = sum(logp[i][t] - old[i][t] for t in real) / max(len(real), 1)
        total = 0.0
        log_w = sum(clip(logp[i][t] - old[i][t], -20.0, 20.0) for t in real)
        if get("importance_sampling_ratio") is not None:
            logs = [clip(log(arguments["importance_sampling_ratio"][i][t]), log(1e-8), 20.0) for t in real]
            log_w += sum(logs) / (max(len(logs), 1) if arguments.get("ratio_per_sequence") else 1)
        big_w = exp(clip(log_w, log(1e-8), 20.0))
        for t in real:
            by_sequence = options.get("importance_sampling_level", "token") == "sequence"
            ratio = exp(mean_log_ratio if by_sequence else logp[i][t] - old[i][t])
            capped = ratio if delta is None or not clips else min(ratio, delta)
            a = arguments["advantages"][i][t]
            w = 1.0 if get("importance_sampling_ratio") is None else arguments["importance_sampling_ratio"][i][t]
            if kind == "cispo":
                value = -min(ratio, options.get("epsilon_high", 0.2)) * a * logp[i][t] * w
            elif kind == "sapo":
                tau = options.get("sapo_temperature_pos", 1.0) if a > 0 else options.get("sapo_temperature_neg", 1.05)
                value = -4.0 / tau / (1.0 + exp(-tau * (ratio - 1.0))) * a * w
            elif kind == "vespo":
                sign = "pos" if a >= 0 else "neg"
                k, rate = options[f"vespo_k_{sign}"], max(options[f"vespo_lambda_{sign}"], 1e-4)
                value = -exp(rate) * big_w**k * exp(-rate * big_w) * a * logp[i][t]
            else:
                value = -min(capped * a, clip(ratio, low, high) * a) * w
            value *= 1.0 if get("policy_weights") is None else arguments["policy_weights"][i][t]
            if get("ref_logp") is not None:
                kl = clipped_k3(arguments["ref_logp"][i][t] - logp[i][t], "kl_clipped")
                kl *= ratio if options.get("bias_correction_kl") else 1.0
                sums["kl"] += kl
                value += beta * kl
            share = 1.0 if get("kappa_weights") is None else arguments["kappa_weights"][i][t]
            if get("context_logp") is not None and share != 0.0:
                counted += 1
                bs = arguments["context_logp"][i][t]
                weights = get("context_weights", [[1.0 / len(bs)] * len(bs)] * batch)[i]
                floor = options.get("proj_floor", 1e-6)
                log_p, clamped = projected(bs[0], bs, weights, query[i][t], floor, bound is not None)
                kl_causal = clipped_k3(log_p - causal[i][t], "kl_causal_clipped")
                sums["kl_causal"] += kl_causal
                sums["proj_clamped"] += clamped
                value += kappa * share * kl_causal
            sums["clip_low"] += clips and capped < low and a < 0
            sums["clip_high"] += clips and capped > high and a > 0
            sums["clip_high"] += kind == "cispo" and ratio > options.get("epsilon_high", 0.2) and a > 0
            total += value
        per_sequence.append(total)
    count = max(sum(counts), 1)
    items = options.get("num_items_in_batch")
    reduction = {"sapo": "grpo", "cispo": "dapo", "vespo": "dapo"}.get(kind, kind)
    reduced = {
        "luspo": sum(per_sequence) / max(batch, 1),
        "grpo": sum(s / max(n, 1) for s, n in zip(per_sequence, counts, strict=True)) / max(batch, 1),
        "bnpo": sum(per_sequence) / count,
        "dr_grpo": sum(per_sequence) / (max(batch, 1) * (options.get("max_completion_length") or 1)),
        "dapo": sum(per_sequence) / (count if items is None else max(items, 1)),
    }
    causal = ("kl_causal", "proj_clamped", "kl_causal_clipped")
    return reduced[reduction], {name: s / (max(counted, 1) if name in causal else count) for name, s in sums.items()}


def token_logprob(
    hidden: list[float],
    weight: list[list[float]],
    bias: list[float] | None,
    token: int,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
) -> tuple[float, float]:
    """Log-probability of one token, and the entropy of its distribution."""
    logits = []
    for v, row in enumerate(weight):
        u = logit_scale * (sum(h * w for h, w in zip(hidden, row, strict=True)) + (bias[v] if bias else 0.0))
        if logit_softcap is not None:
            u = logit_softcap * tanh(u / logit_softcap)
        logits.append(u / temperature)
    total = sum(exp(x) for x in logits)
    probabilities = [exp(x) / total for x in logits]
    return log(probabilities[token]), -sum(p * log(p) for p in probabilities if p > 0)


def advantages(rewards: list[float], group: int, scale: str, eps: float) -> list[float]:
    """Eq. 8, with the unbiased std."""

    def statistics(values: list[float]) -> tuple[float, float]:
        mean = sum(values) / len(values)
        return mean, sqrt(sum((r - mean) ** 2 for r in values) / (len(values) - 1))

    out = []
    for start in range(0, len(rewards), group):
        rows = rewards[start : start + group]
        mean, std = statistics(rows)
        if scale == "batch":
            std = statistics(rewards)[1]
        equal = all(x == y for x, y in pairwise(rows))
        out += [0.0 if equal else (r - mean) if scale == "none" else (r - mean) / (std + eps) for r in rows]
    return out


def upsilon(
    z: list[list[float]],  # (n, H): one prompt
    context_z: list[list[list[list[float]]]],  # (n, L, m, H)
    keep: list[list[list[bool]]],  # (n, L, m)
    alpha: float,
    baseline: str,
    similarity: str,
) -> list[float]:
    """Eq. 11 for one prompt."""
    n, width = len(z), len(z[0])
    out = []
    for i in range(n):
        means = []  # of each context that holds a sample
        for l, samples in enumerate(context_z[i]):
            held = [s for j, s in enumerate(samples) if keep[i][l][j]]
            means.append([sum(s[h] for s in held) / len(held) for h in range(width)] if held else None)
        filled = [m for m in means if m is not None]
        others = [k for k in range(n) if baseline == "mean" or k != i]
        target = []
        for h in range(width):
            difference = means[0][h] - sum(m[h] for m in filled) / len(filled) if means[0] is not None else 0.0
            target.append(difference + (sum(z[k][h] for k in others) / len(others) if others else nan))
        dot = sum(x * y for x, y in zip(z[i], target, strict=True))
        cosine = dot / max(sqrt(sum(x * x for x in z[i])) * sqrt(sum(x * x for x in target)), 1e-8)
        s = {
            "cosine": cosine,
            "euclidean": 1.0 / (1.0 + sqrt(max(2.0 - 2.0 * cosine, 0.0))),
            "gaussian": exp(-(2.0 - 2.0 * cosine) / 2.0),
        }
        out.append(alpha * s[similarity])
    return out
