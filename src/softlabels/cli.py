"""The command `softlabels`. Torch is imported by the commands that need it, not for help."""

import contextlib
import difflib
import functools
import inspect
import io
import json
import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

__all__ = ["main"]

Result = TypeVar("Result")

_TRACEBACK = "SOFTLABELS_TRACEBACK"
_LONGEST_MESSAGE = 2000
_MOST_IMAGES = 1_000_000  # in a batch

_COMMANDS = {
    "train": "train a classifier, from a recipe or from settings",
    "cache-teacher": "store a teacher's answers, so that training needs no teacher",
    "eval": "measure a trained student on a test set",
    "predict": "classify images with a trained student",
    "demo": "train one small student four ways on the embedded data, and compare",
    "methods": "list the methods, what they read, and their settings",
    "config": "`config show`: print a resolved configuration",
}


class _UsageError(ValueError):
    """The command line does not fit."""


def _overview() -> str:
    lines = [
        "usage: softlabels COMMAND [OPTIONS]",
        "",
        "Train better image classifiers with better labels: from a teacher (NKD), from the",
        "network itself (USKD), or from Zipf's law (Zipf's LS).",
        "",
        "commands:",
        *(f"  {name:14} {text}" for name, text in _COMMANDS.items()),
        "",
        "softlabels COMMAND --help tells the options of a command; softlabels --version the",
        "version. For a start: softlabels demo",
    ]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: Without the program's name; None: those of the process.

    Returns:
        Exit status: 0; 2 for anything that the user can put right, after one line that says
        what; 1 for a run that failed; 130 or 143 for a run that SIGINT (Ctrl-C) or SIGTERM
        stopped: 128 + the signal's number.
    """
    given = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    status = _status(given[0], given[1:])
    if arguments is None and _is_one_of_several():
        # gloo's threads may still let go of tensors. If Python is being torn down by then, they
        # abort the process, and a finished run looks like a failed one.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status


def _is_one_of_several() -> bool:
    distributed = sys.modules.get("torch.distributed")
    return distributed is not None and distributed.is_available() and distributed.is_initialized()


def _status(name: str, rest: list[str]) -> int:
    try:
        return _run(name, rest)
    except SystemExit as stop:  # help of a command
        return int(stop.code or 0)
    except KeyboardInterrupt as stop:
        _complain(name, str(stop) or "stopped")
        return int(getattr(stop, "status", 128 + signal.SIGINT))
    except BrokenPipeError:  # the reader of our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
        return 1
    except (ValueError, TypeError, OSError, ModuleNotFoundError) as error:
        _complain(name, _in_words(error))
        return 2
    except Exception as error:  # no user of the command sees a traceback
        from softlabels.training.guards import RunError

        expected = isinstance(error, RunError)
        if not expected and os.environ.get(_TRACEBACK):
            raise
        _complain(name, str(error) if expected else _of_failure(error))
        return 1


def _of_failure(error: Exception) -> str:
    """What to tell of an error that nobody foresaw."""
    kind = type(error).__name__
    if isinstance(error, MemoryError) or re.search(r"out of memory|can't allocate", str(error)):
        return f"not enough memory ({error or kind}): try a smaller batch_size or network"
    return f"stopped by {kind}: {error} ({_TRACEBACK}=1 in the environment shows where)"


def _in_words(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError):
        return f"{error}: the commands need pip install 'softlabels[train]'"
    return str(error) or type(error).__name__


def _complain(command: str, message: str) -> None:
    line = _printable(" ".join(message.split()))
    if len(line) > _LONGEST_MESSAGE:
        line = f"{line[:_LONGEST_MESSAGE]} ... ({len(line)} characters)"
    print(f"softlabels {_printable(command):.80}: {line}", file=sys.stderr)


def _printable(text: str) -> str:
    """Text of a file as a terminal may show it: without orders to it."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _put(line: str) -> None:
    """Print a line whose file names may be no Unicode; in JSON too, the escape stays valid."""
    print(line.encode("utf-8", "backslashreplace").decode())


def _run(name: str, arguments: list[str]) -> int:
    if name in ("-h", "--help"):
        print(_overview(), flush=True)
        return 0
    if name == "--version":
        from softlabels import __version__

        print(f"softlabels {__version__}")
        return 0
    commands: dict[str, Callable[[list[str]], int]] = {
        "train": _train,
        "cache-teacher": _cache_teacher,
        "eval": _eval,
        "predict": _predict,
        "demo": _demo,
        "methods": _methods,
        "config": _config,
    }
    if name not in commands:
        near = difflib.get_close_matches(name, commands, n=2)
        raise _UsageError(f"no such command: expected {', '.join(near or commands)}")
    return commands[name](arguments)


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
        raise _UsageError(_unboxed(complaint.getvalue(), prog)) from stop


