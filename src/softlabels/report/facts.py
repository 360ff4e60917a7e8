"""What was run: tables of facts, environment, and the settings that differ."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from softlabels.report.canvas import decimals, printable
from softlabels.report.entries import Entry, has_seeds, join
from softlabels.training.recipes import ConfigError, flattened, parsed_text
from softlabels.training.run_records import RunRecord

_OF_A_RUN = ("seed", "output")  # settings that differ between the runs of one variant
_TOO_LONG_FOR_MANY = ("command",)


@dataclass(frozen=True)
class Fact:
    """A row of a table with a text for each entry, empty where there is none."""

    name: str
    values: tuple[str, ...]

    @property
    def same(self) -> bool:
        """Whether all entries share the value."""
        return len(set(self.values)) == 1


def facts(entries: Sequence[Entry]) -> list[Fact]:
    """What each entry is, and how long it took."""
    several = has_seeds(entries)
    columns: dict[str, Callable[[Entry], str]] = {
        "model": _all(lambda r: r.summary.model),
        "parameters": _all(lambda r: f"{r.summary.parameters:,}"),
        "data": _all(lambda r: r.summary.data),
        "method": _all(lambda r: r.summary.method or "none"),
        "teacher's test top-1": _all(_teacher),
        "agreement with the teacher": _agreement,
        "seeds" if several else "seed": _all(lambda r: r.summary.seed),
        "epochs": _all(lambda r: r.summary.epochs),
        "best test top-1": lambda entry: "" if several else _best(entry.first),
        "time of a run" if several else "time": _time,
        "images per second": _speed,
        "state": lambda entry: "complete" if entry.is_complete else "incomplete",
        "folders" if several else "folder": _all(lambda r: printable(r.folder.name)),
    }
    rows = [Fact(name, tuple(map(of, entries))) for name, of in columns.items()]
    return [row for row in rows if any(row.values)]


def environment(entries: Sequence[Entry]) -> list[Fact]:
    """Versions, commit and hardware; of several runs all different values."""
    texts = [[r.environment.texts() for r in e.records if r.environment] for e in entries]
    keys = dict.fromkeys(key for of_entry in texts for of_run in of_entry for key in of_run)
    several = has_seeds(entries)
    return [
        Fact(key, tuple(join(run[key] for run in of_entry if key in run) for of_entry in texts))
        for key in keys
        if not (several and key in _TOO_LONG_FOR_MANY)
    ]


def different_settings(entries: Sequence[Entry]) -> list[Fact]:
    """The settings that are not the same in all entries (of the first seed)."""
    settings = [_settings(entry.first.config) for entry in entries]
    keys = dict.fromkeys(key for one in settings for key in one if key not in _OF_A_RUN)
    sections = list(dict.fromkeys(key.partition(".")[0] for key in keys))
    ordered = sorted(keys, key=lambda key: sections.index(key.partition(".")[0]))
    rows = [Fact(key, tuple(one.get(key, "") for one in settings)) for key in ordered]
    return [row for row in rows if not row.same]


def _settings(text: str) -> dict[str, str]:
    """The settings of a configuration by their path; none where it cannot be read."""
    try:
        values = flattened(parsed_text(text, "config.yaml"))
    except ConfigError:
        return {}  # it is shown as it stands
    shown = {key: "none" if value is None else f"{value!s:.200}" for key, value in values.items()}
    return {printable(key): printable(value) for key, value in shown.items()}


def _all(of: Callable[[RunRecord], object]) -> Callable[[Entry], str]:
    """The different values of an entry's runs."""
    return lambda entry: join(value for record in entry.records if (value := of(record)) != "")


def _agreement(entry: Entry) -> str:
    values = [a.teacher.agreement for a in entry.analyses if a.teacher is not None]
    return f"{decimals(statistics.fmean(values), 2)} %" if values else ""


def _time(entry: Entry) -> str:
    return _duration(statistics.median(record.summary.seconds for record in entry.records))


def _speed(entry: Entry) -> str:
    speeds = [r.images_per_second for r in entry.records if r.images_per_second is not None]
    return f"{statistics.median(speeds):,.0f}" if speeds else ""


def _teacher(record: RunRecord) -> str:
    teacher = record.summary.teacher
    return "" if teacher is None else f"{decimals(teacher.top1, 2)} % ({teacher.name})"


def _best(record: RunRecord) -> str:
    best = record.summary.best
    return f"{decimals(best['top1'], 2)} % (epoch {best['epoch']})" if best else ""


def _duration(seconds: float) -> str:
    if not 100 <= seconds < math.inf:
        return f"{decimals(seconds, 1)} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"
