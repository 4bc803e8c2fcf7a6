"""`gcpo diagnose`: every signature in a log that has it and in runs made to fail, none in a healthy run."""

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_policy import SHORT_TEMPLATES, count_low, options, prompts, save_policy

from gcpo import GCPOConfig, GCPOTrainer
from gcpo.cli import main
from gcpo.reports.diagnose import CHECKS, Limits, answer_about_loss, diagnose, overhead
from gcpo.run.records import LOG, Run, append_line, read_run, read_runs

HEALTHY: dict[str, Any] = {
    "loss": 0.01,
    "grad_norm": 2.0,
    "reward": 0.6,
    "frac_reward_zero_std": 0.2,
    "completions/mean_length": 40.0,
    "completions/clipped_ratio": 0.1,
    "gcpo/upsilon/near_zero": 0.0,
    "gcpo/upsilon/fallback": 0.0,
    "gcpo/groups_without_reward": 0.0,
    "gcpo/projection/norm_ratio": 0.03,
    "gcpo/kl_causal": 0.03,
    "gcpo/kl_causal_correlation": 0.2,
    "gcpo/proj_clamped": 0.05,
    "gcpo/colliders/ended": 0.9,
    "gcpo/colliders/masked": 0.0,
    "step_time": 3.0,
    "gcpo/seconds/colliders": 0.5,
    "gcpo/seconds/contexts": 0.5,
    "gcpo/seconds/scoring": 0.4,
    "gcpo/tokens/scored_query": 100.0,
    "gcpo/tokens/scored_colliders": 100.0,
}
CONFIG = {"alpha": 2.0, "kappa": 0.06, "num_colliders": 4, "estimator": "loo"}


def synthetic(changes: dict[str, Any] | None = None, at: int | None = None, **config: Any) -> Run:
    """Twenty healthy steps, changed at one of them or at all."""
    log = [{"step": k + 1, **HEALTHY, **((changes or {}) if at in (None, k) else {})} for k in range(20)]
    return Run("run", {**CONFIG, **config}, log)


def names(run: Run, limits: Limits | None = None) -> list[str]:
    return [finding.name for finding in diagnose(run, limits or Limits())]


def test_a_healthy_log_has_no_signature() -> None:
    assert names(synthetic()) == []
    grpo = {key: value for key, value in HEALTHY.items() if not key.startswith("gcpo/")}
    assert names(Run("grpo", {}, [{"step": k, **grpo} for k in range(20)])) == []