def _call(command: Callable[..., int], arguments: list[str], prog: str) -> int:
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


def _configured(
    arguments: list[str], prog: str, extended: Callable[[Any], Any] = lambda config: config
) -> Any:
    """A configuration: defaults, over them a recipe, over that the options.

    Args:
        arguments: The recipe and the options.
        prog: Name of the command.
        extended: Gives a configuration the further settings of the command.
    """
    import tyro

    from softlabels.training.config import (
        METHOD_SETTINGS,
        checked,
        load_recipe,
        parse,
        with_method,
    )

    values: dict[str, Any] = {}
    if arguments and not arguments[0].startswith("-"):
        values = load_recipe(arguments[0])
        arguments = arguments[1:]
    # The kind decides which options there are, so it is looked for before tyro parses.
    for position, argument in enumerate(arguments):
        flag, equals, kind = argument.partition("=")
        if flag == "--method.kind":
            if not equals:
                kind = arguments[position + 1] if position + 1 < len(arguments) else ""
            values = with_method(values, kind)
    default = extended(parse(values))
    config = _tyro(
        type(default),
        arguments,
        f"{prog} [RECIPE]",
        default=default,
        description=(
            f"{inspect.getdoc(type(default))} RECIPE is a YAML file or the name of a recipe in "
            "the package (`softlabels config` lists them); options override it. --method.kind is "
            f"one of {', '.join(METHOD_SETTINGS)}; the help then shows that method's options."
        ),
        config=(tyro.conf.AvoidSubcommands,),
    )
    return checked(config)


def _console() -> Any:
    from rich.console import Console

    return Console(stderr=True)


def _speaks() -> bool:
    """Whether this is the one process of a run that prints its results."""
    from accelerate import PartialState

    return bool(PartialState().is_main_process)


def _train(arguments: list[str]) -> int:
    from softlabels.training.trainer import run

    result = run(_configured(arguments, "train"), console=_console())
    if not _speaks():
        return 0
    print(_metrics_line(result.final))
    print(f"everything is in {result.folder} (report.html, student.safetensors)")
    return 0


def _cache_teacher(arguments: list[str]) -> int:
    from softlabels.training.cache import CacheConfig, build_cache

    config = _configured(arguments, "cache-teacher", CacheConfig.of)
    path = config.output or config.teacher.cache
    if path is None:
        raise _UsageError("say where the cache shall be: --output FOLDER")
    cache = build_cache(
        config,
        path,
        draws=config.draws,
        top=config.top,
        images_per_file=config.images_per_file,
        console=_console(),
    )
    if not _speaks():
        return 0
    error, views = cache.error, cache.num_images * cache.num_draws
    print(
        f"{cache.num_images:,} images x {cache.num_draws} draws, {cache.top} of "
        f"{cache.num_classes} classes: {cache.num_bytes / 1e6:,.2f} MB, "
        f"{cache.num_bytes / views:g} MB per million images and draw"
    )
    print(
        f"against the full answers: KL mean {error['mean_kl']:.2g}, largest {error['max_kl']:.2g} "
        f"nats; the first class agrees in {error['top1_agreement']:.2%}"
    )
    if error["unreadable"]:
        print(f"{error['unreadable']} views have no answer: their images could not be read")
    print(f"train with --teacher.cache {path}")
    return 0


def _metrics_line(metrics: dict[str, float]) -> str:
    parts = [f"top-1 {metrics['top1']:.2f} %", f"top-5 {metrics['top5']:.2f} %"]
    if "group_top1" in metrics:
        parts.append(f"group {metrics['group_top1']:.2f} %")
    return ", ".join([*parts, f"NLL {metrics['nll']:.3f} nats", f"ECE {metrics['ece']:.2f} %"])


