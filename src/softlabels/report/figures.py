"""Curves as inline SVG, whose colours follow the page's light or dark scheme."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from xml.etree import ElementTree

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator
from numpy.typing import NDArray

from softlabels.report.read import Curve

RUN_COLOURS = (
    ("#0072b2", "#56b4e9"),
    ("#d55e00", "#e69f00"),
    ("#009e73", "#2fc79b"),
    ("#b0558c", "#cc79a7"),
    ("#806a00", "#f0e442"),
    ("#1f4e9e", "#8fb4ff"),
    ("#5c5c5c", "#b8b8b8"),
)
"""Pairs (on white, on black): Okabe and Ito's palette, darkened where it is too pale on white."""

_DASHES: tuple[str | tuple[int, tuple[int, ...]], ...] = (
    "-",
    (0, (5, 2)),
    (0, (1, 1)),
    (0, (6, 2, 1, 2)),
    (0, (9, 3)),
    (0, (3, 1, 1, 1, 1, 1)),
)
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "p")

# Sizes in pixels at the chart's natural width, which is that of a phone's screen.
_WIDTH, _LEAST_HEIGHT = 360.0, 230.0
_LEFT, _BOTTOM, _TOP = 40.0, 36.0, 24.0
_FONT_SIZE, _CHARACTER_WIDTH, _LINE_GAP = 11.0, 6.0, 14.0
_LEADER = 16.0
_LONGEST_NAME = 18
_MOST_POINTS = 60
_LARGEST_WRITTEN_OUT = 1e6
_TEXT = "#808080"


@dataclass(frozen=True, eq=False)
class Line:
    """A line of a chart.

    Attributes:
        name: The text at the line's end.
        style: Number of the run, which picks colour, dashes and marker.
        curve: The points.
    """

    name: str
    style: int
    curve: Curve


def draw_curves(lines: Sequence[Line], *, x_label: str, y_label: str, digits: int) -> str:
    """Draws lines with their names and last values at the right end.

    Args:
        lines: The lines; at least one.
        x_label: Label of the x axis, with the unit.
        y_label: Label of the y axis, with the unit.
        digits: Decimal places of the last values.

    Returns:
        An `<svg>` element for an HTML page, with what it shows in words as `aria-label`. Text
        takes the page's colour and font, line i the CSS variable `--run-i` (i from 0, modulo
        the number of `RUN_COLOURS`).
    """
    height = max(_LEAST_HEIGHT, _TOP + _BOTTOM + _LINE_GAP * len(lines))
    ends = [f"{_shorten(line.name)} {decimals(line.curve.y[-1], digits)}" for line in lines]
    right = _LEADER + 10 + _CHARACTER_WIDTH * max(map(len, ends))
    plot_width, plot_height = _WIDTH - _LEFT - right, height - _TOP - _BOTTOM
    with mpl.rc_context():
        mpl.rcdefaults()  # the reader's own style must not change the page
        mpl.rcParams.update(
            {
                "font.family": ["DejaVu Sans"],
                "font.size": _FONT_SIZE,
                "svg.fonttype": "none",
                "svg.hashsalt": y_label,  # the same file for the same run
                "text.color": _TEXT,
                "text.parse_math": False,  # a label may hold dollar signs
                "axes.labelcolor": _TEXT,
                "axes.edgecolor": _TEXT,
                "xtick.color": _TEXT,
                "ytick.color": _TEXT,
            }
        )
        figure = Figure(figsize=(_WIDTH / 72, height / 72), dpi=72)
        axes = figure.add_axes(
            (_LEFT / _WIDTH, _BOTTOM / height, plot_width / _WIDTH, plot_height / height)
        )
        for line in lines:
            axes.plot(
                line.curve.x,
                line.curve.y,
                color=_colour(line.style),
                linestyle=_DASHES[line.style % len(_DASHES)],
                linewidth=1.6,
                marker=_MARKERS[line.style % len(_MARKERS)],
                markersize=4,
                markevery=max(1, -(-len(line.curve.x) // 10)),
                clip_on=False,
            )
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.grid(axis="y", color=_TEXT, alpha=0.25, linewidth=0.7)
        axes.set_axisbelow(True)
        axes.tick_params(length=0, pad=5)
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True, min_n_ticks=1))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.set_xlabel(x_label, labelpad=3)
        axes.text(
            -_LEFT / plot_width, 1 + 9 / plot_height, y_label, transform=axes.transAxes, va="bottom"
        )
        low, high = axes.get_ylim()
        axes.set_ylim(low, high)
        wanted = [(line.curve.y[-1] - low) / (high - low) * plot_height for line in lines]
        for line, end, place in zip(lines, ends, _spread(wanted, plot_height), strict=True):
            axes.annotate(
                end,
                xy=(line.curve.x[-1], line.curve.y[-1]),
                xytext=(1 + _LEADER / plot_width, place / plot_height),
                textcoords="axes fraction",
                va="center",
                annotation_clip=False,
                arrowprops={
                    "arrowstyle": "-",
                    "color": _colour(line.style),
                    "linewidth": 0.8,
                    "shrinkA": 1,
                    "shrinkB": 3,
                    "relpos": (0, 0.5),
                },
            )
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True)
    first, last = min(line.curve.x[0] for line in lines), max(line.curve.x[-1] for line in lines)
    values = "; ".join(f"{line.name} {decimals(line.curve.y[-1], digits)}" for line in lines)
    return _for_page(
        buffer.getvalue(),
        f"Line chart of {y_label} over {x_label}, {first:g} to {last:g}. Last values: {values}.",
    )


