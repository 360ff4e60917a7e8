"""Writes the HTML page."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path

from jinja2 import Environment, StrictUndefined

from softlabels.files import replace_file
from softlabels.report.figures import RUN_COLOURS, Line, decimals, draw_curves, thin_out
from softlabels.report.read import Gallery, GalleryImage, RunRecord, read_run


@dataclass(frozen=True)
class _Score:
    """How a score is shown."""

    key: str
    heading: str
    unit: str
    better: str
    digits: int
    meaning: str = ""


_SCORES = (
    _Score("top1", "top-1", "%", "higher", 2),
    _Score("top5", "top-5", "%", "higher", 2),
    _Score(
        "group_top1",
        "group top-1",
        "%",
        "higher",
        2,
        "Group top-1: an answer in the true class's group counts as right.",
    ),
    _Score("nll", "NLL", "nats", "lower", 4, "NLL: mean negative log-likelihood."),
    _Score("ece", "ECE", "%", "lower", 2, "ECE: expected calibration error."),
)
_CURVE_SCORES = ("top1", "nll", "ece")
_LOSS_PARTS = (("train/task", "task"), ("train/method", "method"))


@dataclass(frozen=True)
class _Cell:
    text: str
    value: float | None = None


@dataclass(frozen=True)
class _Run:
    """A run as the page names and colours it."""

    record: RunRecord
    name: str
    number: int

    @property
    def colour(self) -> int:
        return self.number % len(RUN_COLOURS)


@dataclass(frozen=True)
class _Chart:
    title: str
    remark: str
    svg: str


@dataclass(frozen=True)
class _Fact:
    """A row of a table with a column a run; `same` where all runs share the value."""

    name: str
    values: tuple[str, ...]

    @property
    def same(self) -> bool:
        return len(set(self.values)) == 1


@dataclass(frozen=True)
class _Sample:
    """An image and what each run says about it."""

    split: str
    image: GalleryImage
    answers: tuple[tuple[_Run, GalleryImage], ...]


def write_report(
    run_folders: Sequence[Path],
    output: Path,
    *,
    title: str,
    table: Sequence[Mapping[str, str | float]] | None = None,
    notes: Sequence[str] = (),
    command: str | None = None,
) -> Path:
    """Writes one self-contained HTML page about a run or a comparison of runs.

    The page needs no network and no script: results, curves, soft labels of some test images,
    environment and configuration. It depends on the arguments and the run folders alone.

    Args:
        run_folders: The run folders, in the order of the page; at least one.
        output: The HTML file to write; missing folders are made.
        title: The heading.
        table: Further columns of the results: for each run, in the order of `run_folders`, a
            mapping from column heading (with its unit) to value. A heading may be missing in
            some of the runs.
        notes: Sentences shown under the heading.
        command: The command that made the runs.

    Returns:
        `output`.

    Raises:
        ValueError: There is no run folder, `table` has another length than `run_folders`, or a
            file of a run is missing or damaged (the message names it).
    """
    if not run_folders:
        raise ValueError("got no run folder, expected at least one")
    columns = [{} for _ in run_folders] if table is None else list(table)
    if len(columns) != len(run_folders):
        raise ValueError(
            f"table has {len(columns)} entries, expected one for each of {len(run_folders)} runs"
        )
    records = [read_run(folder) for folder in run_folders]
    runs = [_Run(*named, i) for i, named in enumerate(zip(records, _names(records), strict=True))]
    scores = [s for s in _SCORES if any(s.key in record.final for record in records)]
    extra = list(dict.fromkeys(heading for mapping in columns for heading in mapping))
    cells = [[_score_cell(record, score) for record in records] for score in scores]
    cells += [_extra_column([mapping.get(name, "") for mapping in columns]) for name in extra]
    samples = _samples(runs)
    shares = [share for s in samples for _, image in s.answers for _, share in image.non_target]
    template = (
        resources.files("softlabels.report").joinpath("page.html.j2").read_text(encoding="utf-8")
    )
    page = (
        Environment(
            autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
        )
        .from_string(template)
        .render(
            title=title,
            command=command,
            notes=notes,
            colours=list(enumerate(RUN_COLOURS)),
            introduction=_introduction(records),
            runs=runs,
            scores=scores,
            extra=extra,
            rows=[(run, [column[run.number] for column in cells]) for run in runs],
            caveats=_caveats(records, scores),
            score_charts=_score_charts(runs),
            loss_charts=_loss_charts(runs),
            samples=samples,
            longest_bar=max(shares, default=0.0) or 1.0,
            facts=_facts(records),
            environment=_environment(records),
        )
    )
    output = Path(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    with replace_file(output) as file:
        file.write(page.encode())
    return output


def _names(records: Sequence[RunRecord]) -> list[str]:
    """A name for each run: its label, with the seed or folder where labels are not unique."""
    folders = [_printable(record.folder.name) for record in records]
    names = [
        _printable(record.label).strip() or folder
        for record, folder in zip(records, folders, strict=True)
    ]
    for details in ([f"seed {record.seed}" for record in records], folders):
        names = [
            f"{name}, {detail}" if names.count(name) > 1 else name
            for name, detail in zip(names, details, strict=True)
        ]
    return names


def _printable(text: str) -> str:
    """Without what a chart's XML cannot hold."""
    return "".join(c if c.isprintable() else " " for c in text)


