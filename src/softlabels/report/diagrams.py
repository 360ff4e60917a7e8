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
from softlabels.report.figures import SMALL_WIDTH, WIDTH
from softlabels.training.schemas import Numbers, Reliability


@dataclass(frozen=True, eq=False)
class Difference:
    """A variant's differences to the baseline.

    Attributes:
        name: The variant's name.
        style: Its number.
        values: One of each seed, shape [S].
    """

    name: str
    style: int
    values: Numbers


def draw_differences(rows: Sequence[Difference], *, x_label: str, digits: int) -> str:
    """Draws each seed's difference as a dot and their mean as a diamond, around a line at zero.

    Args:
        rows: The variants; at least one.
        x_label: What the difference is of, with the unit.
        digits: Decimal places of the means.

    Returns:
        An `<svg>` element.
    """
    means = [signed(float(row.values.mean()), digits) for row in rows]
    step = 24.0
    frame = Frame(
        WIDTH,
        44 + step * len(rows),
        left=10 + max(text_width(shorten(row.name)) for row in rows),
        right=12 + max(map(text_width, means)),
        top=8,
    )

    def paint(axes: Any) -> None:
        for place, row in enumerate(rows):
            shade = color(row.style)
            axes.plot(
                row.values,
                np.full(len(row.values), place),
                "o",
                color=shade,
                alpha=0.45,
                markersize=5,
                markeredgewidth=0,
                clip_on=False,
            )
            axes.plot(
                row.values.mean(),
                place,
                "D",
                color=shade,
                markersize=7,
                markeredgecolor=PAGE,
                clip_on=False,
            )
            axes.text(
                1 + 6 / frame.plot_width,
                place,
                means[place],
                transform=axes.get_yaxis_transform(),
                va="center",
            )
        axes.axvline(0, color=TEXT, linewidth=1)
        axes.set_yticks(range(len(rows)), [shorten(row.name) for row in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.grid(axis="x", color=TEXT, alpha=0.25, linewidth=0.7)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.set_xlabel(x_label, labelpad=3)

    told = "; ".join(
        f"{row.name} {mean} (seeds {', '.join(signed(v, digits) for v in row.values)})"
        for row, mean in zip(rows, means, strict=True)
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
    name: str,
    style: int,
    zipf: PowerLaw,
    background: Numbers | None,
    *,
    limits: tuple[float, float],
    small: bool,
) -> str:
    """Draws the sorted softmax with its straight line in log-log axes.

    Args:
        name: The variant's name.
        style: Its number.
        zipf: What is drawn.
        background: The sorted softmax of another variant, drawn in gray; None: nothing.
        limits: The smallest and the largest probability on the page; positive.
        small: One of many charts side by side.

    Returns:
        An `<svg>` element.
    """
    frame = Frame(SMALL_WIDTH if small else WIDTH, 170 if small else 250, left=44)
    fit = f"exponent {decimals(zipf.exponent, 2)}", f"R\u00b2 {decimals(zipf.r2, 3)}"

    def paint(axes: Any) -> None:
        p = zipf.probabilities
        rank = np.arange(1, len(p) + 1)
        _log_log(axes, len(p), limits)
        if background is not None:
            axes.plot(np.arange(1, len(background) + 1), background, color=MUTED, linewidth=1.2)
        axes.plot(
            rank,
            p,
            "o",
            color=color(style),
            markersize=3 if small else 4,
            clip_on=False,
            markevery=sorted({round(len(p) ** (i / 24)) - 1 for i in range(25)}),
        )
        fitted = rank[zipf.ranks[0] - 1 : zipf.ranks[1]]
        if len(fitted):
            height = np.log(p[fitted - 1]).mean() + zipf.exponent * np.log(fitted).mean()
            line = np.exp(height - zipf.exponent * np.log(fitted[[0, -1]]))
            axes.plot(fitted[[0, -1]], line, color=color(style), linewidth=1.4)
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

    return draw(
        frame,
        f"Log-log chart of the mean probability of {name} over the rank of the class, "
        f"{_ends(zipf.probabilities)}; straight line through ranks {zipf.ranks[0]} to "
        f"{zipf.ranks[1]}: {', '.join(fit)}.",
        paint,
    )


def draw_reliability(
    name: str, style: int, reliability: Reliability, ece: float | None, *, small: bool
) -> str:
    """Draws the accuracy of the bins of the confidence, with the diagonal.

    Args:
        name: The variant's name.
        style: Its number.
        reliability: What is drawn.
        ece: Expected calibration error in percent, None where it is not known.
        small: One of many charts side by side.

    Returns:
        An `<svg>` element.
    """
    width = SMALL_WIDTH if small else 300.0
    frame = Frame(width, width + 8, left=32, right=14)
    some = reliability.count > 0
    x, y = 100 * reliability.confidence[some], 100 * reliability.accuracy[some]
    share = reliability.count[some] / max(1.0, reliability.count.sum())

    def paint(axes: Any) -> None:
        axes.plot([0, 100], [0, 100], color=MUTED, linewidth=1)
        axes.plot(x, y, color=color(style), linewidth=1.2, clip_on=False)
        axes.scatter(
            x, y, s=8 + 160 * share, color=color(style), linewidths=0, clip_on=False, zorder=3
        )
        axes.set(xlim=(0, 100), ylim=(0, 100), xticks=[0, 50, 100], yticks=[0, 50, 100])
        name_axes(axes, frame, "confidence (%)", "right answers (%)")

    told = ", ".join(f"{a:.0f} % right at {c:.0f} %" for c, a in zip(x, y, strict=True))
    error = "" if ece is None else f" ECE {decimals(ece, 2)} %."
    return draw(
        frame, f"Reliability diagram of {name}: {told or 'no images'} confidence.{error}", paint
    )


def _log_log(axes: Any, num_ranks: int, limits: tuple[float, float]) -> None:
    """Log-log axes with powers of ten as plain numbers, at most four on the y axis."""
    last = max(2, num_ranks)
    low, high = (math.log10(limit) for limit in limits)
    low, high = low - 0.1, high + 0.1
    powers = [10.0**power for power in range(math.ceil(low), math.floor(high) + 1)]
    kept = powers[:: -(-max(1, len(powers)) // 4)]
    axes.set(xscale="log", yscale="log", xlim=(1, last), ylim=(10**low, 10**high))
    axes.minorticks_off()
    axes.xaxis.set_major_locator(FixedLocator([rank for rank in (1, 10, 100) if rank <= last]))
    axes.yaxis.set_major_locator(FixedLocator(kept or [10 ** ((low + high) / 2)]))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))


def _ends(probabilities: Numbers) -> str:
    known = probabilities[np.isfinite(probabilities)]
    return f"{known[0]:.3g} to {known[-1]:.3g}" if len(known) else "no values"
