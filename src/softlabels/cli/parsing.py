"""What the commands share: how arguments are read, and how mistakes in them are told."""

from __future__ import annotations

import difflib
import inspect
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import make_dataclass
from itertools import zip_longest
from typing import Annotated, Any, TypeVar, get_args

import tyro
from pydantic import BaseModel, Field, ValidationError, validate_call
from pydantic.fields import FieldInfo

from softlabels.io.records import problem_of

__all__ = ["Count", "UsageError", "command", "configured", "metrics_line"]

Result = TypeVar("Result")
Count = Annotated[int, Field(ge=1)]
_WIDTH = 80

# The settings that most runs give, in the order of the help, some with a shorter option.
_MOST_USED = {
    "--data.path": "--data",
    "--student.name": "--student",
    "--method.kind": "--method",
    "--teacher.name": "--teacher",
    "--epochs": "",
    "--batch-size": "",
    "--optimizer.lr": "--lr",
    "--precision": "",
    "--seed": "",
    "--output": "",
}
_LONG_FORMS = {short: long for long, short in _MOST_USED.items() if short}


class UsageError(ValueError):
    """The command line does not fit."""


def command(prog: str) -> Callable[[Callable[..., None]], Callable[[list[str]], None]]:
    """Makes a command of a function: its arguments are the options, and pydantic checks them.

    Raises:
        UsageError: From the command, for arguments that it does not take.
    """

    def decorate(function: Callable[..., None]) -> Callable[[list[str]], None]:
        names = inspect.signature(function).parameters
        known = [f"--{name.replace('_', '-')}" for name in names]

        def run(arguments: list[str]) -> None:
            try:
                _parsed(validate_call(function), arguments, prog, known)
            except ValidationError as error:
                raise UsageError(problem_of(error)) from error

        return run

    return decorate


def _parsed(
    target: Callable[..., Result], arguments: list[str], prog: str, known: list[str], **options: Any
) -> Result:
    """What tyro makes of the arguments; its error becomes one line.

    A version of tyro without its hook for errors prints them in its own way, and exits with 2 too.
    """
    errors = getattr(tyro, "_errors", None)

    def refuse(event: Any) -> None:
        if message := _in_words(event, known):
            raise UsageError(
                f"{message} (softlabels {prog.split(' [')[0]} --help lists the options)"
            )

    with nullcontext() if errors is None else errors.on_parse_error(refuse):
        result: Result = tyro.cli(target, args=arguments, prog=f"softlabels {prog}", **options)
    return result


def _in_words(event: Any, known: list[str]) -> str | None:
    """One line about one of tyro's errors; None for a kind that it has not had so far."""
    argument = getattr(event, "argument", None)
    flag = "" if argument is None else argument.lowered.name_or_flags[-1]
    match type(event).__name__:
        case "UnrecognizedArgs":
            return _of_unknown(event.tokens[0], known)
        case "MissingArgs":
            names = [missing.arg.field.intern_name for missing in event.missing_arguments]
            return f"missing {', '.join(names).upper()}"
        case "InvalidChoice":
            return f"{flag} must be one of {', '.join(event.choices)}, got {event.value!r:.80}"
        case "BadValue":
            return f"{flag} needs a value: {event.argument.lowered.metavar}"
        case "InstantiationFailure":
            return _of_value(event, flag)
    return None


def _of_unknown(token: str, known: list[str]) -> str:
    if token in known:  # lists of sections have no options
        return f"{token} is set in a recipe, not by an option"
    near = difflib.get_close_matches(token, known, n=3, cutoff=0.75)
    expected = f": expected {' or '.join(near)}" if near else ""
    return f"unknown {'option' if token.startswith('-') else 'argument'} {token!r:.80}{expected}"


def _of_value(event: Any, flag: str) -> str:
    if flag:
        reason = event.message.splitlines()[0].rstrip(".!")
        return f"{flag} takes {event.argument.lowered.metavar}: {reason}"
    error = sys.exc_info()[1]
    section = getattr(error, "arg", "").partition(".")[2]  # config.data is data to the user
    while error is not None and not isinstance(error, ValidationError):
        error = error.__context__
    told = event.message if error is None else problem_of(error)
    return f"{section}.{told}" if section else told


