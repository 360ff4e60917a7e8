"""What came out of a comparison: a record of each run, figures over the seeds, and tables."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from softlabels.experiments.comparison import PlannedVariant
from softlabels.experiments.comparison_record import (
    ComparisonRecord,
    Difference,
    RunFigures,
    VariantRecord,
)
from softlabels.experiments.statistics import LEAST_SEEDS, Spread, Verdict, paired, spread
from softlabels.io.records import read_lines
from softlabels.training.recipes import flattened
from softlabels.training.run_folder import RunFolder, fixed_settings
from softlabels.training.schemas import (
    Analysis,
    Environment,
    Metrics,
    NamedScore,
    Summary,
)

__all__ = ["cells", "csv_text", "markdown", "notes", "results_of"]

_IN_WORDS: Mapping[Verdict, tuple[str, str]] = {
    "higher": ("better", "worse"),
    "lower": ("worse", "better"),
    "no difference shown": ("no difference shown", "no difference shown"),
}


@dataclass(frozen=True)
class _Score:
    """A figure of a run, and how it is shown."""

    key: str
    heading: str
    digits: int
    is_compared: bool = False
    higher_is_better: bool = True


_SCORES = (
    _Score("top1", "top-1 %", 2, is_compared=True),
    _Score("best_top1", "best epoch's top-1 %", 2),
    _Score("group_top1", "group top-1 %", 2, is_compared=True),
    _Score("nll", "NLL nats", 3, is_compared=True, higher_is_better=False),
    _Score("ece", "ECE %", 2, is_compared=True, higher_is_better=False),
    _Score("fitted_ece", "ECE % after temperature", 2),
    _Score("temperature", "temperature", 2),
    _Score("teacher_agreement", "agreement with the teacher %", 1),
    _Score("zipf_r2", "R² of Zipf's law", 3),
    _Score("seconds_per_epoch", "seconds an epoch", 1),
    _Score("peak_memory", "peak memory MB", 0),
)
_BRIEF = ("", "top-1 %", "95 % interval (t)", "in words")
_BY_KEY = {score.key: score for score in _SCORES}
_CURVES = ("top1", "nll", "ece", "zipf_r2")


def results_of(
    variants: Sequence[PlannedVariant], folder: Path, *, title: str, command: str
) -> ComparisonRecord:
    """Everything that came out.

    Args:
        variants: All complete; the first is the baseline.
        folder: Of the runs, which paths are relative to.
        title: Heading of the report.
        command: That repeats the comparison.
    """
    agreements = _agreements(variants)
    figures = {
        variant.name: tuple(
            _figures(run.folder, folder, agreements.get(run.folder.path)) for run in variant.runs
        )
        for variant in variants
    }
    baseline = variants[0]
    environment = Environment.read(baseline.runs[0].folder.environment).model_dump(
        exclude={"command", "process", "host", "earlier_starts", "seed"}, exclude_unset=True
    )
    return ComparisonRecord(
        title=title,
        command=command,
        baseline=baseline.name,
        seeds=tuple(run.config.seed for run in baseline.runs),
        environment=Environment(**environment),
        commits=tuple(sorted({str(run.commit) for runs in figures.values() for run in runs})),
        teachers=_teachers(variants),
        variants=tuple(
            VariantRecord(
                name=variant.name,
                settings=_differing(variant, baseline),
                runs=figures[variant.name],
                scores=_scores(figures[variant.name]),
                against_baseline={}
                if variant is baseline
                else _against(figures[variant.name], figures[baseline.name]),
            )
            for variant in variants
        ),
    )


def _figures(folder: RunFolder, runs: Path, agreement: float | None) -> RunFigures:
    """The figures of one run.

    Args:
        folder: The run's.
        runs: Folder of all runs.
        agreement: With the teacher of the comparison, where the run had none of its own.
    """
    summary, analysis = Summary.read(folder.summary), Analysis.read(folder.analysis)
    final, best, fitted = summary.final, summary.best, analysis.temperature
    if agreement is None and analysis.teacher is not None:
        agreement = analysis.teacher.agreement
    keys = ("top1", "group_top1", "nll", "ece")
    shown: dict[str, float] = {key: final[key] for key in keys if key in final}
    lines = [line.scalars for line in read_lines(folder.metrics, Metrics)]
    evaluated = [scalars for scalars in lines if "eval/top1" in scalars]
    figures: dict[str, Any] = {
        "seed": summary.seed,
        "folder": str(folder.path.relative_to(runs)),
        "commit": Environment.read(folder.environment).commit,
        **shown,
        "best_top1": best["top1"],
        "best_epoch": best["epoch"],
        "fitted_ece": None if fitted is None else fitted.ece,
        "fitted_nll": None if fitted is None else fitted.nll,
        "temperature": None if fitted is None else fitted.value,
        "zipf_r2": final.get("zipf_r2"),
        "zipf_exponent": final.get("zipf_exponent"),
        "teacher_agreement": agreement,
        "seconds_per_epoch": summary.seconds_per_epoch,
        "peak_memory": None if summary.peak_memory is None else summary.peak_memory / 1e6,
        "curve": {
            name: [scalars[f"eval/{name}"] for scalars in evaluated]
            for name in _CURVES
            if all(f"eval/{name}" in scalars for scalars in evaluated)
        },
    }
    return RunFigures.model_validate(figures)


def _teachers(variants: Sequence[PlannedVariant]) -> tuple[NamedScore, ...]:
    analyses = [Analysis.read(run.folder.analysis) for v in variants for run in v.runs]
    found = [NamedScore(name=a.teacher.name, top1=a.teacher.top1) for a in analyses if a.teacher]
    return tuple(score for number, score in enumerate(found) if score not in found[:number])


def _agreements(variants: Sequence[PlannedVariant]) -> dict[Path, float]:
    """How often runs that had no teacher agree with the first teacher of the comparison, %."""
    answers: dict[Path, dict[str, np.ndarray]] = {}
    for variant in variants:
        for run in variant.runs:
            with np.load(run.folder.predictions) as archive:
                answers[run.folder.path] = {name: archive[name] for name in archive.files}
    told = (a for a in answers.values() if "teacher_predicted" in a)
    teacher = next(told, None)
    if teacher is None:
        return {}
    return {
        path: 100 * float(np.mean(found["predicted"] == teacher["teacher_predicted"]))
        for path, found in answers.items()
        if "teacher_predicted" not in found and np.array_equal(found["index"], teacher["index"])
    }


def _differing(variant: PlannedVariant, baseline: PlannedVariant) -> dict[str, Any]:
    """The settings of a variant that the baseline does not have, by their paths."""
    ours, theirs = (flattened(fixed_settings(v.config)) for v in (variant, baseline))
    return {key: ours[key] for key in ours if key not in theirs or ours[key] != theirs[key]}


def _values(runs: Sequence[RunFigures], key: str) -> list[float] | None:
    """A figure of all runs; None if some have none."""
    values = [getattr(run, key) for run in runs]
    return (
        None
        if any(value is None for value in values)
        else [float(v) for v in values if v is not None]
    )


def _scores(runs: Sequence[RunFigures]) -> dict[str, Spread]:
    found = {score.key: _values(runs, score.key) for score in _SCORES}
    return {key: spread(values) for key, values in found.items() if values}


def _against(ours: Sequence[RunFigures], theirs: Sequence[RunFigures]) -> dict[str, Difference]:
    found: dict[str, Difference] = {}
    for score in _SCORES:
        pair = [_values(runs, score.key) for runs in (ours, theirs)]
        if score.is_compared and pair[0] and pair[1]:
            result = paired(pair[0], pair[1])
            in_words = _IN_WORDS[result.verdict][0 if score.higher_is_better else 1]
            found[score.key] = Difference(**vars(result), in_words=in_words)
    return found


def cells(results: ComparisonRecord, *, brief: bool = False) -> list[dict[str, str]]:
    """A row of texts for each variant, by heading, for tables and the report.

    Args:
        results: As `results_of` gives them.
        brief: The columns that a terminal has room for.
    """
    shown = [s for s in _SCORES if any(s.key in v.scores for v in results.variants)]
    rows = [_row(variant, results, shown) for variant in results.variants]
    if not brief:
        return rows
    kept = {*_BRIEF, f"difference to {results.baseline}"}
    return [{key: text for key, text in row.items() if key in kept} for row in rows]


def _row(
    variant: VariantRecord, results: ComparisonRecord, shown: Sequence[_Score]
) -> dict[str, str]:
    row = {"": variant.name}
    for score in shown:
        found = variant.scores.get(score.key)
        row[score.heading] = "" if found is None else _with_spread(found, score.digits)
        if score.key == "top1":
            row.update(_differences(variant, results))
    return row


def _with_spread(found: Spread, digits: int) -> str:
    text = f"{found.mean:.{digits}f}"
    return text if found.deviation is None else f"{text} ± {found.deviation:.{digits}f}"


def _differences(variant: VariantRecord, results: ComparisonRecord) -> dict[str, str]:
    """The columns about top-1 against the baseline."""
    found = variant.against_baseline.get("top1")
    row = {f"difference to {results.baseline}": "baseline" if found is None else ""}
    several = len(results.seeds) > 1
    if several:
        row["95 % interval (t)"] = row["95 % interval (bootstrap)"] = ""
    if len(results.seeds) >= LEAST_SEEDS:
        row["p (exact)"] = ""
    if several:
        row["in words"] = ""
    if found is None:
        return row
    row[f"difference to {results.baseline}"] = f"{found.mean:+.2f}"
    if several:
        row["95 % interval (t)"] = _interval(found.t)
        row["95 % interval (bootstrap)"] = _interval(found.bootstrap)
        row["in words"] = found.in_words
    if found.p_value is not None:
        row["p (exact)"] = f"{found.p_value:.3f}"
    return row


def _interval(ends: tuple[float, float] | None) -> str:
    return "" if ends is None else f"{ends[0]:+.2f} to {ends[1]:+.2f}"


def notes(results: ComparisonRecord) -> list[str]:
    """Sentences that say what the figures can show.

    Args:
        results: As `results_of` gives them.
    """
    count = len(results.seeds)
    teachers = ", ".join(f"{t.name} {t.top1:.2f} %" for t in results.teachers)
    taught = [f"Top-1 of what taught: {teachers}."] if teachers else []
    if count == 1:
        return [
            "One seed: no spread, no interval, and so no evidence of a difference.",
            f"From 2 seeds on there are intervals, from {LEAST_SEEDS} on an exact test.",
            *taught,
        ]
    found = [
        f"Mean ± standard deviation over {count} seeds. Differences are between runs of the same "
        "seed: the same initial weights, order of the data and augmentation.",
        "Nothing is called better or worse where an interval of the difference holds zero.",
        "Single comparisons: with many variants, one in twenty of no effect looks like one.",
    ]
    if count < LEAST_SEEDS:
        found.append(
            f"{count} seeds are too few for an exact test to show anything: its smallest p-value "
            f"would be {2 / 2**count:.3g}; {LEAST_SEEDS} are needed for less than 0.05."
        )
    if any("fitted_ece" in variant.scores for variant in results.variants):
        found.append(
            f"{_BY_KEY['fitted_ece'].heading}: fitted on one half of the test images and measured "
            "on the other, both ways."
        )
    found += taught
    if len(results.commits) > 1:
        found.append(f"The runs are of several commits: {', '.join(results.commits)}.")
    return found


def markdown(results: ComparisonRecord) -> str:
    """The table, with its notes.

    Args:
        results: As `results_of` gives them.
    """
    rows = cells(results)
    headings = [*rows[0]]
    lines = [
        f"# {results.title}",
        "",
        f"`{results.command}`",
        "",
        f"| {' | '.join(headings)} |",
        f"| --- |{' ---: |' * (len(headings) - 1)}",
        *(f"| {' | '.join(map(_escaped, row.values()))} |" for row in rows),
        "",
        *(f"- {note}" for note in notes(results)),
        "",
        _where(results.environment),
    ]
    return "\n".join(lines) + "\n"


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")


def _where(environment: Environment) -> str:
    device = environment.accelerator or environment.device
    return (
        f"{environment.processor}, {environment.cores} cores, {environment.threads} "
        f"thread(s) a run, device {device}, torch {environment.torch}, commit "
        f"{environment.commit}."
    )


def csv_text(results: ComparisonRecord) -> str:
    """A line for each run with its own figures.

    Args:
        results: As `results_of` gives them.
    """
    table = io.StringIO()
    keys = ["seed", *_BY_KEY, "best_epoch", "fitted_nll", "zipf_exponent", "commit", "folder"]
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["variant", *keys])
    for variant in results.variants:
        for run in variant.runs:
            values = [getattr(run, key) for key in keys]
            writer.writerow([variant.name, *("" if v is None else v for v in values)])
    return table.getvalue()
