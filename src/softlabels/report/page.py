"""The pages: of single runs, and of a comparison's variants, each run with the same seeds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from softlabels.analysis.scores import SCORES, Score
from softlabels.report.canvas import decimals, printable
from softlabels.report.entries import Entry, join
from softlabels.report.render import Cell, Heading, Results, write_page
from softlabels.training.run_records import RunRecord, read_run


def write_report(
    run_folders: Sequence[Path],
    output: Path,
    *,
    title: str,
    table: Sequence[Mapping[str, str | float]] | None = None,
    notes: Sequence[str] = (),
    command: str | None = None,
) -> Path:
    """Writes one self-contained HTML page about a run or several single runs.

    The page needs no network and no script: results, curves, the analysis of the answers, soft
    labels of some test images, environment and configuration. It depends on the arguments and the
    run folders alone.

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
    columns = [{}] * len(run_folders) if table is None else list(table)
    if len(columns) != len(run_folders):
        raise ValueError(
            f"table has {len(columns)} entries, expected one for each of {len(run_folders)} runs"
        )
    records = [read_run(folder) for folder in run_folders]
    count = "One run" if len(records) == 1 else f"{len(records)} runs"
    entries = [
        Entry(name, number, (record,))
        for number, (record, name) in enumerate(zip(records, _names(records), strict=True))
    ]
    return write_page(
        output,
        entries,
        _table_of_runs(entries, columns),
        title=title,
        introduction=f"{count} of {_what_ran(records)}",
        against_first=False,
        notes=notes,
        command=command,
    )


def _names(records: Sequence[RunRecord]) -> list[str]:
    """A name for each run: its label, with the seed or folder where labels are not unique."""
    folders = [printable(record.folder.name) for record in records]
    names = [
        printable(record.summary.label).strip() or folder
        for record, folder in zip(records, folders, strict=True)
    ]
    for details in ([f"seed {record.summary.seed}" for record in records], folders):
        names = [
            f"{name}, {detail}" if names.count(name) > 1 else name
            for name, detail in zip(names, details, strict=True)
        ]
    return names


def _table_of_runs(
    entries: Sequence[Entry], columns: Sequence[Mapping[str, str | float]]
) -> Results:
    scores = [
        s for s in SCORES.values() if any(s.key in entry.first.summary.final for entry in entries)
    ]
    extra = list(dict.fromkeys(heading for mapping in columns for heading in mapping))
    cells = [[_score_cell(entry.first, score) for entry in entries] for score in scores]
    cells += [_extra_column([mapping.get(name, "") for mapping in columns]) for name in extra]
    return Results(
        corner="run",
        headings=(
            *(Heading(score.heading, score.unit, score.better) for score in scores),
            *map(Heading, extra),
        ),
        rows=tuple((entry, tuple(column[entry.number] for column in cells)) for entry in entries),
        remarks=tuple(_caveats([entry.first for entry in entries], scores)),
    )


def _caveats(records: Sequence[RunRecord], scores: Sequence[Score]) -> list[str]:
    """The sentences under the table of results."""
    runs = [record.summary for record in records]
    seeds = {run.seed for run in runs}
    repeats = {len({r.seed for r in runs if r.label == run.label}) for run in runs}
    evidence = (
        "One seed is no evidence of a difference between methods."
        if min(repeats) == 1
        else "A difference that is within the spread over seeds is no evidence."
    )
    shown = "Scores after the last finished epoch; every row is one run."
    return [
        f"{'Seed' if len(seeds) == 1 else 'Seeds'} {join(run.seed for run in runs)}.",
        *_sentences(records, [shown, evidence]),
        *(score.meaning for score in scores if score.meaning),
    ]


def _score_cell(record: RunRecord, score: Score) -> Cell:
    value = record.summary.final.get(score.key)
    return Cell("") if value is None else Cell(decimals(value, score.digits), value)


def _extra_column(values: Sequence[str | float]) -> list[Cell]:
    """A column given by the caller: its numbers with the same decimals, about four digits."""
    fractions = [abs(v) for v in values if isinstance(v, float) and math.isfinite(v)]
    digits = max(0, 4 - len(str(int(max(fractions))))) if fractions else 0
    return [
        Cell(value) if isinstance(value, str) else Cell(f"{value:.{digits}f}", value)
        for value in values
    ]


@dataclass(frozen=True)
class Variant:
    """One of the things that a comparison compares.

    Attributes:
        name: Its name on the page.
        folders: Its run folders in the order of the seeds.
    """

    name: str
    folders: tuple[Path, ...]


