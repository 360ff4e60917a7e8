"""Charts with a name inside for each class or part: bars, stacked areas, features."""

from __future__ import annotations

from collections.abc import Sequence
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
    name_axes,
    shorten,
    signed,
    spread,
    text_width,
)
from softlabels.training.schemas import Features, Numbers

_WIDTH = 260.0
_LARGEST_NAME_OF_A_POINT = 3


def draw_bars(
    name: str, style: int, labels: Sequence[str], values: Numbers, *, what: str, change: bool
) -> str:
    """Draws a bar for each class, its name at one side and its value at the other.

    Args:
        name: The variant's name.
        style: Its number.
        labels: Names of the classes; at least one.
        values: Their values, shape [N], in percent or, of a change, percentage points.
        what: What the values are, with the unit.
        change: Bars go to both sides of zero, and values have signs.

    Returns:
        An `<svg>` element.
    """
    texts = [signed(v, 1) if change else decimals(v, 1) for v in values]
    names = [shorten(label, 14) for label in labels]
    step = 15.0
    widest_name, widest_text = (max(map(text_width, part)) + 8 for part in (names, texts))
    frame = Frame(
        _WIDTH,
        24 + step * len(labels),
        left=max(widest_text, widest_name) if change else widest_name,
        right=max(widest_text, widest_name) if change else widest_text,
        top=20,
        bottom=4,
    )

    def paint(axes: Any) -> None:
        places = np.arange(len(labels))
        axes.barh(places, values, height=0.68, color=color(style), linewidth=0)
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
        if change:
            axes.axvline(0, color=TEXT, linewidth=0.8)
            reach = max(np.abs(values).max(), 1e-9)
            axes.set_xlim(-reach if values.min() < 0 else 0, reach if values.max() > 0 else 0)
        else:
            axes.set_xlim(0, max(values.max(), 1e-9))
        axes.set_ylim(len(labels) - 0.5, -0.5)
        axes.set_xticks([])
        axes.set_yticks([])
        axes.spines["bottom"].set_visible(False)
        axes.text(
            -frame.left / frame.plot_width,
            1 + 4 / frame.plot_height,
            what,
            transform=axes.transAxes,
            va="bottom",
        )

    told = ", ".join(f"{label} {text}" for label, text in zip(labels, texts, strict=True))
    return draw(frame, f"Bar chart of {what}, {name}: {told}.", paint)


def draw_areas(name: str, x: Numbers, parts: Sequence[str], shares: Numbers, *, what: str) -> str:
    """Draws shares of a whole on top of one another, each with its name at the right.

    Args:
        name: The variant's name.
        x: Steps, shape [N].
        parts: Names of the parts.
        shares: Shape [number of parts, N], each column with the sum 1.
        what: What the whole is.

    Returns:
        An `<svg>` element.
    """
    ends = [f"{shorten(p, 14)} {100 * s:.0f} %" for p, s in zip(parts, shares[:, -1], strict=True)]
    frame = Frame(_WIDTH, 190.0, left=32, right=LEADER + 4 + max(map(text_width, ends)))

    def paint(axes: Any) -> None:
        stack = np.vstack([np.zeros(len(x)), np.cumsum(shares, 0)]) * 100
        for part in range(len(parts)):
            axes.fill_between(
                x, stack[part], stack[part + 1], color=color(part), alpha=0.75, linewidth=0
            )
            axes.plot(x, stack[part + 1], color=PAGE, linewidth=1)
        axes.set(xlim=(x[0], x[-1] if x[-1] > x[0] else x[0] + 1), ylim=(0, 100))
        middles = (stack[:-1, -1] + stack[1:, -1]) / 2
        starts = [(x[-1], middle) for middle in middles]
        label_ends(axes, frame, ends, starts, [TEXT] * len(ends))
        axes.set_yticks([0, 50, 100])
        axes.xaxis.set_major_locator(MaxNLocator(3, integer=True, min_n_ticks=1))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        name_axes(axes, frame, "steps", f"{what} (%)")

    return draw(
        frame, f"Stacked areas of {what} over steps, {name}. At the end: {', '.join(ends)}.", paint
    )


def draw_features(name: str, features: Features, class_names: Sequence[str]) -> str:
    """Draws images as points in a plane; a short class name is itself the point.

    Longer names are written once, in the middle of the points of their class.

    Args:
        name: The variant's name.
        features: The points; at least one.
        class_names: Names of all classes.

    Returns:
        An `<svg>` element.
    """
    frame = Frame(_WIDTH, 250.0, left=14, right=10, bottom=22)
    known = sorted(set(features.classes.tolist()))
    short = all(len(class_names[c]) <= _LARGEST_NAME_OF_A_POINT for c in known)

    def paint(axes: Any) -> None:
        for number, one in enumerate(known):
            x, y = (v[features.classes == one] for v in (features.x, features.y))
            if not short:
                axes.plot(x, y, "o", color=color(number), markersize=3, alpha=0.6)
                continue
            axes.update_datalim(np.stack([x, y], 1))
            for point in zip(x, y, strict=True):
                axes.text(*point, class_names[one], color=color(number), ha="center", va="center")
        axes.autoscale_view()
        if not short:
            _name_clusters(axes, frame, features, [class_names[c] for c in known])
        axes.grid(visible=False)
        axes.set_xticks([])
        axes.set_yticks([])
        axes.spines["left"].set_visible(True)
        first, second = (f"{100 * share:.0f} %" for share in features.explained)
        name_axes(
            axes, frame, f"first component, {first} of variance", f"second component, {second}"
        )

    names = ", ".join(class_names[c] for c in known)
    return draw(
        frame,
        f"Scatter plot of {len(features.x)} test images of {name} over the "
        f"{features.what or 'first two components'}; classes {names}.",
        paint,
    )


def _name_clusters(axes: Any, frame: Frame, features: Features, names: Sequence[str]) -> None:
    """Writes each class' name at the median of its points, none on another one."""
    known = sorted(set(features.classes.tolist()))
    chosen = [features.classes == one for one in known]
    x = [float(np.median(features.x[points])) for points in chosen]
    y = [float(np.median(features.y[points])) for points in chosen]
    low, high = axes.get_ylim()
    axes.set_ylim(low, high)
    places = spread([(v - low) / (high - low) * frame.plot_height for v in y], frame.plot_height)
    for one, place, text, number in zip(x, places, names, range(len(names)), strict=True):
        axes.text(
            one,
            low + place / frame.plot_height * (high - low),
            shorten(text),
            ha="center",
            va="center",
            color=color(number),
            fontweight="bold",
            fontsize=FONT_SIZE,
        )
