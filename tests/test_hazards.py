"""Bug classes that hit this field's losses: each is tried here or in a test that the table of docs/hazards.md names."""

import hazard_rows
import pytest
from hazard_rows import BEGIN, DOCUMENT, END, ROWS


def test_every_bug_class_is_tried() -> None:
    tried = {test.row for test in hazard_rows.collect()}
    assert tried == set(ROWS), f"rows without a test: {sorted(set(ROWS) - tried)}, unknown: {sorted(tried - set(ROWS))}"


def test_every_test_names_its_thread() -> None:
    nameless = [
        (test.row, test.place)
        for test in hazard_rows.collect()
        if not any(thread in test.docstring for thread in ROWS[test.row].threads.split())
    ]
    assert not nameless


def test_the_committed_table_is_current() -> None:
    committed = DOCUMENT.read_text().split(BEGIN)[1].split(END)[0].strip()
    assert committed == hazard_rows.table(), "run python tests/hazard_rows.py"


def test_the_collector_sees_a_mark(tmp_path, request: pytest.FixtureRequest) -> None:
    """A mark with several rows counts for each; one in a comment for none."""
    folder = tmp_path / "tests"
    folder.mkdir()
    source = '@pytest.mark.slow\n@pytest.mark.hazard(3, 4)\ndef test_a():\n    """x#1"""\n\n# @pytest.mark.hazard(5)\n'
    (folder / "test_x.py").write_text(source + "def test_b():\n    pass\n")
    found = hazard_rows.collect(folder)
    assert [(test.row, test.place, test.docstring) for test in found] == [
        (3, "tests/test_x.py::test_a", "x#1"),
        (4, "tests/test_x.py::test_a", "x#1"),
    ]
