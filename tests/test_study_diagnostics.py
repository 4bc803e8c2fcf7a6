"""What a study's runs log of their weights and of their second KL term, against plain arithmetic."""

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gcpo.causal import CausalTerms, Rollout
from gcpo.commands.study import StudyScale
from gcpo.run.records import Run, read_run
from gcpo.study.definitions import Arm
from gcpo.study.diagnostics import diagnosed, push_of, within_group_sums
from gcpo.study.trainers import QueryGCPOTrainer, StudyGCPOTrainer
from gcpo.study.workbench import Workbench, summarize

SMALL = StudyScale(
    steps=2,
    seeds=(0,),
    prompts_per_step=3,
    num_generations=4,
    num_held_out=4,
    num_samples=1,
    num_train=24,
    completion_tokens=6,
    warm_target=0.0,
    # For the second rollout to be of another policy than the first.
    learning_rate=1e-2,
)


def share_of_vowels(completions: list[Any], **_: Any) -> list[float]:
    """A reward that completions of any model differ in."""
    texts = [text if isinstance(text, str) else text[0]["content"] for text in completions]
    return [sum(letter in "aeiou" for letter in text) / max(len(text), 1) for text in texts]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Workbench:
    bench = Workbench(SMALL, tmp_path_factory.mktemp("studies"))
    bench.bed.reward = share_of_vowels
    return bench


# ---------------------------------------------------------------------------------------------------------------------
# Sums and what is made of them
# ---------------------------------------------------------------------------------------------------------------------


def run_of(*steps: dict[str, float]) -> Run:
    return Run("run", log=[{"step": k, **step} for k, step in enumerate(steps, 1)])


def test_sums_within_groups() -> None:
    """Groups in any order: one as it should be, one of equal rewards, one of equal Upsilon, one row without reward."""
    rows = [
        # group, Upsilon, reward
        (0, 1.0, 0.0),
        (1, 5.0, 1.0),
        (2, 0.1, 0.0),
        (0, 2.0, 1.0),
        (2, 0.1, 3.0),
        (1, 9.0, 1.0),
        (0, 6.0, 2.0),
        (0, 70.0, math.nan),
        (2, 0.1, 0.0),
    ]
    groups, x, rewards = (torch.tensor(column) for column in zip(*rows, strict=True))
    # Group 0: (-2, -1, 3) and (-1, 0, 1). Group 2: zeros and (-1, 2, -1).
    assert within_group_sums(x, rewards, groups) == pytest.approx((5.0, 14.0, 2.0 + 6.0))
    nothing = within_group_sums(x, torch.ones(9), groups)
    assert nothing == (0.0, 0.0, 0.0)


def test_correlations_are_pooled_over_steps() -> None:
    names = [f"study/upsilon_reward_{part}" for part in ("xy", "xx", "yy")]
    steps = [dict(zip(names, sums, strict=True)) for sums in ((5.0, 14.0, 8.0), (0.0, 0.0, 0.0), (-3.0, 2.0, 1.0))]
    assert diagnosed(run_of(*steps)) == {"upsilon_reward_correlation": pytest.approx(2.0 / math.sqrt(16.0 * 9.0))}
    # A step that logs nothing counts as nothing, and so does a whole run.
    assert diagnosed(run_of(*steps, {"reward": 1.0})) == diagnosed(run_of(*steps))
    assert diagnosed(run_of({"reward": 1.0})) == diagnosed(run_of(steps[1])) == {}
    assert diagnosed(run_of(dict(zip(names, (0.0, 0.0, 8.0), strict=True)))) == {}
    beyond = diagnosed(run_of(dict(zip(names, (1.0 + 1e-15, 1.0, 1.0), strict=True))))
    assert beyond == {"upsilon_reward_correlation": 1.0}


def test_equal_values_that_differ_by_roundings() -> None:
    x = torch.tensor([0.1, 0.1, 0.1 + 1e-8, 0.1])
    rewards = torch.tensor([0.0, 1.0, 1.0, 0.0])
    assert within_group_sums(x, rewards, torch.zeros(4)) == pytest.approx((0.0, 0.0, 1.0), abs=0)


def test_ratios_of_sums_and_gains() -> None:
    steps = [
        {"study/push_sum": 1.0, "study/advantage_sum": 10.0, "gcpo/colliders/reward": 0.5, "reward": 0.2},
        {"study/push_sum": 5.0, "study/advantage_sum": 20.0, "reward": 0.9},
        {"gcpo/colliders/reward": 0.5, "reward": 0.6},
    ]
    assert diagnosed(run_of(*steps)) == pytest.approx({"push_size": 0.2, "collider_gain": 0.1})
    assert diagnosed(run_of({"study/push_sum": 1.0, "study/advantage_sum": 0.0})) == {}


