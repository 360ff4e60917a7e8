"""The sections whose charts run over epochs or steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from softlabels.report.class_charts import draw_areas
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
from softlabels.report.figures import Line, draw_curves, mean_line, pick_epochs, thin_out
from softlabels.training.run_records import Curve
from softlabels.training.schemas import Numbers

_MOST_LINES = 8
_START, _FAR = 0.25, 3.0
_LOSS_PARTS = (("train/task", "task"), ("train/method", "method"))
# What a step's parts weigh: of the gradient where the run logged it, else of the loss itself.
_SHARES = (
    ("train/gradient_share/", "share of the gradient"),
    ("train/term/", "share of the loss"),
)
_BAND = "; line: mean over seeds, band: smallest to largest"


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
    draw = partial(
        draw_curves, x_label="finished epochs", y_label=y_label, digits=digits, limits=limits
    )
    if len(lines) <= _MOST_LINES:
        return [Block(charts=(Chart(title, remark, draw([line for _, line in lines])),))]
    reference, baseline = lines[0]
    background = replace(baseline, style=None, band=None)
    charts = tuple(
        Chart(
            entry.name,
            "",
            draw([line] if entry is reference else [background, line], small=True),
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