def decimals(value: float, digits: int) -> str:
    """A number with so many decimal places; one of a run that went wrong in short.

    Args:
        value: The number; NaN and infinity have their names.
        digits: Decimal places.
    """
    return f"{value:.{digits}f}" if abs(value) < _LARGEST_WRITTEN_OUT else f"{value:.3g}"


def thin_out(curve: Curve) -> Curve:
    """Replaces a long curve by the means of at most 60 groups of neighbouring points.

    Args:
        curve: The curve.

    Returns:
        The shorter curve, or the same one where it is short.
    """
    if len(curve.x) <= _MOST_POINTS:
        return curve

    def means(values: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.array([part.mean() for part in np.array_split(values, _MOST_POINTS)])

    return Curve(means(curve.x), means(curve.y))


def _colour(style: int) -> str:
    return RUN_COLOURS[style % len(RUN_COLOURS)][0]


def _shorten(name: str) -> str:
    return name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 3]}..."


def _spread(wanted: Sequence[float], height: float) -> list[float]:
    """The nearest places to the wanted ones, inside [0, height] and a line of text apart."""
    order = np.argsort(wanted, kind="stable")
    steps = np.arange(len(wanted)) * _LINE_GAP
    # Without the gaps the places need only be in order: least squares by pooling neighbours.
    blocks: list[tuple[float, int]] = []
    for value in np.asarray(wanted)[order] - steps:
        mean, count = float(value), 1
        while blocks and blocks[-1][0] > mean:
            earlier, number = blocks.pop()
            mean, count = (earlier * number + mean * count) / (number + count), number + count
        blocks.append((mean, count))
    ordered = np.concatenate([np.full(count, mean) for mean, count in blocks])
    places = np.empty(len(wanted))
    places[order] = np.clip(ordered, 0, max(0.0, height - steps[-1])) + steps
    return [float(place) for place in places]


def _for_page(svg: str, description: str) -> str:
    """Cleans matplotlib's SVG file for use inside an HTML page."""
    root = ElementTree.fromstring(svg)
    for parent in root.iter():
        for child in list(parent):
            # The style element would act on the whole page.
            if child.tag.endswith(("}metadata", "}style")):
                parent.remove(child)
    variables = {light: f"var(--run-{i})" for i, (light, _) in enumerate(RUN_COLOURS)}
    variables[_TEXT] = "currentColor"
    colours = re.compile("|".join(variables))
    for element in root.iter():
        element.tag = element.tag.partition("}")[2]
        element.attrib = {
            key.rpartition("}")[2]: colours.sub(lambda found: variables[found[0]], value)
            for key, value in element.attrib.items()
        }
        if element.tag == "g":
            element.attrib.pop("id", None)  # never referred to, and the same in every chart
    root.attrib = {
        "viewBox": root.attrib["viewBox"],
        "class": "chart",
        "role": "img",
        "aria-label": description,
    }
    return ElementTree.tostring(root, encoding="unicode")
