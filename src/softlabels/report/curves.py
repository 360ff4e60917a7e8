"""The sections whose charts run over epochs or steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from softlabels.report.class_charts import draw_areas
from softlabels.report.entries import (
    CURVE_SCORES,
    Block,
    Chart,
    Entry,
    Section,
    has_seeds,
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
    losses = tuple(_loss_chart(entries, key, part) for key, part in _LOSS_PARTS)
    charts = tuple(chart for chart in losses if chart is not None)
    if charts:
        text = "Long training curves are drawn as means over equal stretches of steps."
        blocks.append(Block(text, charts=charts))
    return [Section("curves", "Curves", merge(blocks))] if blocks else []


def over_epochs(
    entries: Sequence[Entry],
    key: str,
    *,
    title: str,
    remark: str,
    y_label: str,
    digits: int,
) -> list[Block]:
    """A quantity over epochs: a chart of all, or of each one beside the first if they are many."""
    found = [
        (entry, _line(entry, [pick_epochs(c) for c in entry.curves(key)])) for entry in entries
    ]
    lines = [(entry, line) for entry, line in found if line is not None]
    if not lines:
        return []
    remark += _BAND if any(line.band for _, line in lines) else ""
    remark += without(entries, lambda entry: entry.curves(key))
    limits = _limits([line for _, line in lines])
    if limits.cut:
        remark += "; a bad start is cut off"
    if len(lines) <= _MOST_LINES:
        svg = draw_curves(
            [line for _, line in lines],
            x_label="finished epochs",
            y_label=y_label,
            digits=digits,
            limits=limits.ends,
        )
        return [Block(charts=(Chart(title, remark, svg),))]
    reference, baseline = lines[0]
    background = Line(baseline.name, None, baseline.curve)
    charts = tuple(
        Chart(
            entry.name,
            "",
            draw_curves(
                [line] if entry is reference else [background, line],
                x_label="finished epochs",
                y_label=y_label,
                digits=digits,
                small=True,
                limits=limits.ends,
            ),
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
            parts, x, shares = _shares(entry, prefix)
            if len(parts) > 1:
                names = [part.removeprefix("method/") for part in parts]
                charts.append(
                    Chart(
                        entry.name, "", draw_areas(entry.name, x, names, shares, what=what), entry
                    )
                )
                break
    if not charts:
        return []
    text = (
        "How much each part of the loss pulls at the network, step by step: the norm of its "
        "gradient on the logits, as a share of the sum over all parts (of the part's value where "
        f"a run logged no gradients){'; mean over seeds' if has_seeds(entries) else ''}."
    )
    return [
        Section("parts", "Parts of the loss", (Block(text, charts=tuple(charts), size="middle"),))
    ]


def _line(entry: Entry, curves: Sequence[Curve]) -> Line | None:
    return mean_line(entry.name, entry.number, curves) if curves else None


@dataclass(frozen=True)
class _Limits:
    ends: tuple[float, float]
    cut: bool


def _limits(lines: Sequence[Line]) -> _Limits:
    """Ends of an axis that hold all lines and bands, but no first quarter far above the rest."""
    curves = [curve for line in lines for curve in (line.curve, *(line.band or ()))]
    whole = _ends(curves, 0.0)
    later = _ends(curves, _START)
    cut = whole[1] - later[1] > _FAR * (later[1] - later[0])
    return _Limits((whole[0], later[1]) if cut else whole, cut)


def _ends(curves: Sequence[Curve], start: float) -> tuple[float, float]:
    """The least and the largest value after so much of each curve, with a little room."""
    kept = [c.y[c.x >= c.x[0] + start * (c.x[-1] - c.x[0])] for c in curves]
    low, high = float(min(y.min() for y in kept)), float(max(y.max() for y in kept))
    room = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    return low - room, high + room


def _loss_chart(entries: Sequence[Entry], key: str, part: str) -> Chart | None:
    found = [_line(entry, [thin_out(curve) for curve in entry.curves(key)]) for entry in entries]
    lines = [line for line in found if line is not None]
    if not lines or len(lines) > _MOST_LINES:  # more cannot be told apart, and say little
        return None
    svg = draw_curves(lines, x_label="steps", y_label=f"{part} loss (nats)", digits=3)
    remark = "methods differ in scale" if len(lines) > 1 and part == "method" else "lower is better"
    remark += without(entries, lambda entry: entry.curves(key))
    return Chart(f"Training loss, the {part}'s part", remark, svg)


def _shares(entry: Entry, prefix: str) -> tuple[list[str], Numbers, Numbers]:
    """Names of the parts, steps, and each part's share at each step (mean over seeds)."""
    keys = [key for key in entry.first.curves if key.startswith(prefix)]
    lines = [_line(entry, [thin_out(c) for c in entry.curves(key)]) for key in keys]
    known = [(key, line.curve) for key, line in zip(keys, lines, strict=True) if line is not None]
    nothing = [key.removeprefix(prefix) for key, _ in known][:0], np.zeros(0), np.zeros((0, 0))
    if not known or any(not np.array_equal(c.x, known[0][1].x) for _, c in known):
        return nothing
    values = np.array([curve.y for _, curve in known])
    total = values.sum(0)
    if (values < 0).any() or not (total > 0).all():  # no shares of anything
        return nothing
    return [key.removeprefix(prefix) for key, _ in known], known[0][1].x, values / total
