"""docs/reproduce.md is true: its commands, the files that it names, and the figures that texts take from these."""

import argparse
import csv
import fnmatch
import importlib
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from test_hygiene import code_in

from bench import fidelity_colliders, report, step_overhead
from gcpo import cli
from gcpo.commands.flags import TrainParser
from gcpo.reports.intervals import interval

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "reproduce.md").read_text(encoding="utf-8")
OPTIONS = (ROOT / "docs" / "options.md").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")
KERNELS = (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8")
FINDINGS = (ROOT / "docs" / "studies.md").read_text(encoding="utf-8")
COMMANDS = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
RESULTS = ROOT / "bench" / "results" / "cpu"
STUDIES = ROOT / "docs" / "results" / "studies"
FOLDERS = ("bench/results/", "docs/results/")  # where results are kept
COMMAND = re.compile(r"(?:\w+=\S+ )*(?:python|gcpo|make) \S")


def commands() -> list[list[str]]:
    """The words of every command on the page, without variables that stand before it."""
    found = [shlex.split(line) for line in code_in(PAGE) if COMMAND.match(line)]
    return [words[next(k for k, word in enumerate(words) if "=" not in word) :] for words in found]


def named_results() -> set[str]:
    """Files and patterns of files, in the folders of results, that the page names."""
    return {span for span in code_in(PAGE) if span.startswith(FOLDERS) and "." in span.rsplit("/", 1)[1]}


def load(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / name).read_text())


# ---------------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------------


def test_every_file_that_is_named_exists() -> None:
    missing = [name for name in named_results() if not list(ROOT.glob(name))]
    assert len(named_results()) >= 7
    assert not missing


def test_every_committed_result_is_named() -> None:
    command = ["git", "-C", str(ROOT), "ls-files", *FOLDERS]
    try:
        tracked = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    named = named_results()
    assert [name for name in tracked if not any(fnmatch.fnmatchcase(name, pattern) for pattern in named)] == []


def test_tables_beside_the_files_are_those_of_the_files() -> None:
    for path in RESULTS.glob("step_overhead_*.json"):
        assert (
            step_overhead.show(json.loads(path.read_text())["results"]) == path.with_suffix(".md").read_text().strip()
        )
    assert report.table(load("kernels.json")) == (RESULTS / "kernels.md").read_text().strip()


# ---------------------------------------------------------------------------------------------------------------------
# Commands
# ---------------------------------------------------------------------------------------------------------------------


class Parsed(BaseException):
    """Raised in place of doing what a command line asks for, once its flags are read."""

    def __init__(self, flags: argparse.Namespace):
        super().__init__()
        self.flags = flags


@pytest.fixture
def stops_after_parsing(monkeypatch: pytest.MonkeyPatch) -> None:
    real = argparse.ArgumentParser.parse_args

    def parse_args(self: argparse.ArgumentParser, args: Any = None, namespace: Any = None) -> Any:
        raise Parsed(real(self, args, namespace))

    read = TrainParser.parse_args_and_config

    def parse_args_and_config(self: TrainParser, *args: Any, **kwargs: Any) -> Any:
        raise Parsed(argparse.Namespace(groups=read(self, *args, **kwargs)))

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
    monkeypatch.setattr(TrainParser, "parse_args_and_config", parse_args_and_config)


def flags_of(words: list[str], monkeypatch: pytest.MonkeyPatch) -> argparse.Namespace | None:
    """
    What a command's own parser makes of it; None for one that has none, and no flags. Raises SystemExit for what it
    does not take.
    """
    if words[0] == "make":
        return make_flags(words, monkeypatch)
    if words[0] == "gcpo":
        assert words[1] in cli.COMMANDS
        if len(words) == 2:  # a command's name, in a sentence
            return None
        with pytest.raises(Parsed) as caught:
            cli.main(words[1:])
        return caught.value.flags
    name, given = (words[2], words[3:]) if words[1] == "-m" else (words[1], words[2:])
    path = ROOT / (name.replace(".", "/") + ".py" if words[1] == "-m" else name)
    source = path.read_text()
    assert '__name__ == "__main__"' in source, f"{path.name} does nothing when it is run"
    if "argparse" not in source:
        assert not given, f"{path.name} reads no flags"
        return None
    module = importlib.import_module(name if words[1] == "-m" else path.stem)  # scripts are those of this folder
    monkeypatch.setattr(sys, "argv", [str(path), *given])
    with pytest.raises(Parsed) as caught:
        module.main()
    return caught.value.flags


