"""What all charts share: size, style, colors, and SVG that fits into an HTML page."""

from __future__ import annotations

import io
import re
import unicodedata
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from scipy.optimize import isotonic_regression

RUN_COLOURS = (
    ("#0072b2", "#56b4e9"),
    ("#b84c00", "#e69f00"),
    ("#00805c", "#2fc79b"),
    ("#a84a83", "#d58bb6"),
    ("#806a00", "#f0e442"),
    ("#5a3ea8", "#b3a1ff"),
    ("#7a3b2e", "#dba48f"),
    ("#4a5560", "#aab4bf"),
)
"""Pairs (on white, on black): Okabe and Ito's palette and three more, dark enough for text."""

DASHES: tuple[str | tuple[int, tuple[int, ...]], ...] = (
    "-",
    (0, (5, 2)),
    (0, (1, 1)),
    (0, (6, 2, 1, 2)),
    (0, (9, 3)),
    (0, (3, 1, 1, 1, 1, 1)),
)
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "p")

TEXT = "#808080"
"""Stands for the page's text color."""
MUTED = "#707070"
"""Stands for the page's color of secondary text."""
PAGE = "#fefefe"
"""Stands for the page's background."""

WIDTH, SMALL_WIDTH = 360.0, 176.0
"""The natural width of a chart is that of a phone's screen, of a small one half of that."""
FONT_SIZE, LINE_GAP = 11.0, 14.0
LEADER = 16.0
"""Space between the plot and the texts right of it."""
_CHARACTER_WIDTH = 6.2
_LONGEST_NAME = 18
_LARGEST_WRITTEN_OUT = 1e6


@dataclass(frozen=True)
class Frame:
    """Sizes of a chart and its margins, in pixels at its natural width.

    The margins hold the labels of the y axis (left), those at the ends of lines (right), the name
    of the y axis (top) and the x axis (bottom).
    """

    width: float
    height: float
    left: float = 40.0
    right: float = 8.0
    top: float = 24.0
    bottom: float = 36.0

    @property
    def plot_width(self) -> float:
        """Width inside the margins."""
        return self.width - self.left - self.right

    @property
    def plot_height(self) -> float:
        """Height inside the margins."""
        return self.height - self.top - self.bottom


def draw(frame: Frame, description: str, paint: Callable[[Any], None]) -> str:
    """Draws a chart as an `<svg>` element for an HTML page.

    `paint` draws on matplotlib's axes, which fill the frame's inner part. The description, another
    one for each chart of a page, says in words what is shown, as `aria-label`. Text takes the
    page's color and font, the colors of `RUN_COLOURS` are the CSS variables `--run-i`.
    """
    with mpl.rc_context(), warnings.catch_warnings():
        # The page's own font draws the text, so a letter that matplotlib's lacks is no harm.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        mpl.rcdefaults()  # the reader's own style must not change the page
        mpl.rcParams.update(
            {
                "font.family": ["DejaVu Sans"],
                "font.size": FONT_SIZE,
                "svg.fonttype": "none",
                "svg.hashsalt": description,  # the same file for the same run
                "text.color": TEXT,
                "text.parse_math": False,  # a label may hold dollar signs
                "axes.labelcolor": TEXT,
                "axes.edgecolor": TEXT,
                "xtick.color": TEXT,
                "ytick.color": TEXT,
            }
        )
        figure = Figure(figsize=(frame.width / 72, frame.height / 72), dpi=72)
        axes = figure.add_axes(
            (
                frame.left / frame.width,
                frame.bottom / frame.height,
                frame.plot_width / frame.width,
                frame.plot_height / frame.height,
            )
        )
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.grid(axis="y", color=TEXT, alpha=0.25, linewidth=0.7)
        axes.set_axisbelow(True)
        axes.tick_params(which="both", length=0, pad=5)
        paint(axes)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True)
    return _for_page(buffer.getvalue(), description)


def name_axes(axes: Any, frame: Frame, x_label: str, y_label: str) -> None:
    """Writes the x axis' name below it, and the y axis' in a line above the plot."""
    axes.set_xlabel(x_label, labelpad=3)
    name_above(axes, frame, y_label, 9)


def name_above(axes: Any, frame: Frame, text: str, gap: float) -> None:
    """Writes a line so many pixels above the plot, from the picture's left edge on."""
    place = -frame.left / frame.plot_width, 1 + gap / frame.plot_height
    axes.text(*place, text, transform=axes.transAxes, va="bottom")


