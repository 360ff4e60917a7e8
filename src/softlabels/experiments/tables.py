"""What came out of a comparison: a record of each run, figures over the seeds, and tables."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from softlabels.experiments.comparison import PlannedVariant
from softlabels.experiments.statistics import LEAST_SEEDS, Paired, Verdict, paired, spread
from softlabels.training.run_folder import RunFolder, fixed_settings

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


def results_of(variants: Sequence[PlannedVariant], folder: Path) -> dict[str, Any]:
    """Everything that came out, as plain data.

    Args:
        variants: All complete; the first is the baseline.
        folder: Of the runs, which paths are relative to.

    Returns:
        `baseline`, `seeds`, `environment` (of the first run), `commits` (of all runs), `teachers`
        (`name` and `top1` on the test images, each once), and `variants`: for each its `name`, the
        `settings` that differ from the baseline's, `runs` (a record a seed), `scores` (mean and
        deviation of each figure that all its runs have), and `against_baseline` for the figures
        that are compared.
    """
    agreements = _agreements(variants)
    records = {
        variant.name: [
            {**_record(run.folder, folder), **agreements.get(run.folder.path, {})}
            for run in variant.runs
        ]
        for variant in variants
    }
    baseline = variants[0]
    first = _read(baseline.runs[0].folder.environment)
    for name in ("command", "process", "host", "earlier_starts", "seed"):
        first.pop(name, None)
    commits = {str(record["commit"]) for runs in records.values() for record in runs}
    return {
        "baseline": baseline.name,
        "seeds": [run.config.seed for run in baseline.runs],
        "environment": first,
        "commits": sorted(commits),
        "teachers": _teachers(variants),
        "variants": [
            {
                "name": variant.name,
                "settings": _differing(variant, baseline),
                "runs": records[variant.name],
                "scores": _scores(records[variant.name]),
                "against_baseline": {}
                if variant is baseline
                else _against(records[variant.name], records[baseline.name]),
            }
            for variant in variants
        ],
    }


def _read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def _record(folder: RunFolder, runs: Path) -> dict[str, Any]:
    """The figures of one run."""
    summary, analysis = _read(folder.summary), _read(folder.analysis)
    final, best = summary["final"], summary["best"]
    fitted = analysis["temperature"] or {}
    lines = [
        json.loads(line)
        for line in (folder.path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    evaluated = [line for line in lines if "eval/top1" in line]
    memory = summary.get("peak_memory")
    return {
        "seed": summary["seed"],
        "folder": str(folder.path.relative_to(runs)),
        "commit": _read(folder.environment).get("commit"),
        **{key: final[key] for key in ("top1", "group_top1", "nll", "ece") if key in final},
        "best_top1": best["top1"],
        "best_epoch": best["epoch"],
        "fitted_ece": fitted.get("ece"),
        "fitted_nll": fitted.get("nll"),
        "temperature": fitted.get("value"),
        "zipf_r2": final.get("zipf_r2"),
        "zipf_exponent": final.get("zipf_exponent"),
        "teacher_agreement": (analysis["teacher"] or {}).get("agreement"),
        "seconds_per_epoch": summary.get("seconds_per_epoch"),
        "peak_memory": None if memory is None else memory / 1e6,
        "curve": {
            name: [line[f"eval/{name}"] for line in evaluated]
            for name in _CURVES
            if all(f"eval/{name}" in line for line in evaluated)
        },
    }


def _teachers(variants: Sequence[PlannedVariant]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for run in (run for variant in variants for run in variant.runs):
        teacher = _read(run.folder.analysis)["teacher"]
        if teacher is None:
            continue
        told = {"name": teacher["name"], "top1": teacher["top1"]}
        if told not in found:
            found.append(told)
    return found


def _agreements(variants: Sequence[PlannedVariant]) -> dict[Path, dict[str, float]]:
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
        path: {
            "teacher_agreement": 100
            * float(np.mean(found["predicted"] == teacher["teacher_predicted"]))
        }
        for path, found in answers.items()
        if "teacher_predicted" not in found and np.array_equal(found["index"], teacher["index"])
    }


def _differing(variant: PlannedVariant, baseline: PlannedVariant) -> dict[str, Any]:
    """The settings of a variant that the baseline does not have, by their paths."""
    ours, theirs = (_flat(fixed_settings(v.config)) for v in (variant, baseline))
    return {key: ours[key] for key in ours if key not in theirs or ours[key] != theirs[key]}


def _flat(values: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        path = f"{before}{key}"
        found.update(_flat(value, f"{path}.") if isinstance(value, Mapping) else {path: value})
    return found


def _values(records: Sequence[Mapping[str, Any]], key: str) -> list[float] | None:
    """A figure of all runs; None if some have none."""
    values = [record.get(key) for record in records]
    return (
        None
        if any(value is None for value in values)
        else [float(v) for v in values if v is not None]
    )


def _scores(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    found = {score.key: _values(records, score.key) for score in _SCORES}
    return {key: asdict(spread(values)) for key, values in found.items() if values}


def _against(
    ours: Sequence[Mapping[str, Any]], theirs: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for score in _SCORES:
        pair = [_values(records, score.key) for records in (ours, theirs)]
        if score.is_compared and pair[0] and pair[1]:
            result = paired(pair[0], pair[1])
            found[score.key] = {**asdict(result), "in_words": _in_words(result, score)}
    return found


def _in_words(result: Paired, score: _Score) -> str:
    return _IN_WORDS[result.verdict][0 if score.higher_is_better else 1]


def cells(results: Mapping[str, Any], *, brief: bool = False) -> list[dict[str, str]]:
    """A row of texts for each variant, by heading, for tables and the report.

    Args:
        results: As `results_of` gives them.
        brief: The columns that a terminal has room for.
    """
    shown = [s for s in _SCORES if any(s.key in v["scores"] for v in results["variants"])]
    rows = [_row(variant, results, shown) for variant in results["variants"]]
    if not brief:
        return rows
    kept = {*_BRIEF, f"difference to {results['baseline']}"}
    return [{key: text for key, text in row.items() if key in kept} for row in rows]


def _row(
    variant: Mapping[str, Any], results: Mapping[str, Any], shown: Sequence[_Score]
) -> dict[str, str]:
    row = {"": str(variant["name"])}
    for score in shown:
        found = variant["scores"].get(score.key)
        row[score.heading] = "" if found is None else _with_spread(found, score.digits)
        if score.key == "top1":
            row.update(_differences(variant, results))
    return row


def _with_spread(found: Mapping[str, float | None], digits: int) -> str:
    text = f"{found['mean']:.{digits}f}"
    deviation = found["deviation"]
    return text if deviation is None else f"{text} ± {deviation:.{digits}f}"


def _differences(variant: Mapping[str, Any], results: Mapping[str, Any]) -> dict[str, str]:
    """The columns about top-1 against the baseline."""
    found = variant["against_baseline"].get("top1")
    row = {f"difference to {results['baseline']}": "baseline" if found is None else ""}
    several = len(results["seeds"]) > 1
    if several:
        row["95 % interval (t)"] = row["95 % interval (bootstrap)"] = ""
    if len(results["seeds"]) >= LEAST_SEEDS:
        row["p (exact)"] = ""
    if several:
        row["in words"] = ""
    if found is None:
        return row
    row[f"difference to {results['baseline']}"] = f"{found['mean']:+.2f}"
    if several:
        row["95 % interval (t)"] = _interval(found["t"])
        row["95 % interval (bootstrap)"] = _interval(found["bootstrap"])
        row["in words"] = found["in_words"]
    if found["p_value"] is not None:
        row["p (exact)"] = f"{found['p_value']:.3f}"
    return row


def _interval(ends: Sequence[float]) -> str:
    return f"{ends[0]:+.2f} to {ends[1]:+.2f}"


def notes(results: Mapping[str, Any]) -> list[str]:
    """Sentences that say what the figures can show.

    Args:
        results: As `results_of` gives them.
    """
    count = len(results["seeds"])
    teachers = ", ".join(f"{t['name']} {t['top1']:.2f} %" for t in results["teachers"])
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
    if any("fitted_ece" in variant["scores"] for variant in results["variants"]):
        found.append(
            f"{_BY_KEY['fitted_ece'].heading}: fitted on one half of the test images and measured "
            "on the other, both ways."
        )
    found += taught
    if len(results["commits"]) > 1:
        found.append(f"The runs are of several commits: {', '.join(results['commits'])}.")
    return found


def markdown(results: Mapping[str, Any]) -> str:
    """The table, with its notes.

    Args:
        results: As `results_of` gives them, with `title` and `command`.
    """
    rows = cells(results)
    headings = [*rows[0]]
    lines = [
        f"# {results['title']}",
        "",
        f"`{results['command']}`",
        "",
        f"| {' | '.join(headings)} |",
        f"| --- |{' ---: |' * (len(headings) - 1)}",
        *(f"| {' | '.join(map(_escaped, row.values()))} |" for row in rows),
        "",
        *(f"- {note}" for note in notes(results)),
        "",
        _where(results["environment"]),
    ]
    return "\n".join(lines) + "\n"


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")


def _where(environment: Mapping[str, Any]) -> str:
    device = environment["accelerator"] or environment["device"]
    return (
        f"{environment['processor']}, {environment['cores']} cores, {environment['threads']} "
        f"thread(s) a run, device {device}, torch {environment['torch']}, commit "
        f"{environment['commit']}."
    )


def csv_text(results: Mapping[str, Any]) -> str:
    """A line for each run with its own figures.

    Args:
        results: As `results_of` gives them.
    """
    table = io.StringIO()
    keys = ["seed", *_BY_KEY, "best_epoch", "fitted_nll", "zipf_exponent", "commit", "folder"]
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["variant", *keys])
    for variant in results["variants"]:
        for record in variant["runs"]:
            values = [record.get(key) for key in keys]
            writer.writerow([variant["name"], *("" if v is None else v for v in values)])
    return table.getvalue()
