"""
The third table of `bench.fidelity`: what the second KL term says by the colliders it is made from, their length, which
of them is c_0, and what the term pulls to.

Of each prompt there are two independent draws of L sampled colliders, and one that is decoded greedily. Shorter ones
are their first tokens, as a lower limit would have left them. The pull on a token is d = log p' - log pi(y | q);
on-policy, the gradient of k3 in log pi is 1 - exp(d), the token's weight.
"""

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from bench.agreement import SMALL, mean_and_error
from bench.fidelity_runs import Lab, Sample
from gcpo.causal.options import COLLIDER_CHOICES, KL_TARGETS
from gcpo.causal.port import Ids
from gcpo.evaluation.tasks import reasoning_gym_reward
from gcpo_kernels import causal_reference_logprob

LENGTHS = (3, 8, 16, 32, 64)
FLOOR = 1e-6  # of p', the default
_COLD = 1e-4  # a temperature at which what is sampled is greedy
# Contexts as a run's defaults read them, but all of them, and of all candidates.
OPTIONS: dict[str, Any] = {"estimator": "none", "context_attention": "parallel", "candidate_context_tokens": 64}


@dataclass
class Scores:
    """Of one prompt's candidates under the contexts of its colliders, which were cut to one length."""

    query_logp: torch.Tensor  # (n, T)
    mask: torch.Tensor  # (n, T) bool
    greedy: torch.Tensor | None  # (n, T): log pi(y | x) with the greedy collider; None where it says nothing
    draws: list[torch.Tensor]  # of each draw (n, T, colliders that say something)
    rewards: list[list[float]]  # of each draw's colliders that say something
    tokens: float  # mean length of the sampled colliders

    def context_logp(self, draw: int, choice: str, chance: random.Random) -> torch.Tensor | None:
        """(n, T, L) under the contexts x_{i,l} of a draw, that of c_0 first. None where no collider says anything."""
        sampled = self.draws[draw]
        if choice == "greedy" and self.greedy is not None:
            return torch.cat([self.greedy.unsqueeze(-1), sampled[..., : max(sampled.shape[-1] - 1, 0)]], dim=-1)
        if not sampled.shape[-1]:
            return None
        if choice == "reward":
            rewards = self.rewards[draw]
            first = chance.choice([l for l, reward in enumerate(rewards) if reward == max(rewards)])
            others = [l for l in range(len(rewards)) if l != first]
            return sampled[..., [first, *others]]
        return sampled


def pull(query_logp: torch.Tensor, context_logp: torch.Tensor, target: str) -> tuple[torch.Tensor, torch.Tensor]:
    """
    d = log p' - log pi(y | q) of each token, and whether p' was clamped, (n, T), for one of `KL_TARGETS`.

    Args:
        query_logp: (n, T) float32.
        context_logp: (n, T, L) float32, that of x_{i,0} first.
    """
    if target == "projection":
        log_p = causal_reference_logprob(query_logp, context_logp, proj_floor=FLOOR)
    else:  # where the one context is the target, and the query too, p' = a - a + a
        mean = torch.logsumexp(context_logp, dim=-1) - math.log(context_logp.shape[-1])
        own = context_logp[..., 0] if target == "context" else mean
        log_p = causal_reference_logprob(own, own.unsqueeze(-1), proj_floor=FLOOR)
    clamped = (log_p <= math.log(FLOOR) + 1e-6) | (log_p >= 0.0)
    return log_p - query_logp, clamped


def behaviour(scores: Sequence[Scores], choice: str, target: str) -> dict[str, Any]:
    """
    How the pull behaves, over prompts and their two draws.

    Returns:
        "squared_weight": mean over tokens of (1 - p'/pi)^2; "largest_share": what the largest token has of a draw's sum
        of these, the median over draws; "sign_tokens": how often the pull on a token has one sign in both draws, of
        tokens where it is at least `SMALL` in both, mean over prompts, and "sign_tokens_error", its standard error;
        "sign_sequences": the same of the pull's mean over a completion's tokens, of all completions; "clamped": share
        of tokens. NaN where there is nothing to count.
    """
    squares: list[torch.Tensor] = []
    clamped: list[torch.Tensor] = []
    signs: list[float] = []
    sequences: list[torch.Tensor] = []
    for number, one in enumerate(scores):
        pulls = []
        for draw in range(len(one.draws)):
            contexts = one.context_logp(draw, choice, random.Random(1009 * number + draw))
            if contexts is None:
                continue
            d, cut = pull(one.query_logp, contexts, target)
            pulls.append(d)
            squares.append(torch.expm1(d[one.mask].double()).square())
            clamped.append(cut[one.mask].double())
        if len(pulls) < 2:
            continue
        first, second = (d[one.mask] for d in pulls)
        large = (first.abs() >= SMALL) & (second.abs() >= SMALL)
        signs.append(float((first.sign() == second.sign())[large].double().mean()))  # NaN of none
        of_rows = [torch.where(one.mask, d, 0.0).sum(dim=1) for d in pulls]
        sequences.append((of_rows[0].sign() == of_rows[1].sign()).double())
    sign, error = mean_and_error(signs)
    shares = [float(values.max() / values.sum()) for values in squares if values.sum() > 0]
    return {
        "squared_weight": _mean(squares),
        "largest_share": float(torch.tensor(shares).quantile(0.5)) if shares else math.nan,
        "sign_tokens": sign,
        "sign_tokens_error": error,
        "sign_sequences": _mean(sequences),
        "clamped": _mean(clamped),
    }


