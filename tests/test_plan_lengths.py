"""What `gcpo plan` makes of lengths that are drawn, of colliders' default length, and of rewards."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import plan_cases
import pytest
from plan_cases import run_and_count
from tiny_policy import save_policy
from transformers import AutoModelForCausalLM, AutoTokenizer

from gcpo import GCPOConfig, cli
from gcpo.forward.counting import Abilities
from gcpo.planning.architecture import Architecture, load_config
from gcpo.planning.candidate_lengths import count_batches, draw_lengths, planned_batches
from gcpo.planning.counts import Lengths, PlannedScript, count_cycle
from gcpo.planning.plan import Device, StepPlan, plan_step


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    name = save_policy(tmp_path_factory.mktemp("policy"))
    return AutoModelForCausalLM.from_pretrained(name), AutoTokenizer.from_pretrained(name)


def command(*flags: str) -> int:
    return cli.main(["plan", *flags])


H100 = ("--model_name_or_path", "1.5b", "--gpu", "h100", "--num_generations", "8")


@pytest.mark.parametrize("kind", ["full", "lognormal"])
@pytest.mark.parametrize(("tokens", "colliders", "most"), [(2048, 64, 1.04), (512, 16, 1.06)])
def test_the_defaults_cost_little_beside_grpo(
    kind: str, tokens: int, colliders: int, most: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A model of 1.5B on an H100, whatever the lengths; and what colliders of 256 tokens would cost."""

    def seconds(*flags: str) -> dict[str, float]:
        out = tmp_path / "plan.json"
        given = ("--max_completion_length", str(tokens), "--lengths", kind, "--output", str(out))
        assert command(*H100, *given, *flags) == 0
        content = json.loads(out.read_text())
        assert {len(batch) for batch in content["candidate_lengths"]["of_batches"]} == {8}
        return {name: sum(cost["seconds"] for cost in content[name]["costs"]) for name in ("grpo", "gcpo")}

    found = seconds()
    heading = capsys.readouterr().out
    assert f"colliders of {colliders}," in heading and ("lognormal, the mean over 32 drawn" in heading) == (
        kind != "full"
    )
    assert found["gcpo"] <= most * found["grpo"]
    longer = seconds("--collider_max_completion_length", "256")
    assert longer["grpo"] == found["grpo"] and longer["gcpo"] > 1.05 * most * found["grpo"]


def test_drawn_lengths_are_planned_batch_by_batch() -> None:
    """The mean over batches of what a plan of each says; candidates of one length are the plan without batches."""
    shape = Architecture.from_config(load_config("0.5b"))
    config = GCPOConfig(use_cpu=True, bf16=False, max_completion_length=64, estimator="sampled", kappa=0.0)
    lengths, abilities, device = Lengths(10, 64, 5), Abilities(), Device(1.0, 1.0)
    batches = planned_batches("lognormal", config, 64)
    assert len(batches) == 32 and batches[3] == draw_lengths("lognormal", 64, 8, seed=3) and len(set(batches[0])) > 2
    mean = round(sum(map(sum, batches)) / 256)
    for is_grpo in (True, False):
        together = plan_step(config, shape, count_batches(config, lengths, batches, abilities, is_grpo), device)
        own = replace(lengths, sample=mean)  # of outputs sampled under contexts
        counts = [count_cycle(config, PlannedScript(config, own, batch), abilities, is_grpo) for batch in batches]
        alone = [plan_step(config, shape, one, device).total("seconds") for one in counts]
        assert together.total("seconds") == pytest.approx(sum(alone) / 32) and len(set(alone)) > 10
    whole = count_batches(config, lengths, planned_batches("full", config, 64), abilities, False)
    assert whole.tokens == count_cycle(config, PlannedScript(config, lengths), abilities).tokens
    large = GCPOConfig(use_cpu=True, bf16=False, gradient_accumulation_steps=64)
    assert len(planned_batches("lognormal", large, 64)) == 1