def test_the_push_is_the_slope_of_the_term() -> None:
    d = torch.tensor([[-2.0, -0.4, 0.0, 0.4, 2.0]])
    assert push_of(d, None)[0].tolist() == pytest.approx([math.exp(x) - 1 for x in d[0].tolist()])
    assert push_of(d, 0.5)[0].tolist() == pytest.approx(
        [0.0, math.exp(-0.4) - 1, 0.0, math.exp(0.4) - 1, 0.0], rel=1e-6
    )
    assert push_of(torch.tensor([[200.0]]), None).isfinite().all()


# ---------------------------------------------------------------------------------------------------------------------
# Runs
# ---------------------------------------------------------------------------------------------------------------------


class Watched(StudyGCPOTrainer):
    """Keeps what the metrics are recomputed from, and none of what the class under test adds."""

    def __init__(self, *args: Any, **kwargs: Any):
        self.rollouts: list[dict[str, Any]] = []
        self.losses: list[dict[str, Any]] = []
        super().__init__(*args, **kwargs)

    def causal_terms(self, rollout: Rollout, *args: Any) -> CausalTerms:
        terms = super().causal_terms(rollout, *args)
        texts = self.processing_class.batch_decode(rollout.completion_ids, skip_special_tokens=True)
        lengths = [len(ids) for ids in rollout.completion_ids]
        self.rollouts.append({"rewards": share_of_vowels(texts), "upsilon": terms.upsilon, "lengths": lengths})
        return terms

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        width = inputs["completion_ids"].size(1)
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits[:, -width - 1 : -1]
        logp = logits.log_softmax(dim=-1).gather(2, inputs["completion_ids"].unsqueeze(2))[..., 0]
        texts = self.processing_class.batch_decode(inputs["completion_ids"], skip_special_tokens=True)
        self.losses.append({**inputs, "logp": logp, "rewards": share_of_vowels(texts)})
        return super()._compute_loss(model, inputs)


def correlation(batches: list[tuple[np.ndarray, np.ndarray, list[Any]]]) -> float:
    """Of x and rewards, each less its mean in its group of a batch, over groups of at least two rows."""
    left, right = [], []
    for x, rewards, groups in batches:
        for group in set(groups):
            rows = [k for k, other in enumerate(groups) if other == group]
            if len(rows) > 1 and np.ptp(rewards[rows]) > 0:
                left += list(x[rows] - x[rows].mean())
                right += list(rewards[rows] - rewards[rows].mean())
    assert len(left) > 8
    return float(np.dot(left, right) / np.sqrt(np.dot(left, left) * np.dot(right, right)))


def push(loss: dict[str, Any], args: Any) -> np.ndarray:
    """(B, T): p' / pi - 1 on tokens that count, of rows that do."""
    pi = loss["logp"].double().exp()
    contexts = loss["context_logps"].double().exp()
    target = contexts[..., 0] - (contexts * loss["context_weights"].unsqueeze(1)).sum(dim=-1) + pi
    floor = torch.full_like(pi, args.proj_floor)
    target = torch.maximum(target, floor if args.kl_clip is None else torch.minimum(floor, pi)).clamp(max=1.0)
    found = target / pi - 1
    if args.kl_clip is not None:
        found[(target / pi).log().abs() > args.kl_clip] = 0.0
    counts = loss["completion_mask"].bool() & loss["has_collider"].unsqueeze(1)
    return torch.where(counts, found, 0.0).numpy()


def shuffled(losses: list[dict[str, Any]]) -> bool:
    """Whether TRL moved rows, in which case prompts do not come one after the other."""
    for loss in losses:
        prompts = [tuple(row) for row in loss["prompt_ids"].tolist()]
        if sum(a != b for a, b in itertools.pairwise(prompts)) >= len(set(prompts)):
            return True
    return False


CASES: dict[str, dict[str, Any]] = {
    "fused": {"fused_loss": True},
    "TRL's": {"fused_loss": False, "padding_free": False},
    "clipped": {"fused_loss": True, "kl_clip": 0.02},
    "clipped, TRL's": {"fused_loss": False, "kl_clip": 0.02},
    "some rows": {"kl_fraction": 0.75},
    "micro-batches": {"per_device_train_batch_size": 6, "gradient_accumulation_steps": 2},
}