def configured(
    arguments: list[str],
    prog: str,
    further: type[BaseModel] | None = None,
    load: Callable[[str], dict[str, Any]] | None = None,
) -> tuple[Any, Any]:
    """A run's configuration, and beside it what a command has of its own.

    The configuration's defaults lie below a recipe, and that below the options.

    Args:
        arguments: The recipe and the options.
        prog: Name of the command.
        further: The schema of the command's own options, whose names differ from a run's.
        load: Gives the settings of the recipe; None: as they stand in it.
    """
    from softlabels.training.config import checked, load_recipe, parse, with_chosen

    arguments = [*map(_long_form, arguments)]
    values: dict[str, Any] = {}
    if arguments and not arguments[0].startswith("-"):
        values = (load or load_recipe)(arguments[0])
        arguments = arguments[1:]
    # Method and data decide which options there are, so they are looked for before tyro parses.
    flags = ("--method.kind", "--data.source", "--data.path")
    values = with_chosen(values, *map(_values_of(arguments).get, flags))
    default = {"config": parse(values)} | ({} if further is None else {"further": further()})
    own = tyro.conf.arg(name="")  # both stand side by side, without a name before them
    both = make_dataclass("both", [(k, Annotated[type(v), own]) for k, v in default.items()])
    options = {flag: (field, v) for part in default.values() for flag, field, v in _options(part)}
    about = inspect.getdoc(further or type(default["config"])) or ""
    try:
        given_by = _parsed(
            both,
            [*_as_python(arguments, options)],
            f"{prog} [RECIPE]",
            [*options, *_LONG_FORMS],
            default=both(**default),
            description=_description(about, options),
            config=(tyro.conf.AvoidSubcommands,),
        )
    except ValidationError as error:  # of what stands in no section; tyro leaves it as it is
        raise UsageError(problem_of(error)) from error
    return checked(given_by.config), getattr(given_by, "further", None)


def _long_form(argument: str) -> str:
    """An option in the form that the settings have it: `--lr 1` is `--optimizer.lr 1`."""
    flag, equals, value = argument.partition("=")
    return f"{_LONG_FORMS.get(flag, flag)}{equals}{value}"


def _as_python(arguments: list[str], options: Mapping[str, tuple[FieldInfo, Any]]) -> Iterator[str]:
    """The arguments, with YAML's `true` and `false` as tyro has them beside a word like `auto`."""
    either = {flag for flag, (field, _) in options.items() if bool in get_args(field.annotation)}
    previous = ""
    for argument in arguments:
        flag, equals, value = (
            argument.partition("=") if "=" in argument else (previous, "", argument)
        )
        answer = {"true": "True", "false": "False"}.get(value) if flag in either else None
        yield argument if answer is None else f"{flag}={answer}" if equals else answer
        previous = argument


def _values_of(arguments: list[str]) -> dict[str, str]:
    """What may be the values of options, as they stand among arguments."""
    pairs = zip_longest(arguments, arguments[1:], fillvalue="")
    parts = ((argument.partition("="), following) for argument, following in pairs)
    return {flag: value if equals else following for (flag, equals, value), following in parts}


def _options(settings: BaseModel, prefix: str = "--") -> Iterator[tuple[str, FieldInfo, Any]]:
    """Each option of a configuration, with its field and its value."""
    for name, field in type(settings).model_fields.items():
        flag, value = f"{prefix}{name.replace('_', '-')}", getattr(settings, name)
        if hasattr(value, "model_fields_set"):
            yield from _options(value, f"{flag}.")
        else:
            yield flag, field, value


def _description(about: str, options: Mapping[str, tuple[FieldInfo, Any]]) -> str:
    """The first part of the help: what the command takes, and the options that most runs give."""
    from softlabels.training.settings import DATA_SETTINGS

    path = DATA_SETTINGS["folder"].model_fields["path"]
    options = {"--data.path": (path, None), **options}  # what is embedded has none
    about = (
        f"{about} RECIPE is a YAML file or the name of a recipe in the "
        "package (`softlabels recipes` lists them); options override it. The groups have the "
        "options of the chosen method and of the chosen source of data alone."
    )
    lines = [_wrapped("  ", about, indent=2), "", "most used:"]
    for flag, short in _MOST_USED.items():
        field, value = options[flag]
        default = "" if value is None else f" (default: {value})"
        names = f"{short}, {flag}" if short else flag
        lines.append(_wrapped(f"  {names:<26}  ", f"{field.description}{default}", indent=30))
    return "\n".join(lines)


def _wrapped(start: str, text: str, indent: int) -> str:
    return textwrap.fill(
        text,
        _WIDTH,
        initial_indent=start,
        subsequent_indent=" " * indent,  # tyro keeps the breaks before indented lines alone
        break_on_hyphens=False,
    )


def metrics_line(metrics: Mapping[str, float]) -> str:
    """The metrics of an evaluation."""
    from softlabels.analysis.scores import SCORES

    return ", ".join(
        f"{score.heading} {metrics[key]:.{score.digits}f} {score.unit}"
        for key, score in SCORES.items()
        if key in metrics
    )
