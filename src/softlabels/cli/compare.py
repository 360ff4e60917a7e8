"""The command that compares: `compare`."""

import shlex
from pathlib import Path
from typing import Any

from softlabels.cli.parsing import configured, console

__all__ = ["compare"]

_SHORT_OPTIONS = {"--student": "--student.name", "--teacher": "--teacher.name"}


def compare(arguments: list[str]) -> int:
    """Compare methods over seeds."""
    from softlabels.experiments.compare import compare as run_comparison
    from softlabels.experiments.comparison import CompareConfig, Comparison, read_comparison
    from softlabels.training.config import load_recipe

    given: Comparison | None = None

    def load(name: str) -> dict[str, Any]:
        nonlocal given
        given = read_comparison(name)
        return load_recipe(name) if given is None else given.values

    config = configured([*map(_spelled_out, arguments)], "compare", CompareConfig.of, load)
    result = run_comparison(
        config.comparison(given),
        output=Path(config.output or "runs/compare"),
        runs=None if config.runs is None else Path(config.runs),
        jobs=config.jobs,
        threads=config.threads,
        command=shlex.join(["softlabels", "compare", *arguments]),
        console=console(),
    )
    print(f"everything is in {result.folder} (report.html, comparison.md, .csv and .json)")
    return 0


def _spelled_out(argument: str) -> str:
    """An option in the form that the settings have it: `--student X` is `--student.name X`."""
    flag, equals, value = argument.partition("=")
    return f"{_SHORT_OPTIONS.get(flag, flag)}{equals}{value}"
