"""The KL terms that GCPO adds to TRL's loss or changes in it: kappa * k3 (eq. 12), and `kl_clip` of both."""

import math
import warnings
from typing import Any

import torch
from torch import nn

from gcpo.causal.loss import causal_kl_loss, clip_log_ratio, mean_pull
from gcpo.causal.port import KLTerms
from gcpo.run.meter import AccountedGRPOTrainer

_LEFT_OUT = {
    "clip": "`kl_clip` of the reference KL. Take `self.clipped_reference(inputs, per_token_logps)` for the reference's "
    "log-probabilities.",
    "causal": "the second KL term, although the step drew colliders and scored contexts for it. Add "
    "`self.causal_kl_loss(model, inputs, per_token_logps)` to the loss it returns, or set `kappa=0`.",
}


class KLTermsTrainer(AccountedGRPOTrainer):
    """TRL's GRPOTrainer, whose loss has a second KL term wherever a rollout's rows hold what that needs."""

    _loss_inputs: dict[str, Any] | None = None  # of TRL's loss, from its call to its forward
    _policy_logps: torch.Tensor | None = None  # of that forward
    _held: frozenset[str] = frozenset()  # of `_LEFT_OUT`: what the loss being computed does hold
    _warned_of: frozenset[str] = frozenset()

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        self._held = frozenset()
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        wanted = set()
        if self.args.kl_clip is not None and "ref_per_token_logps" in inputs:
            wanted.add("clip")
        if "context_logps" in inputs:
            wanted.add("causal")
        for term in sorted(wanted - self._held - self._warned_of):
            self._warned_of |= {term}
            warnings.warn(f"{type(self).__name__}._compute_loss leaves out {_LEFT_OUT[term]}", stacklevel=2)
        return loss

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
        # A copy: `_keep_for_loss` replaces an entry between TRL's forward and its loss.
        self._loss_inputs = inputs = dict(inputs)
        try:
            loss = super()._compute_loss(model, inputs)
            if "context_logps" not in inputs:
                return loss
            assert self._policy_logps is not None
            return loss + self.causal_kl_loss(model, inputs, self._policy_logps)
        finally:
            self._loss_inputs = self._policy_logps = None

    def _keep_for_loss(self, result: tuple) -> tuple:
        """The policy's log-probabilities, where this forward is the one that a loss is being computed from."""
        if self._loss_inputs is not None:
            inputs, self._loss_inputs = self._loss_inputs, None
            self._policy_logps = result[0]
            if "ref_per_token_logps" in inputs:
                inputs["ref_per_token_logps"] = self.clipped_reference(inputs, result[0])
        return result

    def clipped_reference(self, inputs: dict[str, Any], per_token_logps: torch.Tensor) -> torch.Tensor:
        """
        The reference's log-probabilities (B, T), held within `kl_clip` of the policy's. Where they are further away the
        difference of the two is a constant, so that the gradient of a KL term between them is 0.

        `_compute_loss` takes them. A subclass with a reference KL of its own takes them too, with `causal_kl_loss`.

        Args:
            inputs: what `_compute_loss` gets, with `ref_per_token_logps`.
            per_token_logps: (B, T) log-probabilities of the completions under q, with their gradient.
        """
        self._held |= {"clip"}
        clip, reference = self.args.kl_clip, inputs["ref_per_token_logps"]
        if clip is None:
            return reference
        reference, clipped = clip_log_ratio(reference, per_token_logps, clip)
        if self.model.training:
            mask = self._loss_mask(inputs) != 0
            sums = torch.stack([(clipped & mask).sum(), mask.sum()]).float()
            self._metrics["train"]["reference_sums"].append(self.accelerator.reduce(sums, reduction="sum").tolist())
        return reference

    def _loss_mask(self, inputs: dict[str, Any]) -> torch.Tensor:
        """(B, T): the tokens that count, as TRL has them."""
        mask = inputs["completion_mask"]
        return mask * inputs["tool_mask"] if "tool_mask" in inputs else mask

    def causal_kl_loss(self, model: nn.Module, inputs: dict[str, Any], per_token_logps: torch.Tensor) -> torch.Tensor:
        """
        The second KL term of a micro-batch (eq. 12): kappa * k3 towards the causal reference, reduced and scaled for
        gradient accumulation as TRL's own loss is, to be added to it.

        `_compute_loss` adds it. A subclass whose `_compute_loss` does not call ours adds it itself, where
        `"context_logps" in inputs`: evaluation has no such term, nor has a run with `kappa=0`.

        Args:
            model: the model being trained, as `_compute_loss` gets it.
            inputs: what `_compute_loss` gets.
            per_token_logps: (B, T) log-probabilities of the completions under q, with their gradient.

        Returns:
            A scalar with gradient.
        """
        self._held |= {"causal"}
        causal_logp = self._logps_under_contexts(model, inputs)
        items, scale = self._reduction(inputs)
        terms = KLTerms(
            context_logp=inputs["context_logps"],
            context_weights=inputs["context_weights"],
            counted=inputs["has_collider"],
            scale=inputs["causal_scale"],
            query_logp=inputs.get("query_logps"),
        )
        loss, metrics = causal_kl_loss(
            terms,
            self.args,
            per_token_logps,
            self._loss_mask(inputs),
            causal_logp=causal_logp,
            loss_type=self.loss_type,
            max_completion_length=self.max_completion_length,
            num_items_in_batch=items,
        )
        # Sums over the tokens of all processes, for `log` to divide: a micro-batch may hold no row that was scored.
        count = metrics["tokens"]
        means = [metrics["kl_causal"], metrics["proj_clamped"]]
        means.append(metrics["kl_causal_clipped"] if self.args.kl_clip is not None else torch.zeros_like(count))
        sums = torch.stack([*(mean * count for mean in means), count])
        sums = torch.cat([sums, self._pull_sums(terms, inputs, per_token_logps)])
        found = self.accelerator.reduce(sums, reduction="sum").tolist()
        for name, part in (("causal_sums", found[:4]), ("pull_sums", found[4:])):
            self._metrics["train"][name].append(part)
        return loss * scale

    @torch.no_grad()
    def _pull_sums(self, terms: KLTerms, inputs: dict[str, Any], per_token_logps: torch.Tensor) -> torch.Tensor:
        """
        Of this micro-batch's rows with an advantage A and a pull d (`mean_pull`), (6,) float32: how many there are, and
        the sums of d, A, d^2, A^2 and d A.
        """
        if "plain_advantages" not in inputs:  # a rollout that another version's checkpoint held
            return per_token_logps.new_zeros(6, dtype=torch.float32)
        policy_logp = self._generating_logps(inputs, per_token_logps)
        pull = mean_pull(terms, self.args, policy_logp, self._loss_mask(inputs))
        advantages = inputs["plain_advantages"].to(pull.dtype)
        if advantages.dim() > 1:  # of tokens: a sequence's is their mean, as its pull is
            tokens = self._loss_mask(inputs) != 0
            advantages = torch.where(tokens, advantages, 0.0).sum(dim=1) / tokens.sum(dim=1)
        kept = pull.isfinite() & advantages.isfinite()
        d, a = pull[kept], advantages[kept]
        return torch.stack([kept.sum().to(d.dtype), *(x.sum() for x in (d, a, d * d, a * a, d * a))])

    def _generating_logps(self, inputs: dict[str, Any], per_token_logps: torch.Tensor) -> torch.Tensor:
        """log pi_old(y | q) of a micro-batch, (B, T), whatever the second KL term pulls to."""
        # Without scores of its own the rollout serves one update alone, at which the policy is what generated.
        known = [inputs.get("old_per_token_logps"), per_token_logps]
        if self.args.kl_target == "projection":  # of another target they are not the policy's
            known.insert(0, inputs.get("query_logps"))
        return next(logp for logp in known if logp is not None)

    def _logps_under_contexts(self, model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor | None:
        """log pi_theta under x_i with a gradient of its own, where the second KL has the paper's form."""
        if "context_ids" not in inputs:
            return None
        completion = inputs["completion_ids"], inputs["completion_mask"]
        return self._get_per_token_logps_and_entropies(
            model,
            torch.cat([inputs["context_ids"], completion[0]], dim=1),
            torch.cat([inputs["context_mask"], completion[1]], dim=1),
            completion[0].size(1),
        )[0]

    def _reduction(self, inputs: dict[str, Any]) -> tuple[torch.Tensor | None, torch.Tensor | float]:
        """TRL's reduction of a micro-batch, as (`num_items_in_batch`, a factor of the loss) for `gcpo_loss`."""
        accumulation = self.current_gradient_accumulation_steps if self.model.training else 1
        if self.loss_type not in ("dapo", "cispo", "vespo"):
            return None, 1.0 / accumulation
        # The count spans the generation batch: bring it to one accumulation window of one process.
        items = inputs["num_items_in_batch"].clamp(min=1.0) / self.accelerator.num_processes
        items = items * accumulation / self.args.steps_per_generation if self.model.training else items
        # `gcpo_loss` divides by 1 at least, TRL also by less: where there are fewer tokens than windows or processes.
        return items.clamp(min=1.0), items.clamp(min=1.0) / items

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.model.training:
            kl_causal, proj_clamped, causal_clipped = self._means_of_sums("causal_sums", 3)
            (clipped,) = self._means_of_sums("reference_sums", 1)
            self._log("kl_causal", kl_causal)
            self._log("proj_clamped", proj_clamped)
            self._log("kl_causal_correlation", _correlation(self._metrics["train"].pop("pull_sums", [])))
            if self.args.kl_clip is not None:
                self._log("kl_causal_clipped", causal_clipped)
                self._log("kl_clipped", clipped)
        super().log(logs, start_time)

    def _means_of_sums(self, name: str, width: int) -> list[float]:
        """Means over all tokens since the last log, from sums whose last column counts tokens; NaN without any."""
        rows = torch.tensor(self._metrics["train"].pop(name, []), dtype=torch.float64).view(-1, width + 1)
        *sums, count = rows[~rows.isnan().any(dim=1)].sum(dim=0).tolist()
        return [value / count if count else math.nan for value in sums]

    def _log(self, name: str, value: torch.Tensor | float, mode: str = "train") -> None:
        """Log a metric of GCPO's own. NaN is the mean of no values: such a metric is left out."""
        value = float(value)
        if self.keeps_account and not math.isnan(value):
            self._metrics[mode].setdefault(f"gcpo/{name}", []).append(value)


def _correlation(rows: list[list[float]]) -> float:
    """
    Pearson's, of two quantities from sums of how many, of each, of their squares and of their product; NaN for fewer
    than two, and where one does not vary beyond the rounding of its sums.
    """
    parts = torch.tensor(rows, dtype=torch.float64).view(-1, 6)
    count, x, y, xx, yy, xy = parts.sum(dim=0).tolist()
    if count < 2:
        return math.nan
    spreads = [square / count - (total / count) ** 2 for total, square in ((x, xx), (y, yy))]
    if any(spread <= 1e-6 * square / count for spread, square in zip(spreads, (xx, yy), strict=True)):
        return math.nan
    found = (xy / count - x * y / count**2) / math.sqrt(spreads[0] * spreads[1])
    return min(max(found, -1.0), 1.0)  # beyond by rounding alone
