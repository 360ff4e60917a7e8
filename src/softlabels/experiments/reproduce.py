"""Runs the rows of a published table, their baselines and their teachers, and compares."""

from __future__ import annotations

import difflib
import re
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import computed_field
from rich.console import Console

from softlabels.experiments.launcher import PlannedRun, RunPlan, launch_runs
from softlabels.experiments.smoke import shrunk
from softlabels.experiments.statistics import Spread, spread
from softlabels.experiments.text_tables import markdown_table
from softlabels.io.console import say, show_table
from softlabels.io.files import write_json, write_text
from softlabels.io.records import Record
from softlabels.training.config import (
    Config,
    ConfigError,
    load_recipe,
    recipe_names,
    resolve,
)
from softlabels.training.recipes import flattened, merged
from softlabels.training.schemas import Environment, Summary
from softlabels.training.settings import PaperSettings

__all__ = ["Reproduced", "describe_recipes", "recipes_of", "reproduce", "tables"]

_SHARED = "shared"  # the folder of what recipes have in common, which is no table
_PARTS = re.compile(r"\d+|\D+").findall  # table2 comes before table10


class Reproduced(Record):
    """A row of a table: what was published, and what came out here.

    Attributes:
        recipe: Its name.
        paper: What was published.
        top1: Test top-1 of each seed, %, of the epoch that the paper reports.
        gains: Over the baseline's run of the same seed, points; empty without a baseline.
        published_gain: The same in the paper; None where a figure is missing.
        assumed: Settings that no source gives, with reasons.
    """

    recipe: str
    paper: PaperSettings
    top1: list[float]
    gains: list[float]
    published_gain: float | None
    assumed: dict[str, str]

    @computed_field  # type: ignore[prop-decorator]  # mypy takes properties for undecorated
    @property
    def difference(self) -> float | None:
        """Our mean top-1 minus the published one, points."""
        return None if self.paper.top1 is None else spread(self.top1).mean - self.paper.top1


def tables() -> list[str]:
    """Names of the tables that the package has recipes for, with those of the embedded data."""
    found = {name.partition("/")[0] for name in recipe_names()} - {_SHARED}
    return sorted(found, key=lambda name: [int(p) if p.isdigit() else p for p in _PARTS(name)])


def recipes_of(table: str) -> list[str]:
    """Names of a table's recipes.

    Raises:
        ConfigError: No such table.
    """
    found = [name for name in recipe_names() if name.startswith(f"{table}/")]
    if not found or table == _SHARED:
        near = difflib.get_close_matches(table[:80], tables(), n=3)
        raise ConfigError(
            f"no table {table!r:.80}: expected one of {', '.join(tables())}"
            + (f"; near: {', '.join(near)}" if near else "")
        )
    return found


def describe_recipes(
    *, data: str | None = None, method: str | None = None, table: str | None = None
) -> list[str]:
    """What each recipe is called and runs, and what was published; at most 80 characters wide.

    Those on a data source, of a table, or of a method, as which `"cross_entropy"` and
    `"label_smoothing"` count too.

    Raises:
        ConfigError: No recipe has this table, data or method.
    """
    names = recipes_of(table) if table is not None else [n for t in tables() for n in recipes_of(t)]
    found = [(name, resolve(load_recipe(name))) for name in names]
    for what, value, known in (
        ("data", data, {config.data.source for _, config in found}),
        ("method", method, {config.label for _, config in found}),
    ):
        if value is not None and value not in known:
            expected = ", ".join(sorted(known))
            raise ConfigError(f"no recipe with {what} {value!r:.80}: expected {expected}")
    kept = [
        (name, config)
        for name, config in found
        if data in (None, config.data.source) and method in (None, config.label)
    ]
    width = max((len(name) for name, _ in kept), default=0)
    indent = " " * (width + 2)
    texts = [f"{name:{width}}  {_in_words(config)}" for name, config in kept]
    return [textwrap.fill(text, 80, subsequent_indent=indent) for text in texts] or ["none"]


def _in_words(config: Config) -> str:
    paper = config.paper
    if paper.row is None:
        return f"{config.label} on {config.data.source}"
    figure = "no figure is known"
    if paper.top1 is not None:
        figure = f"{paper.top1:.2f} %"
    elif paper.gain is not None:
        figure = f"{paper.gain:+.2f} over its baseline"
    return f"{paper.row}: {figure}"


