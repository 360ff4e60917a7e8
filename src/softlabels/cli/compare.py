"""The command that compares: `compare`."""

import shlex
from pathlib import Path
from typing import Any

from softlabels.cli.parsing import configured
from softlabels.io.console import echo, progress_console

__all__ = ["compare"]


def compare(arguments: list[str]) -> int:
    """Compare methods over seeds."""
    from softlabels.experiments.compare import compare as run_comparison
    from softlabels.experiments.comparison import CompareOptions, Comparison, read_comparison
    from softlabels.training.config import load_recipe

    given: Comparison | None = None

    def load(name: str) -> dict[str, Any]:
        nonlocal given
        given = read_comparison(name)
        return load_recipe(name) if given is None else given.values

    config, options = configured(arguments, "compare", CompareOptions, load)
    result = run_comparison(
        options.comparison(config, given),
        output=Path(config.output or "runs/compare"),
        runs=None if options.runs is None else Path(options.runs),
        jobs=options.jobs,
        threads=config.threads,
        command=shlex.join(["softlabels", "compare", *arguments]),
        console=progress_console(),
    )
    echo(f"everything is in {result.folder} (report.html, comparison.md, .csv and .json)")
    return 0
