"""What came out of a comparison: `comparison.json`, written and read by one schema."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from softlabels.experiments.statistics import Paired, Spread
from softlabels.io.records import Record
from softlabels.training.schemas import Environment, NamedScore

__all__ = ["ComparisonRecord", "Difference", "RunFigures", "VariantRecord"]


class RunFigures(Record):
    """The figures of one run; None where it has none.

    Attributes:
        folder: The run's, within that of all runs.
        commit: That it ran at.
        top1: In percent after the last epoch, as are `group_top1` and `ece`.
        nll: In nats.
        best_top1: Of the best epoch.
        fitted_ece: After a temperature that was fitted on other images, as is `fitted_nll`.
        temperature: The fitted one.
        zipf_r2: Share of the variance that Zipf's law explains.
        teacher_agreement: Share of images with the teacher's first class, in percent.
        peak_memory: In MB.
        curve: Scores after each evaluated epoch, by name.
    """

    seed: int
    folder: str
    commit: str | None
    top1: float
    group_top1: float | None = None
    nll: float
    ece: float
    best_top1: float
    best_epoch: int
    fitted_ece: float | None
    fitted_nll: float | None
    temperature: float | None
    zipf_r2: float | None
    zipf_exponent: float | None
    teacher_agreement: float | None
    seconds_per_epoch: float | None
    peak_memory: float | None
    curve: dict[str, tuple[float, ...]]


@dataclass(frozen=True)
class Difference(Paired):
    """Paired differences to the baseline.

    Attributes:
        in_words: `"better"`, `"worse"` or that no difference is shown.
    """

    in_words: str


class VariantRecord(Record):
    """A variant.

    Attributes:
        name: Its name.
        settings: Those that differ from the baseline's, by their paths.
        runs: One a seed.
        scores: Mean and deviation of each figure that all its runs have.
        against_baseline: Of the figures that are compared; empty for the baseline.
    """

    name: str
    settings: dict[str, Any]
    runs: tuple[RunFigures, ...]
    scores: dict[str, Spread]
    against_baseline: dict[str, Difference]


class ComparisonRecord(Record):
    """A comparison.

    Attributes:
        title: Heading of the report.
        command: That repeats it.
        baseline: Name of the first variant.
        seeds: Of each variant's runs.
        environment: Of the first run.
        commits: Of all runs.
        teachers: Each once.
        variants: The baseline first.
    """

    title: str
    command: str
    baseline: str
    seeds: tuple[int, ...]
    environment: Environment
    commits: tuple[str, ...]
    teachers: tuple[NamedScore, ...]
    variants: tuple[VariantRecord, ...]
