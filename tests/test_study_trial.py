"""The study `trial` and what it brought: arms, lists of seeds, workers, step times, and what colliders are worth."""

import csv
import json
import os
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gcpo.cli import main
from gcpo.commands import study as command
from gcpo.reports.intervals import interval
from gcpo.run.records import read_run, text_of
from gcpo.study import perform, sums, tables, workbench
from gcpo.study.definitions import GCPO, GRPO, STUDIES, Arm, Study
from gcpo.study.scale import PRESETS, SEED_LISTS, StudyScale
from gcpo.study.sums import Recipe
from gcpo.study.trainers import ScaledGRPOTrainer, StudyGCPOTrainer
from gcpo.study.workbench import TUNING_SEED, Workbench

pytestmark = pytest.mark.usefixtures("studies_in_this_process")

TINY = Recipe(steps=4, hidden_size=32, num_layers=1, intermediate_size=32, plain_rows=4, shown_rows=2, num_candidates=3)
SMALL = StudyScale(
    bed="integrating",
    steps=2,
    seeds=(0, 1),
    prompts_per_step=2,
    num_generations=4,
    num_colliders=2,
    num_held_out=6,
    num_samples=2,
    num_train=24,
    completion_tokens=sums.COMPLETION_TOKENS,
    beta=0.0,
)
WORDS = replace(SMALL, bed="tiny", completion_tokens=6, warm_target=0.0)
TRIAL = {arm.name: arm for arm in STUDIES["trial"].arms}


