"""The studies: which runs each compares, with what, and what its table shows beside the score."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class Arm:
    """
    One way to train.

    Attributes:
        name: what the table calls it.
        method: `"gcpo"` or `"grpo"`.
        options: options of the trainer that differ from the workbench's.
        pulls_to_query: whether the second KL term pulls to pi_old under q, in place of what `kl_target` says.
        scaled_by: for GRPO: the arm whose mean Upsilon, step by step and of the same seed, multiplies its advantages.
        open_ended: scored by a programmable reward instead of the task's verifier.
        against: the arm, by name, that a difference is paired with.
        as_long_as: for GRPO: it draws as many more candidates as make its step as long as that arm's, which the
            workbench finds out (`Workbench.resolved`).
        num_seeds: most of a study's seeds that it runs with, the first ones. None: all of them.
    """

    name: str
    method: str = "gcpo"
    options: Mapping[str, Any] = field(default_factory=dict)
    pulls_to_query: bool = False
    scaled_by: "Arm | None" = None
    open_ended: bool = False
    against: str | None = None
    as_long_as: "Arm | None" = None
    num_seeds: int | None = None

    def settings(self) -> dict[str, Any]:
        """What decides how its runs come out: two arms that agree in it share them."""
        scaled_by = None if self.scaled_by is None else self.scaled_by.settings()
        return {
            "method": self.method,
            "options": dict(self.options),
            "pulls_to_query": self.pulls_to_query,
            "scaled_by": scaled_by,
            "open_ended": self.open_ended,
        }

    def seeds_of(self, seeds: tuple[int, ...]) -> tuple[int, ...]:
        """Those of a study's seeds that it runs with."""
        return seeds[: self.num_seeds]


@dataclass(frozen=True)
class Study:
    """
    A comparison.

    Attributes:
        question: what it answers, in a line.
        arms: in the order of the table. An arm comes after the one that it is scaled by.
        score: `"pass_at_1"` or `"mean_score"`.
        columns: metrics of the runs to show (see `gcpo.study.workbench.summarize`), with their headings.
        asks_of_colliders: whether it says first if colliders are better than candidates.
    """

    question: str
    arms: tuple[Arm, ...]
    score: str = "pass_at_1"
    columns: Mapping[str, str] = field(default_factory=dict)
    asks_of_colliders: bool = False

    def only(self, names: Sequence[str] | None) -> "Study":
        """
        The study with some of its arms, and those that they are paired with. None: itself.

        Raises:
            ValueError: it has no arm of that name.
        """
        if names is None:
            return self
        known = {arm.name: arm for arm in self.arms}
        names = [re.sub(r" \(n = \d+\)$", "", name) for name in names]  # as the table has those that are resolved
        for name in names:
            if name not in known:
                raise ValueError(f"`--arms` must be of {', '.join(map(repr, known))}, got {name!r}.")
        wanted = {*names, *(known[name].against for name in names)}
        return replace(self, arms=tuple(arm for arm in self.arms if arm.name in wanted))


GRPO = Arm("GRPO", method="grpo")
GCPO = Arm("GCPO", against="GRPO")
NO_KL: dict[str, Any] = {"kappa": 0.0}
WEIGHT_COLUMNS = {"upsilon_mean": "mean Upsilon", "upsilon_std": "std Upsilon"}


def _scaled(arm: Arm, name: str, **changes: Any) -> Arm:
    return Arm(name, method="grpo", scaled_by=arm, against="GRPO", **changes)


def _values(option: str, symbol: str, values: tuple[float, ...]) -> tuple[Arm, ...]:
    return tuple(Arm(f"{symbol} = {value:g}", options={option: value}, against="GRPO") for value in values)


def _pairs(option: str, symbol: str, values: tuple[Any, ...]) -> tuple[Arm, ...]:
    """GRPO and GCPO at each value of an option of both."""
    arms = []
    for value in values:
        options = {option: value}
        arms.append(Arm(f"GRPO, {symbol} = {value:g}", method="grpo", options=options))
        arms.append(Arm(f"GCPO, {symbol} = {value:g}", options=options, against=arms[-1].name))
    return tuple(arms)


