"""Predicted times are the arithmetic that they say they are, and their table is current."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("triton")

import torch
import triton

from bench import predict
from bench.cards import CARDS, Card, one_pass, own_product, product, tiled
from bench.registry import MODELS, PUBLISHED, Case
from gcpo_kernels.sass import Counts

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT = ROOT / "docs" / "kernels.md"
BEGIN, END = "<!-- begin: python -m bench.predict -->", "<!-- end -->"
PINNED = f"triton=={triton.__version__}" in (ROOT / "constraints.txt").read_text().split()
# One multiplication and addition a nanosecond, a byte a nanosecond, 4 processors of 10 cycles a microsecond.
ROUND = Card(
    "round",
    flops=2e9,
    copy=1e9,
    cache=2e9,
    sms=4,
    lanes=100,
    exps=10,
    clock=1e7,
    issue=0.5,
    stream=0.5,
    own_product=0.5,
    staging=0,
    launch=1e-6,
    host=1e-3,
)

needs_machine_code = pytest.mark.skipif(
    bool(triton.knobs.runtime.interpret) or not PINNED,
    reason="instructions are counted in what the pinned version of Triton compiles, without TRITON_INTERPRET=1",
)


def counted(instructions: float, exps: float = 1.0) -> Counts:
    return Counts(16.0, instructions, exps, ((128, 4),), 0, 0, 0)


def test_fill_of_waves() -> None:
    assert tiled(128, 256, 128, 256, 4) == 1 / 4
    assert tiled(512, 512, 128, 256, 4) == 1  # 8 tiles, 2 waves
    assert tiled(512, 513, 128, 256, 4) == pytest.approx(513 / 768)  # 12 tiles, 3 waves


def test_a_pass_takes_its_bytes_or_its_instructions() -> None:
    assert one_pass(1000, 4, counted(1), ROUND) == pytest.approx(1000 * 4 / 0.5e9)
    # 400 instructions are 8 cycles of an SM, and four SMs have 4e7 cycles a second.
    assert one_pass(1000, 4, counted(400), ROUND) == pytest.approx(1000 * 8 / 4e7)
    # So do 80 exponentials.
    assert one_pass(1000, 4, counted(1, exps=80), ROUND) == pytest.approx(1000 * 8 / 4e7)


def test_a_product_waits_for_its_epilogue() -> None:
    """K = 1,000: a tile has 1000 / (1e9 / 4e7) cycles an element for its product, 40, and 10 for 500 instructions."""
    found = own_product(512, 512, 1000, counted(500), ROUND)
    assert found == pytest.approx(512 * 512 * 1000 / 1e9 * (1 + 10 / 40) / 0.5)


def test_linear_loss_by_hand() -> None:
    """Two tiles of 512 and 256 rows, H = 512, V = 1,000."""
    n, h, v = 768, 512, 1000
    g = n * h * v / 1e9
    parts = predict.linear_loss(n, h, v, ROUND, "two reads", [counted(1), counted(400)], 512)
    assert parts.pop("logits") == pytest.approx(g + 0.4 * 4 * n * v / 1e9)
    assert parts.pop("passes") == pytest.approx(n * v * (4 / 0.5e9 + 8 / 4e7))
    assert parts.pop("dX") == pytest.approx(g)  # 512 x 512 and 256 x 512 fill four processors
    assert parts.pop("dW") == pytest.approx(g + 0.5 * 8 * v * h / 1e9)
    assert parts.pop("cast") == pytest.approx(6 * v * h / 1e9)
    assert parts.pop("around") == pytest.approx(14 * n * h / 1e9)
    assert parts.pop("launches") == pytest.approx((2 * 7 + 10) * 1e-6)
    assert parts == {}
    single = predict.linear_loss(n, h, v, ROUND, "one read", [counted(1)], n)
    assert single["passes"] == pytest.approx(n * v * 6 / 0.5e9)
    assert single["dW"] == pytest.approx(g) and single["cast"] == 0  # straight to the parameter's type
    fused = predict.linear_loss(n, h, v, ROUND, "epilogue", [counted(500)], n)
    assert "passes" not in fused and fused["logits"] == pytest.approx(own_product(n, v, h, counted(500), ROUND))


def test_scoring_by_hand() -> None:
    """2,049 rows and 5,000 columns are four slices; with a second of host time each, that is what takes longest."""
    assert predict.scoring_in_slices(2049, 1, 5000, replace(ROUND, host=1.0), counted(1)) == 4.0
    quick = replace(ROUND, host=0.0)
    assert predict.scoring_in_slices(512, 64, 512, quick, counted(1, exps=0)) == pytest.approx(
        512 * 512 * (64 / 1e9 + 4 / 2e9) + 2e-6
    )


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.name)
@pytest.mark.parametrize("how", ["two reads", "one read", "epilogue"])
def test_more_work_takes_longer(how: str, card: Card) -> None:
    for n, model in PUBLISHED:
        h, v = MODELS[model]

        def seconds(
            each: float, on: Card = card, tokens: int = n, rows: int = 2048, hidden: int = h, vocab: int = v
        ) -> float:
            found = [counted(each)] * len(predict._NEEDS[how])
            return sum(predict.linear_loss(tokens, hidden, vocab, on, how, found, rows).values())

        usual = seconds(15)
        assert usual > 3 * product(n, v, h, card)
        assert seconds(10) <= usual < seconds(100)
        assert usual < seconds(15, tokens=2 * n) and usual < seconds(15, hidden=2 * h)
        assert usual < seconds(15, rows=256)
        slower = {"flops": card.flops / 2, "copy": card.copy / 2, "launch": 1e-3}
        assert all(usual < seconds(15, replace(card, **{name: value})) for name, value in slower.items())


def test_tiles_hold_every_row() -> None:
    assert predict.heights(700, 256) == [256, 256, 188]
    assert predict.heights(256, 256) == [256]


@needs_machine_code
def test_what_is_not_there_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of a kernel appear with it."""
    monkeypatch.setattr(predict, "counts", lambda name: None)
    assert not any("linear" in row.what or "selective" in row.what for row in predict.rows())
    monkeypatch.setattr(predict, "counts", lambda name: counted(14) if name.startswith("epilogue") else None)
    ways = [row.how.split(" (")[0] for row in predict.rows() if "linear" in row.what]
    assert ways == ["epilogue"] * 4 + ["one product"] * 4


