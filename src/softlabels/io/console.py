"""What is shown: progress and tables on the error stream, results on the output stream."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

__all__ = ["echo", "printable", "progress_bar", "progress_console", "say", "show_table"]


def progress_console() -> Console:
    """Where progress is shown: the error stream."""
    from rich.console import Console

    return Console(stderr=True)


def say(console: Console | None, text: str) -> None:
    """Show a line as it is, whatever it holds; without a console nothing is shown."""
    if console is not None:
        console.print(text, highlight=False, markup=False, soft_wrap=True)


def progress_bar(console: Console | None) -> Progress:
    """Bars that say what is done of how much; tasks need the fields `speed` and `news`, texts.

    Without a console nothing is shown.
    """
    from rich import progress
    from rich.console import Console

    return progress.Progress(
        progress.SpinnerColumn(),
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TextColumn("{task.fields[speed]}"),
        progress.TimeElapsedColumn(),
        progress.TextColumn("left"),
        progress.TimeRemainingColumn(),
        progress.TextColumn("{task.fields[news]}"),
        console=console or Console(quiet=True),
        disable=console is None,
    )


def show_table(
    console: Console,
    headings: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    title: str,
    caption: str = "",
) -> None:
    """Show a table: names in the first column, numbers in the others; the caption is below it."""
    from rich.box import SIMPLE_HEAD
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=escape(title), caption=escape(caption), box=SIMPLE_HEAD, pad_edge=False)
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="left" if number == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*map(escape, row))
    console.print(table)


def printable(text: str) -> str:
    """Text of a file as a terminal may show it: without orders to it."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def echo(text: str) -> None:
    """Print a result, whose file names may be no Unicode; in JSON too, the escape stays valid."""
    print(text.encode("utf-8", "backslashreplace").decode())