def reproduce(
    table: str,
    *,
    rows: Sequence[str] = (),
    changes: Mapping[str, Any],
    seeds: int,
    output: Path,
    jobs: int = 1,
    threads: int | None = None,
    processes: int = 1,
    smoke: bool = False,
    console: Console,
) -> list[Reproduced]:
    """Train what a table's rows need and is not complete yet, and compare with the paper.

    A teacher without weights is trained by its own recipe first, with seed 0, once for all rows.
    Runs of the same settings are shared, also between tables with the same `output`. The arguments
    are those of `softlabels reproduce`; `changes` lie over each recipe, and the baselines of the
    rows are added.

    Raises:
        ConfigError: No such table or row, or a setting that does not fit.
        RunError: A run failed; the same call goes on from there.
    """
    names = _chosen(table, rows)
    plan = RunPlan(output / "runs")
    configs, planned = dict[str, Config](), dict[str, list[PlannedRun]]()

    def config_of(recipe: str) -> Config:
        config = _changed(recipe, changes)
        return shrunk(config, processes=processes) if smoke else config

    for name in dict.fromkeys([*names, *filter(None, (_paper(name).baseline for name in names))]):
        config = configs[name] = config_of(name)
        teacher, taught_by = config.teacher, None
        if teacher.recipe is not None and teacher.weights is None and not teacher.pretrained:
            taught_by = plan.add(f"{teacher.recipe} 0", config_of(teacher.recipe), 0)
        planned[name] = [
            plan.add(f"{name} {seed}", config, seed, taught_by=taught_by) for seed in range(seeds)
        ]
    for name, config in configs.items():
        for key, reason in config.assumed.items():
            say(console, f"{name} assumes {key}: {reason}")
    launch_runs(*plan.rounds, jobs=jobs, console=console, threads=threads, processes=processes)
    results = [_result(name, configs[name], planned) for name in names]
    first = planned[names[0]][0].folder
    content = {
        "table": table,
        "smoke": smoke,
        "changed_settings": changes,
        "environment": Environment.read(first.environment).dump(),
        "rows": [row.model_dump() for row in results],
    }
    write_json(output / f"{table}.json", content)
    cells, note = [_cells(row) for row in results], _note(results, changes, smoke)
    lines = [f"# {table}", "", note, "", *markdown_table(_HEADINGS, cells)]
    lines += [
        f"\n`{row.recipe}` assumes {key}: {reason}"
        for row in results
        for key, reason in row.assumed.items()
    ]
    write_text(output / f"{table}.md", "\n".join(lines) + "\n")
    show_table(console, _HEADINGS, cells, title=table, caption=note)
    return results


def _chosen(table: str, rows: Sequence[str]) -> list[str]:
    known = {name.partition("/")[2]: name for name in recipes_of(table)}
    chosen = [row.removeprefix(f"{table}/") for row in rows] or [*known]
    for row in chosen:
        if row not in known:
            expected = ", ".join(known)
            raise ConfigError(
                f"table {table!r} has no row {row!r:.80}: expected some of {expected}"
            )
    return [known[row] for row in chosen]


def _paper(recipe: str) -> PaperSettings:
    return PaperSettings.model_validate(load_recipe(recipe).get("paper") or {})


def _changed(recipe: str, changes: Mapping[str, Any]) -> Config:
    """A recipe's settings, with what the caller changes."""
    own = load_recipe(recipe)
    # A change of the teacher is for the rows that have one, not for their baselines.
    taught = bool(own.get("teacher"))
    try:
        return resolve(merged(own, {k: v for k, v in changes.items() if k != "teacher" or taught}))
    except ConfigError as error:
        raise ConfigError(f"{recipe}: {error}") from error


def _result(name: str, config: Config, planned: Mapping[str, Sequence[PlannedRun]]) -> Reproduced:
    paper, gains, published = config.paper, list[float](), None
    top1 = [_top1(run, paper) for run in planned[name]]
    if paper.baseline is not None:
        before = [_top1(run, paper) for run in planned[paper.baseline]]
        gains = [ours - base for ours, base in zip(top1, before, strict=True)]
        baseline, published = _paper(paper.baseline).top1, paper.gain
        if paper.top1 is not None and baseline is not None:
            published = paper.top1 - baseline
    return Reproduced(
        recipe=name,
        paper=paper,
        top1=top1,
        gains=gains,
        published_gain=published,
        assumed=config.assumed,
    )


def _top1(run: PlannedRun, paper: PaperSettings) -> float:
    summary = Summary.read(run.folder.summary)
    return (summary.best if paper.reported == "best" else summary.final)["top1"]


def _cells(row: Reproduced) -> tuple[str, ...]:
    paper, difference = row.paper, row.difference
    published = "" if paper.top1 is None else f"{Spread(paper.top1, paper.top1_std):.2f}"
    return (
        row.recipe,
        published,
        f"{spread(row.top1):.2f}",
        "" if difference is None else f"{difference:+.2f}",
        "" if row.published_gain is None else f"{row.published_gain:+.2f}",
        f"{spread(row.gains):+.2f}" if row.gains else "",
        paper.reported,
    )


_HEADINGS = (
    "recipe",
    "paper, top-1 %",
    "ours",
    "difference",
    "paper, gain over its baseline",
    "ours",
    "epoch",
)


def _note(results: Sequence[Reproduced], changes: Mapping[str, Any], smoke: bool) -> str:
    seeds = len(results[0].top1)
    count = "One seed: no spread." if seeds == 1 else f"Mean ± standard deviation of {seeds} seeds."
    changed = ", ".join(
        f"{key}={'null' if value is None else value}" for key, value in flattened(changes).items()
    )
    notes = ["Smoke runs: these figures mean nothing."] if smoke else []
    notes += [count, *([f"Changed from the recipes: {changed}."] if changed else [])]
    return " ".join(notes)
