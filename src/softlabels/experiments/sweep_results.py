"""What a sweep leaves for its reader: a table, the recommended settings, and a recipe."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from pathlib import Path

import yaml

from softlabels.analysis.scores import SCORES
from softlabels.experiments.search_space import nested
from softlabels.experiments.sweep_record import MEASURED, SweepRecord, Trial, shown
from softlabels.experiments.text_tables import csv_table, markdown_table
from softlabels.io.files import write_text
from softlabels.training.config import Config, dump

__all__ = ["flags", "rank_of", "write_results"]

_SUPERLATIVES = {"higher": "highest", "lower": "lowest"}


def write_results(record: SweepRecord, best: Config, output: Path) -> None:
    """Write sweep.csv, sweep.md and best.yaml, the settings to train with, into the output."""
    write_text(output / "sweep.csv", _table_of_values(record))
    write_text(output / "sweep.md", _page(record, output))
    write_text(output / "best.yaml", _recipe(record, best, output))


def flags(trial: Trial) -> str:
    """A trial's settings as options of `softlabels train`."""
    return " ".join(
        f"--{key.replace('_', '-')} {shlex.quote(shown(value))}"
        for key, value in trial.values.items()
    )


def rank_of(record: SweepRecord, number: int) -> int | None:
    """A trial's place, from 1; None if its loss was not finite."""
    numbers = [trial.number for trial in record.ranked]
    return numbers.index(number) + 1 if number in numbers else None


def _table_of_values(record: SweepRecord) -> str:
    rows = (
        (
            trial.number,
            rank_of(record, trial.number),
            *trial.values.values(),
            *map(trial.mean, MEASURED),
            len(record.seeds),
            sum(trial.seconds) if trial.metrics else None,
        )
        for trial in record.trials
    )
    return csv_table(("trial", "rank", *record.space, *MEASURED, "seeds", "seconds"), rows)


def _page(record: SweepRecord, output: Path) -> str:
    best = record.ranked[0]
    settings = yaml.safe_dump(nested(best.values), sort_keys=False).rstrip()
    runs = f"{len(record.seeds)} seed" + ("s" if len(record.seeds) > 1 else "")
    lines = [
        f"# Sweep of {record.label} on {record.data}",
        "",
        f"{len(record.trials)} trials, {runs} each ({', '.join(map(str, record.seeds))}), "
        f"{record.seconds:.0f} s of training. {record.train_images:,} images to train on, "
        f"{record.validation_images:,} validation images, held out of the training set; the test "
        f"set was not read. Metrics are of the validation images after the last epoch, means over "
        f"the seeds; the {_what_decides(record)} decides.",
        "",
        *markdown_table(
            ("setting", "searched", "as given", "best"),
            (
                (key, values, *(shown(trial.values[key]) for trial in (record.trials[0], best)))
                for key, values in record.space.items()
            ),
            names=2,
        ),
        "",
        "## Recommended",
        "",
        _gain(record),
        "",
        f"```yaml\n{settings}\n```",
        "",
        "```sh",
        f"softlabels train {shlex.quote(str(output / 'best.yaml'))}",
        "```",
        "",
        f"As options of your own command: `{flags(best)}`",
        "",
        "## How far to trust it",
        "",
        *_caveat(record),
        "",
        "## Trials, best first",
        "",
        *_ranking(record),
    ]
    return "\n".join(lines) + "\n"


def _gain(record: SweepRecord) -> str:
    """How the best trial compares with the settings as given."""
    best, given = record.ranked[0], record.trials[0]
    if best.number == given.number:
        return "Trial 0, the settings as given: the search found nothing better."
    rank, metric = rank_of(record, given.number), record.metric
    reached = f"Trial {best.number}, {SCORES[metric].column} {_number(best, metric)}."
    if rank is None:
        return f"{reached} With the settings as given, trial 0, the loss was not finite."
    return (
        f"{reached} The settings as given, trial 0, reach {_number(given, metric)}: rank {rank} of "
        f"{len(record.ranked)}."
    )


def _caveat(record: SweepRecord) -> Sequence[str]:
    best = record.ranked[0]
    share = (best.mean("top1") or 0.0) / 100
    error = 100 * math.sqrt(share * (1 - share) / record.validation_images)
    near = sum((trial.mean("top1") or 0.0) > 100 * share - 2 * error for trial in record.ranked)
    return (
        f"- {record.validation_images:,} images tell a top-1 of {100 * share:.1f} % to within "
        f"about {2 * error:.1f} points either way (two standard errors of one run), and another "
        f"seed would move it too. {near} of {len(record.ranked)} trials, the best one included, "
        "are not worse than it by more than that.",
        f"- The best of {len(record.ranked)} noisy figures is partly luck: expect less of it on "
        "the test set, and compare it there over several seeds before it is called better.",
        "- Compare methods after a search of as many trials for each.",
    )


def _ranking(record: SweepRecord) -> Sequence[str]:
    measured = [SCORES[name].column for name in MEASURED]
    failed = [trial for trial in record.trials if not trial.metrics]
    rows = [
        (
            str(rank_of(record, trial.number) or ""),
            f"{trial.number} (as given)" if trial.number == 0 else str(trial.number),
            *(_number(trial, name) for name in MEASURED),
            *map(shown, trial.values.values()),
            f"{sum(trial.seconds):.0f}" if trial.metrics else "",
        )
        for trial in (*record.ranked, *failed)
    ]
    return markdown_table(("rank", "trial", *measured, *record.space, "seconds"), rows, names=0)


def _what_decides(record: SweepRecord) -> str:
    score = SCORES[record.metric]
    return f"{_SUPERLATIVES[score.better]} {score.heading}"


def _number(trial: Trial, name: str) -> str:
    value = trial.mean(name)
    return "not finite" if value is None else f"{value:.{SCORES[name].digits}f}"


def _recipe(record: SweepRecord, best: Config, output: Path) -> str:
    held_back = {
        name: record.settings["data"][name]
        for name in ("validation", "train_share")
        if record.settings["data"].get(name) is not None
    }
    left_out = ", ".join(f"data.{name} {shown(value)}" for name, value in held_back.items())
    return (
        f"# The best of {len(record.trials)} trials for {record.label} on {record.data}, by the "
        f"{_what_decides(record)} on\n# validation images. Left out, so that it trains on the "
        f"whole training set: {left_out}.\n"
        f"#   softlabels train {output / 'best.yaml'}\n{dump(best)}"
    )