def label_ends(
    axes: Any,
    frame: Frame,
    ends: Sequence[str],
    starts: Sequence[tuple[float, float]],
    colors: Sequence[str],
) -> None:
    """Writes texts right of the plot, each with a thin line from the point that it names.

    The points are in the units of the axes, which have linear scales and their final limits.
    """
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    named = [((x - left) / (right - left), (y - low) / (high - low)) for x, y in starts]
    places = spread([y * frame.plot_height for _, y in named], frame.plot_height)
    gap = 1 / frame.plot_width
    for end, (x, y), place, line in zip(ends, named, places, colors, strict=True):
        height = place / frame.plot_height
        axes.plot(
            [x + 3 * gap, 1 + (LEADER - 2) * gap],
            [y, height],
            color=line,
            linewidth=0.8,
            transform=axes.transAxes,
            clip_on=False,
        )
        axes.text(1 + LEADER * gap, height, end, transform=axes.transAxes, va="center")


def color(style: int | None) -> str:
    """The color of a run by its number; None: that of what stands in the background."""
    return MUTED if style is None else RUN_COLOURS[style % len(RUN_COLOURS)][0]


def decimals(value: float, digits: int) -> str:
    """A number with so many decimal places; one of a run that went wrong in short, or its name."""
    return f"{value:.{digits}f}" if abs(value) < _LARGEST_WRITTEN_OUT else f"{value:.3g}"


def signed(value: float, digits: int) -> str:
    """The same with a plus or a true minus sign; zero has none."""
    text = decimals(abs(value), digits)
    is_zero = not text.strip("0.")
    return text if is_zero else f"{'-' if value < 0 else '+'}{text}".replace("-", "\u2212", 1)


def printable(text: str) -> str:
    """Without what a chart's XML cannot hold."""
    return "".join(c if c.isprintable() else " " for c in text)


def shorten(name: str, longest: int = _LONGEST_NAME) -> str:
    """The name, with dots for what is beyond so many characters."""
    return name if len(name) <= longest else f"{name[: longest - 3]}..."


def text_width(text: str) -> float:
    """About the width of a line of text in pixels."""
    wide = sum(unicodedata.east_asian_width(character) in "WF" for character in text)
    return _CHARACTER_WIDTH * (len(text) + wide)


def spread(wanted: Sequence[float], height: float) -> list[float]:
    """The nearest places to the wanted ones, inside [0, height] and a line of text apart."""
    order = np.argsort(wanted, kind="stable")
    steps = np.arange(len(wanted)) * LINE_GAP
    # Without the gaps the places need only be in order.
    ordered = isotonic_regression(np.asarray(wanted, float)[order] - steps).x
    places = np.empty(len(wanted))
    places[order] = np.clip(ordered, 0, max(0.0, height - steps[-1])) + steps
    return [float(place) for place in places]


_VARIABLES = {
    **{light: f"var(--run-{i})" for i, (light, _) in enumerate(RUN_COLOURS)},
    TEXT: "currentColor",
    MUTED: "var(--muted)",
    PAGE: "var(--page)",
}
_COLOURS = re.compile("|".join(_VARIABLES))
_MANY_DIGITS = re.compile(r"(\.\d\d)\d+")
# What the page's style sheet or the root element says already.
_NEEDLESS = re.compile(f"font-size: {FONT_SIZE:g}px; |font-family: [^;]+; |text-anchor: start; ")


def _for_page(svg: str, description: str) -> str:
    """Cleans matplotlib's SVG file for use inside an HTML page."""
    root = ElementTree.fromstring(svg)
    for parent in root.iter():
        for child in list(parent):
            # The style element would act on the whole page.
            if child.tag.endswith(("}metadata", "}style")):
                parent.remove(child)
    for element in root.iter():
        element.tag = element.tag.partition("}")[2]
        element.attrib = {
            key.rpartition("}")[2]: _COLOURS.sub(lambda found: _VARIABLES[found[0]], value)
            for key, value in element.attrib.items()
        }
        _shrink(element)
    root.attrib = {
        "viewBox": root.attrib["viewBox"],
        "class": "chart",
        "role": "img",
        "font-size": f"{FONT_SIZE:g}",
        "aria-label": description,
    }
    return ElementTree.tostring(root, encoding="unicode")


def _shrink(element: ElementTree.Element) -> None:
    """Takes away what changes nothing on the page: half of a chart's bytes."""
    if element.tag == "g":
        element.attrib.pop("id", None)  # never referred to, and the same in every chart
    for child in list(element):
        if child.tag.endswith("}g") and not len(child):
            element.remove(child)
    for key in ("d", "x", "y"):
        if key in element.attrib:
            element.attrib[key] = _MANY_DIGITS.sub(r"\1", element.attrib[key]).strip()
    if element.tag == "text":
        element.attrib["style"] = _NEEDLESS.sub("", element.attrib["style"])
        if element.attrib.get("transform", "").startswith("rotate(-0 "):
            del element.attrib["transform"]
    elif element.text is not None:
        element.text = None
    element.tail = None
