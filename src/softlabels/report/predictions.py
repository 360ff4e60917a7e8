"""The sections about answers: differences, Zipf's law, calibration, classes, features."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from softlabels.report.canvas import decimals, printable
from softlabels.report.charts import (
    PowerLaw,
    draw_bars,
    draw_differences,
    draw_features,
    draw_reliability,
    draw_zipf,
)
from softlabels.report.curves import merge, over_epochs
from softlabels.report.entries import (
    CURVE_SCORES,
    Block,
    Chart,
    Entry,
    Section,
    has_seeds,
    same_classes,
    section,
    without,
)
from softlabels.training.schemas import Analysis, Features, Numbers, Reliability

_CHANGES, _LOWEST, _POINTS = 10, 20, 20


def difference_sections(entries: Sequence[Entry]) -> list[Section]:
    """Scores minus the first entry's, seed by seed."""
    baseline, *others = entries
    charts = []
    for score in CURVE_SCORES:
        found = [(entry, _differences(entry, baseline, score.key)) for entry in others]
        rows = [(entry, values) for entry, values in found if len(values)]
        if rows:
            unit = "percentage points" if score.unit == "%" else score.unit
            svg = draw_differences(
                rows, x_label=f"difference of {score.heading} ({unit})", digits=min(score.digits, 3)
            )
            side = "right" if score.better == "higher" else "left"
            charts.append(Chart(f"Test {score.heading}", f"{side} of zero is better", svg))
    what = "a dot for each seed, and a diamond for their mean" if has_seeds(entries) else "one seed"
    text = (
        f"Each variant minus {baseline.name}: {what}. Runs of the same seed see the same images in "
        "the same order and start from the same weights, so each difference is one of a pair."
    )
    return section("differences", "Paired differences", text, charts)


def zipf_sections(entries: Sequence[Entry]) -> list[Section]:
    """The sorted softmax beside its power law."""
    known = [(entry, _mean_zipf(entry.analyses)) for entry in entries if entry.analyses]
    small = len(entries) > 1
    limits = _limits([zipf.probabilities for _, zipf in known])
    charts = []
    for entry, zipf in known:
        background = None if entry is known[0][0] else known[0][1].probabilities
        svg = draw_zipf(entry, zipf, background, limits=limits, small=small)
        charts.append(_own_chart(entries, entry, "Probability over rank", "", svg))
    text = (
        "Each test image's probabilities are sorted, and averaged rank by rank. Zipf's law would "
        "be a straight line; the line is fitted to the first ranks, over which it is drawn."
    )
    if small and known:
        text += f" Gray: {known[0][0].name}{_missing(entries)}."
    size = "small" if small else "large"
    blocks = [Block(text, charts=tuple(charts), size=size)] if charts else []
    blocks += over_epochs(
        entries,
        "eval/zipf_r2",
        title="Fit of Zipf's law over training",
        remark="share of the variance that the straight line explains; 1 is a perfect law",
        y_label="R\u00b2",
        digits=3,
    )
    blocks += over_epochs(
        entries,
        "eval/zipf_exponent",
        title="Exponent of Zipf's law over training",
        remark="how steeply probabilities fall; 1 is Zipf's own law",
        y_label="exponent",
        digits=2,
    )
    return [Section("zipf", "Zipf's law", merge(blocks))] if blocks else []


def reliability_sections(entries: Sequence[Entry]) -> list[Section]:
    """How often an answer of some confidence is right."""
    small = len(entries) > 1
    charts = []
    for entry in entries:
        if entry.analyses:
            pooled, ece = _pooled([a.reliability for a in entry.analyses]), _mean_ece(entry)
            svg = draw_reliability(entry, pooled, ece, small=small)
            remark = "" if ece is None else f"ECE {decimals(ece, 2)} %"
            title = "Right answers over confidence"
            charts.append(_own_chart(entries, entry, title, remark, svg))
    text = (
        "Test images by the probability of their first class, in 15 bins of equal width. On the "
        "diagonal a network is right as often as it says, below it is too sure, above too modest. "
        "A larger dot stands for more images"
        f"{'; all seeds together' if has_seeds(entries) else ''}{_missing(entries)}."
    )
    size = "small" if small else "large"
    return section("reliability", "Reliability", text, charts, size=size)


def class_sections(entries: Sequence[Entry], *, against_first: bool) -> list[Section]:
    """Top-1 of single classes: the change against the first entry, or the lowest ones."""
    known = [entry for entry in entries if entry.analyses]
    change = against_first and len(known) > 1 and known[0] is entries[0]
    seeds = ", mean over seeds" if has_seeds(entries) else ""
    if change:
        baseline, *known = known
        found = [(e, _largest_changes(e, baseline)) for e in known if same_classes(e, baseline)]
        title = "Change by class"
        text = (
            "The classes whose top-1 on the test images differs most from that of "
            f"{baseline.name}: at most {_CHANGES} upwards and {_CHANGES} downwards{seeds}"
            f"{_missing(entries)}. A class has few test images, so single bars are noisy."
        )
    else:
        found = [(entry, _lowest(entry)) for entry in known]
        title = "Hardest classes"
        text = f"The classes with the lowest top-1 on the test images{seeds}{_missing(entries)}."
    charts = [
        Chart(entry.name, "", draw_bars(entry, names, values, change=change), entry)
        for entry, (names, values) in found
        if names
    ]
    return section("classes", title, text, charts, size="middle")