def _mean(parts: list[torch.Tensor]) -> float:
    return float(torch.cat(parts).mean()) if parts else math.nan


def tabulate(by_length: dict[int, list[Scores]]) -> list[dict[str, Any]]:
    """A row for each length, choice of c_0 and target."""
    rows = []
    for length, scores in by_length.items():
        tokens = sum(one.tokens for one in scores) / len(scores)
        for target in KL_TARGETS:
            for choice in COLLIDER_CHOICES:
                row = {"length": length, "choice": choice, "target": target, "collider_tokens": tokens}
                rows.append(row | behaviour(scores, choice, target))
    return rows


def rewarded_apart(scores: Sequence[Scores]) -> float:
    """Share of draws in which some collider has a higher reward than another: elsewhere "reward" chooses by chance."""
    draws = [rewards for one in scores for rewards in one.rewards if rewards]
    return sum(max(rewards) > min(rewards) for rewards in draws) / max(len(draws), 1)


@torch.no_grad()
def score_lengths(lab: Lab, number: int, sample: Sample, lengths: Sequence[int]) -> dict[int, Scores]:
    """One prompt's candidates under its colliders, of which each length keeps the first tokens."""
    trainer = lab.trainer(**OPTIONS, num_colliders=2 * len(sample.group.colliders) + 1)
    policy, builder, group = trainer._policy, trainer._causal.builder, sample.group
    query_logp, _ = policy.score(
        sample.rollout.prompt_ids, sample.rollout.completion_ids, sample.mask.shape[1], "scored_query"
    )
    fusion = lab.trainer()._causal.builder.fusion(group.prompt, group.candidates)  # as the other colliders were made
    limit = trainer.args.collider_max_completion_length
    (greedy,) = policy.generate([fusion], lab.seed + number, limit=limit, temperature=_COLD)
    drawn = [group.colliders, sample.other_group.colliders]
    found = {}
    for length in lengths:
        colliders = [ids[:length] for ids in (greedy, *drawn[0], *drawn[1])]
        says = [k for k, ids in enumerate(colliders) if builder.content(ids)]
        kept = [colliders[k] for k in says]
        logp = query_logp.new_zeros(*query_logp.shape, len(colliders))
        if kept:
            shown = replace(group, colliders=kept, has_content=[True] * len(kept))
            terms = trainer._causal.terms(sample.rollout, sample.mask.shape[1], groups=[shown])
            assert terms.kl is not None
            logp[..., says] = terms.kl.context_logp
        half = len(drawn[0])
        parts = [[k for k in says if start <= k < start + half] for start in (1, 1 + half)]
        found[length] = Scores(
            query_logp,
            sample.mask,
            logp[..., 0] if 0 in says else None,
            [logp[..., part] for part in parts],
            [_rewards(lab, number, [colliders[k] for k in part]) for part in parts],
            sum(map(len, colliders[1:])) / (2 * half),
        )
    return found


def _rewards(lab: Lab, number: int, colliders: list[Ids]) -> list[float]:
    """By the task's own verifier."""
    texts: list[Any] = lab.tokenizer.batch_decode(colliders, skip_special_tokens=True)
    row, count = lab.prompts[number], len(colliders)
    return reasoning_gym_reward(texts, [row["task"]] * count, [row["entry"]] * count)


def measure(lab: Lab, lengths: Sequence[int]) -> Iterator[tuple[list[Sample], dict[str, Any]]]:
    """The rollouts and the table so far, after each prompt."""
    samples: list[Sample] = []
    by_length: dict[int, list[Scores]] = {length: [] for length in lengths}
    for number in range(len(lab.prompts)):
        samples.append(lab.roll_out(number))
        for length, scores in score_lengths(lab, number, samples[-1], lengths).items():
            by_length[length].append(scores)
        apart = {str(length): rewarded_apart(scores) for length, scores in by_length.items()}
        yield samples, {"colliders": tabulate(by_length), "rewarded_apart": apart}


def label(row: dict[str, Any]) -> str:
    """A row's name in the tables: the projection is what is meant where no target is named."""
    target = "" if row["target"] == "projection" else f", `{row['target']}`"
    return f"{row['length']} tokens, `{row['choice']}`{target}"


# Headings of the table, the field of each, and how it is shown.
COLUMNS = {
    "squared weight": ("squared_weight", ",.2f"),
    "largest token": ("largest_share", ".0%"),
    "sign, tokens": ("sign_tokens", ".2f"),
    "±": ("sign_tokens_error", ".2f"),
    "sign, completions": ("sign_sequences", ".2f"),
    "clamped": ("clamped", ".1%"),
    "tokens": ("collider_tokens", ".1f"),
}


def show(results: dict[str, Any]) -> str:
    """The table as Markdown, of the results or of what was read back from their JSON."""
    lines = ["| colliders, c_0 | " + " | ".join(COLUMNS) + " |", "|" + "---|" * (len(COLUMNS) + 1)]
    for row in results["colliders"]:
        values = [(row[field], form) for field, form in COLUMNS.values()]
        cells = ["-" if value is None or math.isnan(value) else f"{value:{form}}" for value, form in values]
        lines.append(f"| {label(row)} | " + " | ".join(cells) + " |")
    apart = ", ".join(f"{share:.0%} at {length}" for length, share in results["rewarded_apart"].items())
    lines += ["", f"Draws in which the rewards of colliders differ, by their tokens: {apart}."]
    return "\n".join(lines)
