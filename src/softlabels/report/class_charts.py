"""Charts with a name inside for each class or part: bars, stacked areas, features."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from matplotlib.ticker import EngFormatter, MaxNLocator

from softlabels.report.canvas import (
    FONT_SIZE,
    LEADER,
    PAGE,
    TEXT,
    Frame,
    color,
    decimals,
    draw,
    label_ends,
    name_above,
    name_axes,
    shorten,
    signed,
    spread,
    text_width,
)
from softlabels.report.entries import Entry
from softlabels.training.schemas import Features, Numbers

_WIDTH = 260.0
_LARGEST_NAME_OF_A_POINT = 3


def draw_bars(entry: Entry, labels: Sequence[str], values: Numbers, *, change: bool) -> str:
    """Draws a bar for each class, its name at one side and its value at the other.

    The values, shape [N] with N >= 1, are top-1 in percent. Of a `change` they are percentage
    points, which have signs, and bars go to both sides of zero.
    """
    what = "change of top-1 (points)" if change else "top-1 (%)"
    texts = [signed(v, 1) if change else decimals(v, 1) for v in values]
    names = [shorten(label, 14) for label in labels]
    widest_name, widest_text = (max(map(text_width, part)) + 8 for part in (names, texts))
    widest = max(widest_text, widest_name)
    frame = Frame(
        _WIDTH,
        24 + 15.0 * len(labels),
        left=widest if change else widest_name,
        right=widest if change else widest_text,
        top=20,
        bottom=4,
    )

    def paint(axes: Any) -> None:
        places = np.arange(len(labels))
        axes.barh(places, values, height=0.68, color=color(entry.number), linewidth=0)
        for place, label, value, text in zip(places, names, values, texts, strict=True):
            side = -1 if value < 0 else 1
            for x, content, at in ((0, label, -side), (value, text, side)):
                axes.annotate(
                    content,
                    (x, place),
                    (4 * at, 0),
                    textcoords="offset points",
                    ha="left" if at > 0 else "right",
                    va="center",
                )
        reach = max(np.abs(values).max(), 1e-9)
        axes.set_xlim(-reach if values.min() < 0 else 0, reach if values.max() >= 0 else 0)
        if change:
            axes.axvline(0, color=TEXT, linewidth=0.8)
        axes.set_ylim(len(labels) - 0.5, -0.5)
        axes.set(xticks=[], yticks=[])
        axes.spines["bottom"].set_visible(False)
        name_above(axes, frame, what, 4)

    told = ", ".join(f"{label} {text}" for label, text in zip(labels, texts, strict=True))
    return draw(frame, f"Bar chart of {what}, {entry.name}: {told}.", paint)


def draw_areas(entry: Entry, parts: Sequence[str], x: Numbers, shares: Numbers, what: str) -> str:
    """Draws shares of a whole on top of one another, each with its name at the right.

    `x` are the steps, shape [N]; the columns of `shares`, [number of parts, N], have the sum 1.
    """
    ends = [f"{shorten(p, 14)} {100 * s:.0f} %" for p, s in zip(parts, shares[:, -1], strict=True)]
    frame = Frame(_WIDTH, 190.0, left=32, right=LEADER + 4 + max(map(text_width, ends)))

    def paint(axes: Any) -> None:
        stack = np.vstack([np.zeros(len(x)), np.cumsum(shares, 0)]) * 100
        for part, (low, high) in enumerate(pairwise(stack)):
            axes.fill_between(x, low, high, color=color(part), alpha=0.75, linewidth=0)
            axes.plot(x, high, color=PAGE, linewidth=1)
        axes.set(xlim=(x[0], x[-1] if x[-1] > x[0] else x[0] + 1), ylim=(0, 100))
        starts = [(x[-1], middle) for middle in (stack[:-1, -1] + stack[1:, -1]) / 2]
        label_ends(axes, frame, ends, starts, [TEXT] * len(ends))
        axes.set_yticks([0, 50, 100])
        axes.xaxis.set_major_locator(MaxNLocator(3, integer=True, min_n_ticks=1))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        name_axes(axes, frame, "steps", f"{what} (%)")

    told = f"Stacked areas of {what} over steps, {entry.name}. At the end: {', '.join(ends)}."
    return draw(frame, told, paint)


def draw_features(entry: Entry, features: Features, class_names: Sequence[str]) -> str:
    """Draws images as points in a plane; a short class name is itself the point.

    Longer names are written once, in the middle of the points of their class.
    """
    frame = Frame(_WIDTH, 250.0, left=14, right=10, bottom=22)
    known = sorted(set(features.classes.tolist()))
    names = [class_names[c] for c in known]
    points = [np.stack([features.x, features.y], 1)[features.classes == c] for c in known]
    short = all(len(name) <= _LARGEST_NAME_OF_A_POINT for name in names)

    def paint(axes: Any) -> None:
        for number, (name, of_class) in enumerate(zip(names, points, strict=True)):
            if not short:
                axes.plot(*of_class.T, "o", color=color(number), markersize=3, alpha=0.6)
                continue
            axes.update_datalim(of_class)
            for point in of_class:
                axes.text(*point, name, color=color(number), ha="center", va="center")
        axes.autoscale_view()
        if not short:
            _name_clusters(axes, frame, names, [np.median(p, 0) for p in points])
        axes.grid(visible=False)
        axes.set(xticks=[], yticks=[])
        axes.spines["left"].set_visible(True)
        first, second = (f"{100 * share:.0f} %" for share in features.explained)
        name_axes(
            axes, frame, f"first component, {first} of variance", f"second component, {second}"
        )

    return draw(
        frame,
        f"Scatter plot of {len(features.x)} test images of {entry.name} over the "
        f"{features.what or 'first two components'}; classes {', '.join(names)}.",
        paint,
    )


def _name_clusters(
    axes: Any, frame: Frame, names: Sequence[str], middles: Sequence[Numbers]
) -> None:
    """Writes each class' name at the middle of its points, none on another one."""
    low, high = axes.get_ylim()
    axes.set_ylim(low, high)
    scale = (high - low) / frame.plot_height
    places = spread([(y - low) / scale for _, y in middles], frame.plot_height)
    for number, ((x, _), place) in enumerate(zip(middles, places, strict=True)):
        axes.text(
            x,
            low + place * scale,
            shorten(names[number]),
            ha="center",
            va="center",
            color=color(number),
            fontweight="bold",
            fontsize=FONT_SIZE,
        )