@pytest.mark.parametrize("case", CASES)
def test_a_run_logs_what_plain_code_finds(case: str, bench: Workbench, tmp_path: Path) -> None:
    options = {"log_collider_reward": True, "kl_fraction": 1.0, **CASES[case]}
    trainer = bench.trainer(Arm(case, options=options), 0, tmp_path, Watched)
    trainer.train()
    assert trainer.fuses_loss == options.get("fused_loss", True)
    found, log = summarize(tmp_path), read_run(tmp_path).log
    rollouts, losses, args = trainer.rollouts, trainer.losses, trainer.args
    assert len(rollouts) == len(log) == SMALL.steps
    assert len(losses) == SMALL.steps * args.gradient_accumulation_steps

    # Upsilon: the rows of a rollout, in its order.
    n = SMALL.num_generations
    numbers = [k // n for k in range(n * SMALL.prompts_per_step)]
    batches = [(each["upsilon"].double().numpy(), np.array(each["rewards"]), numbers) for each in rollouts]
    assert found["upsilon_reward_correlation"] == pytest.approx(correlation(batches), rel=1e-4, abs=1e-5)

    # The push: the rows of a micro-batch, which TRL has shuffled; a group is a prompt.
    assert shuffled(losses)
    batches, pushed = [], []
    for loss in losses:
        pushed.append(push(loss, args))
        kept = loss["has_collider"].numpy()
        means = pushed[-1].sum(axis=1) / loss["completion_mask"].sum(dim=1).numpy()
        prompts = [tuple(row) for row, k in zip(loss["prompt_ids"].tolist(), kept, strict=True) if k]
        batches.append((means[kept], np.array(loss["rewards"])[kept], prompts))
        same = [[a == b for b in loss["study_groups"].tolist()] for a in loss["study_groups"].tolist()]
        ids = loss["prompt_ids"].tolist()
        assert same == [[a == b for b in ids] for a in ids]
        assert loss["study_rewards"].tolist() == pytest.approx(loss["rewards"])
    assert all(all(loss["has_collider"]) for loss in losses) == (case != "some rows")
    assert found["push_reward_correlation"] == pytest.approx(correlation(batches), rel=1e-3, abs=1e-4)

    # Its size, beside that of B.
    scales = [float(loss["causal_scale"]) for loss in losses]
    above = sum(args.kappa * scale * np.abs(x).sum() for scale, x in zip(scales, pushed, strict=True))
    below = 0.0
    for each in rollouts:
        rewards = np.array(each["rewards"]).reshape(-1, n)
        advantages = (rewards - rewards.mean(axis=1, keepdims=True)) / (
            rewards.std(axis=1, ddof=1, keepdims=True) + 1e-4
        )
        below += np.abs(advantages.flatten() * each["upsilon"].numpy() * np.array(each["lengths"])).sum()
    assert found["push_size"] == pytest.approx(above / below, rel=1e-3)
    assert found["push_size"] > 0

    # What others log.
    gains = [row["gcpo/colliders/reward"] - row["reward"] for row in log]
    assert found["collider_gain"] == pytest.approx(sum(gains) / len(gains))
    assert found["collider_reward"] == pytest.approx(log[-1]["gcpo/colliders/reward"])
    assert found["unit_std"] == pytest.approx(log[-1]["gcpo/upsilon/unit_std"])
    assert found["kl_causal_correlation"] == pytest.approx(log[-1]["gcpo/kl_causal_correlation"])
    assert ("causal_clipped" in found) == (args.kl_clip is not None)
    if args.kl_clip is not None:
        assert 0.0 < found["causal_clipped"] < 1.0
    assert all(value is not None for row in log for name, value in row.items() if name.startswith("study/"))


@pytest.mark.parametrize(
    ("options", "there"),
    [({"kappa": 0.0}, {"upsilon_reward"}), ({"estimator": "none"}, {"push_reward"}), (None, {"upsilon_reward"})],
)
def test_what_an_arm_lacks_is_absent(
    options: dict[str, Any] | None, there: set[str], bench: Workbench, tmp_path: Path
) -> None:
    """None: the control that pulls to pi_old itself, whose push is rounding alone."""
    gcpo_class = QueryGCPOTrainer if options is None else StudyGCPOTrainer
    arm = Arm("arm", options={"max_steps": 1, "kl_fraction": 1.0, **(options or {})})
    bench.trainer(arm, 0, tmp_path, gcpo_class).train()
    found = summarize(tmp_path)
    assert {name for name in ("upsilon_reward", "push_reward") if f"{name}_correlation" in found} == there
    assert ("push_size" in found) == (options != {"kappa": 0.0})
    if options is None:
        assert found["push_size"] < 1e-6
