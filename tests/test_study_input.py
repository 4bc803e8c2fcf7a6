"""What `gcpo study` refuses, and that it names what there is instead, before anything is made."""

from pathlib import Path

import pytest

from gcpo.cli import main
from gcpo.commands import study as command
from gcpo.study.definitions import STUDIES


@pytest.mark.parametrize(
    ("flags", "wanted"),
    [
        (["trial", "--arms", "GRPO", "GCPO 2"], "`--arms` must be of 'GRPO', "),
        (["trial", "--arms", "GRPO", "GCPO 2"], "got 'GCPO 2'"),
        (["ablation", "trial", "--arms", "no weights"], "'GRPO x mean Upsilon', got 'no weights'"),
        (["samples", "--arms", "GRPO"], "`--arms` must not be given for `samples`"),
        (["all", "--arms", "GRPO"], "`--arms` must not be given for `samples`"),
        (["trial", "--seeds", "some"], "or one of reported, tuning, got 'some'"),
        (["trial", "--seeds", "reported", "tuning"], "or one of reported, tuning, got 'reported tuning'"),
        (["trial", "--seeds", "1", "0", "01"], "`--seeds` must be different numbers from 0 to 2**32 - 1, "),
        (["trial", "--seeds", "0", "-1"], "got '0 -1'"),
        (["trial", "--seeds", "1.5"], "got '1.5'"),
        (["trial", "--seeds", "4294967296"], "got '4294967296'"),
        (["trial", "--workers", "0"], "`--workers` must be at least 1, got 0"),
        (["trial", "--steps", "0"], "`--steps` must be at least 1"),
        (["trial", "--bed", "integrating", "--model_name_or_path", "."], "`--bed` has a model of its own: no `--model"),
        (["trial", "--bed", "integrating", "--dataset_name", "d"], "no `--dataset_name`"),
        (["trial", "--bed", "integrating", "--reward_funcs", "f.py:f"], "no `--reward_funcs`"),
        (
            ["trial", "--bed", "integrating", "--completion_tokens", "17"],
            "must have at least 18 tokens on `--bed integ",
        ),
        (["all", "--bed", "integrating"], "as right answers have, got 5 for 'GRPO, cut off at 5'"),
        (["trial", "--num_generations", "1"], "at least 2 generations"),
    ],
)
def test_what_is_not_there_is_refused_before_anything_is_made(
    flags: list[str],
    wanted: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(command, "perform", None)  # is not called
    assert main(["study", *flags, "--output_dir", str(tmp_path), "--work_dir", str(tmp_path)]) == 2
    assert wanted in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("seed: 5", "`--config` must not hold 'seed', which a study sets by itself: use `--seeds`"),
        ("num_generations: 4", "use `--num_generations`"),
        ("logging_steps: 2", "tables need every step"),
        ("beta: 0.1\nkappa: [", "`--config` must be a YAML file, got "),
        ("- beta", "`--config` must be a YAML file of options, got list"),
        ("kapa: 0.1", "kapa"),
        ("kappa: -1.0", "`kappa` must be"),
    ],
)
def test_options_that_no_run_could_have_are_refused_before_anything_is_made(
    text: str, wanted: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "perform", None)
    (tmp_path / "options.yaml").write_text(text)
    folder = tmp_path / "work"
    argv = ["study", "trial", "--bed", "integrating", "--config", str(tmp_path / "options.yaml")]
    assert main([*argv, "--work_dir", str(folder), "--output_dir", str(folder)]) == 2
    assert wanted in capsys.readouterr().err
    assert not folder.exists()


def test_arms_have_the_names_that_a_table_gives_them() -> None:
    found = STUDIES["trial"].only(["GRPO, as many seconds (n = 18)"])
    assert [arm.name for arm in found.arms] == ["GRPO", "GRPO, as many seconds"]


@pytest.mark.parametrize("flags", [["trial", "--bed", "sofa"], ["sofa"]])
def test_a_bed_or_a_study_that_is_not_there_is_refused_with_those_that_are(
    flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["study", *flags])
    assert stopped.value.code == 2
    message = capsys.readouterr().err
    assert "sofa" in message and ("integrating" if "--bed" in flags else "ablation") in message
