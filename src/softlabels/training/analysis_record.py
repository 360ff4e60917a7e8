"""Reads `analysis.json`: statistics of a network's answers to the test images."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from softlabels.io.fields import Fields, number_of, read_object

Numbers = NDArray[np.float64]
"""A column of numbers; NaN where there is none."""

_MOST_POINTS = 400
_MOST_COUNT = 2**53


@dataclass(frozen=True, eq=False)
class Zipf:
    """The sorted softmax, and the straight line through its logarithm over that of the rank.

    Attributes:
        probabilities: Mean over images at rank 1, 2, ..., shape [R]; positive.
        exponent: Minus the slope.
        r2: Share of the variance that the line explains, at most 1.
        ranks: The first and the last rank of the fit.
    """

    probabilities: Numbers
    exponent: float
    r2: float
    ranks: tuple[int, int]


@dataclass(frozen=True, eq=False)
class Reliability:
    """Bins of the confidence; shares from 0 to 1, NaN in an empty bin.

    Attributes:
        confidence: Mean confidence, shape [15].
        accuracy: Share of right answers, shape [15].
        count: Number of images, shape [15].
    """

    confidence: Numbers
    accuracy: Numbers
    count: Numbers


@dataclass(frozen=True, eq=False)
class Features:
    """Some images in the plane of the first two principal components.

    Attributes:
        what: What the components are of.
        classes: Class of each image, shape [N].
        x: First component, shape [N].
        y: Second component, shape [N].
        explained: Share of the variance that each of the two explains, 0 to 1.
    """

    what: str
    classes: NDArray[np.int64]
    x: Numbers
    y: Numbers
    explained: tuple[float, float]


@dataclass(frozen=True, eq=False)
class Analysis:
    """What is known of a run's answers to the test images.

    Attributes:
        images: Number of test images.
        class_names: Name of each class, C of them.
        groups: Name of the group of similar classes of each class, None without groups.
        zipf: The sorted softmax.
        reliability: Accuracy over confidence.
        per_class: Top-1 of each class in percent, shape [C]; NaN for a class without images.
        confusion: Rows of true class, predicted class, number of images, shape [K, 3]; the
            most frequent confusions first.
        agreement: Share of images with the teacher's first class, in percent; None without one.
        features: A picture of the features, None without one.
    """

    images: int
    class_names: tuple[str, ...]
    groups: tuple[str, ...] | None
    zipf: Zipf
    reliability: Reliability
    per_class: Numbers
    confusion: NDArray[np.int64]
    agreement: float | None
    features: Features | None


def read_analysis(path: Path) -> Analysis:
    """Reads a run's `analysis.json`; unknown keys are ignored.

    Args:
        path: The file.

    Returns:
        Its content.

    Raises:
        ValueError: The file is damaged; the message names it.
    """
    fields = read_object(path)
    names = fields.get("class_names", list)
    groups = fields.optional("groups", list)
    if groups is not None and len(groups) != len(names):
        raise ValueError(f"{path}: 'groups' has {len(groups)} entries, expected {len(names)}")
    teacher = fields.optional("teacher", dict)
    features = fields.optional("features", dict)
    return Analysis(
        images=fields.get("images", int),
        class_names=tuple(
            name if isinstance(name, str) else f"class {index}" for index, name in enumerate(names)
        ),
        groups=None if groups is None else tuple(f"{group!s:.80}" for group in groups),
        zipf=_zipf(Fields(path, fields.get("zipf", dict))),
        reliability=_reliability(Fields(path, fields.get("reliability", dict))),
        per_class=_numbers(fields, "per_class", len(names)),
        confusion=_confusion(fields, len(names)),
        agreement=_number_or_nan(Fields(path, teacher), "agreement") if teacher else None,
        features=None if features is None else _features(Fields(path, features), len(names)),
    )


def _numbers(fields: Fields, key: str, length: int | None = None) -> Numbers:
    """A list of numbers, NaN for null."""
    given = fields.get(key, list)
    if length is not None and len(given) != length:
        raise ValueError(f"{fields.path}: {key!r} has {len(given)} entries, expected {length}")
    what = f"{fields.path}: {key!r}"
    return np.array(
        [math.nan if value is None else number_of(value, what) for value in given],
        dtype=np.float64,
    )


def _number_or_nan(fields: Fields, key: str) -> float:
    return math.nan if fields.values.get(key) is None else fields.number(key)


def _shares(fields: Fields, key: str, length: int | None = None) -> Numbers:
    """The same, of numbers from 0 to 1."""
    numbers = _numbers(fields, key, length)
    # Rounding may lead a little beyond.
    bad = numbers[~(np.isnan(numbers) | ((numbers >= -1e-6) & (numbers <= 1 + 1e-6)))]
    if len(bad):
        raise ValueError(f"{fields.path}: {key!r} holds {bad[0]:g}, expected numbers from 0 to 1")
    return numbers.clip(0, 1)


def _whole(fields: Fields, key: str, value: object, end: int) -> int:
    if type(value) is not int or not 0 <= value < end:
        raise ValueError(
            f"{fields.path}: {key!r} holds {value!r:.80}, expected a whole number below {end}"
        )
    return value


def _zipf(fields: Fields) -> Zipf:
    probabilities = _shares(fields, "mean_sorted_softmax")
    ranks = fields.get("ranks", list)
    if len(ranks) != 2:
        raise ValueError(f"{fields.path}: 'ranks' is {ranks!r:.80}, expected [first, last]")
    first, last = (_whole(fields, "ranks", rank, len(probabilities) + 1) for rank in ranks)
    return Zipf(
        np.where(probabilities > 0, probabilities, math.nan),
        _number_or_nan(fields, "exponent"),
        _number_or_nan(fields, "r2"),
        (max(1, first), last),
    )


def _reliability(fields: Fields) -> Reliability:
    confidence = _shares(fields, "confidence")
    count = _numbers(fields, "count", len(confidence))
    if not ((count >= 0) & (count < _MOST_COUNT)).all():
        raise ValueError(f"{fields.path}: 'count' holds something else than numbers of images")
    return Reliability(confidence, _shares(fields, "accuracy", len(confidence)), count)


def _confusion(fields: Fields, num_classes: int) -> NDArray[np.int64]:
    rows = []
    for row in fields.get("confusion", list):
        if not isinstance(row, list) or len(row) != 3:
            raise ValueError(
                f"{fields.path}: 'confusion' holds {row!r:.80}, expected [true, predicted, count]"
            )
        ends: Sequence[int] = (num_classes, num_classes, _MOST_COUNT)
        rows.append([_whole(fields, "confusion", *pair) for pair in zip(row, ends, strict=True)])
    return np.array(rows, dtype=np.int64).reshape(-1, 3)


def _features(fields: Fields, num_classes: int) -> Features:
    classes = [_whole(fields, "class", c, num_classes) for c in fields.get("class", list)]
    if len(classes) > _MOST_POINTS:
        raise ValueError(
            f"{fields.path}: 'class' has {len(classes)} entries, expected at most {_MOST_POINTS}"
        )
    explained = _shares(fields, "explained", 2)
    return Features(
        what=fields.optional("what", str) or "",
        classes=np.array(classes, dtype=np.int64),
        x=_numbers(fields, "x", len(classes)),
        y=_numbers(fields, "y", len(classes)),
        explained=(float(explained[0]), float(explained[1])),
    )
