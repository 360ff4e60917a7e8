"""The page of a comparison: variants, each run with the same seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from softlabels.report.canvas import printable
from softlabels.report.entries import Entry, caveats, join, what_ran
from softlabels.report.render import Cell, Heading, Results, write_page
from softlabels.training.run_records import RunRecord, read_run


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
    _check(variants, table)
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
        _results(entries, records, table),
        title=title,
        introduction=_introduction(entries, records),
        against_first=True,
        notes=notes,
        command=command,
    )


def _check(variants: Sequence[Variant], table: Sequence[Mapping[str, str]]) -> None:
    if not variants:
        raise ValueError("got no variant, expected at least one")
    names = [variant.name for variant in variants]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{names.count(name)} variants are named {name!r}, expected one")
    runs = max(len(variants[0].folders), 1)
    for variant in variants:
        if len(variant.folders) != runs:
            raise ValueError(
                f"variant {variant.name!r} has {len(variant.folders)} runs, expected {runs}: the "
                "same seeds for each variant"
            )
    if len(table) != len(variants):
        raise ValueError(
            f"table has {len(table)} rows, expected one for each of {len(variants)} variants"
        )


def _check_seeds(entries: Sequence[Entry]) -> None:
    """Differences of runs with different seeds would not be paired."""
    expected = _seeds(entries[0])
    for entry in entries:
        if _seeds(entry) != expected:
            raise ValueError(
                f"variant {entry.name!r} has the seeds {join(_seeds(entry))}, expected "
                f"{join(expected)} in this order, as {entries[0].name!r}"
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
        f"{what_ran(records)}{against}"
    )


def _results(
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
        remarks=tuple(caveats(records, evidence)),
    )
