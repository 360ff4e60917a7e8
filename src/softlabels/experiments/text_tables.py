"""Tables as texts: Markdown for people, CSV for programs."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence

__all__ = ["csv_table", "markdown_table"]


def markdown_table(
    headings: Sequence[str], rows: Iterable[Iterable[str]], *, names: int = 1
) -> list[str]:
    """The lines of a table: names in so many columns, numbers in the others."""
    rule = [*["---"] * names, *["---:"] * (len(headings) - names)]
    escaped = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    return [f"| {' | '.join(row)} |" for row in (headings, rule, *escaped)]


def csv_table(headings: Sequence[str], rows: Iterable[Iterable[object]]) -> str:
    """A line for each row; None is an empty cell."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([headings, *rows])
    return text.getvalue()
