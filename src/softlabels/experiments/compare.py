"""Trains what a comparison needs, and tells what came out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import nn

from softlabels.data import DataSource
from softlabels.experiments.analyze_run import analyze_run
from softlabels.experiments.comparison import Comparison, PlannedVariant, planned
from softlabels.experiments.comparison_record import ComparisonRecord
from softlabels.experiments.launcher import launch_runs
from softlabels.experiments.tables import cells, csv_text, markdown, notes, results_of
from softlabels.io.console import say, show_table
from softlabels.io.files import write_text
from softlabels.report import Variant, write_comparison
from softlabels.training.build import build_distiller, build_source, with_defaults
from softlabels.training.config import Config, ConfigError, parse
from softlabels.training.distributed import start
from softlabels.training.precision import overrun, with_precision
from softlabels.training.recipes import merged
from softlabels.training.settings import TeacherSettings
from softlabels.training.validate import check_needs

__all__ = ["compare"]

_DECIDED = ("precision", "channels_last")


def compare(
    comparison: Comparison,
    *,
    output: Path,
    runs: Path | None = None,
    jobs: int = 1,
    threads: int | None = None,
    command: str | None = None,
    console: Console,
) -> ComparisonRecord:
    """Train all variants over all seeds, and write tables and a report.

    Runs of the same seed share initial weights, order of the data and augmentation. What is
    complete in `runs` is not trained again, whatever comparison it was trained for.

    Args:
        comparison: What is compared.
        output: Folder of `comparison.json`, `.csv` (a line a run), `.md`, `.yaml` (the comparison
            itself) and `report.html`.
        runs: Folder of the runs, which several comparisons may share; None: `runs` in `output`.
        jobs: Runs at a time.
        threads: CPU threads of each; None: its share of the cores.
        command: What the report gives as the way to repeat it.
        console: Where progress and the table are shown.

    Returns:
        What came out, as `comparison.json` holds it.

    Raises:
        ValueError: A variant that does not fit, before anything is trained.
        RunError: A run failed; the same call goes on from there.
    """
    folder = output / "runs" if runs is None else runs
    comparison = _checked(comparison, folder)
    variants, plan = planned(comparison, folder)
    output.mkdir(parents=True, exist_ok=True)
    write_text(output / "comparison.yaml", comparison.dump())
    launch_runs(*plan.rounds, jobs=jobs, threads=threads, console=console)
    for variant in variants:
        for run in variant.runs:
            if not (run.folder.analysis.is_file() and run.folder.predictions.is_file()):
                analyze_run(run.folder.path)
    results = results_of(
        variants,
        folder,
        title=comparison.title or _title(variants),
        command=command or f"softlabels compare {output / 'comparison.yaml'}",
    )
    results.write(output / "comparison.json")
    write_text(output / "comparison.csv", csv_text(results))
    write_text(output / "comparison.md", markdown(results))
    write_comparison(
        [Variant(v.name, tuple(run.folder.path for run in v.runs)) for v in variants],
        output / "report.html",
        title=results.title,
        table=[{k: v for k, v in row.items() if k} for row in cells(results)],
        notes=notes(results),
        command=results.command,
    )
    rows = cells(results, brief=True)
    show_table(
        console,
        [*rows[0]],
        [[*row.values()] for row in rows],
        title=results.title,
        caption="more columns: comparison.md",
    )
    for note in notes(results):
        say(console, note)
    return results


def _checked(comparison: Comparison, folder: Path) -> Comparison:
    """With what is decided once for all: the student, its precision and its memory format.

    Every variant is built once, before anything is trained.
    """
    values = comparison.values
    source = build_source(parse({k: v for k, v in values.items() if k in ("data", "seed")}))
    try:
        if not (values.get("student") or {}).get("name"):
            name = with_defaults(Config(), source.info).student.name
            comparison = _with_settings(comparison, {"student": {"name": name}})
        baseline, *others = planned(comparison, folder)[0]
        trained = _built(baseline, source)
        narrow = [variant.name for variant in others if overrun(_built(variant, source))]
    finally:
        source.close()
    base = parse({name: values[name] for name in _DECIDED if name in values})
    if narrow and base.channels_last == "auto":  # another variant's parts would not bear it
        base = base.model_copy(update={"channels_last": False})
    decided = with_precision(base, trained, start(baseline.config).device)
    return _with_settings(comparison, {name: getattr(decided, name) for name in _DECIDED})


def _with_settings(comparison: Comparison, settings: dict[str, Any]) -> Comparison:
    return comparison.model_copy(update={"settings": merged(comparison.settings, settings)})


def _built(variant: PlannedVariant, source: DataSource) -> nn.Module:
    """What a variant trains, with all else built too; a teacher to be trained is random."""
    config = variant.config
    if config.generations > 1:  # the last one
        teacher = TeacherSettings(name=config.student.name, settings=config.student.settings)
        config = config.model_copy(update={"generations": 1, "teacher": teacher})
    try:
        config = with_defaults(config, source.info, source.num_train)
        distiller = build_distiller(config, source.info)
        check_needs(config, distiller, source, 1)
    except ValueError as error:
        raise ConfigError(f"{variant.name}: {error}") from error
    return distiller.trainable


def _title(variants: Sequence[PlannedVariant]) -> str:
    first = variants[0].config
    student = (first.student.name or "").rpartition(":")[2]
    return f"{len(variants)} ways to train {student} on {first.data.source}"
