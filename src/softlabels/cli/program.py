"""The program: which command is meant, and how it ends."""

import difflib
import os
import re
import signal
import sys
from collections.abc import Sequence
from importlib import import_module

from softlabels.io.console import printable

__all__ = ["main"]

_TRACEBACK = "SOFTLABELS_TRACEBACK"
_LONGEST_MESSAGE = 2000

# Where each command is, and what the overview says of it.
_COMMANDS = {
    "train": ("runs.train", "train a classifier, from a recipe or from settings"),
    "cache-teacher": (
        "runs.cache_teacher",
        "store a teacher's answers, so that training needs no teacher",
    ),
    "eval": ("students.evaluate", "measure a trained student on a test set"),
    "analyze": (
        "students.analyze",
        "write the statistics of a finished run's answers that its report shows",
    ),
    "predict": ("students.predict", "classify images with a trained student"),
    "export": (
        "students.export",
        "write a trained student for others, as safetensors or ONNX, with a model card",
    ),
    "demo": (
        "experiments.demo",
        "train one small student four ways on the embedded data, and compare",
    ),
    "compare": (
        "experiments.compare",
        "train several methods over the same seeds, and say what differs",
    ),
    "sweep": (
        "experiments.sweep",
        "search a method's weights and temperature on images that are held out",
    ),
    "reproduce": (
        "experiments.reproduce",
        "train the rows of a published table, and compare with the paper",
    ),
    "recipes": ("show.recipes", "list the recipes; `recipes show NAME` prints one"),
    "taps": ("show.taps", "say where a network's features are read, and how its positions vote"),
    "methods": ("show.methods", "list the methods, what they read, and their settings"),
    "config": ("show.config", "`config show`: print a resolved configuration"),
}


def _overview() -> str:
    lines = [
        "usage: softlabels COMMAND [OPTIONS]",
        "",
        "Train better image classifiers with better labels: from a teacher (NKD), from the",
        "network itself (USKD), or from Zipf's law (Zipf's LS).",
        "",
        "commands:",
        *(f"  {name:14} {text}" for name, (_, text) in _COMMANDS.items()),
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
        _run(name, rest)
        return 0
    except SystemExit as stop:  # help of a command
        return int(stop.code or 0)
    except KeyboardInterrupt as stop:
        _complain(name, str(stop) or "stopped")
        return int(getattr(stop, "status", 128 + signal.SIGINT))
    except BrokenPipeError:  # the reader of our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
        return 1
    except ModuleNotFoundError as error:
        _complain(name, f"{error}: the commands need pip install 'softlabels[train]'")
        return 2
    except (ValueError, TypeError, OSError) as error:
        _complain(name, str(error) or type(error).__name__)
        return 2
    except Exception as error:  # no user of the command sees a traceback
        from softlabels.training.errors import RunError

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


def _complain(command: str, message: str) -> None:
    line = printable(" ".join(message.split()))
    if len(line) > _LONGEST_MESSAGE:
        line = f"{line[:_LONGEST_MESSAGE]} ... ({len(line)} characters)"
    print(f"softlabels {printable(command):.80}: {line}", file=sys.stderr)


def _run(name: str, arguments: list[str]) -> None:
    if name in ("-h", "--help"):
        print(_overview(), flush=True)
    elif name == "--version":
        from softlabels import __version__

        print(f"softlabels {__version__}")
    elif name not in _COMMANDS:
        near = difflib.get_close_matches(name, _COMMANDS, n=2)
        raise ValueError(f"no such command: expected {', '.join(near or _COMMANDS)}")
    else:
        module, _, function = _COMMANDS[name][0].partition(".")
        getattr(import_module(f"softlabels.cli.{module}"), function)(arguments)
