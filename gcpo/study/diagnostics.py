"""
What explains how an arm comes out: whether its weights and its second KL term favour what is rewarded, and how large
that term is beside the advantages. Every step logs sums, which a run's log keeps; the numbers are made afterwards.
"""

import math
import statistics
from typing import Any

import torch

from gcpo import GCPOTrainer
from gcpo.causal import CausalTerms
from gcpo.causal.loss import token_pull
from gcpo.causal.port import KLTerms
from gcpo.run.records import Run, is_number

# Values that differ by less, of 1 or of the largest of them, are equal but for roundings.
_ROUNDING = 1e-5


class DiagnosedGCPOTrainer(GCPOTrainer):
    """
    GCPO that logs, of every step, under `study/`:

    - `upsilon_reward_xy`, `_xx`, `_yy`: `within_group_sums` of Upsilon and the reward;
    - `push_reward_xy`, `_xx`, `_yy`: those of a completion's mean push and its reward, over rows in the second KL;
    - `push_sum`, `advantage_sum`: sums over tokens of |kappa u push|, where u is the scale of the term, and of
      |B| = |A Upsilon|.

    The push of a token is p' / pi_old(y | q) - 1, minus the gradient of k3 in log pi at the first update after a
    rollout, and 0 where `kl_clip` clamps. With `causal_policy_context="context"` it still is that of pi_old(y | q).

    What is summed are the rows of this process: studies have but one.
    """

    # TRL logs means over what a step's micro-batches appended. Of sums these are the sums but for a factor, which the
    # sums of one name share: so all of them are appended, also those of nothing, and ratios of them stay right. A group
    # whose rows are in several micro-batches is centred in each.

    _rewards: torch.Tensor | None = None  # of the rollout that is going on

    def _calculate_rewards(self, *args: Any) -> torch.Tensor:
        per_function = super()._calculate_rewards(*args)
        if self.model.training:
            rewards = (per_function * self.reward_weights.to(per_function.device)).nansum(dim=1)
            self._rewards = torch.where(per_function.isnan().all(dim=1), torch.nan, rewards)
        return per_function

    def _take(self, terms: CausalTerms, output: dict[str, Any]) -> None:
        super()._take(terms, output)
        assert self._rewards is not None
        rewards, self._rewards = self._rewards, None
        groups = torch.arange(len(rewards), device=rewards.device) // self.num_generations
        if terms.upsilon is not None:
            self._append("upsilon_reward", within_group_sums(terms.upsilon, rewards, groups))
        # TRL shuffles the rows before their loss: what the loss is to know of them goes with them.
        output["study_rewards"], output["study_groups"] = rewards[terms.rows], groups[terms.rows]

    def _pull_sums(self, terms: KLTerms, inputs: dict[str, Any], per_token_logps: torch.Tensor) -> torch.Tensor:
        # Both ways to the loss come here, with the terms and the policy's log-probabilities.
        if "study_rewards" in inputs:  # a checkpoint of another version may hold a rollout without
            self._log_push(terms, inputs, self._generating_logps(inputs, per_token_logps))
        return super()._pull_sums(terms, inputs, per_token_logps)

    @torch.no_grad()
    def _log_push(self, terms: KLTerms, inputs: dict[str, Any], policy_logp: torch.Tensor) -> None:
        mask = self._loss_mask(inputs) != 0
        push = push_of(token_pull(terms, self.args, policy_logp, mask), self.args.kl_clip)
        mask = mask.cpu()
        kept = terms.counted.cpu() & mask.any(dim=1)
        rows = push[kept].sum(dim=1) / mask[kept].sum(dim=1)
        rewards, groups = inputs["study_rewards"].cpu()[kept], inputs["study_groups"].cpu()[kept]
        self._append("push_reward", within_group_sums(rows, rewards, groups))
        advantages = inputs["advantages"].cpu().double().view(len(mask), -1).expand(mask.shape)  # (B,) or (B, T)
        factor = self.args.kappa * float(terms.scale)
        size = {"push_sum": (factor * push).abs().sum(), "advantage_sum": advantages[mask].abs().sum()}
        self._append_all({name: float(value) for name, value in size.items()})

    def _append(self, name: str, sums: tuple[float, float, float]) -> None:
        self._append_all(dict(zip(_names(name), sums, strict=True)))

    def _append_all(self, values: dict[str, float]) -> None:
        """Log these, or none of them: one that is no finite number would make the others wrong."""
        if all(map(math.isfinite, values.values())):
            for name, value in values.items():
                self._metrics["train"][f"study/{name}"].append(value)