def share_of_even_digits(completions: list[Any], **_: Any) -> list[float]:
    """A reward that completions of any model differ in."""
    texts = list(map(text_of, completions))
    return [sum(letter in "02468" for letter in text) / max(len(text), 1) for text in texts]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Kept between tests: they share a starting model and runs."""
    return tmp_path_factory.mktemp("trial")


@pytest.fixture
def tiny_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """A starting model that is made in a blink, and a reward that it can get."""
    monkeypatch.setattr(sums, "RECIPE", TINY)
    monkeypatch.setattr(sums, "reward", share_of_even_digits)


# ---------------------------------------------------------------------------------------------------------------------
# Arms
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("tiny_start")
def test_every_arm_of_the_trial_has_a_trainer(folder: Path) -> None:
    bench = Workbench(SMALL, folder)
    assert len(TRIAL) == len(STUDIES["trial"].arms)
    for arm in TRIAL.values():
        assert arm.against is None or arm.against in TRIAL
        if arm.as_long_as is not None:
            assert arm.as_long_as in TRIAL.values()
            continue  # its options are found out
        trainer = bench.trainer(replace(arm, scaled_by=None), 0, folder / "trainers")
        assert all(getattr(trainer.args, name) == value for name, value in arm.options.items()), arm.name
        assert type(trainer) is (StudyGCPOTrainer if arm.method == "gcpo" else ScaledGRPOTrainer), arm.name


def test_the_controls_of_the_trial_are_what_they_say() -> None:
    assert TRIAL["GRPO x mean Upsilon"].scaled_by == TRIAL["GCPO"] == GCPO
    assert TRIAL["GRPO, as many seconds"].as_long_as == GCPO
    assert {name for name, arm in TRIAL.items() if arm.method == "grpo"} == {
        "GRPO",
        "GRPO, as many seconds",
        "GRPO x mean Upsilon",
        "GRPO, twice the learning rate",
    }
    # Each is compared with GRPO at its own learning rate.
    rates = {name: arm.options.get("learning_rate") for name, arm in TRIAL.items()}
    assert {name for name, arm in TRIAL.items() if arm.against is None} == {"GRPO", "GRPO, twice the learning rate"}
    assert all(rates[arm.against] == rates[name] for name, arm in TRIAL.items() if arm.against is not None)
    assert rates["GRPO, twice the learning rate"] == 2 * PRESETS["integrating", False].learning_rate
    assert TRIAL["no weights"].options == {"estimator": "none"}
    assert TRIAL["no second KL, colliders on texts"].options == {"kappa": 0.0}  # which reads texts by default
    felt = [arm for name, arm in TRIAL.items() if name.startswith("felt")]
    assert len(felt) == 8 and all(arm.options["kappa"] >= 1.0 and arm.options["kl_clip"] == 1.0 for arm in felt)
    assert TRIAL["weights of mean 1"].options == {"weight_scale": "unit"}
    # Those that a conclusion rests on have every seed.
    assert all(TRIAL[name].num_seeds is None for name in ("GRPO", "GCPO", "GRPO, as many seconds"))
    settings = [arm.settings() for arm in TRIAL.values() if arm.as_long_as is None]
    assert all(settings.count(found) == 1 for found in settings)


def test_some_arms_of_a_study_come_with_their_pairs() -> None:
    study = STUDIES["trial"]
    assert study.only(None) is study
    names = ["no weights", "c_0 greedy"]
    assert [arm.name for arm in study.only(names).arms] == [name for name in TRIAL if name in ("GRPO", *names)]
    assert [arm.name for arm in study.only(["GRPO"]).arms] == ["GRPO"]
    assert study.only(["GRPO"]).columns == study.columns
    with pytest.raises(ValueError, match=r"`--arms` must be of 'GRPO', .*'GCPO', .*, got 'GCPo'"):
        study.only(["GRPO", "GCPo"])


def test_a_study_of_one_arm_has_nothing_to_conclude() -> None:
    study = STUDIES["ablation"].only(["GRPO"])
    rows = tables.make_rows(study, {"GRPO": [{"pass_at_1": 0.5, "metrics": {}}]})
    assert tables.conclude(rows) == ""
    assert tables.as_cells(study, rows)[1][:3] == ["GRPO", "0.500 ± ?", ""]


def test_an_arm_with_fewer_seeds_is_paired_with_those_seeds() -> None:
    study = Study("?", (GRPO, replace(GCPO, num_seeds=2)))
    scores = {"GRPO": [0.0, 0.25, 1.0, 0.75], "GCPO": [0.5, 0.5]}
    results = {name: [{"pass_at_1": score, "metrics": {}} for score in found] for name, found in scores.items()}
    grpo, gcpo = tables.make_rows(study, results)
    assert gcpo.difference == interval([0.5, 0.25]) and gcpo.against == "GRPO"
    assert (grpo.score.count, gcpo.score.count) == (4, 2) and grpo.difference is None
    cells = tables.as_cells(study, [grpo, gcpo])
    assert [row[4] for row in cells] == ["seeds", "4", "2"]
    assert "with 2 seeds" in tables.conclude([grpo, gcpo])


def test_seeds_that_tune_are_not_those_that_are_reported() -> None:
    assert not set(SEED_LISTS["tuning"]) & set(SEED_LISTS["reported"])
    assert TUNING_SEED in SEED_LISTS["tuning"]
    assert not any(set(scale.seeds) & set(SEED_LISTS["tuning"]) for scale in command.PRESETS.values())
    assert command.parse_seeds(["tuning"]) == SEED_LISTS["tuning"]
    assert command.parse_seeds(["3", "0"]) == (3, 0)


# ---------------------------------------------------------------------------------------------------------------------
# As many candidates as fit into the time
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("grpo", "twice", "other", "wanted"),
    [
        (1.0, 1.8, 1.4, 12),  # a candidate more takes 0.1
        (1.0, 2.0, 1.2, 10),  # 0.125 each: 1.6 more
        (1.0, 2.0, 1.0, 8),
        (1.0, 2.0, 0.7, 8),  # no fewer than GRPO has
        (1.0, 1.8, 3.3, 31),
        (1.0, 1.8, 9.0, 32),  # no more than four times as many
        (1.0, 1.0, 1.4, 8),  # candidates that take no time: noise
        (1.0, 0.9, 1.4, 8),
    ],
)
def test_an_arm_gets_the_candidates_that_fill_the_time(
    grpo: float, twice: float, other: float, wanted: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def seconds(self: Workbench, arm: Arm) -> dict[str, float]:
        asked.append(arm)
        return {"grpo": grpo, "twice": twice, "other": other}

    monkeypatch.setattr(Workbench, "_seconds_per_step", seconds)
    bench = Workbench(replace(SMALL, num_generations=8, prompts_per_step=3), tmp_path)
    arm = Arm("GRPO, as many seconds", "grpo", options={"temperature": 0.9}, as_long_as=GCPO, against="GRPO")
    found = bench.resolved(arm)
    assert asked == [GCPO]
    assert found.name == f"GRPO, as many seconds (n = {wanted})" and found.against == "GRPO"
    assert found.options == {
        "temperature": 0.9,
        "num_generations": wanted,
        "per_device_train_batch_size": 3 * wanted,
    }
    assert bench.resolved(found) is found and bench.resolved(GCPO) is GCPO


@pytest.mark.usefixtures("tiny_start")
def test_step_times_are_measured_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workbench, "TIMED_ROUNDS", 1)
    monkeypatch.setattr(workbench, "TIMED_STEPS", 2)
    made: list[tuple[str, int, int]] = []
    make = Workbench.trainer

    def counted(self: Workbench, arm: Arm, seed: int, *args: Any, **kwargs: Any) -> Any:
        trainer = make(self, arm, seed, *args, **kwargs)
        made.append((arm.method, trainer.args.num_generations, trainer.args.max_steps))
        assert seed == TUNING_SEED
        return trainer

    monkeypatch.setattr(Workbench, "trainer", counted)
    bench = Workbench(SMALL, folder)
    found = bench._seconds_per_step(GCPO)
    assert made == [("grpo", 4, 2), ("grpo", 8, 2), ("gcpo", 4, 2)]
    assert set(found) == {"grpo", "twice", "other"} and all(value > 0 for value in found.values())
    assert Workbench(SMALL, folder)._seconds_per_step(GCPO) == found
    assert len(made) == 3


# ---------------------------------------------------------------------------------------------------------------------
# What colliders are worth
# ---------------------------------------------------------------------------------------------------------------------


def test_the_gain_of_colliders_is_theirs_less_that_of_candidates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workbench, "COLLIDER_BATCHES", 3)
    rewards = {
        None: ([0.75, 0.5, 1.0], [0.25, 0.25, 0.25]),  # of colliders, of candidates
        "full": ([0.0, 0.5, 0.25], [0.25, 0.5, 0.75]),
    }
    made = []

    def trainer(self: Workbench, arm: Arm, seed: int, folder: Path) -> Any:
        made.append(arm.options)
        colliders, candidates = rewards[arm.options.get("collider_attention")]
        logged: dict[str, list[float]] = defaultdict(list)

        def rollout(batch: int) -> None:
            logged["gcpo/colliders/reward"].append(colliders[batch])
            logged["reward"].append(candidates[batch])

        return SimpleNamespace(
            model=SimpleNamespace(train=lambda: None),
            state=SimpleNamespace(global_step=0),
            get_train_dataloader=lambda: range(100),
            _generate_and_score_completions=rollout,
            _metrics={"train": logged},
        )

    monkeypatch.setattr(Workbench, "trainer", trainer)
    gains = Workbench(SMALL, tmp_path).collider_gains()
    assert gains["by default"] == interval([0.5, 0.25, 0.75])
    assert gains["after a text"] == interval([-0.25, 0.0, -0.5])
    assert gains["by default"].mean == 0.5 and gains["after a text"].mean == -0.25
    assert Workbench(SMALL, tmp_path).collider_gains() == gains and len(made) == 2  # kept

    study = Study("?", (GRPO,), asks_of_colliders=True)
    monkeypatch.setattr(Workbench, "start", "there")
    text = perform._prepare("trial", study, Workbench(SMALL, tmp_path))
    # 0.25 either way over three batches: Student's t of 2 degrees, 4.303, times 0.25 / sqrt(3), which is 0.621.
    assert "by default are not to be told from candidates (+0.500 ± 0.621)" in text
    assert "after a text are not to be told from candidates (-0.250 ± 0.621)" in text and "3 batches" in text
    rewards[None] = ([0.75, 0.75, 0.5], [0.25, 0.25, 0.05])
    rewards["full"] = ([0.25, 0.25, 0.05], [0.75, 0.75, 0.5])
    text = perform._prepare("trial", study, Workbench(SMALL, tmp_path / "other"))
    assert "by default are better than candidates (+0.483 ±" in text
    assert "after a text are worse than candidates (-0.483 ±" in text
    assert perform._prepare("ablation", replace(study, asks_of_colliders=False), Workbench(SMALL, tmp_path)) == ""


@pytest.mark.usefixtures("tiny_start")
def test_every_batch_draws_colliders_of_its_own(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches that shared their draws would agree by more than the mean, and the interval would be too narrow."""
    monkeypatch.setattr(workbench, "COLLIDER_BATCHES", 3)
    seeds: list[int] = []
    terms = StudyGCPOTrainer.causal_terms

    def watched(self: StudyGCPOTrainer, *args: Any) -> Any:
        seeds.append(self._policy.step_seed)
        return terms(self, *args)

    monkeypatch.setattr(StudyGCPOTrainer, "causal_terms", watched)
    gains = Workbench(SMALL, folder).collider_gains()
    assert len(seeds) == 6 and len(set(seeds)) == 3 and seeds[:3] == seeds[3:]
    assert all(gain.count == 3 and abs(gain.mean) < 1 for gain in gains.values())
    assert any(gain.half > 0 for gain in gains.values())


