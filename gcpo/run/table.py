"""Tables of text: in a terminal, and as Markdown. The first row holds the headings."""

import sys
from collections.abc import Sequence

Cells = Sequence[Sequence[str]]


def show(title: str, cells: Cells, *notes: str, sections: Sequence[int] = ()) -> None:
    """
    Print a table and the notes below it.

    Args:
        title: above the table.
        cells: rows of text, the headings first; all but the first column are aligned to the right.
        notes: texts to print after it.
        sections: rows, counted from the first below the headings, that a line is drawn above.
    """
    from rich.console import Console
    from rich.table import Table

    console = Console() if sys.stdout.isatty() else Console(width=180)  # a file has no width to fit
    table = Table(title=title)
    for column, heading in enumerate(cells[0]):
        table.add_column(heading, justify="left" if column == 0 else "right", no_wrap=column < 3)
    for number, row in enumerate(cells[1:]):
        if number in sections:
            table.add_section()
        table.add_row(*row)
    console.print(table)
    for note in notes:
        console.print(note)


def markdown(cells: Cells) -> list[str]:
    """The lines of a table in Markdown."""
    lines = [("| " if row[0] else "|") + " | ".join(row) + " |" for row in cells]
    return [lines[0], "|" + "---|" * len(cells[0]), *lines[1:]]
