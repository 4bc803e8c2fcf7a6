"""The figures of the method's page are those that its script draws."""

import re
import runpy
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parents[1] / "docs"


def shapes(path: Path) -> list[str]:
    """The elements of a drawing and its labels, without coordinates, whose last digits a machine may round its way."""
    return re.findall(r"<(?!!)/?(\w+)|<!-- (.*?) -->", path.read_text(encoding="utf-8"))


def test_committed_figures_are_those_drawn(tmp_path: Path) -> None:
    runpy.run_path(str(DOCS / "draw_figures.py"))["main"](tmp_path)
    drawn = {path.name for path in tmp_path.glob("*.svg")}
    assert drawn == {path.name for path in (DOCS / "figures").iterdir()}
    assert drawn == set(re.findall(r"\(figures/(\w+\.svg)\)", (DOCS / "method.md").read_text(encoding="utf-8")))
    for name in sorted(drawn):
        expected = shapes(DOCS / "figures" / name)
        assert len(expected) > 20
        assert shapes(tmp_path / name) == expected, f"{name}: python docs/draw_figures.py"


def test_a_mean_is_drawn_with_its_bar() -> None:
    """As a border, which needs no font: an accent lies on its letter where there is no font with mathematics in it."""
    pytest.importorskip("docutils")
    mathml = runpy.run_path(str(DOCS / "conf.py"))["mathml"]
    bar = '<mrow class="bar"><mi>Z</mi></mrow>'
    assert bar in mathml(r"\bar{Z}{}_i - Z'_i") and bar not in mathml(r"Z'_i")
    assert "math .bar {" in (DOCS / "static" / "math.css").read_text(encoding="utf-8")