def feature_sections(entries: Sequence[Entry]) -> list[Section]:
    """Test images in the plane of their features."""
    charts = []
    for entry in entries:
        analysis = entry.first.analysis
        if analysis is not None and analysis.features is not None and len(analysis.features.x):
            names = [printable(name) or "?" for name in analysis.class_names]
            svg = draw_features(entry, _few_of_each_class(analysis.features), names)
            charts.append(Chart(entry.name, "", svg, entry))
    text = (
        "Some test images of a few classes, each at the first two principal components of what the "
        "classifier's last layer reads. Axes of different charts are not related"
        f"{'; the first seed' if has_seeds(entries) else ''}."
    )
    return section("features", "Features", text, charts, size="middle")


def _own_chart(entries: Sequence[Entry], entry: Entry, title: str, remark: str, svg: str) -> Chart:
    """A chart of one entry, by its name; with a title where there is no other entry."""
    return Chart(entry.name, remark, svg, entry) if len(entries) > 1 else Chart(title, remark, svg)


def _few_of_each_class(features: Features) -> Features:
    """The first images of each class: more could not be told apart."""
    earlier = [int((features.classes[:i] == one).sum()) for i, one in enumerate(features.classes)]
    kept = np.array(earlier) < _POINTS
    kept &= np.isfinite(features.x) & np.isfinite(features.y)
    columns = {name: getattr(features, name)[kept] for name in ("classes", "x", "y")}
    return features.model_copy(update=columns)


def _missing(entries: Sequence[Entry]) -> str:
    return without(entries, lambda entry: entry.analyses)


def _mean_ece(entry: Entry) -> float | None:
    values = [r.summary.final["ece"] for r in entry.records if "ece" in r.summary.final]
    return float(np.mean(values)) if values else None


def _differences(entry: Entry, baseline: Entry, key: str) -> Numbers:
    """Of the seeds that have a finite one."""
    ours, theirs = (
        [record.summary.final.get(key, math.nan) for record in each.records]
        for each in (entry, baseline)
    )
    values: Numbers = np.subtract(ours, theirs)
    return values[np.isfinite(values)]


def _mean_zipf(analyses: Sequence[Analysis]) -> PowerLaw:
    alike = [a.zipf for a in analyses if len(a.per_class) == len(analyses[0].per_class)]
    length = min(len(zipf.mean_sorted_softmax) for zipf in alike)
    columns = [zipf.mean_sorted_softmax[:length] for zipf in alike]
    # Axes of logarithms show what is above zero.
    return PowerLaw(
        np.mean([np.where(column > 0, column, np.nan) for column in columns], 0),
        float(np.mean([math.nan if zipf.exponent is None else zipf.exponent for zipf in alike])),
        float(np.mean([math.nan if zipf.r2 is None else zipf.r2 for zipf in alike])),
        alike[0].ranks,
    )


def _limits(probabilities: Sequence[Numbers]) -> tuple[float, float]:
    """The smallest and the largest of them, so that charts side by side share an axis."""
    known = [p[np.isfinite(p)] for p in probabilities]
    lows = [float(p.min()) for p in known if len(p)]
    # The straight line often starts above the first point.
    return (min(lows), 1.0) if lows else (0.1, 1.0)


def _pooled(parts: Sequence[Reliability]) -> Reliability:
    """The bins of all seeds together."""
    alike = [part for part in parts if len(part.count) == len(parts[0].count)]
    count = np.sum([part.count for part in alike], 0)
    means = {
        name: np.nansum([getattr(part, name) * part.count for part in alike], 0)
        / np.maximum(count, 1)
        for name in ("confidence", "accuracy")
    }
    return parts[0].model_copy(update={**means, "count": count})


def _per_class(entry: Entry) -> Numbers:
    alike = [a.per_class for a in entry.analyses if a.class_names == entry.analyses[0].class_names]
    return np.asarray(np.mean(alike, 0), dtype=np.float64)


def _lowest(entry: Entry) -> tuple[list[str], Numbers]:
    """The classes with the lowest top-1, the lowest first."""
    values = _per_class(entry)
    return _named(entry, values, _order(values)[:_LOWEST])


def _largest_changes(entry: Entry, baseline: Entry) -> tuple[list[str], Numbers]:
    """The classes that changed most, from the largest gain to the largest loss."""
    change = _per_class(entry) - _per_class(baseline)
    order = _order(change)
    up, down = (order[change[order] > 0][::-1], order[change[order] < 0])
    return _named(entry, change, np.concatenate([up[:_CHANGES], down[:_CHANGES][::-1]]))


def _order(values: Numbers) -> NDArray[np.int64]:
    """Indices of the finite values, the lowest first."""
    order = np.argsort(values, kind="stable")
    return np.asarray(order[np.isfinite(values[order])], dtype=np.int64)


def _named(entry: Entry, values: Numbers, chosen: NDArray[np.int64]) -> tuple[list[str], Numbers]:
    names = entry.analyses[0].class_names
    return [printable(names[i]) for i in chosen], values[chosen]