@pytest.mark.parametrize(
    ("changes", "at", "config", "name", "number", "advice"),
    [
        ({"gcpo/upsilon/near_zero": 0.7}, None, {}, "Upsilon near 0", "70%", "representation"),
        (
            {"gcpo/groups_without_colliders": 0.75},
            None,
            {},
            "groups without colliders",
            "75% of the groups",
            "candidate_context_tokens",
        ),
        (
            {"gcpo/seconds/collider_rewards": 2.0, "step_time": 3.4},
            None,
            {},
            "overhead above plan",
            "a step takes 17.00 times",  # 3.4 s to the 0.2 s without colliders, their rewards, contexts and scores
            "collider_choice='greedy'",
        ),
        ({"gcpo/upsilon/near_zero": 1.0}, None, {"alpha": 0.05}, "Upsilon near 0", "100%", "`alpha` is 0.05"),
        (
            {"gcpo/projection/norm_ratio": 0.0},
            None,
            {"num_colliders": 1},
            "projection without signal",
            "0",
            "2 or more",
        ),
        ({"gcpo/projection/norm_ratio": 4e-4}, None, {}, "projection without signal", "0.0004", "collider_temperature"),
        ({"grad_norm": 90.0, "gcpo/kl_causal": 4.0}, 13, {}, "gradient-norm spikes", "45 times, at step 14", "`kappa`"),
        ({"grad_norm": 90.0, "gcpo/kl_causal": 4.0}, 13, {}, "gradient-norm spikes", "45 times", "set `kl_clip`"),
        ({"grad_norm": 90.0, "gcpo/kl_causal": 4.0}, 13, {"kl_clip": 4.5}, "gradient-norm spikes", "45", "(4.5 now)"),
        ({"gcpo/kl_causal_clipped": 0.6}, None, {"kl_clip": 0.1}, "clipped KL", "60%", "raise `kl_clip`"),
        ({"gcpo/kl_clipped": 0.6}, None, {"kl_clip": 0.1}, "clipped KL", "60%", "held to the reference"),
        ({"grad_norm": 90.0}, 13, {}, "gradient-norm spikes", "45 times", "`learning_rate`"),
        ({"grad_norm": 90.0, "gcpo/kl_causal": 4.0}, 13, {"kappa": 0.0}, "gradient-norm spikes", "45", "learning_rate"),
        ({"grad_norm": None}, 4, {}, "gradient-norm spikes", "not finite at step 5 (1 of 20", "`kappa`"),
        (
            {"gcpo/kl_causal_correlation": 0.0},
            None,
            {},
            "second KL without signal",
            "over 20 logs",
            "E[p'] = pi(y | q)",
        ),
        ({"gcpo/kl_causal_correlation": -0.3}, None, {}, "second KL without signal", "-0.300 ± 0.000", "or `kappa=0`"),
        ({"gcpo/proj_clamped": 0.45}, None, {}, "clamped p'", "45%", "`proj_floor`"),
        ({"frac_reward_zero_std": 0.95}, None, {}, "zero-variance groups", "95%", "num_generations"),
        ({"completions/clipped_ratio": 0.9}, None, {}, "completions cut off", "90%", "max_completion_length"),
        ({"gcpo/colliders/ended": 0.2}, None, {}, "colliders say little", "80%", "collider_max_completion_length"),
        ({"gcpo/colliders/masked": 0.8}, None, {}, "colliders say little", "80%", "fusion_prompt_template='answer'"),
        (
            {"gcpo/colliders/reward": 0.1, "reward": 0.5},
            None,
            {},
            "colliders worse than candidates",
            "-0.400 ± 0.000 beside the candidates' 0.500",
            "collider_attention='full'",
        ),
        ({"gcpo/seconds/colliders": 1.8}, None, {}, "overhead above plan", "times", "num_colliders"),
        ({"gcpo/seconds/contexts": 2.4, "step_time": 3.4}, None, {}, "overhead above plan", "plan 4", "kl_fraction"),
        ({"gcpo/upsilon/fallback": 0.5}, 2, {}, "undefined weights", "2.5%", "float16"),
        ({"gcpo/upsilon/fallback": 1.0}, 2, {"weight_scale": "unit"}, "undefined weights", "5.0%", "cannot divide"),
        ({"gcpo/groups_without_reward": 1.0}, 2, {}, "groups without reward", "5.0%", "reward function"),
    ],
)
def test_each_signature_in_a_log_that_has_it(
    changes: dict[str, Any], at: int | None, config: dict[str, Any], name: str, number: str, advice: str
) -> None:
    (finding,) = diagnose(synthetic(changes, at, **config))
    assert finding.name == name
    assert number in finding.number
    assert advice in finding.change


def with_correlations(values: list[float], **config: Any) -> Run:
    run = synthetic(**config)
    for row, value in zip(run.log, values, strict=False):
        row["gcpo/kl_causal_correlation"] = value
    for row in run.log[len(values) :]:
        del row["gcpo/kl_causal_correlation"]
    return run


def test_a_second_kl_has_a_signal_where_its_correlation_is_surely_above_0() -> None:
    """Of these twenty, 0.1 ± 0.5, the mean's 95% interval is Student's t with 19 degrees of freedom: ± 0.240."""
    noise = [0.6, -0.4] * 10
    (finding,) = diagnose(with_correlations(noise))
    assert finding.name == "second KL without signal" and "0.100 ± 0.240 over 20 logs" in finding.number
    assert names(with_correlations([0.15 + value for value in noise])) == []  # 0.250 ± 0.240
    assert names(with_correlations([0.13 + value for value in noise])) == ["second KL without signal"]
    assert names(with_correlations([-0.5] * 7)) == []  # too few to say
    assert names(with_correlations([-0.5] * 8)) == ["second KL without signal"]
    assert names(with_correlations(noise, kappa=0.0)) == []


