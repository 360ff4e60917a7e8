"""What is shown on a terminal: lines and tables as they are, whatever they hold."""

import io

from rich.console import Console

from softlabels.io.console import echo, printable, say, show_table


def terminal() -> Console:
    return Console(file=io.StringIO(), width=60)


def shown(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_a_line_is_shown_as_it_is():
    console = terminal()
    text = f"[red]run[/] {'x' * 90}"
    say(console, text)
    assert shown(console) == f"{text}\n"
    say(None, text)


def test_a_table_has_every_cell_as_it_is_and_fits_the_terminal():
    console = terminal()
    rows = [("[bold]nkd", "71.2 ± 0.1"), ("n" * 90, "70.0")]
    show_table(console, ["method", "top-1 %"], rows, title="one [table]", caption="more [there]")
    lines = shown(console).splitlines()
    assert all(len(line) <= 60 for line in lines)
    text = "\n".join(lines)
    for part in ("one [table]", "more [there]", "[bold]nkd", "71.2 ± 0.1"):
        assert part in text
    assert text.count("n" * 40) == 2  # folded, not cut


def test_names_that_are_no_unicode_are_escaped(capsys):
    echo("run\udce9.png")
    assert capsys.readouterr().out == "run\\udce9.png\n"
    assert printable("a\x1b[2Jb") == "a\\x1b[2Jb"
