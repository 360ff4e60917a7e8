"""How a sweep searches, what it tried, and what came out: its record, with which it goes on."""

from __future__ import annotations

import statistics
from typing import Annotated, Any, Literal

import tyro
from pydantic import Field

from softlabels.analysis.scores import SCORES
from softlabels.training.settings import Section

__all__ = ["MEASURED", "Metric", "SweepOptions", "SweepRecord", "Trial", "shown"]

Metric = Literal["top1", "nll"]
MEASURED = ("top1", "nll", "ece")
"""What is kept of each run: %, nats, %."""


class SweepOptions(Section):
    """Settings of a run, and how some of them are searched.

    --trials, --startup, --space, --metric, --seeds and --jobs are those of the search, whose folder
    is --output, by default runs/sweep-DATA-METHOD; the rest is what each trial trains with.
    """

    trials: int = Field(20, ge=1, le=100_000, description="Settings that are tried.")
    startup: int = Field(
        8, ge=0, description="How many of them are drawn at random, before the search learns."
    )
    space: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = Field(
        (),
        description="What is searched, KEY=LOW..HIGH, KEY=LOW..HIGH:log or KEY=VALUE,VALUE; once "
        "for each setting. None: the method's weights and temperatures.",
    )
    metric: Metric = Field(
        "top1", description="What decides, on the validation images after the last epoch."
    )
    seeds: int = Field(1, ge=1, le=1000, description="Runs of each trial: seed, seed + 1, ...")
    jobs: int = Field(1, ge=1, le=1024, description="Runs at a time, and trials proposed together.")


class Trial(Section):
    """Settings that were tried, and what came out.

    Attributes:
        number: From 0, the settings as given.
        values: What was tried, by setting.
        runs: Folder of each seed's run, within the sweep's.
        metrics: `top1` (%), `nll` (nats) and `ece` (%) of each seed, on the validation images after
            the last epoch; empty where a loss was not finite.
        seconds: Of training, of each seed.
    """

    number: int
    values: dict[str, bool | int | float | str | None]
    runs: tuple[str, ...]
    metrics: dict[str, tuple[float, ...]]
    seconds: tuple[float, ...]

    def mean(self, metric: str) -> float | None:
        """Mean over the seeds; None where a loss was not finite."""
        values = self.metrics.get(metric)
        return statistics.fmean(values) if values else None


class SweepRecord(Section):
    """What a sweep is, and how far it came: its `sweep.json`.

    Attributes:
        label: The method.
        data: The data set.
        train_images: How many are trained on.
        validation_images: How many are held out, and measured.
        metric: What decides.
        space: By setting, as text.
        seeds: Of each trial's runs.
        search_seed: Of the proposals.
        startup: Trials that are drawn at random.
        settings: What all trials share.
        trials: In order.
        environment: What the first run ran on.
    """

    label: str
    data: str
    train_images: int
    validation_images: int
    metric: Metric
    space: dict[str, str]
    seeds: tuple[int, ...]
    search_seed: int
    startup: int
    settings: dict[str, Any]
    trials: tuple[Trial, ...] = ()
    environment: dict[str, Any] = Field({})

    @property
    def ranked(self) -> list[Trial]:
        """The trials whose losses stayed finite, best first; the earlier one of equal ones."""
        finite = [trial for trial in self.trials if trial.metrics]
        highest_first = SCORES[self.metric].better == "higher"
        return sorted(finite, key=lambda t: t.mean(self.metric) or 0.0, reverse=highest_first)

    @property
    def seconds(self) -> float:
        """Of training, of all runs together."""
        return sum(sum(trial.seconds) for trial in self.trials)


def shown(value: Any) -> str:
    """A setting's value as a person reads it."""
    return f"{value:g}" if isinstance(value, float) else str(value)