def _join(values: Iterable[object]) -> str:
    """The different values in their order, as words."""
    return ", ".join(dict.fromkeys(str(value) for value in values))


def _introduction(records: Sequence[RunRecord]) -> str:
    count = "One run" if len(records) == 1 else f"{len(records)} runs"
    epochs = _join(record.epochs for record in records)
    return (
        f"{count} of {_join(r.model for r in records)} on {_join(r.data for r in records)}, "
        f"{epochs} {'epoch' if epochs == '1' else 'epochs'}."
    )


def _caveats(records: Sequence[RunRecord], scores: Sequence[_Score]) -> list[str]:
    """The sentences under the table of results."""
    seeds = list(dict.fromkeys(record.seed for record in records))
    sentences = [f"{'Seed' if len(seeds) == 1 else 'Seeds'} {_join(seeds)}."]
    counts = {record.test_images for record in records if record.test_images is not None}
    if counts:
        sentences.append(f"{_join(f'{count:,}' for count in sorted(counts))} test images.")
    sentences.append("Scores after the last finished epoch; every row is one run.")
    repeats = {len({r.seed for r in records if r.label == record.label}) for record in records}
    if min(repeats) == 1:
        sentences.append("One seed is no evidence of a difference between methods.")
    else:
        sentences.append("A difference that is within the spread over seeds is no evidence.")
    if not all(record.is_complete for record in records):
        sentences.append("Incomplete runs stopped before their last epoch.")
    sentences += [score.meaning for score in scores if score.meaning]
    return sentences


def _score_cell(record: RunRecord, score: _Score) -> _Cell:
    value = record.final.get(score.key)
    return _Cell("") if value is None else _Cell(decimals(value, score.digits), value)


def _extra_column(values: Sequence[str | float]) -> list[_Cell]:
    """A column given by the caller: its numbers with the same decimals, about four digits."""
    fractions = [abs(v) for v in values if isinstance(v, float) and math.isfinite(v)]
    digits = max(0, 4 - len(str(int(max(fractions))))) if fractions else 0
    return [
        _Cell(value) if isinstance(value, str) else _Cell(f"{value:.{digits}f}", value)
        for value in values
    ]