@pytest.mark.parametrize(
    ("config", "said", "unsaid"),
    [
        ({}, ["`collider_choice='reward'` or `'greedy'`", "`kl_target='context'`", "`kappa=0`"], "works against"),
        ({"collider_choice": "sample", "kl_target": "projection"}, ["E[p'] = pi(y | q)"], "works against"),
        ({"collider_choice": "reward"}, ["`collider_choice='greedy'`", "works against"], "E[p']"),
        ({"kl_target": "context"}, ["`kl_target='context'`", "another `kl_target`", "`kappa=0`"], "E[p']"),
    ],
    ids=str,
)
def test_what_is_said_of_a_second_kl_without_signal(config: dict[str, Any], said: list[str], unsaid: str) -> None:
    run = with_correlations([0.01, -0.01] * 10, **config)
    (finding,) = diagnose(run)
    assert all(part in finding.change for part in said) and unsaid not in finding.change
    assert "c_0" not in finding.number
    for row in run.log:
        row["gcpo/colliders/first_above"] = 0.55
    (finding,) = diagnose(run)
    assert "c_0 has a higher reward than the other colliders' mean in 55% of the groups" in finding.number


def test_colliders_may_be_a_little_worse_or_worse_by_chance() -> None:
    assert names(synthetic({"reward": 0.5, "gcpo/colliders/reward": 0.4})) == []
    by_chance = synthetic({"reward": 0.5})
    for row in by_chance.log:
        row["gcpo/colliders/reward"] = 0.0 if row["step"] % 2 else 0.7  # 0.15 less, but for chance
    assert names(by_chance) == []
    (finding,) = diagnose(synthetic({"reward": 0.5, "gcpo/colliders/reward": 0.1}, collider_attention="full"))
    assert "collider_attention" not in finding.change


def test_length_collapse_is_a_matter_of_time() -> None:
    run = synthetic()
    for k, row in enumerate(run.log):
        row["completions/mean_length"] = 40.0 - 1.9 * k
    assert names(run) == ["length collapse"]
    run.log.reverse()  # lengths that grow
    for k, row in enumerate(run.log):
        row["step"] = k + 1
    assert names(run) == []


def test_every_check_can_fire() -> None:
    wrong = synthetic({"gcpo/upsilon/fallback": 0.5, "gcpo/proj_clamped": 1.0, "gcpo/colliders/ended": 0.0})
    for row in wrong.log:
        row.update({"frac_reward_zero_std": 1.0, "gcpo/upsilon/near_zero": 1.0, "gcpo/projection/norm_ratio": 0.0})
        row.update({"completions/clipped_ratio": 1.0, "gcpo/kl_clipped": 1.0, "gcpo/seconds/colliders": 1.8})
        row["gcpo/kl_causal_correlation"] = 0.0
        row.update({"reward": 0.5, "gcpo/colliders/reward": 0.1})
        row["completions/mean_length"] = 40.0 / row["step"]
    wrong.log[-1]["grad_norm"] = 1e4
    assert len(diagnose(wrong)) == len(CHECKS)


def test_what_is_said_of_the_loss() -> None:
    assert answer_about_loss(synthetic({"loss": 1e-5})).startswith(
        "Loss is 0 (mean |loss| 1e-05), and that says nothing"
    )
    assert "Loss is near 0" in answer_about_loss(synthetic())
    assert "nothing is being learnt" in answer_about_loss(synthetic({"loss": 0.0, "grad_norm": 0.0}))
    assert "does not hold it" in answer_about_loss(Run("a", {}, [{"step": 1, "reward": 1.0}]))


def test_overhead_leaves_out_what_only_gcpo_does() -> None:
    # 3.0 s, of which 0.5 + 0.5 and half of 0.4 of scoring are GCPO's.
    assert overhead(HEALTHY) == pytest.approx(3.0 / 1.8)
    assert overhead({"step_time": 1.0, "gcpo/seconds/scoring": 0.5}) is None


# ---------------------------------------------------------------------------------------------------------------------
# Real runs
# ---------------------------------------------------------------------------------------------------------------------


def train(folder: Path, reward: Any = count_low, **overrides: Any) -> Run:
    settings = options(
        folder,
        max_steps=4,
        gradient_accumulation_steps=1,
        learning_rate=1e-4,
        num_colliders=2,
        collider_max_completion_length=6,
        **SHORT_TEMPLATES,
    )
    config = GCPOConfig(**{**settings, **overrides})
    trainer = GCPOTrainer(save_policy(folder / "policy"), reward, args=config, train_dataset=prompts())
    trainer.keeps_account = True  # of runs without causal parts too
    trainer.train()
    return read_run(folder / "out")


# The policy is random: its completions never end, and that is not what these runs are about.
UNENDED = {"completions cut off", "colliders say little"}


def zero(completions: list[Any], **kwargs: Any) -> list[float]:
    return [0.0] * len(completions)