def push_of(pull: torch.Tensor, kl_clip: float | None) -> torch.Tensor:
    """
    The push exp(d) - 1 of tokens, on the CPU and in float64, where it does not overflow.

    Args:
        pull: (B, T) d = log p' - log pi, 0 for tokens that do not count.
        kl_clip: beyond it d has no gradient. None: everywhere it has.
    """
    pull = pull.cpu().double()
    return pull.expm1() if kl_clip is None else torch.where(pull.abs() > kl_clip, 0.0, pull.expm1())


def within_group_sums(x: torch.Tensor, rewards: torch.Tensor, groups: torch.Tensor) -> tuple[float, float, float]:
    """
    Sums of x r, x^2 and r^2 over the rows of groups whose rewards r vary, with x and r less their means in the group.

    Args:
        x, rewards: (B,). Rows where one of them is no finite number are left out.
        groups: (B,) the number of each row's group. They may be in any order.
    """
    x, rewards, groups = x.cpu().double(), rewards.cpu().double(), groups.cpu()
    kept = x.isfinite() & rewards.isfinite()
    xy = xx = yy = 0.0
    for group in groups[kept].unique():
        rows = kept & (groups == group)
        from_mean, reward_from_mean = _centred(x[rows]), _centred(rewards[rows])
        if not reward_from_mean.any():
            continue
        xy += float((from_mean * reward_from_mean).sum())
        xx += float(from_mean.square().sum())
        yy += float(reward_from_mean.square().sum())
    return xy, xx, yy


def diagnosed(run: Run) -> dict[str, float]:
    """
    What a run's log says, over all its steps, as far as it says it:

    - `upsilon_reward_correlation`, `push_reward_correlation`: of Upsilon, and of the second KL term's push, with the
      reward, within groups;
    - `push_size`: that push on all tokens, beside that of the advantages;
    - `collider_gain`: mean reward of colliders less that of candidates.
    """
    correlations = {f"{name}_correlation": pooled_correlation(run, name) for name in ("upsilon_reward", "push_reward")}
    found = {name: value for name, value in correlations.items() if value is not None}
    if advantages := math.fsum(run.values("study/advantage_sum")):
        found["push_size"] = math.fsum(run.values("study/push_sum")) / advantages
    both = ("gcpo/colliders/reward", "reward")
    if rows := [row for row in run.log if all(is_number(row.get(name)) for name in both)]:
        found["collider_gain"] = statistics.fmean(row[both[0]] - row[both[1]] for row in rows)
    return found


def pooled_correlation(run: Run, name: str) -> float | None:
    """
    The correlation within groups of all steps, from their `within_group_sums`; None where one of the two does not vary.
    """
    xy, xx, yy = (math.fsum(run.values(f"study/{part}")) for part in _names(name))
    if not (xx > 0 and yy > 0):
        return None
    return min(max(xy / (math.sqrt(xx) * math.sqrt(yy)), -1.0), 1.0)  # beyond by rounding alone


def _names(name: str) -> list[str]:
    return [f"{name}_{part}" for part in ("xy", "xx", "yy")]


def _centred(values: torch.Tensor) -> torch.Tensor:
    """Values less their mean, (n,); 0 where they differ by roundings alone."""
    if values.max() - values.min() <= _ROUNDING * values.abs().max().clamp(min=1.0):
        return torch.zeros_like(values)
    return values - values.mean()