# ---------------------------------------------------------------------------------------------------------------------
# Rewards
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("processes", [1, 2])
def test_rewards_cost_what_they_are_said_to(processes: int) -> None:
    """Those of colliders where they are computed; with `overlap_rewards` the longer of rewards and colliders counts."""
    shape, lengths = Architecture.from_config(load_config("0.5b")), Lengths(10, 20, 5)

    def planned(each: float = 0.5, is_grpo: bool = False, **changed: Any) -> StepPlan:
        config = GCPOConfig(use_cpu=True, bf16=False, gradient_accumulation_steps=4 * processes, **changed)
        counts = count_cycle(config, PlannedScript(config, lengths), Abilities(), is_grpo)
        return plan_step(config, shape, counts, Device(1.0, 1.0), num_processes=processes, reward_seconds=each)

    candidates, colliders = 32 * processes, 4 * 4 * processes
    grpo, plain = planned(is_grpo=True, overlap_rewards=True), planned()
    rewarded = planned(log_collider_reward=True)
    assert grpo.rewarded == plain.rewarded == candidates and rewarded.rewarded == candidates + colliders
    for one in (grpo, plain, rewarded):
        assert one.total("seconds", "rewards") == pytest.approx(0.5 * 32)
        assert one.total("seconds", "collider_rewards") == pytest.approx(0.5 * 16 if one is rewarded else 0.0)
        assert (one.costs[0].phase, one.costs[-1].phase) == ("rollout", "loss")
    assert rewarded.total("seconds") == pytest.approx(plain.total("seconds") + 0.5 * 16)
    assert planned(each=0.0).total("seconds") == pytest.approx(plain.total("seconds") - 0.5 * 32)
    decoded = plain.total("seconds", "colliders")
    for each in (decoded / 8, decoded / 320):  # rewards are longer, and shorter, than colliders are decoded
        apart, beside = planned(each), planned(each, overlap_rewards=True, log_collider_reward=True)
        longer = max(each * 32, decoded)
        both = beside.total("seconds", "rewards") + beside.total("seconds", "colliders")
        assert both == pytest.approx(longer) and (each * 32 > decoded) == (each > decoded / 100)
        saved = apart.total("seconds") - beside.total("seconds") + beside.total("seconds", "collider_rewards")
        assert saved == pytest.approx(each * 32 + decoded - longer)


@pytest.mark.parametrize("logged", [False, True])
def test_rewarded_completions_are_those_of_a_run(
    logged: bool, loaded: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, reward = [], plan_cases.count_low

    def counted(completions: list[Any], **kwargs: Any) -> list[float]:
        seen.append(len(completions))
        return reward(completions, **kwargs)

    monkeypatch.setattr(plan_cases, "count_low", counted)
    _, counts = run_and_count(*loaded, tmp_path, {"log_collider_reward": logged})
    assert counts.rewarded["rewards"] == seen[0] and counts.rewarded.total() == sum(seen)
    assert (counts.rewarded["collider_rewards"] > 0) == (len(seen) > 1) == logged


def test_command_says_how_many_completions_are_rewarded(capsys: pytest.CaptureFixture[str]) -> None:
    flags = (*H100, "--max_completion_length", "64")
    assert command(*flags) == 0 and "rewarded" not in capsys.readouterr().out
    assert command(*flags, "--reward_seconds", "0.25", "--overlap_rewards", "true") == 0
    out = capsys.readouterr().out
    assert "completions rewarded: GRPO 8, GCPO 8" in out and "collider_rewards" not in out
    (hidden,) = [line for line in out.splitlines() if "hidden behind colliders" in line]
    assert float(hidden.split()[-1]) < 0
    assert command(*flags, "--log_collider_reward", "true") == 0
    assert "completions rewarded: GRPO 8, GCPO 12" in capsys.readouterr().out
