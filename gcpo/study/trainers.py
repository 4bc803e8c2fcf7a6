"""The controls that studies compare GCPO with: small changes to a rollout, between its making and the loss."""

import time
from collections.abc import Sequence
from typing import Any

import torch

from gcpo.causal import CausalTerms, Rollout
from gcpo.run.meter import AccountedGRPOTrainer
from gcpo.study.diagnostics import DiagnosedGCPOTrainer


class _Distinct:
    """Logs the share of a group's candidates that differ from one another."""

    def _generate(self, prompts: list[Any]) -> tuple:
        result = super()._generate(prompts)  # type: ignore[misc]
        if self.model.training:  # type: ignore[attr-defined]
            n, rows = self.num_generations, list(map(tuple, result[1]))  # type: ignore[attr-defined]
            shares = [len(set(rows[k : k + n])) / n for k in range(0, len(rows), n)]
            self._metrics["train"]["study/distinct"].append(sum(shares) / len(shares))  # type: ignore[attr-defined]
        return result


class ScaledGRPOTrainer(_Distinct, AccountedGRPOTrainer):
    """
    GRPO with its advantages multiplied by a number.

    Args:
        scales: the number of each optimizer step; the last one goes on. Empty: GRPO as it is.
    """

    def __init__(self, *args: Any, scales: Sequence[float] = (), **kwargs: Any):
        self.scales = list(scales)
        super().__init__(*args, **kwargs)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs)
        if self.scales and self.model.training:
            scale = self.scales[min(self.state.global_step, len(self.scales) - 1)]
            output["advantages"] = output["advantages"] * scale
            self._metrics["train"]["study/scale"].append(scale)
        return output


class StudyGCPOTrainer(_Distinct, DiagnosedGCPOTrainer):
    """GCPO as studies train it."""


class QueryGCPOTrainer(StudyGCPOTrainer):
    """GCPO whose second KL term pulls to pi_old under q: a control, which no option gives."""

    def causal_terms(self, *args: Any) -> CausalTerms:
        terms = super().causal_terms(*args)
        if terms.kl is not None:
            # exp(a) and the mean over l cancel when all weight is on l = 0: what is left of p' is its query term.
            terms.kl.context_weights = torch.zeros_like(terms.kl.context_weights)
            terms.kl.context_weights[:, 0] = 1.0
        return terms


class RepeatingTrainer(StudyGCPOTrainer):
    """
    GCPO that estimates the weights of each rollout several times, with colliders and samples of their own.

    Attributes:
        repeats: how many times.
        upsilon: (P * n,) of each time.
        seconds: what each took.
        candidates: token ids of the rollout's completions.
    """

    repeats = 1

    def causal_terms(
        self, rollout: Rollout, length: int, query_logp: torch.Tensor | None, z: torch.Tensor | None
    ) -> CausalTerms:
        assert self._causal is not None
        self.candidates = rollout.completion_ids
        self.upsilon: list[torch.Tensor] = []
        self.seconds: list[float] = []
        for repeat in range(self.repeats):
            seed = self._policy.step_seed + 1_000_003 * repeat  # the draws of the step that many steps later
            assert self._causal is not None
            rollout.drawing = None  # each time pays for its own colliders
            began = time.perf_counter()
            terms = self._causal.terms(rollout, length, query_logp, z, seed=seed)
            self.seconds.append(time.perf_counter() - began)
            assert terms.upsilon is not None
            self.upsilon.append(terms.upsilon)
        return terms
