"""Places of the labels at the line ends."""

from __future__ import annotations

import re

import numpy as np
import pytest

from softlabels.report.curves import Line, draw_curves, thin_out
from softlabels.training.run_records import Curve


def label_heights(values):
    """The heights of the end labels on the page, in the order of the values."""
    lines = [
        Line(f"run{i}", i, Curve(np.array([0.0, 1.0]), np.array([0.0, value])))
        for i, value in enumerate(values)
    ]
    svg = draw_curves(lines, x_label="steps", y_label="loss", digits=2)
    found = re.findall(r'<text[^>]* y="([\d.]+)"[^>]*>run(\d+) ', svg)
    assert len(found) == len(values)
    total = float(re.search(r'viewBox="0 0 \S+ (\S+)"', svg)[1])
    heights = [float(y) for y, _ in sorted(found, key=lambda pair: int(pair[1]))]
    assert all(0 < height < total for height in heights)
    return heights


@pytest.mark.parametrize(
    "values",
    [
        [1.0, 1.0, 1.0, 1.0],
        [0.5, 0.51, 0.49, 1.0],
        [0.0, 0.0, 0.001, 1.0, 1.0],
        list(np.linspace(0.9, 1.0, 24)),
    ],
)
def test_end_labels_do_not_overlap_and_keep_the_order_of_the_values(values):
    heights = np.array(label_heights(values))
    assert np.diff(np.sort(heights)).min() > 13
    order = np.argsort(values, kind="stable")
    assert (np.diff(heights[order]) < 0).all()  # y points down


def test_end_labels_with_room_stand_at_their_values():
    low, middle, high = label_heights([0.0, 0.5, 1.0])
    assert middle == pytest.approx((low + high) / 2, abs=0.5)
    assert low - high > 100


def test_one_point_is_drawn():
    line = Line("run", 0, Curve(np.array([1.0]), np.array([5.0])))
    svg = draw_curves([line], x_label="epochs", y_label="x", digits=1)
    assert "run 5.0" in svg


def test_long_name_is_shortened_in_the_plot_and_whole_in_the_description():
    name = "a very long name of a run"
    line = Line(name, 0, Curve(np.array([1.0, 2.0]), np.array([5.0, 6.0])))
    svg = draw_curves([line], x_label="epochs", y_label="x", digits=1)
    assert f"{name} 6.0" in re.search(r'aria-label="([^"]+)"', svg)[1]
    assert ">a very long nam... 6.0<" in svg


def test_thin_out_keeps_the_mean_and_short_curves():
    x = np.arange(6000.0)
    short = thin_out(Curve(x, 2 * x))
    assert len(short.x) == len(short.y) == 60
    assert short.y.mean() == pytest.approx((2 * x).mean())
    np.testing.assert_allclose(short.y, 2 * short.x)
    few = Curve(x[:10], x[:10])
    assert thin_out(few) is few
