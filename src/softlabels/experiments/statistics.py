"""What paired runs show: means, spreads, intervals of differences, and an exact test."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import stats

__all__ = ["LEAST_SEEDS", "Paired", "Spread", "paired", "spread"]

LEAST_SEEDS = 6
"""With fewer pairs no exact two-sided test reaches 5 %: its smallest value is 2 / 2^pairs."""

_LEVEL = 0.95
_LEAST_FOR_VERDICT = 3  # two differences may be equal by chance
_RESAMPLES = 9999
_MOST_FLIPS = 2**16  # all of them are tried up to here, and so many drawn beyond

Verdict = Literal["higher", "lower", "no difference shown"]


@dataclass(frozen=True)
class Spread:
    """Values over seeds.

    Attributes:
        mean: Their mean.
        deviation: Their standard deviation with n - 1; None for one value.
    """

    mean: float
    deviation: float | None

    def __format__(self, spec: str) -> str:
        """Both, such as `70.10 ± 0.20` for `.2f`; a plus in front is for the mean."""
        if self.deviation is None:
            return format(self.mean, spec)
        return f"{self.mean:{spec}} ± {self.deviation:{spec.lstrip('+')}}"


@dataclass(frozen=True)
class Paired:
    """Differences between runs that share their seeds.

    Attributes:
        differences: Ours minus theirs, for each seed.
        mean: Their mean.
        deviation: Their standard deviation with n - 1; None for one seed.
        bootstrap: 95 % interval of the mean, percentiles over resampled seeds; None for one seed.
        t: 95 % interval of the mean by Student's t; None for one seed.
        p_value: Two-sided, of the exact test that flips the signs of the differences; None for
            fewer than `LEAST_SEEDS`.
        verdict: `"higher"` or `"lower"` only where three or more seeds ran, neither interval holds
            zero, and the test, if there is one, stays below 5 %.
    """

    differences: tuple[float, ...]
    mean: float
    deviation: float | None
    bootstrap: tuple[float, float] | None
    t: tuple[float, float] | None
    p_value: float | None
    verdict: Verdict


def spread(values: Sequence[float]) -> Spread:
    """Mean and standard deviation over seeds.

    Raises:
        ValueError: There is no value.
    """
    if not values:
        raise ValueError("got no values, expected one or more")
    deviation = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return Spread(float(np.mean(values)), deviation)


def paired(ours: Sequence[float], theirs: Sequence[float]) -> Paired:
    """Compare values of the same seeds, in the same order.

    Raises:
        ValueError: The lengths differ, or there is none, or a value is not finite.
    """
    if len(ours) != len(theirs) or not ours:
        raise ValueError(
            f"expected one or more values for the same seeds, got {len(ours)} and {len(theirs)}"
        )
    if not all(map(math.isfinite, (*ours, *theirs))):
        raise ValueError("a value is not finite, so its difference says nothing")
    differences = np.subtract(ours, theirs)
    of_all = spread(differences.tolist())
    several = len(differences) > 1
    bootstrap, t = (_bootstrap(differences), _student(differences)) if several else (None, None)
    p_value = _sign_flips(differences) if len(differences) >= LEAST_SEEDS else None
    return Paired(
        tuple(differences.tolist()),
        of_all.mean,
        of_all.deviation,
        bootstrap,
        t,
        p_value,
        _verdict(len(differences), bootstrap, t, p_value=p_value),
    )


def _bootstrap(differences: np.ndarray) -> tuple[float, float]:
    """Percentiles of the means of seeds drawn with replacement; the draws are always the same."""
    found = stats.bootstrap(
        (differences,),
        np.mean,
        n_resamples=_RESAMPLES,
        confidence_level=_LEVEL,
        method="percentile",
        random_state=np.random.default_rng(0),
    ).confidence_interval
    return float(found.low), float(found.high)


def _student(differences: np.ndarray) -> tuple[float, float]:
    with warnings.catch_warnings():  # equal differences are an interval of one point
        warnings.simplefilter("ignore", RuntimeWarning)
        found = stats.ttest_1samp(differences, 0.0).confidence_interval(_LEVEL)
    return float(found.low), float(found.high)


def _sign_flips(differences: np.ndarray) -> float:
    """Share of all sign patterns whose mean is at least as far from zero."""
    result = stats.permutation_test(
        (differences,),
        np.mean,
        permutation_type="samples",
        n_resamples=_MOST_FLIPS,
        vectorized=True,
        random_state=np.random.default_rng(0),
    )
    return float(result.pvalue)


def _verdict(count: int, *intervals: tuple[float, float] | None, p_value: float | None) -> Verdict:
    told = [ends for ends in intervals if ends is not None]
    if count >= _LEAST_FOR_VERDICT and (p_value is None or p_value < 1 - _LEVEL):
        if all(low > 0 for low, _ in told):
            return "higher"
        if all(high < 0 for _, high in told):
            return "lower"
    return "no difference shown"
