"""The sections whose charts run over epochs or steps, with the names of lines at their ends."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial, reduce
from typing import Any

import numpy as np
from matplotlib.ticker import EngFormatter, MaxNLocator

from softlabels.report.canvas import (
    DASHES,
    LEADER,
    LINE_GAP,
    MARKERS,
    SMALL_WIDTH,
    WIDTH,
    Frame,
    color,
    decimals,
    draw,
    label_ends,
    name_axes,
    shorten,
    text_width,
)
from softlabels.report.charts import draw_areas
from softlabels.report.entries import (
    CURVE_SCORES,
    Block,
    Chart,
    Entry,
    Section,
    has_seeds,
    section,
    without,
)
from softlabels.training.run_records import Curve
from softlabels.training.schemas import Numbers

_HEIGHT, _SMALL_HEIGHT = 230.0, 150.0
_MOST_LINES, _MOST_POINTS, _MOST_EPOCHS = 8, 60, 120
_START, _FAR = 0.25, 3.0
_LOSS_PARTS = (("train/task", "task"), ("train/method", "method"))
# What a step's parts weigh: of the gradient where the run logged it, else of the loss itself.
_SHARES = (
    ("train/gradient_share/", "share of the gradient"),
    ("train/term/", "share of the loss"),
)
_BAND = "; line: mean over seeds, band: smallest to largest"


@dataclass(frozen=True)
class Line:
    """A line of a chart, perhaps in a band from its lower to its upper edge, at the same x.

    The style, a run's number, picks color, dashes and marker; None: it is in the background.
    """

    name: str
    style: int | None
    curve: Curve
    band: tuple[Curve, Curve] | None = None


def curve_sections(entries: Sequence[Entry]) -> list[Section]:
    """Scores over epochs, and losses over steps."""
    blocks = [
        block
        for score in CURVE_SCORES
        for block in over_epochs(
            entries,
            f"eval/{score.key}",
            title=f"Test {score.heading}",
            remark=f"{score.better} is better",
            y_label=f"{score.heading} ({score.unit})",
            digits=min(score.digits, 3),
        )
    ]
    losses = [_loss_chart(entries, key, part) for key, part in _LOSS_PARTS]
    charts = tuple(chart for chart in losses if chart is not None)
    if charts:
        text = "Long training curves are drawn as means over equal stretches of steps."
        blocks.append(Block(text, charts=charts))
    return [Section("curves", "Curves", merge(blocks))] if blocks else []


def over_epochs(
    entries: Sequence[Entry], key: str, *, title: str, remark: str, y_label: str, digits: int
) -> list[Block]:
    """A quantity over epochs: a chart of all, or of each one beside the first if they are many."""
    found = [(entry, mean_line(entry, key, pick_epochs)) for entry in entries]
    lines = [(entry, line) for entry, line in found if line is not None]
    if not lines:
        return []
    limits, is_cut = _limits([line for _, line in lines])
    remark += _BAND if any(line.band for _, line in lines) else ""
    remark += without(entries, lambda entry: entry.curves(key))
    remark += "; a bad start is cut off" if is_cut else ""
    drawn = partial(
        draw_curves, x_label="finished epochs", y_label=y_label, digits=digits, limits=limits
    )
    if len(lines) <= _MOST_LINES:
        return [Block(charts=(Chart(title, remark, drawn([line for _, line in lines])),))]
    reference, baseline = lines[0]
    background = replace(baseline, style=None, band=None)
    charts = tuple(
        Chart(
            entry.name,
            "",
            drawn([line] if entry is reference else [background, line], small=True),
            entry,
        )
        for entry, line in lines
    )
    text = f"{remark[0].upper()}{remark[1:]}. Gray: {reference.name}."
    return [Block(text, heading=title, charts=charts, size="small")]


def merge(blocks: Sequence[Block]) -> tuple[Block, ...]:
    """The same with neighboring pictures of all entries in one block."""
    merged: list[Block] = []
    for block in blocks:
        plain = Block(charts=block.charts)
        if merged and block == plain and merged[-1] == Block(charts=merged[-1].charts):
            merged[-1] = Block(charts=merged[-1].charts + block.charts)
        else:
            merged.append(block)
    return tuple(merged)


def loss_share_sections(entries: Sequence[Entry]) -> list[Section]:
    """What the parts of each entry's loss weigh over time."""
    charts = []
    for entry in entries:
        for prefix, what in _SHARES:
            found = _shares(entry, prefix)
            if found is not None:
                charts.append(Chart(entry.name, "", draw_areas(entry, *found, what), entry))
                break
    text = (
        "How much each part of the loss pulls at the network, step by step: the norm of its "
        "gradient on the logits, as a share of the sum over all parts (of the part's value where "
        f"a run logged no gradients){'; mean over seeds' if has_seeds(entries) else ''}."
    )
    return section("parts", "Parts of the loss", text, charts, size="middle")


def _limits(lines: Sequence[Line]) -> tuple[tuple[float, float], bool]:
    """Ends of an axis that hold all lines and bands, but no first quarter far above the rest.

    Also whether there is one, which is cut off.
    """
    curves = [curve for line in lines for curve in (line.curve, *(line.band or ()))]
    whole, later = _ends(curves, 0.0), _ends(curves, _START)
    is_cut = whole[1] - later[1] > _FAR * (later[1] - later[0])
    return (whole[0], later[1]) if is_cut else whole, is_cut


def _ends(curves: Sequence[Curve], start: float) -> tuple[float, float]:
    """The least and the largest value after so much of each curve, with a little room."""
    kept = [c.y[c.x >= c.x[0] + start * (c.x[-1] - c.x[0])] for c in curves]
    low, high = float(min(y.min() for y in kept)), float(max(y.max() for y in kept))
    room = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    return low - room, high + room


def _loss_chart(entries: Sequence[Entry], key: str, part: str) -> Chart | None:
    found = [mean_line(entry, key, thin_out) for entry in entries]
    lines = [line for line in found if line is not None]
    if not lines or len(lines) > _MOST_LINES:  # more cannot be told apart, and say little
        return None
    svg = draw_curves(lines, x_label="steps", y_label=f"{part} loss (nats)", digits=3)
    remark = "methods differ in scale" if len(lines) > 1 and part == "method" else "lower is better"
    remark += without(entries, lambda entry: entry.curves(key))
    return Chart(f"Training loss, the {part}'s part", remark, svg)


def _shares(entry: Entry, prefix: str) -> tuple[list[str], Numbers, Numbers] | None:
    """Names of several parts, steps, and each part's share at each step (mean over seeds)."""
    keys = [key for key in entry.first.curves if key.startswith(prefix)]
    lines = {key: mean_line(entry, key, thin_out) for key in keys}
    curves = {key: line.curve for key, line in lines.items() if line is not None}
    if len(curves) < 2 or len({tuple(curve.x) for curve in curves.values()}) > 1:
        return None
    values = np.array([curve.y for curve in curves.values()])
    total = values.sum(0)
    if (values < 0).any() or not (total > 0).all():  # no shares of anything
        return None
    names = [key.removeprefix(prefix).removeprefix("method/") for key in curves]
    return names, next(iter(curves.values())).x, values / total


def draw_curves(
    lines: Sequence[Line],
    *,
    x_label: str,
    y_label: str,
    digits: int,
    small: bool = False,
    limits: tuple[float, float] | None = None,
) -> str:
    """Draws lines, at least one, with their names and last values at the right end.

    One of many `small` charts side by side has half the width, and values without names. Without
    limits the y axis holds all lines and bands. Labels have units, last values so many digits.
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