def _cut_off_arms() -> tuple[Arm, ...]:
    arms = [GRPO, GCPO, Arm("GCPO, mean", options={"representation": "mean"}, against="GRPO")]
    short = {"max_completion_length": 5}
    arms.append(Arm("GRPO, cut off at 5", method="grpo", options=short))
    for name in ("last", "mean"):
        options = {"representation": name, **short}
        arms.append(Arm(f"GCPO, {name}, cut off at 5", options=options, against="GRPO, cut off at 5"))
    return tuple(arms)


# Contexts and colliders as texts, and every candidate scored under every context, as in the paper: without the savings.
TEXTS: dict[str, Any] = {
    "context_attention": "full",
    "collider_attention": "full",
    "num_kl_contexts": None,
    "kl_fraction": 1.0,
}
# The same with a second KL that is felt: at kappa = 0.06 its gradients are a ten thousandth of the advantages' on the
# bed `integrating`. It needs a bound then. A single context is further from the policy than the projection ever is.
FELT: dict[str, Any] = {**TEXTS, "kappa": 1.0, "kl_clip": 1.0}
FELT_5: dict[str, Any] = {**FELT, "kappa": 5.0}
FELT_PROJECTION: dict[str, Any] = {**FELT, "kappa": 50.0}
PARALLEL: dict[str, Any] = {"context_attention": "parallel", "collider_attention": "parallel"}


def _trial_arms() -> tuple[Arm, ...]:
    def gcpo(name: str, num_seeds: int | None = 4, **options: Any) -> Arm:
        return Arm(name, options=options, against="GRPO", num_seeds=num_seeds)

    best: dict[str, Any] = {"kl_target": "context", "collider_choice": "reward"}
    faster: dict[str, Any] = {"learning_rate": 4e-4}
    return (
        GRPO,
        Arm("GRPO, as many seconds", method="grpo", as_long_as=GCPO, against="GRPO"),
        GCPO,
        gcpo("on texts", None, **TEXTS),
        gcpo("scored, L = n, on texts", estimator="scored", num_colliders=8, **TEXTS),
        gcpo("no weights", estimator="none"),
        gcpo("no second KL, colliders on texts", **NO_KL),
        Arm("GRPO x mean Upsilon", method="grpo", scaled_by=GCPO, against="GRPO", num_seeds=4),
        gcpo("weights of mean 1", weight_scale="unit"),
        gcpo("c_0 greedy", collider_choice="greedy"),
        gcpo("c_0 by reward", collider_choice="reward"),
        gcpo("colliders on texts", collider_attention="full"),
        gcpo("kl_clip = 1", kl_clip=1.0),
        gcpo("felt", **FELT_PROJECTION),
        gcpo("felt, c_0 greedy", collider_choice="greedy", **FELT_PROJECTION),
        gcpo("felt, c_0 by reward", collider_choice="reward", **FELT_PROJECTION),
        gcpo("felt, to the ensemble", None, kl_target="ensemble", **FELT),
        gcpo("felt, to one context", kl_target="context", **FELT),
        gcpo("felt, to one parallel context", kl_target="context", **{**FELT, **PARALLEL}),
        gcpo("felt, to the best c_0's context", **best, **FELT),
        gcpo("felt 5 times, best c_0's context, mean 1", weight_scale="unit", **best, **FELT_5),
        Arm("GRPO, twice the learning rate", method="grpo", options=faster, num_seeds=4),
        Arm(
            "on texts, twice the learning rate",
            options={**TEXTS, **faster},
            against="GRPO, twice the learning rate",
            num_seeds=4,
        ),
    )


def _transfer_arms() -> tuple[Arm, ...]:
    grpo, gcpo = Arm("GRPO", method="grpo", open_ended=True), Arm("GCPO", against="GRPO", open_ended=True)
    return grpo, gcpo, _scaled(gcpo, "GRPO x mean Upsilon", open_ended=True)


