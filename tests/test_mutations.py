"""The list of planted mistakes fits the sources, and its table in docs/mutations.md is of this list."""

import pytest
from mutations import BEGIN, DOCUMENT, END, MUTATIONS, ROOT, Mutation, mutated


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.what)
def test_it_can_be_planted(mutation: Mutation) -> None:
    text = (ROOT / mutation.path).read_text()
    changed = mutated(mutation, text)
    differing = [k for k, (x, y) in enumerate(zip(text.splitlines(), changed.splitlines(), strict=True)) if x != y]
    assert len(differing) == 1
    compile(changed, mutation.path, "exec")


def test_the_table_holds_every_mutation_and_what_killed_it() -> None:
    rows = DOCUMENT.read_text().split(BEGIN)[1].split(END)[0].strip().splitlines()[2:]
    assert [row.split(" | ")[0].removeprefix("| ") for row in rows] == [mutation.what for mutation in MUTATIONS]
    for row in rows:
        path, _, name = row.rsplit("| ", 1)[1].strip(" |`").partition("::")
        assert f"def {name}(" in (ROOT / path).read_text(), f"no test {path}::{name}: run `make mutations`"


def test_at_least_twenty_and_no_two_alike() -> None:
    assert len({mutation.what for mutation in MUTATIONS}) == len(MUTATIONS) >= 20