# ---------------------------------------------------------------------------------------------------------------------
# Whole studies
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("tiny_start")
def test_a_trial_whose_arms_have_different_numbers_of_seeds(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(workbench, "COLLIDER_BATCHES", 3)
    monkeypatch.setitem(command.PRESETS, ("integrating", True), SMALL)
    trial = STUDIES["trial"]
    arms = (GRPO, replace(GCPO, num_seeds=1), Arm("none", options={"estimator": "none"}, against="GRPO"))
    monkeypatch.setitem(STUDIES, "trial", replace(trial, arms=arms))
    argv = ["study", "trial", "--bed", "integrating", "--quick", "--seeds", "3", "1", "--arms", "GRPO", "GCPO"]
    argv += ["--output_dir", str(folder), "--work_dir", str(folder)]
    assert main(argv) == 0
    results = json.loads((folder / "trial.json").read_text())["results"]
    scores = {name: [result["pass_at_1"] for result in found] for name, found in results.items()}
    assert {name: len(found) for name, found in scores.items()} == {"GRPO": 2, "GCPO": 1}
    assert "-seed3-" in results["GRPO"][0]["folder"] and "-seed3-" in results["GCPO"][0]["folder"]
    with (folder / "trial.csv").open() as file:
        grpo, gcpo = csv.DictReader(file)
    assert (grpo["seeds"], gcpo["seeds"]) == ("2", "1")
    means = {name: [result["mean_score"] for result in found] for name, found in results.items()}
    assert gcpo["difference"] == f"{scores['GCPO'][0] - scores['GRPO'][0]:+.3f} ± ?"
    assert gcpo["pass@1, held out"].endswith(" ± ?") and not grpo["pass@1, held out"].endswith("?")
    assert gcpo["Upsilon and reward"].endswith(" ± ?") and grpo["Upsilon and reward"] == ""
    assert gcpo["colliders - candidates"].endswith(" ± ?") and float(gcpo["mean Upsilon"]) > 0
    assert all(0 < value < 1 for found in means.values() for value in found)
    text = (folder / "trial.md").read_text()
    assert "95% intervals over 1 or 2 seeds" in text and "At the start, colliders drawn by default are" in text
    assert "![trial-correlations](trial-correlations.png)" in text
    assert (folder / "trial-correlations.png").stat().st_size > 0 and (folder / "trial.png").stat().st_size > 0
    assert "At the start, colliders" in capsys.readouterr().out


def outcomes(folder: Path) -> dict[tuple[str, int], Any]:
    """Of every arm's run with a seed: its score, and what its log says that is not a time."""
    found = {}
    for name, results in json.loads((folder / "ablation.json").read_text())["results"].items():
        for number, result in enumerate(results):
            run = read_run(result["folder"])
            logged = [run.values(key) for key in ("reward", "grad_norm", "gcpo/upsilon/mean", "study/scale")]
            found[name, number] = result["pass_at_1"], result["mean_score"], *logged
    return found


@pytest.mark.slow
def test_workers_come_to_the_numbers_of_one_and_go_on_with_what_was_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(command.PRESETS, ("tiny", True), WORDS)

    def study(folder: Path, *flags: str) -> int:
        argv = ["study", "ablation", "--quick", "--arms", "GRPO", "GCPO", "GRPO x mean Upsilon", *flags]
        return main([*argv, "--output_dir", str(folder), "--work_dir", str(folder)])

    alone, shared = tmp_path / "alone", tmp_path / "shared"
    assert study(alone) == 0
    run, ran = Workbench.run, []

    def interrupted(self: Workbench, arm: Arm, seed: int) -> dict[str, Any]:
        if ran:
            raise KeyboardInterrupt
        ran.append(arm)
        return run(self, arm, seed)

    with monkeypatch.context() as patch:
        patch.setattr(Workbench, "run", interrupted)
        assert study(shared) == 130
    (kept,) = (shared / "runs").glob("*/result.json")
    before = kept.stat().st_mtime_ns
    with monkeypatch.context() as patch:
        patch.setattr(Workbench, "trainer", None)  # nothing is trained in this process
        assert study(shared, "--workers", "2") == 0
    assert kept.stat().st_mtime_ns == before
    assert len(list((shared / "runs").glob("*/result.json"))) == 6
    ours, theirs = outcomes(shared), outcomes(alone)
    assert ours == theirs and len(ours) == 6
    for seed in range(2):
        *_, weights, _ = ours["GCPO", seed]
        assert ours["GRPO x mean Upsilon", seed][-1] == pytest.approx(weights) and len(weights) == WORDS.steps


class InlinePool:
    """In place of a pool of processes: does nothing, and keeps what it was given."""

    def __init__(self, workers: int, context: Any, begin: Callable[..., None], given: tuple[Any, ...]):
        self.workers, self.given = workers, given
        self.runs: list[tuple[str, int]] = []

    def submit(self, do: Callable[..., None], arm: Arm, seed: int) -> Future[None]:
        self.runs.append((arm.name, seed))
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def shutdown(self, **given: bool) -> None:
        pass


class Fatal(Arm):
    """An arm that ends the process that is to run it."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os._exit, (1,)


def test_a_worker_that_is_killed_ends_the_study(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`--workers` 1: a process was ended from outside"):
        perform._share([(Fatal(""), 0)], Workbench(SMALL, tmp_path), 1, lambda: None)


def test_a_worker_ends_with_the_process_that_asked_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[str] = []
    parent = SimpleNamespace(join=lambda: waited.append("parent"))
    monkeypatch.setattr(os, "_exit", lambda code: waited.append(f"exit {code}"))
    perform._end_with(parent)
    assert waited == ["parent", "exit 1"]


def test_workers_do_each_run_once_and_scaled_ones_after_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pools: list[InlinePool] = []

    def pool(*args: Any) -> InlinePool:
        pools.append(InlinePool(*args))
        return pools[-1]

    monkeypatch.setattr(perform, "ProcessPoolExecutor", pool)
    bench = Workbench(SMALL, tmp_path)
    scaled = Arm("scaled", "grpo", scaled_by=GCPO, against="GRPO")
    # With as little time to fill as this, the arm is GRPO itself.
    same = Arm("as long", "grpo", options={"num_generations": 4, "per_device_train_batch_size": 8}, against="GRPO")
    runs = [(arm, seed) for seed in (0, 1) for arm in (GRPO, scaled, GCPO, same)]
    done = bench._run_folder(GCPO, 1)
    done.mkdir(parents=True)
    (done / "result.json").write_text("{}")
    left = bench.left(runs)
    assert len(left) == 5  # GRPO, GCPO and the scaled one of seed 0; GRPO and the scaled one of seed 1
    ticks: list[int] = []
    perform._share(left, bench, 2, lambda: ticks.append(1))
    first, then = pools[0].runs[:3], pools[0].runs[3:]
    assert [seed for name, seed in first if name != "GCPO"] == [0, 1] and ("GCPO", 0) in first
    assert then == [("scaled", 0), ("scaled", 1)]
    assert len(ticks) == 5
    assert pools[0].workers == 2 and pools[0].given == (bench.scale, bench.folder, 1)


def test_runs_from_another_starting_model_are_not_taken_for_those_from_this_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where its folder was removed, as the message says that refuses it, and the runs beside it were not."""
    places = set()
    for recipe in (TINY, replace(TINY, seed=7), replace(TINY, layout=TINY.layout + 1)):
        monkeypatch.setattr(sums, "RECIPE", recipe)
        bench = Workbench(SMALL, tmp_path)
        assert bench._run_folder(GRPO, 0) == Workbench(SMALL, tmp_path)._run_folder(GRPO, 0)
        places |= {bench._run_folder(GRPO, 0), bench.fingerprint(0)}
    assert len(places) == 6