STUDIES: dict[str, Study] = {
    "trial": Study(
        "Where could GCPO beat GRPO, and does it?",
        _trial_arms(),
        asks_of_colliders=True,
        columns={
            "upsilon_reward_correlation": "Upsilon and reward",
            "push_reward_correlation": "second KL and reward",
            "push_size": "second KL beside advantages",
            "collider_gain": "colliders - candidates",
            "proj_clamped": "clamped",
            "upsilon_mean": "mean Upsilon",
            "step_seconds": "s/step",
        },
    ),
    "ablation": Study(
        "What do the two parts add, beyond a larger step?",
        (
            GRPO,
            GCPO,
            Arm("GCPO, no weights", options={"estimator": "none"}, against="GRPO"),
            Arm("GCPO, no second KL", options=NO_KL, against="GRPO"),
            _scaled(GCPO, "GRPO x mean Upsilon"),
        ),
        columns={**WEIGHT_COLUMNS, "kl_causal": "causal KL", "step_seconds": "s/step"},
    ),
    "alpha": Study(
        "How does the scale of the weights matter?",
        (GRPO, *_values("alpha", "alpha", (0.5, 1.0, 2.0, 3.0))),
        columns={**WEIGHT_COLUMNS, "grad_norm": "gradient norm"},
    ),
    "kappa": Study(
        "How does the weight of the second KL term matter?",
        (GRPO, *_values("kappa", "kappa", (0.0, 0.02, 0.04, 0.06, 0.08))),
        columns={"kl_causal": "causal KL", "proj_clamped": "clamped", "grad_norm": "gradient norm"},
    ),
    "group-size": Study(
        "How many candidates per prompt, at one number of completions per step?",
        _pairs("num_generations", "n", (2, 4, 8, 16)),
        columns={**WEIGHT_COLUMNS, "zero_variance": "equal rewards", "step_seconds": "s/step"},
    ),
    "similarity": Study(
        "Which similarity?",
        (GRPO, GCPO, *(Arm(n, options={"similarity": n}, against="GRPO") for n in ("euclidean", "gaussian"))),
        columns=WEIGHT_COLUMNS,
    ),
    "representation": Study(
        "Last token or mean over tokens, where completions end and where they are cut off?",
        _cut_off_arms(),
        columns={
            "ended_mean": "Upsilon, ended",
            "truncated_mean": "Upsilon, cut off",
            "clipped_ratio": "cut off",
            **WEIGHT_COLUMNS,
        },
    ),
    "sampling": Study(
        "Does it matter how candidates are sampled? The causal graph takes them as independent given the query.",
        (
            *_pairs("temperature", "T", (0.7, 1.0, 1.3)),
            Arm("GRPO, top-p = 0.9", method="grpo", options={"top_p": 0.9}),
            Arm("GCPO, top-p = 0.9", options={"top_p": 0.9}, against="GRPO, top-p = 0.9"),
        ),
        columns={"distinct": "distinct candidates", "norm_ratio": "norm ratio", **WEIGHT_COLUMNS},
    ),
    "baseline": Study(
        "What should the second KL term pull to?",
        (
            GRPO,
            GCPO,
            Arm("query only", pulls_to_query=True, against="GRPO"),
            Arm("one context", options={"kl_target": "context"}, against="GRPO"),
            Arm("ensemble mean", options={"kl_target": "ensemble"}, against="GRPO"),
            Arm("no second KL", options=NO_KL, against="GRPO"),
        ),
        columns={"kl_causal": "second KL", "proj_clamped": "clamped", "upsilon_mean": "mean Upsilon"},
    ),
    "transfer": Study(
        "A task without one right answer, scored by a program",
        _transfer_arms(),
        score="mean_score",
        columns={**WEIGHT_COLUMNS, "distinct": "distinct candidates", "kl_causal": "causal KL"},
    ),
}
# The last one measures estimators on one rollout and trains nothing: gcpo/study/budget.py.
NAMES = (*STUDIES, "samples")