def _score_charts(runs: Sequence[_Run]) -> list[_Chart]:
    charts = []
    for score in _SCORES:
        key = f"eval/{score.key}"
        if score.key not in _CURVE_SCORES or not any(key in run.record.curves for run in runs):
            continue
        lines, missing = _lines(runs, key)
        svg = draw_curves(
            lines,
            x_label="finished epochs",
            y_label=f"{score.heading} ({score.unit})",
            digits=min(score.digits, 3),
        )
        remark = f"{score.better} is better"
        charts.append(_Chart(f"Test {score.heading}", remark + missing, svg))
    return charts


def _loss_charts(runs: Sequence[_Run]) -> list[_Chart]:
    charts = []
    for key, part in _LOSS_PARTS:
        if not any(key in run.record.curves for run in runs):
            continue
        lines, missing = _lines(runs, key)
        svg = draw_curves(
            [replace(line, curve=thin_out(line.curve)) for line in lines],
            x_label="steps",
            y_label=f"{part} loss (nats)",
            digits=3,
        )
        several = len(lines) > 1
        remark = "methods differ in scale" if several and part == "method" else "lower is better"
        charts.append(_Chart(f"Training loss, the {part}'s part", remark + missing, svg))
    return charts


def _lines(runs: Sequence[_Run], key: str) -> tuple[list[Line], str]:
    """The lines of a chart, and a remark that names the runs without one."""
    lines = [
        Line(run.name, run.number, run.record.curves[key])
        for run in runs
        if key in run.record.curves
    ]
    without = [run.name for run in runs if key not in run.record.curves]
    return lines, f"; no values: {', '.join(without)}" if without else ""


def _samples(runs: Sequence[_Run]) -> list[_Sample]:
    """The saved images of all runs: one entry an image, even if several runs saved it."""
    images: dict[tuple[str, str, int], GalleryImage] = {}
    answers: dict[tuple[str, str, int], list[tuple[_Run, GalleryImage]]] = {}
    for run in runs:
        gallery = run.record.gallery or Gallery("", ())
        for image in gallery.images:
            key = (run.record.data, gallery.split, image.index)
            images.setdefault(key, image)
            answers.setdefault(key, []).append((run, image))
    return [_Sample(key[1], image, tuple(answers[key])) for key, image in images.items()]


def _facts(records: Sequence[RunRecord]) -> list[_Fact]:
    rows = {
        "model": [r.model for r in records],
        "parameters": [f"{r.parameters:,}" for r in records],
        "data": [r.data for r in records],
        "method": [r.method or "none" for r in records],
        "teacher's test top-1": [_teacher(r) for r in records],
        "seed": [str(r.seed) for r in records],
        "epochs": [str(r.epochs) for r in records],
        "best test top-1": [_best(r) for r in records],
        "time": [_duration(r.seconds) for r in records],
        "images per second": [
            "" if r.images_per_second is None else f"{r.images_per_second:,.0f}" for r in records
        ],
        "state": ["complete" if r.is_complete else "incomplete" for r in records],
        "folder": [_printable(r.folder.name) for r in records],
    }
    return [_Fact(name, tuple(values)) for name, values in rows.items() if any(values)]


def _teacher(record: RunRecord) -> str:
    if record.teacher_top1 is None:
        return ""
    return f"{decimals(record.teacher_top1, 2)} % ({record.teacher or 'the teacher'})"


def _best(record: RunRecord) -> str:
    if "top1" not in record.best:
        return ""
    epoch = "" if record.best_epoch is None else f" (epoch {record.best_epoch})"
    return f"{decimals(record.best['top1'], 2)} %{epoch}"


def _duration(seconds: float) -> str:
    if not 100 <= seconds < math.inf:
        return f"{decimals(seconds, 1)} s"
    minutes, hours = round(seconds / 60), int(seconds // 3600)
    return f"{minutes} min" if hours < 2 else f"{hours} h {round(seconds / 60) - 60 * hours} min"


def _environment(records: Sequence[RunRecord]) -> list[_Fact]:
    keys = dict.fromkeys(key for record in records for key in record.environment)
    return [_Fact(key, tuple(r.environment.get(key, "") for r in records)) for key in keys]