def make_flags(words: list[str], monkeypatch: pytest.MonkeyPatch) -> argparse.Namespace | None:
    """The same for what a target of the Makefile hands ARGS to."""
    makefile = (ROOT / "Makefile").read_text()
    recipe = re.search(rf"^{re.escape(words[1])}:[^\n]*\n((?:\t[^\n]*\n)+)", makefile, re.MULTILINE)
    if len(words) == 2:
        assert words[1] == "install" or recipe is not None, f"no target {words[1]}"
        return None
    assert recipe is not None
    assert words[2].startswith("ARGS=")
    (line,) = [line for line in recipe[1].splitlines() if "$(ARGS)" in line and "$(if" not in line]
    given = shlex.split(words[2].removeprefix("ARGS="))
    if "pytest" in line:
        assert all((ROOT / name).exists() for name in given)
        return None
    line = re.sub(r"(--[\w-]+ )?\$\(\w+\)(?!/)", "", line.replace("$(BIN)/", ""))  # ARGS, and flags set by variables
    return flags_of([*line.split(), *given], monkeypatch)


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_commands_are_accepted(words: list[str], stops_after_parsing: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every flag, every choice, and what is required: by the command's own parser, after which it stops."""
    flags_of(words, monkeypatch)


@pytest.mark.parametrize(
    "line",
    [
        "gcpo study ablation --quik",
        "gcpo plan --model_name_or_path 1.5b --lenghts full",
        "python -m bench.step_overhead --only 'GCPO, default'",
        "python -m bench.gpu_programme",
        "make demo ARGS='--sede 1'",
        "make fuzz ARGS='--seeds 1'",
    ],
)
def test_wrong_commands_are_found(line: str, stops_after_parsing: None, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit):
        flags_of(shlex.split(line), monkeypatch)


def test_commands_are_those_that_made_the_files(stops_after_parsing: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A result file holds the command that made it, or its settings."""
    shown = commands()
    for name in ("kernels.json", "fidelity_smollm2.json", "fidelity_colliders_smollm2.json"):
        assert shlex.split(load(name)["command"]) in shown, name
    made = {}
    for words in shown:
        if words[:3] == ["python", "-m", "bench.step_overhead"] and "--out" in words:
            flags = vars(flags_of(words, monkeypatch))
            made[ROOT / flags.pop("out")] = flags
    assert set(made) == set(RESULTS.parent.glob("*/step_overhead_*.json"))
    for path, flags in made.items():
        threads = 2 if path.parent == RESULTS else 16
        assert json.loads(path.read_text())["settings"] == flags | {"threads": threads}, path
    studies = list(STUDIES.glob("*.json"))
    assert studies
    assert [path.name for path in studies if shlex.split(json.loads(path.read_text())["command"]) not in shown] == []


# ---------------------------------------------------------------------------------------------------------------------
# Figures in tables
# ---------------------------------------------------------------------------------------------------------------------


def tables(text: str) -> list[list[dict[str, str]]]:
    """Every table of a page: rows by column heading, the first column's being ""."""
    found = []
    for block in re.findall(r"(?:^\|[^\n]*\n)+", text, re.MULTILINE):
        lines = [[cell.strip() for cell in line.strip()[1:-1].split(" |")] for line in block.splitlines()]
        found.append([{"": row[0], **dict(zip(lines[0][1:], row[1:], strict=True))} for row in lines[2:]])
    return found


def table_with(text: str, *columns: str) -> list[dict[str, str]]:
    """The one table that has these columns."""
    (found,) = [table for table in tables(text) if table and set(columns) <= set(table[0])]
    return found


def shows(cell: str, value: float) -> bool:
    """Whether a cell is a number, rounded to the digits it shows, once or from the two digits of a result's table."""
    number = re.fullmatch(r"(-?[\d,]+(?:\.(\d+))?)(?:x|%| [kGM]?B| ms| us| TFLOP)?", cell)
    assert number is not None, f"{cell!r} is no number"
    shown, unit = float(number[1].replace(",", "")), 10.0 ** -len(number[2] or "")
    return min(abs(shown - value), abs(shown - round(value, 2))) <= 0.5 * unit * (1 + 1e-9)


def wrong_cells(table: list[dict[str, str]], values: dict[str, dict[str, float]]) -> list[str]:
    """Cells that do not show what a file holds; `values` by the row's first cell, and by column."""
    assert [row[""] for row in table] == list(values)
    return [
        f"{label}, {column}: {row[column]}, not {value}"
        for row, (label, columns) in zip(table, values.items(), strict=True)
        for column, value in columns.items()
        if not shows(row[column], value)
    ]


def step_values(result: dict[str, Any]) -> dict[str, float]:
    """A row of a step-overhead table, by the headings of the texts."""
    return {
        "s per step": result["step_seconds"]["median"],
        "to GRPO": result["ratio"]["median"],
        "to GRPO, same savings": result["ratio_same_savings"]["median"],
        "planned": result["predicted"]["ratio"],
        **{phase: result["seconds"][phase]["median"] for phase in step_overhead.PHASES},
        "loss, ms per token": result["loss_ms_per_token"]["median"],
        "read by the loss": result["tokens"]["trained"],
        "padding": result["tokens"]["trained_padding"],
        "tokens scored": result["scored"],
        "to one pass under q": result["scored_to_one_pass"],
    }


@pytest.mark.parametrize(
    ("section", "file"),
    [("32 tokens", "step_overhead_smollm2.json"), ("512 tokens", "step_overhead_smollm2_512.json")],
)
def test_step_overhead(section: str, file: str) -> None:
    results = load(file)["results"]
    text = OPTIONS.split(f"### Completions of {section}\n")[1].split("\n### ")[0]
    table = table_with(text, "s per step", "planned")
    names = [row[""].replace("`", "") for row in table]
    assert set(names) == set(results) <= set(step_overhead.ROWS)  # what `--only` takes
    values = {row[""]: step_values(results[name]) for row, name in zip(table, names, strict=True)}
    values = {label: {c: v for c, v in row.items() if c in table[0]} for label, row in values.items()}
    assert min(map(len, values.values())) >= 9
    assert wrong_cells(table, values) == []


def test_the_readmes_table() -> None:
    """Seconds of a step from their files, pass@1 from the demo's table."""
    score, *steps = table_with(README, "GRPO", "GCPO")
    (shown,) = [row for row in table_with(COMMANDS, "before", "GRPO", "GCPO") if row[""] == "pass@1, held out"]
    assert (score["GRPO"], score["GCPO"]) == (shown["GRPO"], shown["GCPO"]) and shown["before"] in score[""]
    shown = (("32 tokens", "", "GRPO"), ("512 tokens", "_512", "GRPO"), ("same savings", "_512", "GRPO, same savings"))
    for row, (words, file, other) in zip(steps, shown, strict=True):
        assert words in row[""]
        results = load(f"step_overhead_smollm2{file}.json")["results"]
        grpo, gcpo = (step_values(results[name]) for name in (other, "GCPO, defaults"))
        assert shows(row["GRPO"], grpo["s per step"]) and shows(row["GCPO"], gcpo["s per step"])
        assert shows(row["compared"].split("]")[0].removeprefix("["), gcpo[f"to {other}"])


UPSILON = {
    "`sampled`, m = 1, against 6 other samples": "sampled, m = 1 (against 6 others)",
    "`sampled`, m = 6, against 6 other samples": "sampled, m = 6 (against 6 others)",
    "no projection: alpha s(z_i, zbar)": "no projection (or 1 collider)",
    "`scored`": "scored",
    "`scored`, parallel contexts": "scored, parallel",
    "`scored`, 32 tokens of each candidate": "scored, 32 tokens of each",
    "`scored`, 16 tokens of each candidate": "scored, 16 tokens of each",
    "`loo` (the default)": "loo",
    '`loo`, `baseline="mean"`': "loo, baseline mean",
    "`loo`, other colliders": "loo, other colliders",
    "`loo`, 2 colliders": "loo, 2 colliders",
}
LOG_P = {
    "full contexts, all (the truth)": "scored",
    "the same, other colliders": "scored, other colliders",
    "32 tokens of each candidate": "scored, 32 tokens of each",
    "16 tokens of each candidate": "scored, 16 tokens of each",
    "parallel contexts": "scored, parallel",
    "1 context drawn": "1 context drawn",
    "parallel, 1 context drawn (the defaults)": "parallel, 1 context drawn",
}


def test_fidelity_of_upsilon() -> None:
    content = load("fidelity_smollm2.json")
    # Column headings repeat: the second "within a group" is that of the mean over tokens.
    text = OPTIONS.replace("| mean: correlation | within a group | mean abs. difference |", "| m: r | m: in | m: MAD |")
    assert text != OPTIONS
    table = table_with(text, "last: correlation")
    fields = {"correlation": "pearson", "within a group": "pearson_within", "mean abs. difference": "mad"}
    columns = {
        "last": ("last: correlation", "within a group", "mean abs. difference"),
        "mean": ("m: r", "m: in", "m: MAD"),
    }
    values: dict[str, dict[str, float]] = {}
    for row in table:
        name = UPSILON[row[""]]
        values[row[""]] = {
            column: content["upsilon"][representation][name][field]
            for representation, names in columns.items()
            for column, field in zip(names, fields.values(), strict=True)
        }
        if row["tokens"]:
            values[row[""]]["tokens"] = tokens(content, content["upsilon"]["last"][name]["variant"])
    assert list(values) == list(UPSILON)
    assert wrong_cells(table, values) == []


def test_fidelity_of_the_causal_reference() -> None:
    content = load("fidelity_smollm2.json")
    table = table_with(OPTIONS, "correlation of d")
    values = {}
    for label, name in LOG_P.items():
        row = content["log_p"][name]
        values[label] = {
            "correlation": row["pearson"],
            "mean abs. difference": row["mad"],
            "correlation of d": row["pearson_d"],
            "sign of d": row["sign_d"],
            "clamped": 100 * row["clamped"],
            "tokens": tokens(content, name),
        }
    assert wrong_cells(table, values) == []


def test_what_colliders_say() -> None:
    """All lengths and choices for the projection, and what else is shown of the default length."""
    content = load("fidelity_colliders_smollm2.json")
    rows = {fidelity_colliders.label(row): row for row in content["colliders"]}
    table = table_with(OPTIONS, "squared weight", "largest token")
    shown = [rows[row[""]] for row in table]
    plain = [label for label, row in rows.items() if row["target"] == "projection"]
    assert len(plain) == 15 and set(plain) < {row[""] for row in table}
    assert {row["target"] for row in shown} == {"projection", "context", "ensemble"}
    values = {}
    for row, own in zip(table, shown, strict=True):
        fields = {heading: own[field] for heading, (field, _) in fidelity_colliders.COLUMNS.items()}
        percent = {heading for heading, (_, form) in fidelity_colliders.COLUMNS.items() if form.endswith("%")}
        values[row[""]] = {heading: value * (100 if heading in percent else 1) for heading, value in fields.items()}
    assert wrong_cells(table, values) == []


def test_what_a_plan_says_of_colliders(tmp_path: Path) -> None:
    def seconds(*flags: str) -> dict[str, float]:
        common = ("--model_name_or_path", "1.5b", "--gpu", "h100", "--num_generations", "8")
        out = tmp_path / "plan.json"
        assert cli.main(["plan", *common, *flags, "--output", str(out)]) == 0
        content = json.loads(out.read_text())
        found = {name: sum(cost["seconds"] for cost in content[name]["costs"]) for name in ("grpo", "gcpo")}
        return found | {"collider": content["lengths"]["collider"]}

    table = table_with(OPTIONS, "lengths drawn")
    drawn, longer = ("--lengths", "lognormal"), ("--collider_max_completion_length", "256")
    values = {}
    savings = ("--kappa", "0", "--estimator", "none", "--fused_loss", "true", "--padding_free", "true")
    (same,) = re.findall(r"`padding_free`, it is ([\d.]+) in both rows", OPTIONS)
    for row in table:
        size = ("--max_completion_length", row[""].split()[0].replace(",", ""))
        found = {
            "seconds to GRPO": seconds(*size),
            "lengths drawn": seconds(*size, *drawn),
            "256-token colliders": seconds(*size, *longer),
            "the same, lengths drawn": seconds(*size, *drawn, *longer),
        }
        values[row[""]] = {name: one["gcpo"] / one["grpo"] for name, one in found.items()}
        values[row[""]]["tokens of a collider"] = found["lengths drawn"]["collider"]
        assert shows(same, found["lengths drawn"]["gcpo"] / seconds(*size, *drawn, *savings)["gcpo"])
    assert len(values) == 2 and wrong_cells(table, values) == []


def tokens(content: dict[str, Any], variant: str) -> float:
    cost = content["costs"][variant]
    return cost["tokens_query"] + cost["tokens_contexts"]


def study(name: str) -> list[dict[str, str]]:
    with (STUDIES / f"{name}.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_the_ablation_is_that_of_its_file() -> None:
    shown = table_with(FINDINGS, "pass@1, held out", "difference from GRPO")
    kept = [(row["arm"], row["pass@1, held out"], row["difference"]) for row in study("ablation")]
    assert [tuple(row.values()) for row in shown] == kept


def test_the_trial_is_that_of_its_file() -> None:
    shown, kept = table_with(FINDINGS, "seeds", "Upsilon and reward"), study("integrating/trial")
    names = {"": "arm", "pass@1": "pass@1, held out"}
    for row, other in zip(shown, kept, strict=True):
        assert {names.get(column, column): cell for column, cell in row.items()}.items() <= other.items()
    results = json.loads((STUDIES / "integrating" / "trial.json").read_text())["results"]
    scores = {arm: [result["pass_at_1"] for result in found] for arm, found in results.items()}
    # Seeds that were run after the arm had looked good.
    fresh = [a - b for a, b in zip(scores["felt, to the ensemble"][4:], scores["GRPO"][4:], strict=True)]
    assert f"give {interval(fresh).mean:+.3f} ± {interval(fresh).half_text}." in FINDINGS
    third = [f"{scores[arm][3]:.3f}" for arm in ("kl_clip = 1", "GRPO", "GCPO")]
    assert "seed 3 comes to {}, where GRPO has {} and the defaults {}.".format(*third) in FINDINGS


def test_comparisons_are_counted_right() -> None:
    """Those that several studies of one bed share count once; so says every text that gives a number."""
    rows = [row for path in STUDIES.glob("*.csv") for row in study(path.stem) if row.get("difference")]
    found = {tuple(row.values())[1:3] for row in rows}  # score and difference
    differences = [[float(part) for part in shown.split(" ± ")] for _, shown in found]
    assert [mean for mean, width in differences if abs(mean) > width] == [-0.030]
    trial = sum(bool(row["difference"]) for row in study("integrating/trial"))
    texts = (README, FINDINGS, (ROOT / "docs" / "faq.md").read_text(encoding="utf-8"))
    numbers = [re.findall(r"(\d+) (?:different )?comparisons", text) for text in texts]
    assert numbers == [[str(trial)], [str(trial), str(len(found))], [str(trial), str(len(found))]]


def test_floors_are_arithmetic() -> None:
    """What docs/kernels.md says that a launch moves, from the formulas beside it, and its time at the assumed rates."""
    rates = re.search(r"([\d.]+) TB/s of memory traffic and (\d+) TFLOP/s", KERNELS)
    assert rates is not None
    bandwidth, products = float(rates[1]) * 1e12, float(rates[2]) * 1e12
    b = 64
    n, contexts = b * 4096, 4
    rows, hidden, vocab = 8192, 1536, 151_936
    group, width, blocks = 32 * 8, 3584, 3584 // 512  # P n, H, blocks of H
    moved = {
        "`token_loss`": n * (21 + 4 * contexts),
        "`token_loss`, ratio per sequence": n * (21 + 4 * contexts) + 9 * n,
        "`token_loss_finish`": 28 * b * 8,
        "`token_loss_backward`": 8 * n,
        "three products": 6 * rows * hidden * vocab,
        "`logprob_forward`": 4 * rows * vocab,
        "`logprob_backward`": 6 * rows * vocab,
        "`softmax_once`": 6 * rows * vocab,
        "`product`, scoring": 2 * rows * hidden * vocab,
        "`logprob_forward`, `selective_logprob`": 2 * rows * vocab,
        "`logprob_backward`, `selective_logprob`": 4 * rows * vocab,
        "`causal_weights`": 2 * group * width * (1 + contexts) + 12 * group * blocks,
        "`causal_weights_finish`": 12 * group * blocks + 16 * group,
        "`coefficients`": 5 * group * contexts,
        "`causal_weights_backward`": 4 * group * width * (1 + contexts),
        "`leave_one_out`": 6 * group * width,
    }
    units = {"kB": 1e3, "MB": 1e6, "GB": 1e9, "TFLOP": 1e12, "us": 1e-6, "ms": 1e-3}
    table = [row | {"": row[""]} for row in table_with(KERNELS, "moves", "floor")]
    values: dict[str, dict[str, float]] = {}
    for row in table:
        amount = moved[row[""]]
        values[row[""]] = {"moves": amount / units[row["moves"].split()[1]]}
        if row["floor"] != "launch":
            seconds = amount / (products if row["moves"].endswith("TFLOP") else bandwidth)
            values[row[""]]["floor"] = seconds / units[row["floor"].split()[1]]
    assert list(values) == list(moved)
    assert wrong_cells(table, values) == []


def test_wrong_figures_are_found() -> None:
    assert shows("1.18x", 1.1764) and not shows("1.18x", 1.186)
    assert shows("12.5x", 12.538) and shows("4,292", 4291.6) and shows("4.5%", 4.545)
    assert not shows("4,292", 4293.0)
    table = tables("| a | b |\n|---|---|\n| x | 1.0 |\n")[0]
    assert wrong_cells(table, {"x": {"b": 1.04}}) == [] and len(wrong_cells(table, {"x": {"b": 1.06}})) == 1


# ---------------------------------------------------------------------------------------------------------------------
# The worked example of docs/adding_a_kernel.md
# ---------------------------------------------------------------------------------------------------------------------

WORKED = re.findall(
    r"^```python\n(.*?)^```$", (ROOT / "docs" / "adding_a_kernel.md").read_text(), re.DOTALL | re.MULTILINE
)
# Its blocks, put where the page says, and its function held against the float64 reference. Read from the folder given.
RUN = """
import importlib.util, sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
import pytest, torch
from torch import Tensor
from gcpo_kernels import api, maths, reference
from gcpo_kernels.checks import check_mask
from gcpo_kernels.testing import assert_close_to_truth, assert_gradient, make_token_inputs, poison

folder = Path(sys.argv[1])
spec = importlib.util.spec_from_file_location("sequence", folder / "kernel.py")
sequence = importlib.util.module_from_spec(spec)
sys.modules["sequence"] = sequence
spec.loader.exec_module(sequence)
naive = dict(vars(reference))
exec((folder / "reference.py").read_text(), naive)
careful = dict(vars(maths))
exec((folder / "maths.py").read_text(), careful)
operators = {"torch": torch, "Tensor": Tensor, "Any": Any, "sequence": sequence}
exec((folder / "operator.py").read_text(), operators)
public = dict(vars(api)) | {
    "check_mask": check_mask,
    "maths": SimpleNamespace(sequence_logprob=careful["sequence_logprob"]),
    "triton_ops": SimpleNamespace(triton_sequence_logprob=operators["triton_sequence_logprob"]),
}
exec((folder / "api.py").read_text(), public)
function = public["sequence_logprob"]
for penalty in (0.0, 0.6, 1.0):
    for tokens in (1, 512, 513):
        inputs = poison(make_token_inputs(4, tokens), float("nan"), "logp")
        clean = make_token_inputs(4, tokens)
        results = []
        for x, call in (
            (clean["logp"].double(), naive["sequence_logprob"]),
            (inputs["logp"], partial(function, backend="torch")),
            (inputs["logp"], partial(function, backend="triton")),
        ):
            leaf = x.detach().clone().requires_grad_()
            out = call(leaf, clean["mask"], length_penalty=penalty)
            (out * torch.linspace(-1.0, 2.0, 4)).sum().backward()
            results.append((out.detach(), leaf.grad))
        for ours in results[1:]:
            assert_close_to_truth(ours[0], results[0][0])
            assert_gradient(ours[1], results[0][1])
for wrong in ({"mask": torch.ones(3)}, {"length_penalty": -1.0}):
    with pytest.raises(ValueError, match="`" + next(iter(wrong))):
        function(**({"logp": torch.zeros(4, 5), "mask": torch.ones(4, 5)} | wrong))
arguments = (clean["logp"].requires_grad_(), clean["mask"], 0.6)
torch.library.opcheck(operators["triton_sequence_logprob"], arguments)
print("right")
"""


def worked(text: str) -> str:
    (block,) = [block for block in WORKED if text in block]
    return block


def test_the_worked_example_is_right(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    files = {
        "kernel": "@triton.jit",
        "reference": "_wide(",
        "maths": "compute_dtype(",
        "operator": "custom_op",
        "api": "use_triton(",
    }
    for name, text in files.items():
        (tmp_path / f"{name}.py").write_text(worked(text))
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-c", RUN, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.stdout == "right\n", done.stdout + done.stderr


@pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="kernels cannot be compiled under TRITON_INTERPRET=1"
)
def test_the_worked_example_compiles(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    from gcpo_kernels import targets

    (tmp_path / "sequence.py").write_text(worked("@triton.jit"))
    spec = importlib.util.spec_from_file_location("sequence", tmp_path / "sequence.py")
    assert spec is not None and spec.loader is not None
    sequence: ModuleType = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sequence)
    specimen = eval(worked("Specimen("), {"Specimen": targets.Specimen, "sequence": sequence})
    report_of = targets.compile_for(specimen, targets.TARGETS["sm_90"])
    assert report_of.stack == 0 and report_of.narrow_offsets == () and report_of.registers <= 64
