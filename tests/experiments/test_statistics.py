"""Figures of paired runs, against hand calculations and enumeration."""

from __future__ import annotations

import itertools
import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from softlabels.experiments.statistics import LEAST_SEEDS, paired, spread

OURS = [71.2, 70.8, 71.9, 71.0, 71.4, 70.7]
THEIRS = [70.6, 70.9, 71.1, 70.5, 70.6, 70.4]
DIFFERENCES = [0.6, -0.1, 0.8, 0.5, 0.8, 0.3]


def test_mean_and_deviation_of_seeds():
    found = spread(OURS)
    assert found.mean == pytest.approx(statistics.fmean(OURS))
    assert found.deviation == pytest.approx(statistics.stdev(OURS))
    assert spread([3.0]).deviation is None
    with pytest.raises(ValueError, match="expected one or more"):
        spread([])


def test_the_t_interval_by_hand():
    found = paired(OURS, THEIRS)
    assert found.differences == pytest.approx(DIFFERENCES)
    half = 2.570582 * statistics.stdev(DIFFERENCES) / math.sqrt(6)  # the table's t for 5 degrees
    mean = statistics.fmean(DIFFERENCES)
    assert found.t == pytest.approx((mean - half, mean + half), abs=1e-5)


def test_the_exact_test_counts_all_patterns_of_signs():
    observed = abs(sum(DIFFERENCES))
    sums = [
        abs(sum(s * d for s, d in zip(signs, DIFFERENCES, strict=True)))
        for signs in itertools.product((1, -1), repeat=6)
    ]
    share = sum(value >= observed - 1e-9 for value in sums) / len(sums)
    assert paired(OURS, THEIRS).p_value == pytest.approx(share)
    assert paired(OURS[:-1], THEIRS[:-1]).p_value is None
    smallest = paired([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], [0.0] * 6).p_value
    assert smallest == pytest.approx(2 / 2**LEAST_SEEDS)


def test_the_bootstrap_is_near_the_exhaustive_one():
    means = sorted(statistics.fmean(drawn) for drawn in itertools.product(DIFFERENCES, repeat=6))
    low, high = paired(OURS, THEIRS).bootstrap
    assert low == pytest.approx(means[int(0.025 * len(means))], abs=0.02)
    assert high == pytest.approx(means[int(0.975 * len(means))], abs=0.02)
    assert paired(OURS, THEIRS) == paired(OURS, THEIRS)  # its draws are the same


@pytest.mark.parametrize(
    ("differences", "verdict"),
    [
        ([0.6, 0.4, 0.8, 0.5, 0.8, 0.3], "higher"),
        ([-0.6, -0.4, -0.8, -0.5, -0.8, -0.3], "lower"),
        ([0.6, -0.4, 0.8, -0.5, 0.8, 0.3], "no difference shown"),
        ([0.5, 0.5], "no difference shown"),  # two seeds may agree by chance
        ([0.9], "no difference shown"),
        ([0.0] * 6, "no difference shown"),
        ([5.0, 5.1, 5.2], "higher"),
    ],
)
def test_nothing_is_said_where_an_interval_holds_zero(differences, verdict):
    assert paired(differences, [0.0] * len(differences)).verdict == verdict


@given(st.lists(st.floats(-10, 10), min_size=2, max_size=8), st.floats(-5, 5))
def test_verdicts_follow_the_intervals_and_change_sides(values, shift):
    found, turned = paired(values, [shift] * len(values)), paired([shift] * len(values), values)
    assert found.mean == pytest.approx(-turned.mean, abs=1e-9)
    low, high = found.t
    assert low <= found.mean + 1e-9
    assert high >= found.mean - 1e-9
    if low <= 0 <= high:
        assert found.verdict == "no difference shown"
    if found.p_value is not None:
        assert found.p_value == pytest.approx(turned.p_value)
        assert found.p_value >= 2 / 2 ** len(values) - 1e-12


@pytest.mark.parametrize(
    ("ours", "theirs", "message"),
    [([1.0], [1.0, 2.0], "got 1 and 2"), ([], [], "got 0 and 0"), ([math.nan], [1.0], "finite")],
)
def test_what_cannot_be_paired_is_an_error(ours, theirs, message):
    with pytest.raises(ValueError, match=message):
        paired(ours, theirs)