@needs_machine_code
def test_no_prediction_is_below_its_floor() -> None:
    rows = list(predict.rows())
    assert len(rows) > 15
    for row in rows:
        assert all(seconds >= floor > 0 for floor, seconds in row.times.values()), row
        assert row.times["H200"][0] <= row.times["H100"][0]


def test_no_result_no_column(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Measured times appear once a result of that card is kept, by its case and phase; a CPU's never."""
    monkeypatch.setattr(predict, "counts", lambda name: counted(14))
    assert "measured" not in predict.table(tmp_path)
    n, model = PUBLISHED[1]
    h, v = MODELS[model]
    case = Case("scoring", model, tokens=n // 8, hidden=h, vocab=v, dtype=torch.bfloat16)
    row = {"name": "gcpo", "times": {"forward": {"median": 9.87}}}
    for folder, device in (("cpu", "CPU: H-something, 2 thread(s)"), ("h100", "NVIDIA H100 80GB HBM3")):
        (tmp_path / folder).mkdir()
        result = {"environment": {"device": device}, "cases": [{"key": case.key, "results": [row]}]}
        (tmp_path / folder / "kernels.json").write_text(json.dumps(result))
    table = predict.table(tmp_path)
    assert "H100: **measured**" in table and "H200: **measured**" not in table
    held = [line for line in table.splitlines() if "9.87 ms" in line]
    assert held and all(f"{n} x {h} x {v}" in line and "linear_logprob" in line for line in held)
    assert re.search(r"9\.87 ms, \d\.\d\d of predicted \|$", held[0])
    columns = {line.count("|") for line in table.splitlines()}
    assert len(columns) == 1


@needs_machine_code
def test_the_committed_table_is_current() -> None:
    committed = DOCUMENT.read_text().split(BEGIN)[1].split(END)[0].strip()
    assert committed == predict.table(), "run python -m bench.predict and paste its table"