def _config(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(
            "usage: softlabels config show [RECIPE] [OPTIONS]\n\n"
            "Print the configuration that `softlabels train` with the same arguments would use,\n"
            "as YAML that `softlabels train FILE` takes. Recipes in the package:\n"
        )
        from softlabels.training.config import recipe_names

        print("\n".join(f"  {name}" for name in recipe_names()))
        return 0
    if arguments[0] != "show":
        raise _UsageError(f"expected `config show`, got {arguments[0]!r}")
    from softlabels.training.config import dump

    print(dump(_configured(arguments[1:], "config show")), end="")
    return 0


def _check_batch_size(batch_size: int) -> None:
    if not 1 <= batch_size <= _MOST_IMAGES:
        raise _UsageError(f"batch_size must be in 1..{_MOST_IMAGES}, got {batch_size}")


def _eval(arguments: list[str]) -> int:
    import tyro

    def evaluate_student(
        student: Annotated[str, tyro.conf.Positional],
        path: str | None = None,
        source: str | None = None,
        batch_size: int = 256,
        format: Literal["text", "json"] = "text",
    ) -> int:
        """Measure a trained student on a test set.

        Args:
            student: A run's folder, or a student.safetensors.
            path: Folder of the data. Without path and source, the run's own data.
            source: Kind of the data: glyphs100, folder or idx.
            batch_size: Images per forward.
            format: text or json.
        """
        from softlabels.training.predict import evaluate_file

        _check_batch_size(batch_size)
        metrics = evaluate_file(student, path=path, source=source, batch_size=batch_size)
        print(json.dumps(metrics) if format == "json" else _metrics_line(metrics))
        return 0

    return _call(evaluate_student, arguments, "eval")


def _predict(arguments: list[str]) -> int:
    import tyro

    def classify(
        student: Annotated[str, tyro.conf.Positional],
        images: Annotated[tuple[str, ...], tyro.conf.Positional],
        top: int = 3,
        batch_size: int = 64,
        format: Literal["text", "json", "csv"] = "text",
    ) -> int:
        """Classify images with a trained student.

        Args:
            student: A run's folder, or a student.safetensors.
            images: Images, or folders of images.
            top: How many classes are named for each image.
            batch_size: Images per forward.
            format: text, json (one object a line), or csv.
        """
        from softlabels.training.predict import find_images, load_student, predict

        if not images:
            raise _UsageError("expected one or more images after the student")
        if top < 1:
            raise _UsageError(f"top must be 1 or more, got {top}")
        _check_batch_size(batch_size)
        found = find_images(images)
        network, record = load_student(student)
        predictions = predict(network, record, found, top=top, batch_size=batch_size)
        if format == "csv":
            import csv

            table = io.StringIO()
            writer = csv.writer(table)
            writer.writerow(["image", "rank", "class", "probability"])
            for item in predictions:
                for rank, (name, value) in enumerate(
                    zip(item.classes, item.probabilities, strict=True), 1
                ):
                    writer.writerow([item.path, rank, name, f"{value:.6f}"])
            _put(table.getvalue().rstrip("\r\n"))
            return 0
        for item in predictions:
            pairs = zip(item.classes, item.probabilities, strict=True)
            if format == "json":
                classes = [{"class": name, "probability": value} for name, value in pairs]
                _put(json.dumps({"image": str(item.path), "classes": classes}, ensure_ascii=False))
            else:
                shares = ", ".join(f"{name} {value:.1%}" for name, value in pairs)
                _put(_printable(f"{item.path}: {shares}"))
        return 0

    return _call(classify, arguments, "predict")


def _demo(arguments: list[str]) -> int:
    def demo(
        output: str = "runs/demo",
        epochs: int = 8,
        seed: int = 0,
        jobs: int = 2,
        steps: int = 30,
        fonts: int | None = None,
    ) -> int:
        """Train one small student four ways on the embedded glyphs100, and compare.

        Cross-entropy, Zipf's LS, USKD, and NKD with the teacher that ships in the package; equal
        initial weights, data and steps. Ends with a table and report.html.

        Args:
            output: Folder of the four runs and the report.
            epochs: Passes over the training set.
            seed: Of everything random.
            jobs: Runs at a time, one thread each.
            steps: Rounds of the step-time measurement at the end, 2 or more.
            fonts: Train on so many of the 239 fonts only, for a quick look.
        """
        from softlabels.training.demo import run_demo

        for name, value, least in (("epochs", epochs, 1), ("jobs", jobs, 1), ("steps", steps, 2)):
            if value < least:
                raise _UsageError(f"{name} must be {least} or more, got {value}")
        report = run_demo(
            Path(output),
            epochs=epochs,
            seed=seed,
            jobs=jobs,
            rounds=steps,
            console=_console(),
            num_fonts=fonts,
        )
        print(f"report: {report}")
        return 0

    return _call(demo, arguments, "demo")


def _methods(arguments: list[str]) -> int:
    def methods(kind: str | None = None) -> int:
        """List the methods, what they read, and their settings.

        Args:
            kind: Show this one alone.
        """
        from softlabels.training.config import METHOD_SETTINGS, describe_method

        if kind is not None and kind not in METHOD_SETTINGS:
            raise _UsageError(f"no method {kind!r}: expected one of {', '.join(METHOD_SETTINGS)}")
        print("\n\n".join(describe_method(k) for k in METHOD_SETTINGS if kind in (None, k)))
        return 0

    return _call(methods, arguments, "methods")
