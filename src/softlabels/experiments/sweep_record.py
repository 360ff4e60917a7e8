"""What a sweep tried, and what came out: its record, which is read again to go on."""

from __future__ import annotations

import statistics
from typing import Any, Literal

from pydantic import Field

from softlabels.training.settings import Section

__all__ = ["MEASURED", "Metric", "SweepRecord", "Trial", "shown"]

Metric = Literal["top1", "nll"]
MEASURED = ("top1", "nll", "ece")
"""What is kept of each run: %, nats, %."""


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
        sign = -1.0 if self.metric == "top1" else 1.0
        scores = {trial.number: trial.mean(self.metric) for trial in self.trials}
        finite = [trial for trial in self.trials if scores[trial.number] is not None]
        return sorted(finite, key=lambda trial: sign * (scores[trial.number] or 0.0))

    @property
    def seconds(self) -> float:
        """Of training, of all runs together."""
        return sum(sum(trial.seconds) for trial in self.trials)


def shown(value: Any) -> str:
    """A setting's value as a person reads it."""
    return f"{value:g}" if isinstance(value, float) else str(value)
