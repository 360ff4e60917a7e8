"""Reads what a run left in its folder."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from softlabels.io.records import read_lines
from softlabels.training.run_folder import RunFolder
from softlabels.training.schemas import (
    Analysis,
    Environment,
    Gallery,
    Metrics,
    Summary,
    Timing,
)

__all__ = ["Curve", "RunRecord", "read_run"]

_BEYOND = 1e100  # of a run that went wrong; a chart's scale would overflow


@dataclass(frozen=True, eq=False)
class Curve:
    """One logged quantity.

    Attributes:
        x: Finished epochs or steps, rising, shape [N].
        y: The values, all finite (and below 1e100), shape [N].
    """

    x: NDArray[np.float64]
    y: NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class RunRecord:
    """One run.

    Attributes:
        folder: Where the run lies.
        summary: What it was, and what came out.
        images_per_second: Median over epochs, None without timings.
        curves: Logged quantities by key: "eval/..." over finished epochs, others over steps.
        config: Text of the configuration, empty where there is none.
        environment: What it ran on, None where it does not say it.
        gallery: The saved test images, None where there are none.
        analysis: Statistics of the answers to the test images, None where there are none.
    """

    folder: Path
    summary: Summary
    images_per_second: float | None
    curves: Mapping[str, Curve]
    config: str
    environment: Environment | None
    gallery: Gallery | None
    analysis: Analysis | None


def read_run(path: Path) -> RunRecord:
    """Read a run's folder.

    `summary.json` must be there; everything else may be absent. Unreadable lines of a log (the
    last one, where a run was killed while writing) are left out with a warning.

    Raises:
        ValueError: `summary.json` is missing, or a file does not fit its schema; the message names
            the file and the field.
    """
    folder = RunFolder(Path(path))
    if not folder.summary.is_file():
        raise ValueError(f"{path} has no summary.json; expected the folder of a run")
    has = Path.is_file
    speeds = [line.images_per_second for line in read_lines(folder.timings, Timing)]
    return RunRecord(
        folder=folder.path,
        summary=Summary.read(folder.summary),
        images_per_second=statistics.median(speeds) if speeds else None,
        curves=_curves(read_lines(folder.metrics, Metrics)),
        config=folder.config.read_text("utf-8", "replace") if has(folder.config) else "",
        environment=Environment.read(folder.environment) if has(folder.environment) else None,
        gallery=Gallery.read(folder.gallery) if has(folder.gallery) else None,
        analysis=Analysis.read(folder.analysis) if has(folder.analysis) else None,
    )


def _curves(lines: Sequence[Metrics]) -> dict[str, Curve]:
    points: dict[str, dict[int, float]] = {}
    for line in lines:
        for key, value in line.scalars.items():
            # A resumed run may log a step again: the later line counts.
            position = line.epoch if key.startswith("eval/") else line.step
            points.setdefault(key, {})[position] = value
    curves = {}
    for key, values in points.items():
        x, y = np.array(sorted(values.items()), dtype=np.float64).T
        finite = np.abs(y) < _BEYOND  # False for NaN
        if finite.any():
            curves[key] = Curve(x[finite], y[finite])
    return curves