@pytest.mark.parametrize(
    ("overrides", "reward", "wanted"),
    [
        ({}, count_low, set()),
        ({"num_colliders": 1}, count_low, {"projection without signal"}),
        ({"alpha": 0.01}, count_low, {"Upsilon near 0"}),
        ({"proj_floor": 0.2}, count_low, {"clamped p'"}),
        ({}, zero, {"zero-variance groups"}),
    ],
)
def test_runs_made_to_fail(overrides: dict[str, Any], reward: Any, wanted: set[str], tmp_path: Path) -> None:
    run = train(tmp_path, reward, **overrides)
    assert run.config["num_colliders"] == overrides.get("num_colliders", 2)
    assert len(run.log) == 4
    assert set(names(run, Limits(overhead=1e9))) - UNENDED == wanted


def shorter(completions: list[Any], **kwargs: Any) -> list[float]:
    return [-float(len(completion)) for completion in completions]


def test_a_run_that_is_paid_for_short_answers_collapses(tmp_path: Path) -> None:
    rollout = {"per_device_train_batch_size": 32, "num_generations": 8, "max_completion_length": 24}
    plain = {"estimator": "none", "kappa": 0.0, "learning_rate": 3e-2, "max_steps": 16}
    run = train(tmp_path, shorter, **rollout, **plain)
    (finding,) = [finding for finding in diagnose(run) if finding.name == "length collapse"]
    assert "`beta`" in finding.change


def test_a_run_with_too_large_a_kappa_spikes(tmp_path: Path) -> None:
    run = train(tmp_path, kappa=10.0, learning_rate=0.1, max_steps=12)
    (finding,) = [finding for finding in diagnose(run) if finding.name == "gradient-norm spikes"]
    assert "lower `kappa` (10 now)" in finding.change


def test_a_run_that_breaks_its_plan(tmp_path: Path) -> None:
    run = train(tmp_path, estimator="sampled", num_estimator_samples=2)
    (finding,) = [item for item in diagnose(run, Limits(overhead=1.18)) if item.name == "overhead above plan"]
    assert "plan 1.18" in finding.number
    assert "`estimator='loo'`" in finding.change


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, run in (("good", synthetic()), ("bad", synthetic({"gcpo/proj_clamped": 0.9}))):
        for row in run.log:
            append_line(tmp_path / name / LOG, row)
    assert main(["diagnose", str(tmp_path / "good")]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[1].strip().startswith("Loss is near 0")
    assert "Nothing is wrong" in out
    assert main(["diagnose", str(tmp_path)]) == 1  # the folder of both
    assert "! clamped p': p' left [proj_floor, 1] on 90%" in capsys.readouterr().out
    assert main(["diagnose", str(tmp_path / "good"), "--overhead", "1.18", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["good"][0]["name"] == "overhead above plan"
    assert main(["diagnose", str(tmp_path / "nowhere")]) == 2
    assert "`RUN` must be the output folder of a run" in capsys.readouterr().err


def test_runs_are_read_from_a_trainer_state_and_from_an_unfinished_log(tmp_path: Path) -> None:
    history = [{"step": 1, "reward": 0.5}, {"step": 1, "eval_reward": 0.1}, {"step": 2, "train_runtime": 3.0}]
    (tmp_path / "a" / "checkpoint-2").mkdir(parents=True)
    (tmp_path / "a" / "checkpoint-10").mkdir()
    (tmp_path / "a" / "checkpoint-2" / "trainer_state.json").write_text(json.dumps({"log_history": []}))
    newest = tmp_path / "a" / "checkpoint-10" / "trainer_state.json"
    newest.write_text(json.dumps({"log_history": history}))
    assert [row["step"] for row in read_run(tmp_path / "a").log] == [1]
    assert read_run(newest).values("reward") == [0.5]
    append_line(tmp_path / "b" / LOG, {"step": 1, "reward": float("nan")})
    append_line(tmp_path / "b" / LOG, {"step": 2, "reward": 1.0})
    append_line(tmp_path / "b" / LOG, {"step": 2, "reward": 2.0})  # resumed: done again
    with (tmp_path / "b" / LOG).open("a") as file:
        file.write('{"step": 3, "rew')
    assert read_run(tmp_path / "b").series("reward") == ([2], [2.0])
    assert [run.name for run in read_runs([str(tmp_path / "a"), str(tmp_path / "b")])] == ["a", "b"]
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "trainer_state.json").write_text("[]")
    with pytest.raises(ValueError, match="log_history"):
        read_run(tmp_path / "c")