def write_comparison(
    variants: Sequence[Variant],
    output: Path,
    *,
    title: str,
    table: Sequence[Mapping[str, str]],
    notes: Sequence[str] = (),
    command: str | None = None,
) -> Path:
    """Writes one self-contained HTML page about variants that were run with the same seeds.

    The page needs no network and no script: the table, curves with bands over seeds, paired
    differences to the first variant, the analysis of the answers, soft labels of some test images,
    settings that differ, environment and configuration. What some runs lack is left out, or the
    variant is named. It depends on the arguments and the run folders alone.

    Args:
        variants: The variants, in the order of the page; the first is the baseline.
        output: The HTML file to write; missing folders are made.
        title: The heading.
        table: A row for each variant, in their order: column heading (with its unit) to text. The
            headings of the first row are shown.
        notes: Sentences shown under the heading.
        command: The command that repeats the comparison.

    Returns:
        `output`.

    Raises:
        ValueError: There is no variant, two have one name, they have different numbers of runs or
            different seeds, `table` has another length than `variants`, or a file of a run is
            missing or damaged (the message names it).
    """
    if not variants:
        raise ValueError("got no variant, expected at least one")
    if len(table) != len(variants):
        raise ValueError(
            f"table has {len(table)} rows, expected one for each of {len(variants)} variants"
        )
    names = [variant.name for variant in variants]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{names.count(name)} variants are named {name!r}, expected one")
    entries = [
        Entry(
            printable(variant.name).strip() or f"variant {number + 1}",
            number,
            tuple(read_run(folder) for folder in variant.folders),
        )
        for number, variant in enumerate(variants)
    ]
    _check_seeds(entries)
    records = [record for entry in entries for record in entry.records]
    return write_page(
        output,
        entries,
        _table_of_variants(entries, records, table),
        title=title,
        introduction=_introduction(entries, records),
        against_first=True,
        notes=notes,
        command=command,
    )


def _check_seeds(entries: Sequence[Entry]) -> None:
    """Differences of runs with different seeds would not be paired."""
    expected = _seeds(entries[0])
    for entry in entries:
        seeds = _seeds(entry)
        if not seeds or seeds != expected:
            raise ValueError(
                f"variant {entry.name!r} has {len(seeds)} runs with the seeds {seeds}, expected "
                f"{max(1, len(expected))} with {expected} in this order, as {entries[0].name!r}"
            )


def _seeds(entry: Entry) -> list[int]:
    return [record.summary.seed for record in entry.records]


def _introduction(entries: Sequence[Entry], records: Sequence[RunRecord]) -> str:
    seeds = _seeds(entries[0])
    variants = f"{len(entries)} variants" if len(entries) > 1 else "one variant"
    runs = f"{len(records)} runs" if len(records) > 1 else "One run"
    against = f" Differences are to {entries[0].name}." if len(entries) > 1 else ""
    return (
        f"{runs}: {variants} with {'seed' if len(seeds) == 1 else 'seeds'} {join(seeds)}, of "
        f"{_what_ran(records)}{against}"
    )


def _table_of_variants(
    entries: Sequence[Entry], records: Sequence[RunRecord], table: Sequence[Mapping[str, str]]
) -> Results:
    headings = list(table[0])
    several = len({record.summary.seed for record in records}) > 1
    evidence = [] if several else ["One seed is no evidence of a difference."]
    return Results(
        corner="variant",
        headings=tuple(map(Heading, headings)),
        rows=tuple(
            (entry, tuple(Cell(row.get(heading, "")) for heading in headings))
            for entry, row in zip(entries, table, strict=True)
        ),
        remarks=tuple(_sentences(records, evidence)),
    )


def _what_ran(records: Sequence[RunRecord]) -> str:
    """Models, data and epochs of runs, for an introduction."""
    runs = [record.summary for record in records]
    models, data, epochs = (
        join(getattr(run, name) for run in runs) for name in ("model", "data", "epochs")
    )
    return f"{models} on {data}, {epochs} {'epoch' if epochs == '1' else 'epochs'}."


def _sentences(records: Sequence[RunRecord], evidence: Sequence[str]) -> list[str]:
    """Sentences below the results: the test set, then what they can show, and incomplete runs."""
    counts = {r.summary.test_images for r in records if r.summary.test_images is not None}
    images = [f"{join(f'{count:,}' for count in sorted(counts))} test images."] if counts else []
    stopped = not all(record.summary.complete for record in records)
    end = ["Incomplete runs stopped before their last epoch."] if stopped else []
    return [*images, *evidence, *end]
