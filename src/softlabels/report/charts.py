"""Charts of a network's answers: differences, Zipf's law, calibration, classes, parts, features."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from matplotlib.ticker import EngFormatter, FixedLocator, FuncFormatter, MaxNLocator

from softlabels.report.canvas import (
    FONT_SIZE,
    LEADER,
    LINE_GAP,
    MUTED,
    PAGE,
    SMALL_WIDTH,
    TEXT,
    WIDTH,
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
from softlabels.training.schemas import Features, Numbers, Reliability

_MIDDLE_WIDTH = 260.0
_LARGEST_NAME_OF_A_POINT = 3


def draw_differences(rows: Sequence[tuple[Entry, Numbers]], *, x_label: str, digits: int) -> str:
    """Draws each seed's difference as a dot and their mean as a diamond, around a line at zero.

    A row is a variant with its differences, shape [seeds]; there is at least one.
    """
    means = [signed(float(values.mean()), digits) for _, values in rows]
    names = [shorten(entry.name) for entry, _ in rows]
    frame = Frame(
        WIDTH,
        44 + 24.0 * len(rows),
        left=10 + max(map(text_width, names)),
        right=12 + max(map(text_width, means)),
        top=8,
    )

    def paint(axes: Any) -> None:
        for place, (entry, values) in enumerate(rows):
            shared = {"color": color(entry.number), "clip_on": False}
            axes.plot(
                values,
                np.full(len(values), place),
                "o",
                alpha=0.45,
                markersize=5,
                markeredgewidth=0,
                **shared,
            )
            axes.plot(values.mean(), place, "D", markersize=7, markeredgecolor=PAGE, **shared)
            axes.text(
                1 + 6 / frame.plot_width,
                place,
                means[place],
                transform=axes.get_yaxis_transform(),
                va="center",
            )
        axes.axvline(0, color=TEXT, linewidth=1)
        axes.set_yticks(range(len(rows)), names)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.grid(axis="x", color=TEXT, alpha=0.25, linewidth=0.7)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.set_xlabel(x_label, labelpad=3)

    told = "; ".join(
        f"{entry.name} {mean} (seeds {', '.join(signed(v, digits) for v in values)})"
        for (entry, values), mean in zip(rows, means, strict=True)
    )
    return draw(frame, f"Dot plot of {x_label}. Means: {told}.", paint)


@dataclass(frozen=True, eq=False)
class PowerLaw:
    """A sorted softmax, shape [R], and its line through some ranks, as `schemas.Zipf` has them.

    Perhaps means over seeds; NaN where there is none.
    """

    probabilities: Numbers
    exponent: float
    r2: float
    ranks: tuple[int, int]


def draw_zipf(
    entry: Entry,
    zipf: PowerLaw,
    background: Numbers | None,
    *,
    limits: tuple[float, float],
    small: bool,
) -> str:
    """Draws the sorted softmax with its straight line in log-log axes.

    The background is that of another variant, in gray. The limits are the smallest and the largest
    probability on the page, above zero.
    """
    frame = Frame(SMALL_WIDTH if small else WIDTH, 170 if small else 250, left=44)
    fit = f"exponent {decimals(zipf.exponent, 2)}", f"R\u00b2 {decimals(zipf.r2, 3)}"
    p, (first, last) = zipf.probabilities, zipf.ranks

    def paint(axes: Any) -> None:
        _log_log(axes, len(p), limits)
        if background is not None:
            axes.plot(np.arange(1, len(background) + 1), background, color=MUTED, linewidth=1.2)
        rank = np.arange(1, len(p) + 1)
        axes.plot(
            rank,
            p,
            "o",
            color=color(entry.number),
            markersize=3 if small else 4,
            clip_on=False,
            markevery=sorted({round(len(p) ** (i / 24)) - 1 for i in range(25)}),
        )
        fitted = rank[first - 1 : last]
        if len(fitted):
            height = np.log(p[fitted - 1]).mean() + zipf.exponent * np.log(fitted).mean()
            line = np.exp(height - zipf.exponent * np.log(fitted[[0, -1]]))
            axes.plot(fitted[[0, -1]], line, color=color(entry.number), linewidth=1.4)
        name_axes(axes, frame, "rank of the class", "mean probability")
        # The curve falls from the upper left to the lower right: this corner is free.
        for row, text in enumerate(reversed(fit)):
            axes.text(
                6 / frame.plot_width,
                (5 + row * LINE_GAP) / frame.plot_height,
                text,
                transform=axes.transAxes,
                va="bottom",
            )

    known = p[np.isfinite(p)]
    ends = f"{known[0]:.3g} to {known[-1]:.3g}" if len(known) else "no values"
    return draw(
        frame,
        f"Log-log chart of the mean probability of {entry.name} over the rank of the class, "
        f"{ends}; straight line through ranks {first} to {last}: {', '.join(fit)}.",
        paint,
    )


def draw_reliability(
    entry: Entry, reliability: Reliability, ece: float | None, *, small: bool
) -> str:
    """Draws the accuracy of the bins of the confidence, with the diagonal; ECE is in percent."""
    width = SMALL_WIDTH if small else 300.0
    frame = Frame(width, width + 8, left=32, right=14)
    some = reliability.count > 0
    x, y = 100 * reliability.confidence[some], 100 * reliability.accuracy[some]
    share = reliability.count[some] / max(1.0, reliability.count.sum())

    def paint(axes: Any) -> None:
        axes.plot([0, 100], [0, 100], color=MUTED, linewidth=1)
        shared = {"color": color(entry.number), "clip_on": False}
        axes.plot(x, y, linewidth=1.2, **shared)
        axes.scatter(x, y, s=8 + 160 * share, linewidths=0, zorder=3, **shared)
        axes.set(xlim=(0, 100), ylim=(0, 100), xticks=[0, 50, 100], yticks=[0, 50, 100])
        name_axes(axes, frame, "confidence (%)", "right answers (%)")

    told = ", ".join(f"{a:.0f} % right at {c:.0f} %" for c, a in zip(x, y, strict=True))
    error = "" if ece is None else f" ECE {decimals(ece, 2)} %."
    told = f"Reliability diagram of {entry.name}: {told or 'no images'} confidence.{error}"
    return draw(frame, told, paint)


def _log_log(axes: Any, num_ranks: int, limits: tuple[float, float]) -> None:
    """Log-log axes with powers of ten as plain numbers, at most four on the y axis."""
    last = max(2, num_ranks)
    low, high = math.log10(limits[0]) - 0.1, math.log10(limits[1]) + 0.1
    powers = [10.0**power for power in range(math.ceil(low), math.floor(high) + 1)]
    kept = powers[:: -(-max(1, len(powers)) // 4)]
    axes.set(xscale="log", yscale="log", xlim=(1, last), ylim=(10**low, 10**high))
    axes.minorticks_off()
    axes.xaxis.set_major_locator(FixedLocator([rank for rank in (1, 10, 100) if rank <= last]))
    axes.yaxis.set_major_locator(FixedLocator(kept or [10 ** ((low + high) / 2)]))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))


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
        _MIDDLE_WIDTH,
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
    frame = Frame(_MIDDLE_WIDTH, 190.0, left=32, right=LEADER + 4 + max(map(text_width, ends)))

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
    frame = Frame(_MIDDLE_WIDTH, 250.0, left=14, right=10, bottom=22)
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
