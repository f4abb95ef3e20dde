"""The one writer of tables: lines of cells as text for a terminal, as Markdown, and as CSV."""

import csv
import io
from collections.abc import Collection, Iterable, Sequence

Cell = str | float | bool | None
_FORMULA = ("=", "+", "-", "@", "\t", "\r")


def as_text(lines: Iterable[Sequence[str]], left: Collection[int] = ()) -> list[str]:
    """Lines of text with the cells of a column below one another, the columns of `left` from the left."""
    return ["  ".join(line) for line in _padded(list(lines), left)]


def as_markdown(lines: Iterable[Sequence[str]], left: Collection[int] = (0,), padded: bool = False) -> str:
    """A Markdown table whose first line is its header; its cells are escaped already.

    Args:
        left: columns that are shown from the left, the others from the right.
        padded: have the columns below one another in the text, too, for readers of the text itself.
    """
    header, *rows = lines
    if padded:
        header, *rows = _padded([header, *rows], range(len(header)))
        widths = [max(0, len(cell) - 1) for cell in header]
        rule = [f"{'-' * width}{'-' if i in left else ':'}" for i, width in enumerate(widths)]
    else:
        rule = [":--" if i in left else "--:" for i in range(len(header))]
    return "\n".join(f"| {' | '.join(line)} |" for line in [header, rule, *rows])


def as_csv(lines: Iterable[Sequence[Cell]]) -> str:
    """Comma-separated values; a text that a spreadsheet would run as a formula is marked as a text."""
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerows(map(_plain, lines))
    return file.getvalue().removesuffix("\n")


def _padded(lines: Sequence[Sequence[str]], left: Collection[int]) -> list[list[str]]:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        [cell.ljust(width) if i in left else cell.rjust(width)
         for i, (cell, width) in enumerate(zip(line, widths, strict=True))]
        for line in lines
    ]  # fmt: skip


def _plain(line: Sequence[Cell]) -> list[Cell]:
    """Cells that a spreadsheet takes for numbers and texts."""
    return ["'" + cell if isinstance(cell, str) and cell.startswith(_FORMULA) else cell for cell in line]
