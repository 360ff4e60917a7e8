"""Curves over epochs or steps, with the names of their lines at the ends."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np
from matplotlib.ticker import EngFormatter, MaxNLocator

from softlabels.report.canvas import (
    DASHES,
    LEADER,
    LINE_GAP,
    MARKERS,
    Frame,
    color,
    decimals,
    draw,
    label_ends,
    name_axes,
    shorten,
    text_width,
)
from softlabels.report.entries import Entry
from softlabels.training.run_records import Curve

# The natural width of a chart is that of a phone's screen, of a small one half of that.
WIDTH, SMALL_WIDTH = 360.0, 176.0
_HEIGHT, _SMALL_HEIGHT = 230.0, 150.0
_MOST_POINTS, _MOST_EPOCHS = 60, 120


@dataclass(frozen=True)
class Line:
    """A line of a chart.

    Attributes:
        name: The text at the line's end.
        style: Number of the run, which picks color, dashes and marker; None: in the background.
        curve: The points.
        band: The lower and the upper edge of a band around it, at the same x; None: no band.
    """

    name: str
    style: int | None
    curve: Curve
    band: tuple[Curve, Curve] | None = None


def draw_curves(
    lines: Sequence[Line],
    *,
    x_label: str,
    y_label: str,
    digits: int,
    small: bool = False,
    limits: tuple[float, float] | None = None,
) -> str:
    """Draws lines with their names and last values at the right end.

    Args:
        lines: The lines; at least one.
        x_label: Label of the x axis, with the unit.
        y_label: Label of the y axis, with the unit.
        digits: Decimal places of the last values.
        small: One of many charts side by side: half the width, and values without names.
        limits: The y axis' ends; None: what holds all lines and bands.
    """
    values = [decimals(line.curve.y[-1], digits) for line in lines]
    ends = (
        values
        if small
        else [f"{shorten(line.name)} {v}" for line, v in zip(lines, values, strict=True)]
    )
    frame = Frame(
        SMALL_WIDTH if small else WIDTH,
        max(_SMALL_HEIGHT if small else _HEIGHT, 60 + LINE_GAP * len(lines)),
        right=LEADER + 4 + max(map(text_width, ends)),
    )

    def paint(axes: Any) -> None:
        for line in lines:
            _draw_line(axes, line, clip=limits is not None)
        axes.xaxis.set_major_locator(MaxNLocator(2 if small else 4, integer=True, min_n_ticks=1))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.yaxis.set_major_locator(MaxNLocator(4 if small else 5))
        name_axes(axes, frame, x_label, y_label)
        low, high = limits or axes.get_ylim()
        axes.set_ylim(low, high)
        starts = [(line.curve.x[-1], line.curve.y[-1]) for line in lines]
        label_ends(axes, frame, ends, starts, [color(line.style) for line in lines])

    first, last = min(line.curve.x[0] for line in lines), max(line.curve.x[-1] for line in lines)
    told = "; ".join(f"{line.name} {value}" for line, value in zip(lines, values, strict=True))
    return draw(
        frame,
        f"Line chart of {y_label} over {x_label}, {first:g} to {last:g}. Last values: {told}.",
        paint,
    )


def _draw_line(axes: Any, line: Line, *, clip: bool) -> None:
    if line.band is not None:
        low, high = line.band
        axes.fill_between(low.x, low.y, high.y, color=color(line.style), alpha=0.16, linewidth=0)
    style = line.style or 0
    axes.plot(
        line.curve.x,
        line.curve.y,
        color=color(line.style),
        linestyle=DASHES[style % len(DASHES)],
        linewidth=1.6 if line.style is not None else 1.2,
        marker=MARKERS[style % len(MARKERS)] if line.style is not None else None,
        markersize=4,
        markevery=max(1, -(-len(line.curve.x) // 10)),
        clip_on=clip,
    )


def mean_line(entry: Entry, key: str, shorter: Callable[[Curve], Curve]) -> Line | None:
    """The mean of an entry's shortened curves, with a band from the smallest to the largest.

    Only what all of them have an x for counts; None where there is no such x, or no curve.
    """
    curves = [shorter(curve) for curve in entry.curves(key)]
    common = reduce(np.intersect1d, [curve.x for curve in curves]) if curves else np.zeros(0)
    if not len(common):
        return None
    table = np.array([curve.y[np.isin(curve.x, common)] for curve in curves])
    low, high = Curve(common, table.min(0)), Curve(common, table.max(0))
    band = (low, high) if len(curves) > 1 else None
    return Line(entry.name, entry.number, Curve(common, table.mean(0)), band)


def thin_out(curve: Curve) -> Curve:
    """Replaces a long curve by the means of 60 groups of neighboring points; a short one stays."""
    if len(curve.x) <= _MOST_POINTS:
        return curve
    groups = [np.array_split(values, _MOST_POINTS) for values in (curve.x, curve.y)]
    return Curve(*(np.array([group.mean() for group in each]) for each in groups))


def pick_epochs(curve: Curve) -> Curve:
    """Leaves out points of a very long curve, but not the first and the last: 120 stay."""
    if len(curve.x) <= _MOST_EPOCHS:
        return curve
    kept = np.linspace(0, len(curve.x) - 1, _MOST_EPOCHS).round().astype(int)
    return Curve(curve.x[kept], curve.y[kept])
