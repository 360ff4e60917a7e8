"""Charts of numbers of the whole test set: paired differences, Zipf's law, calibration."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator

from softlabels.report.canvas import (
    LINE_GAP,
    MUTED,
    PAGE,
    TEXT,
    Frame,
    color,
    decimals,
    draw,
    name_axes,
    shorten,
    signed,
    text_width,
)
from softlabels.report.entries import Entry
from softlabels.report.figures import SMALL_WIDTH, WIDTH
from softlabels.training.schemas import Numbers, Reliability


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
    """A sorted softmax and its straight line, perhaps means over seeds.

    Attributes:
        probabilities: At rank 1, 2, ..., shape [R]; NaN where there is none.
        exponent: Minus the slope; NaN where there is none, as of `r2`.
        r2: Share of the variance that the line explains.
        ranks: The first and the last rank of the fit, from 1.
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

    Args:
        entry: Whose it is.
        zipf: What is drawn.
        background: The sorted softmax of another variant, drawn in gray; None: nothing.
        limits: The smallest and the largest probability on the page; positive.
        small: One of many charts side by side.
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
