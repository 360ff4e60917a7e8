"""What the commands share: how arguments are read, and how a line is printed."""

import contextlib
import functools
import inspect
import io
import re
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

__all__ = [
    "UsageError",
    "call",
    "configured",
    "console",
    "metrics_line",
    "printable",
    "put",
    "speaks",
]

Result = TypeVar("Result")


class UsageError(ValueError):
    """The command line does not fit."""


def _tyro(target: Callable[..., Result], arguments: list[str], prog: str, **options: Any) -> Result:
    """Let tyro parse; its error, a box of lines, becomes one line."""
    import tyro

    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            result: Result = tyro.cli(target, args=arguments, prog=f"softlabels {prog}", **options)
            return result
    except SystemExit as stop:
        if not stop.code:
            raise
        raise UsageError(_unboxed(complaint.getvalue(), prog)) from stop


def call(command: Callable[..., int], arguments: list[str], prog: str) -> int:
    """Parse the arguments of a command, then run it, outside of what `_tyro` catches."""

    @functools.wraps(command)
    def bound(*positional: Any, **named: Any) -> inspect.BoundArguments:
        return inspect.signature(command).bind(*positional, **named)

    given = _tyro(bound, arguments, prog)
    return command(*given.args, **given.kwargs)


def _unboxed(text: str, prog: str) -> str:
    """The message in one of tyro's boxes, without borders and what is below its first rule."""
    inside = [line.strip("│╭╮╰╯ \t") for line in re.sub(r"\x1b\[[0-9;]*m", "", text).splitlines()]
    message: list[str] = []
    for line in inside[1:] or inside:
        if line and set(line) <= set("─"):
            break
        if line.strip("─"):
            message.append(line)
    words = re.sub(r"\s*\[type=.*?errors\.pydantic\.dev\S*", "", " ".join(message))
    words = re.sub(r"Error parsing \S+: \d+ validation errors? for \S+ (\S+)", r"\1:", words)
    return f"{words} (softlabels {prog} --help lists the options)"


def configured(
    arguments: list[str],
    prog: str,
    extended: Callable[[Any], Any] = lambda config: config,
    load: Callable[[str], dict[str, Any]] | None = None,
) -> Any:
    """A configuration: defaults, over them a recipe, over that the options.

    Args:
        arguments: The recipe and the options.
        prog: Name of the command.
        extended: Gives a configuration the further settings of the command.
        load: Gives the settings of the recipe; None: as they stand in it.
    """
    import tyro

    from softlabels.training.config import checked, load_recipe, parse, with_data, with_method
    from softlabels.training.settings import METHOD_SETTINGS

    values: dict[str, Any] = {}
    if arguments and not arguments[0].startswith("-"):
        values = (load or load_recipe)(arguments[0])
        arguments = arguments[1:]
    # Method and data decide which options there are, so they are looked for before tyro parses.
    given = _values_of(arguments, ("--method.kind", "--data.source", "--data.path"))
    if "--method.kind" in given:
        values = with_method(values, given["--method.kind"])
    values = with_data(values, given.get("--data.source"), given.get("--data.path"))
    default = extended(parse(values))
    config = _tyro(
        type(default),
        arguments,
        f"{prog} [RECIPE]",
        default=default,
        description=(
            f"{inspect.getdoc(type(default))} RECIPE is a YAML file or the name of a recipe in "
            "the package (`softlabels config` lists them); options override it. --method.kind is "
            f"one of {', '.join(METHOD_SETTINGS)}, or module:Class for one of your own; the help "
            "then shows that method's options, and with --data.source those of that source."
        ),
        config=(tyro.conf.AvoidSubcommands,),
    )
    return checked(config)


def _values_of(arguments: list[str], flags: Sequence[str]) -> dict[str, str]:
    """The values of some flags, as they stand among arguments."""
    found: dict[str, str] = {}
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=False):
        flag, equals, value = argument.partition("=")
        if flag in flags:
            found[flag] = value if equals else following
    return found


def console() -> Any:
    """Where progress is shown: the error stream."""
    from rich.console import Console

    return Console(stderr=True)


def speaks() -> bool:
    """Whether this is the one process of a run that prints its results."""
    from accelerate import PartialState

    return bool(PartialState().is_main_process)


def metrics_line(metrics: dict[str, float]) -> str:
    """The metrics of an evaluation."""
    parts = [f"top-1 {metrics['top1']:.2f} %", f"top-5 {metrics['top5']:.2f} %"]
    if "group_top1" in metrics:
        parts.append(f"group {metrics['group_top1']:.2f} %")
    return ", ".join([*parts, f"NLL {metrics['nll']:.3f} nats", f"ECE {metrics['ece']:.2f} %"])


def printable(text: str) -> str:
    """Text of a file as a terminal may show it: without orders to it."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def put(line: str) -> None:
    """Print a line whose file names may be no Unicode; in JSON too, the escape stays valid."""
    print(line.encode("utf-8", "backslashreplace").decode())
