"""What came out of a comparison: a record of each run, figures over the seeds, and tables."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from softlabels.analysis.scores import SCORES, Score
from softlabels.experiments.comparison import PlannedVariant
from softlabels.experiments.comparison_record import (
    ComparisonRecord,
    Difference,
    RunFigures,
    VariantRecord,
)
from softlabels.experiments.statistics import LEAST_SEEDS, Spread, paired, spread
from softlabels.experiments.text_tables import csv_table, markdown_table
from softlabels.training.recipes import flattened
from softlabels.training.run_folder import fixed_settings
from softlabels.training.run_records import RunRecord, read_run
from softlabels.training.schemas import Environment, NamedScore

__all__ = ["cells", "csv_text", "markdown", "notes", "results_of"]

_COMPARED = ("top1", "group_top1", "nll", "ece")
_SCORES = (
    SCORES["top1"],
    Score("best_top1", "best epoch's top-1", "%", "higher", 2),
    SCORES["group_top1"],
    SCORES["nll"],
    SCORES["ece"],
    Score("fitted_ece", "ECE % after temperature", "", "lower", 2),
    Score("temperature", "temperature", "", "", 2),
    Score("teacher_agreement", "agreement with the teacher", "%", "", 1),
    Score("zipf_r2", "R² of Zipf's law", "", "", 3),
    Score("seconds_per_epoch", "seconds an epoch", "", "lower", 1),
    Score("peak_memory", "peak memory", "MB", "lower", 0),
)
_MOST_DIGITS = 3
_BRIEF = ("", "top-1 %", "95 % interval (t)", "in words")
_CURVES = ("top1", "nll", "ece", "zipf_r2")


def results_of(
    variants: Sequence[PlannedVariant], folder: Path, *, title: str, command: str
) -> ComparisonRecord:
    """Everything that came out of complete variants, the baseline first.

    Paths are relative to the folder of the runs; the command repeats the comparison.
    """
    records = {v.name: [read_run(run.folder.path) for run in v.runs] for v in variants}
    agreements = _agreements(variants)
    figures = {
        name: tuple(_figures(run, folder, agreements.get(run.folder)) for run in runs)
        for name, runs in records.items()
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
        teachers=_teachers([run for runs in records.values() for run in runs]),
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


def _figures(run: RunRecord, runs: Path, agreement: float | None) -> RunFigures:
    """The figures of one of the runs, with its agreement with the comparison's teacher."""
    summary, analysis = run.summary, run.analysis
    fitted, taught = analysis and analysis.temperature, analysis and analysis.teacher
    final, best = summary.final, summary.best
    curves = {name: run.curves.get(f"eval/{name}") for name in _CURVES}
    figures: dict[str, Any] = {
        "seed": summary.seed,
        "folder": str(run.folder.relative_to(runs)),
        "commit": run.environment and run.environment.commit,
        **{key: final[key] for key in _COMPARED if key in final},
        "best_top1": best["top1"],
        "best_epoch": best["epoch"],
        "fitted_ece": fitted and fitted.ece,
        "fitted_nll": fitted and fitted.nll,
        "temperature": fitted and fitted.value,
        "zipf_r2": final.get("zipf_r2"),
        "zipf_exponent": final.get("zipf_exponent"),
        "teacher_agreement": taught.agreement if agreement is None and taught else agreement,
        "seconds_per_epoch": summary.seconds_per_epoch,
        "peak_memory": None if summary.peak_memory is None else summary.peak_memory / 1e6,
        "curve": {name: curve.y.tolist() for name, curve in curves.items() if curve is not None},
    }
    return RunFigures.model_validate(figures)


def _teachers(runs: Sequence[RunRecord]) -> tuple[NamedScore, ...]:
    """Those of all runs, each once."""
    analyses = [run.analysis for run in runs if run.analysis is not None]
    found = dict.fromkeys((a.teacher.name, a.teacher.top1) for a in analyses if a.teacher)
    return tuple(NamedScore(name=name, top1=top1) for name, top1 in found)


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


def _values(runs: Sequence[RunFigures], key: str) -> list[float]:
    """A figure of all runs; none where some have none."""
    values = [getattr(run, key) for run in runs]
    return [] if None in values else [float(value) for value in values]


def _scores(runs: Sequence[RunFigures]) -> dict[str, Spread]:
    found = {score.key: _values(runs, score.key) for score in _SCORES}
    return {key: spread(values) for key, values in found.items() if values}


def _against(ours: Sequence[RunFigures], theirs: Sequence[RunFigures]) -> dict[str, Difference]:
    found: dict[str, Difference] = {}
    for key in _COMPARED:
        pair = [_values(runs, key) for runs in (ours, theirs)]
        if all(pair):
            result = paired(*pair)
            in_words: str = result.verdict
            if in_words in ("higher", "lower"):
                in_words = "better" if in_words == SCORES[key].better else "worse"
            found[key] = Difference(**vars(result), in_words=in_words)
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
    variant: VariantRecord, results: ComparisonRecord, shown: Sequence[Score]
) -> dict[str, str]:
    row = {"": variant.name}
    for score in shown:
        found = variant.scores.get(score.key)
        digits = min(score.digits, _MOST_DIGITS)
        row[score.column] = "" if found is None else f"{found:.{digits}f}"
        if score.key == "top1":
            row |= _differences(variant.against_baseline.get("top1"), results)
    return row


def _differences(found: Difference | None, results: ComparisonRecord) -> dict[str, str]:
    """The columns about top-1 against the baseline, of the baseline itself too."""
    several = len(results.seeds) > 1
    row = {f"difference to {results.baseline}": f"{found.mean:+.2f}" if found else "baseline"}
    if several:
        row["95 % interval (t)"] = _interval(found.t if found else None)
        row["95 % interval (bootstrap)"] = _interval(found.bootstrap if found else None)
    if len(results.seeds) >= LEAST_SEEDS:
        p_value = found.p_value if found else None
        row["p (exact)"] = "" if p_value is None else f"{p_value:.3f}"
    if several:
        row["in words"] = found.in_words if found else ""
    return row


def _interval(ends: tuple[float, float] | None) -> str:
    return "" if ends is None else f"{ends[0]:+.2f} to {ends[1]:+.2f}"


def notes(results: ComparisonRecord) -> list[str]:
    """Sentences that say what the figures can show."""
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
            "ECE % after temperature: fitted on one half of the test images and measured "
            "on the other, both ways."
        )
    found += taught
    if len(results.commits) > 1:
        found.append(f"The runs are of several commits: {', '.join(results.commits)}.")
    return found


def markdown(results: ComparisonRecord) -> str:
    """The table, with its notes."""
    rows = cells(results)
    environment = results.environment
    device = environment.accelerator or environment.device
    lines = [
        f"# {results.title}",
        "",
        f"`{results.command}`",
        "",
        *markdown_table([*rows[0]], [row.values() for row in rows]),
        "",
        *(f"- {note}" for note in notes(results)),
        "",
        f"{environment.processor}, {environment.cores} cores, {environment.threads} "
        f"thread(s) a run, device {device}, torch {environment.torch}, commit "
        f"{environment.commit}.",
    ]
    return "\n".join(lines) + "\n"


def csv_text(results: ComparisonRecord) -> str:
    """A line for each run with its own figures."""
    shown = [score.key for score in _SCORES]
    keys = ["seed", *shown, "best_epoch", "fitted_nll", "zipf_exponent", "commit", "folder"]
    rows = (
        [variant.name, *(getattr(run, key) for key in keys)]
        for variant in results.variants
        for run in variant.runs
    )
    return csv_table(["variant", *keys], rows)
