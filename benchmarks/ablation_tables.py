"""The papers' ablations on our data, beside the papers' own figures, and a plot of weights."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from benchmarks.comparison_tables import comparison_rows, read_comparison, where
from softlabels.training.config import load_recipe
from softlabels.training.settings import PaperSettings

__all__ = ["ablations", "draw_sensitivity"]

NAME = "ablations"
_TITLES = {
    "table 5": "NKD's parts (table 5: ResNet-34 to ResNet-18, ImageNet)",
    "table 6": "USKD's parts (table 6: MobileNet, ImageNet)",
    "table 9": "Where USKD's ranks come from (table 9: ResNet-18, ImageNet)",
    "table 10": "NKD's temperature (table 10: CIFAR-100, ResNet-34 to ResNet-18)",
    "table 12": "The square in USKD's target label (table 12: MobileNet, ImageNet)",
    "table 14": "NKD's target term (table 14: ResNet-34 to ResNet-18, ImageNet)",
    "table 15": "USKD's target term (table 15: ResNet-18, ImageNet)",
    "rank form": "Ranks of probabilities (the paper) or of their logarithms (later reference code)",
    "distribution": "The law of Zipf's LS",
}
# The row of the paper that is like a variant of ours.
_LIKE = {
    "table 5: target term": "table5/target",
    "table 5: target term, KD's non-target term": "table5/target_and_kd_non_target",
    "table 5: target term, NKD's non-target term": "table5/nkd",
    "table 6: target term": "table6/mobilenet_target",
    "table 6: non-target term": "table6/mobilenet_non_target",
    "table 6: both terms": "table6/mobilenet_both",
    "table 9: weak logits": "table9/resnet18_weak",
    "table 9: final logits": "table9/resnet18_final",
    "table 9: both, not normalized": "table9/resnet18_both_unnormalized",
    "table 9: both, normalized": "table9/resnet18_both",
    **{f"table 10: temperature {t}": f"table10/temperature_{t}" for t in range(1, 5)},
    "table 12: squared": "table12/mobilenet_squared",
    "table 12: not squared": "table12/mobilenet_not_squared",
    **{
        f"table {number}: {ours}": f"table{number}/{theirs}"
        for number in (14, 15)
        for ours, theirs in (("T1", "t1"), ("T2", "t2"), ("T1 and T2", "both"))
    },
}
_WEIGHTS = {
    "figure 4": ("alpha", "target weight"),
    "figure 5": ("beta", "non-target weight"),
    "figure 6": ("mu", "weak weight"),
}


def _published_gain(variant: str) -> float | None:
    """What the paper's row gained over its baseline, points."""
    if variant not in _LIKE:
        return None
    paper = _paper(_LIKE[variant])
    baseline = None if paper.baseline is None else _paper(paper.baseline).top1
    return None if paper.top1 is None or baseline is None else paper.top1 - baseline


def _paper(recipe: str) -> PaperSettings:
    return PaperSettings.model_validate(load_recipe(recipe)["paper"])


def ablations() -> str:
    """A table for each ablation."""
    results = read_comparison(NAME)
    if results is None:
        return f"Not run yet: `make results NAME={NAME}`."
    baseline = results["variants"][0]["scores"]["top1"]
    lines = [
        f"Cross-entropy: {baseline['mean']:.2f} ± {baseline['deviation']:.2f} % over "
        f"{len(results['seeds'])} seeds. Differences are to it, with their 95 % t intervals; the "
        "paper's gain is over its own baseline, on other data.",
    ]
    for prefix, title in _TITLES.items():
        of_table = [v for v in results["variants"] if v["name"].startswith(f"{prefix}: ")]
        gains = [_published_gain(v["name"]) for v in of_table]
        lines += ["", f"**{title}**", "", *_table(of_table, prefix, gains)]
    return "\n".join([*lines, "", where(results, NAME)])


def _table(
    variants: Sequence[Mapping[str, Any]], prefix: str, gains: Sequence[float | None]
) -> list[str]:
    published = any(gain is not None for gain in gains)
    rows = comparison_rows(variants, named=lambda name: name.removeprefix(f"{prefix}: "))
    heading = "| | top-1 % | difference, 95 % interval | in words | NLL nats | ECE % |"
    rule = "| --- | ---: | ---: | --- | ---: | ---: |"
    if not published:
        return [heading, rule, *(f"| {' | '.join(row[:6])} |" for row in rows)]
    return [
        f"{heading} paper's gain |",
        f"{rule} ---: |",
        *(
            f"| {' | '.join(row[:6])} | {'' if gain is None else f'{gain:+.2f}'} |"
            for row, gain in zip(rows, gains, strict=True)
        ),
    ]


def draw_sensitivity(path: Path) -> bool:
    """Draw top-1 over each weight of USKD; says whether there were results.

    Args:
        path: The SVG file to write.
    """
    results = read_comparison(NAME)
    if results is None:
        return False
    baseline = results["variants"][0]["scores"]["top1"]["mean"]
    with mpl.rc_context({"svg.hashsalt": NAME, "font.size": 9, "svg.fonttype": "none"}):
        figure = Figure(figsize=(9, 2.8), layout="constrained", facecolor="white")
        panels = figure.subplots(1, len(_WEIGHTS), sharey=True)
        for axes, (prefix, (letter, name)) in zip(panels, _WEIGHTS.items(), strict=True):
            points = [
                (float(v["name"].split()[-1]), [run["top1"] for run in v["runs"]])
                for v in results["variants"]
                if v["name"].startswith(f"{prefix}: ")
            ]
            weights = [weight for weight, _ in points]
            for seed in range(len(results["seeds"])):
                top1 = [values[seed] for _, values in points]
                axes.plot(weights, top1, "o", color="#9aa2ac", markersize=3)
            means = [sum(values) / len(values) for _, values in points]
            axes.plot(weights, means, "-D", color="#0067b1", markersize=5)
            axes.axhline(baseline, color="#5f6670", linestyle="--", linewidth=1)
            axes.annotate(
                "cross-entropy", (weights[0], baseline), xytext=(0, 3), textcoords="offset points"
            )
            axes.set_xscale("log")
            axes.set_xticks(weights, [f"{weight:g}" for weight in weights])
            axes.minorticks_off()
            axes.set_xlabel(f"{name} ({letter})")
        panels[0].set_ylabel("top-1 (%)")
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    path.write_text(buffer.getvalue(), encoding="utf-8")
    return True
