"""What a page is made of: the runs or variants that it compares, and its sections."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from softlabels.analysis.scores import SCORES
from softlabels.report.canvas import MARKERS, RUN_COLOURS
from softlabels.training.run_records import Curve, RunRecord
from softlabels.training.schemas import Analysis

CURVE_SCORES = tuple(SCORES[key] for key in ("top1", "nll", "ece"))
"""Those that are drawn over epochs."""


@dataclass(frozen=True, eq=False)
class Entry:
    """A row of the results: a run, or a variant that was run with several seeds.

    Attributes:
        name: Its name, another one for each entry of a page.
        number: Its place on the page, which picks its color and its mark.
        records: Its runs in the order of the seeds; at least one.
    """

    name: str
    number: int
    records: tuple[RunRecord, ...]

    @property
    def color(self) -> int:
        """Number of its color on the page."""
        return self.number % len(RUN_COLOURS)

    @property
    def mark(self) -> int:
        """Number of the shape of its mark."""
        return self.number % len(MARKERS)

    @property
    def first(self) -> RunRecord:
        """The run with the first seed."""
        return self.records[0]

    @property
    def is_complete(self) -> bool:
        """Whether no run was stopped early."""
        return all(record.summary.complete for record in self.records)

    @property
    def analyses(self) -> list[Analysis]:
        """Of the runs that have one."""
        return [record.analysis for record in self.records if record.analysis is not None]

    def curves(self, key: str) -> list[Curve]:
        """The curves of a key, of the runs that have it."""
        return [record.curves[key] for record in self.records if key in record.curves]


@dataclass(frozen=True)
class Chart:
    """A picture with a heading and a remark; without an entry it is about all of them."""

    title: str
    remark: str
    svg: str
    entry: Entry | None = None


@dataclass(frozen=True)
class Bar:
    """A cell of a table with a bar behind its text, of a length from 0 to 1; no text: no value."""

    text: str
    share: float = 0.0


@dataclass(frozen=True)
class BarTable:
    """A table with a column for each entry, and rows of a name and a cell for each entry."""

    corner: str
    entries: tuple[Entry, ...]
    rows: tuple[tuple[str, tuple[Bar, ...]], ...]


@dataclass(frozen=True)
class Block:
    """A part of a section: sentences, then pictures (large, middle or small) or a table."""

    text: str = ""
    heading: str = ""
    charts: tuple[Chart, ...] = ()
    size: str = "large"
    table: BarTable | None = None


@dataclass(frozen=True)
class Section:
    """A section of the page, which addresses name by its key; it has a block at least."""

    key: str
    title: str
    blocks: tuple[Block, ...]


def join(values: Iterable[object]) -> str:
    """The different values in their order, as words."""
    return ", ".join(dict.fromkeys(str(value) for value in values))


def without(entries: Sequence[Entry], has: Callable[[Entry], object]) -> str:
    """The end of a remark, which names the entries that have no values."""
    missing = [entry.name for entry in entries if not has(entry)]
    return f"; no values: {', '.join(missing)}" if missing else ""


def section(
    key: str, title: str, text: str, charts: Sequence[Chart], *, size: str = "large"
) -> list[Section]:
    """A section of one block; none without charts."""
    return [Section(key, title, (Block(text, charts=tuple(charts), size=size),))] if charts else []


def has_seeds(entries: Sequence[Entry]) -> bool:
    """Whether any of them was run with several seeds."""
    return any(len(entry.records) > 1 for entry in entries)


def same_classes(entry: Entry, other: Entry) -> bool:
    """Whether the analyses of two entries are about the same classes."""
    return entry.analyses[0].class_names == other.analyses[0].class_names
