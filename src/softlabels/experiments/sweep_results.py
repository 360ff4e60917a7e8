"""What a sweep leaves for its reader: a table, the recommended settings, and a recipe."""

from __future__ import annotations

import csv
import io
import math
import shlex
from collections.abc import Sequence
from pathlib import Path

import yaml

from softlabels.experiments.search_space import nested
from softlabels.experiments.sweep_record import MEASURED, SweepRecord, Trial, shown
from softlabels.io.files import replace_file
from softlabels.training.config import Config, dump

__all__ = ["flags", "rank_of", "write_record", "write_results"]

_UNITS = {"top1": "top-1 %", "nll": "NLL nats", "ece": "ECE %"}
_DECIMALS = {"top1": 2, "nll": 4, "ece": 2}
_IN_WORDS = {"top1": "highest top-1", "nll": "lowest NLL"}


def write_record(record: SweepRecord, output: Path) -> None:
    """Write sweep.json."""
    with replace_file(output / "sweep.json") as file:
        file.write((record.model_dump_json(indent=1) + "\n").encode())


def write_results(record: SweepRecord, best: Config, output: Path) -> None:
    """Write sweep.csv, sweep.md and best.yaml.

    Args:
        record: The sweep; at least one trial has a finite loss.
        best: The settings to train with.
        output: Folder of the sweep.
    """
    texts = {
        "sweep.csv": _table_of_values(record),
        "sweep.md": _page(record, output),
        "best.yaml": _recipe(record, best, output),
    }
    for name, text in texts.items():
        with replace_file(output / name) as file:
            file.write(text.encode())


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
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("trial", "rank", *record.space, *MEASURED, "seeds", "seconds"))
    for trial in record.trials:
        measured = (trial.mean(name) for name in MEASURED)
        writer.writerow(
            (
                trial.number,
                rank_of(record, trial.number),
                *trial.values.values(),
                *measured,
                len(record.seeds),
                sum(trial.seconds) if trial.metrics else None,
            )
        )
    return text.getvalue()


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
        f"the seeds; the {_IN_WORDS[record.metric]} decides.",
        "",
        "| setting | searched | as given | best |",
        "| --- | --- | ---: | ---: |",
        *(
            f"| {key} | {values} | {shown(record.trials[0].values[key])} | "
            f"{shown(best.values[key])} |"
            for key, values in record.space.items()
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
    best, given, metric = record.ranked[0], record.trials[0], record.metric
    if best.number == given.number:
        return "Trial 0, the settings as given: the search found nothing better."
    rank = rank_of(record, given.number)
    reached = f"Trial {best.number}, {_UNITS[metric]} {_number(best, metric)}."
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
    headings = ("rank", "trial", *(_UNITS[name] for name in MEASURED), *record.space, "seconds")
    failed = [trial for trial in record.trials if not trial.metrics]
    rows = [
        (
            str(rank),
            f"{trial.number} (as given)" if trial.number == 0 else str(trial.number),
            *(_number(trial, name) for name in MEASURED),
            *map(shown, trial.values.values()),
            f"{sum(trial.seconds):.0f}",
        )
        for rank, trial in enumerate(record.ranked, 1)
    ]
    rows += [
        (
            "",
            str(trial.number),
            *["not finite"] * len(MEASURED),
            *map(shown, trial.values.values()),
            "",
        )
        for trial in failed
    ]
    return (
        "| " + " | ".join(headings) + " |",
        "|" + " ---: |" * len(headings),
        *("| " + " | ".join(row) + " |" for row in rows),
    )


def _number(trial: Trial, name: str) -> str:
    return f"{trial.mean(name):.{_DECIMALS[name]}f}"


def _recipe(record: SweepRecord, best: Config, output: Path) -> str:
    held_back = {
        name: record.settings["data"][name]
        for name in ("validation", "train_share")
        if record.settings["data"].get(name) is not None
    }
    left_out = ", ".join(f"data.{name} {shown(value)}" for name, value in held_back.items())
    return (
        f"# The best of {len(record.trials)} trials for {record.label} on {record.data}, by the "
        f"{_IN_WORDS[record.metric]} on\n# validation images. Left out, so that it trains on the "
        f"whole training set: {left_out}.\n"
        f"#   softlabels train {output / 'best.yaml'}\n{dump(best)}"
    )
