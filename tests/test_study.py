"""`gcpo study`: its arithmetic, its controls, and a whole study, interrupted and gone on with."""

import csv
import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from scipy.stats import ttest_1samp

from gcpo import GCPOConfig
from gcpo.cli import main
from gcpo.commands import study as command
from gcpo.reports.intervals import elbow, holm, interval
from gcpo.run.records import read_run
from gcpo.study import budget, perform, tables, workbench
from gcpo.study.beds import Bed
from gcpo.study.definitions import GCPO, GRPO, NAMES, STUDIES, Arm
from gcpo.study.rewards import open_ended_reward
from gcpo.study.workbench import Workbench

pytestmark = pytest.mark.usefixtures("studies_in_this_process")

SMALL = command.StudyScale(
    steps=2,
    seeds=(0, 1),
    prompts_per_step=2,
    num_generations=4,
    num_held_out=6,
    num_samples=2,
    num_train=24,
    completion_tokens=6,
    warm_target=0.0,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Kept between tests: they share a starting model and runs."""
    return tmp_path_factory.mktemp("studies")


def test_intervals_cover_the_mean_as_often_as_they_say() -> None:
    rng = np.random.default_rng(0)
    for count in (2, 3, 5, 30):
        drawn = [interval(list(values)) for values in rng.normal(1.0, 2.0, (4000, count))]
        covered = np.mean([abs(found.mean - 1.0) <= found.half for found in drawn])
        assert abs(covered - 0.95) < 0.012, count
    assert math.isnan(interval([1.0]).half)
    assert not interval([1.0]).excludes_zero
    assert not interval([0.5, 0.5]).excludes_zero
    assert interval([1.0, 1.1]).excludes_zero and not interval([1.0, -1.1]).excludes_zero
    with pytest.raises(ValueError, match="must not be empty"):
        interval([])


def test_the_half_width_is_that_of_a_table_of_student_s_t() -> None:
    table = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 11: 2.228, 21: 2.086, 31: 2.042}
    for count, quantile in table.items():
        values = [float(k) for k in range(count)]
        wanted = quantile * np.std(values, ddof=1) / math.sqrt(count)
        assert interval(values).half == pytest.approx(wanted, rel=3e-4), count


def test_p_values_are_those_of_a_t_test_and_agree_with_the_interval() -> None:
    rng = np.random.default_rng(1)
    for count in (2, 4, 10):
        for values in rng.normal(0.5, 1.0, (200, count)):
            found = interval(list(values))
            assert found.p_value == pytest.approx(ttest_1samp(values, 0.0).pvalue, rel=1e-6)
            assert (found.p_value < 0.05) == found.excludes_zero
    assert interval([1.0]).p_value == interval([0.5, 0.5]).p_value == 1.0


def test_holm_s_correction() -> None:
    """By hand: 0.01 <= 0.05 / 4 and 0.014 <= 0.05 / 3 hold, 0.03 > 0.05 / 2 does not, nor does what comes after it."""
    assert holm([0.03, 0.01, 0.04, 0.014]) == [False, True, False, True]
    assert holm([0.02, 0.03]) == [True, True]  # 0.03 alone is tested at 0.05
    assert holm([0.5]) == [False] and holm([]) == []


def test_the_elbow_of_a_curve() -> None:
    x = [1.0, 2.0, 3.0, 4.0, 8.0]
    assert elbow(x, [10.0, 2.0, 1.5, 1.2, 1.0]) == 1
    assert elbow(x[::-1], [1.0, 1.2, 1.5, 2.0, 10.0]) == 3  # in any order
    assert elbow(x, [5 - value for value in x]) is None  # a straight line
    assert elbow(x, [1.0, 2.0, 3.0, 4.0, 5.0]) is None  # that rises
    assert elbow([1.0, 2.0], [2.0, 1.0]) is None


def test_the_open_ended_reward() -> None:
    words = [
        "potage",
        "banana",
        "strong",
        "a",
        "two words",
        "",
        "potage\n",
        [{"role": "assistant", "content": "potage"}],
    ]
    # banana: vowels and consonants take turns, with three letters of six; strong: two of five neighbours do.
    assert open_ended_reward(words) == pytest.approx([1.0, 3 / 6, 2 / 5, 0.0, 0.0, 0.0, 1.0, 1.0])


def test_every_study_pairs_with_an_arm_of_its_own() -> None:
    assert len(NAMES) == 11
    for name, study in STUDIES.items():
        arms = [arm.name for arm in study.arms]
        assert len(set(arms)) == len(arms), name
        assert all(arm.against in arms for arm in study.arms if arm.against), name
        for place, arm in enumerate(study.arms):
            if arm.scaled_by is not None:  # is done before
                assert arm.scaled_by.settings() in [other.settings() for other in study.arms[:place]], name


def test_every_arm_has_options_that_its_trainer_takes(folder: Path) -> None:
    bench = Workbench(replace(SMALL, prompts_per_step=8, num_generations=8), folder)
    for study in STUDIES.values():
        for arm in study.arms:
            options = bench._options(arm, 0, folder)
            config = GCPOConfig(**options)
            assert all(getattr(config, name) == value for name, value in arm.options.items()), arm.name
            assert config.generation_batch_size == 64, arm.name  # completions per step, in every arm


def test_the_baseline_study_pulls_to_what_its_arms_say(folder: Path) -> None:
    """Targets are options; but for pi_old under q, which no option gives: there the KL is 0 at the first update."""
    bench = Workbench(SMALL, folder)
    arms = {arm.name: arm for arm in STUDIES["baseline"].arms}
    targets = {"GCPO": "projection", "query only": "projection", "one context": "context", "ensemble mean": "ensemble"}
    for name, target in targets.items():
        trainer = bench.trainer(arms[name], 0, folder / "runs" / name)
        assert trainer.args.kl_target == target and trainer.args.kappa > 0
        trainer.model.train()
        output = trainer._generate_and_score_completions(next(iter(trainer.get_train_dataloader())))
        trainer.current_gradient_accumulation_steps = 1
        trainer._compute_loss(trainer.model, output)
        trainer.log({})
        kl = trainer.state.log_history[-1]["gcpo/kl_causal"]
        assert (abs(kl) < 1e-6) == (name == "query only"), (name, kl)


def test_a_study_interrupted_and_gone_on_with(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(command.PRESETS, ("tiny", True), SMALL)
    argv = ["study", "ablation", "--quick", "--output_dir", str(folder), "--work_dir", str(folder)]
    run, ran = Workbench.run, []

    def interrupted(self: Workbench, arm: Arm, seed: int) -> dict[str, Any]:
        if len(ran) == 3:
            raise KeyboardInterrupt
        ran.append((arm.name, seed))
        return run(self, arm, seed)

    monkeypatch.setattr(Workbench, "run", interrupted)
    assert main(argv) == 130
    assert not (folder / "ablation.csv").exists()
    trained: list[str] = []
    make = Workbench.trainer
    monkeypatch.setattr(Workbench, "run", run)
    monkeypatch.setattr(
        Workbench, "trainer", lambda self, arm, *args: trained.append(arm.name) or make(self, arm, *args)
    )
    assert main(argv) == 0
    assert len(trained) == 2 * 5 - 3
    capsys.readouterr()
    assert main(argv) == 0  # all of it is there
    assert len(trained) == 2 * 5 - 3
    out = capsys.readouterr().out
    assert "differences" in out and "95% intervals over 2 seeds" in out

    with (folder / "ablation.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["arm"] for row in rows] == [arm.name for arm in STUDIES["ablation"].arms]
    assert all(" ± " in row["pass@1, held out"] for row in rows)
    assert all((" ± " in row["difference"]) == (row["arm"] != "GRPO") for row in rows)
    assert rows[0]["mean Upsilon"] == "" and float(rows[1]["mean Upsilon"]) > 0
    assert (folder / "ablation.png").stat().st_size > 0
    results = json.loads((folder / "ablation.json").read_text())["results"]
    scores = [result["pass_at_1"] for result in results["GCPO"]]
    others = [result["pass_at_1"] for result in results["GRPO"]]
    mean = sum(a - b for a, b in zip(scores, others, strict=True)) / 2
    assert rows[1]["difference"].startswith(f"{mean:+.3f}")
    # The control takes its scale from the run of the same seed, step by step.
    for gcpo, scaled in zip(results["GCPO"], results["GRPO x mean Upsilon"], strict=True):
        weights = read_run(gcpo["folder"]).values("gcpo/upsilon/mean")
        assert read_run(scaled["folder"]).values("study/scale") == pytest.approx(weights)
        assert len(weights) == SMALL.steps
    # From one seed, all arms begin with the same rollout.
    first = {read_run(result[0]["folder"]).log[0]["reward"] for result in results.values()}
    assert len(first) == 1


def test_arms_that_mean_the_same_share_their_run(folder: Path) -> None:
    bench = Workbench(SMALL, folder)
    for arm in (Arm("alpha = 2", options={"alpha": 2.0}), Arm("n", options={"num_generations": 4})):
        assert bench._run_folder(arm, 0) == bench._run_folder(GCPO, 0)
    assert bench._run_folder(Arm("alpha = 3", options={"alpha": 3.0}), 0) != bench._run_folder(GCPO, 0)
    assert bench._run_folder(GCPO, 1) != bench._run_folder(GCPO, 0) != bench._run_folder(GRPO, 0)
    longer = Workbench(replace(SMALL, steps=3), folder)
    assert longer._run_folder(GCPO, 0) != bench._run_folder(GCPO, 0)


def test_the_study_of_estimator_budgets(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    grid = [budget.Budget("loo", 4, 1), budget.Budget("loo", 4, 2), budget.Budget("sampled", 4, 2, 1)]
    monkeypatch.setitem(command.PRESETS, ("tiny", True), SMALL)
    monkeypatch.setattr(budget, "budgets", lambda quick: grid)
    assert main(["study", "samples", "--quick", "--output_dir", str(folder), "--work_dir", str(folder)]) == 0
    measured = json.loads((folder / "samples.json").read_text())["results"]
    for seed in measured:
        assert seed["loo, n = 4, L = 1"]["variance"] == 0.0  # the projection cancels
        assert seed["sampled, n = 4, L = 2, m = 1"]["variance"] > 0.0
        assert all(value["seconds"] > 0 for value in seed.values())
    assert (folder / "samples.png").stat().st_size > 0
    assert "loo, n = 4, L = 2" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "wanted"),
    [
        (["--steps", "0"], "`--steps` must be at least 1"),
        (["--model_name_or_path", "m"], "`--dataset_name` is missing"),
        (["--model_name_or_path", "./nowhere", "--dataset_name", "d"], "must be a name on the hub or a folder"),
    ],
)
def test_wrong_flags(flags: list[str], wanted: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["study", "alpha", "--output_dir", str(tmp_path), "--work_dir", str(tmp_path), *flags]) == 2
    assert wanted in capsys.readouterr().err


def test_no_secret_of_an_option_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scale = replace(SMALL, options={"model_init_kwargs": {"token": "s3cret", "dtype": "float32"}})
    bed = Bed(None, None, open_ended_reward, open_ended_reward, "float32")
    monkeypatch.setattr(workbench, "make_bed", lambda scale: bed)
    monkeypatch.setattr(
        workbench.Workbench, "trainer", lambda *given: SimpleNamespace(train=lambda **given: None, model=None)
    )
    monkeypatch.setattr(workbench.Workbench, "measure", lambda *given: {})
    monkeypatch.setattr(workbench, "summarize", lambda folder: {})
    bench = Workbench(scale, tmp_path)
    bench._run_folder(GCPO, 0).mkdir(parents=True)
    bench.run(GCPO, 0)
    monkeypatch.setattr(budget, "measure", lambda *given: {})
    monkeypatch.setattr(tables, "budget_cells", lambda *given: ([["a"]], []))
    monkeypatch.setattr(tables, "plot_budgets", lambda *given: None)
    done = perform.perform("samples", bench, True)
    perform.write(done, "samples", bench, tmp_path, "gcpo study samples --model_name_or_path https://s3cret@host/m")
    assert "s3cret" not in (tmp_path / "samples.md").read_text()
    written = {path.name: path.read_text() for path in tmp_path.rglob("*.json")}
    assert set(written) == {"result.json", "samples.json"}
    assert all("s3cret" not in text and "model_init_kwargs" in text for text in written.values())
