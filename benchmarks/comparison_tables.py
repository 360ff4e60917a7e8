"""Tables of the comparisons over seeds, from results/NAME/comparison.json."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from softlabels.experiments.statistics import paired

__all__ = ["between", "comparison", "comparison_rows", "read_comparison", "where"]

RESULTS = Path(__file__).parents[1] / "results"


def read_comparison(name: str) -> dict[str, Any] | None:
    """What came out of a comparison; None where it was not run."""
    path = RESULTS / name / "comparison.json"
    if not path.is_file():
        return None
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


# The comparisons besides the one with cross-entropy that the papers make; by the first variant
# whose name begins so.
PAIRS = (
    ("NKD", "KD"),
    ("Zipf's LS", "label smoothing"),
    ("USKD", "label smoothing"),
    ("USKD", "Tf-KD"),
    ("USKD", "Zipf's LS"),
)


def between(results: Mapping[str, Any]) -> list[str]:
    """A table of paired differences in top-1 between methods, as lines."""
    runs = {
        variant["name"]: [run["top1"] for run in variant["runs"]] for variant in results["variants"]
    }
    rows = []
    for pair in PAIRS:
        ours, theirs = (next(name for name in runs if name.startswith(one)) for one in pair)
        found = paired(runs[ours], runs[theirs])
        words = {"higher": "better", "lower": "worse"}.get(found.verdict, found.verdict)
        low, high = found.t or (math.nan, math.nan)
        rows.append(
            f"| {ours} - {theirs} | {found.mean:+.2f} ({low:+.2f} to {high:+.2f}) | {words} |"
        )
    return ["| | top-1, 95 % interval | in words |", "| --- | ---: | --- |", *rows]


def where(results: Mapping[str, Any], name: str) -> str:
    """The accuracy of the teacher, where there is one, and what made a comparison on what."""
    environment = results["environment"]
    device = environment["accelerator"] or environment["processor"]
    teachers = results["teachers"]
    teacher = f"Teacher: top-1 {teachers[0]['top1']:.2f} %. " if len(teachers) == 1 else ""
    return (
        f"{teacher}`make results NAME={name}` on {device}, {environment['cores']} cores, "
        f"one thread a run, torch {environment['torch']}, commit {', '.join(results['commits'])}."
    )


def comparison(
    name: str, *, named: Callable[[str], str] = str, best_first: bool = False
) -> list[str]:
    """A comparison's table, as lines.

    Args:
        name: Its folder in results/.
        named: What a variant's name becomes in its row.
        best_first: Order the rows by top-1; else as they were given.
    """
    results = read_comparison(name)
    if results is None:
        return [f"Not run yet: `make results NAME={name}`."]
    variants = results["variants"]
    if best_first:
        variants = sorted(variants, key=lambda v: -v["scores"]["top1"]["mean"])
    return [
        "| | top-1 % | difference, 95 % interval | in words | NLL nats | ECE % | ECE % after "
        "temperature |",
        "| --- | ---: | ---: | --- | ---: | ---: | ---: |",
        *(f"| {' | '.join(row)} |" for row in comparison_rows(variants, named=named)),
    ]


def comparison_rows(
    variants: Sequence[Mapping[str, Any]], *, named: Callable[[str], str] = str
) -> list[tuple[str, ...]]:
    """The cells of variants: name, top-1, difference, in words, NLL, ECE, ECE after temperature.

    Args:
        variants: As comparison.json has them.
        named: What a variant's name becomes.
    """
    return [_row(variant, named(variant["name"])) for variant in variants]


def _row(variant: Mapping[str, Any], name: str) -> tuple[str, ...]:
    scores, against = variant["scores"], variant["against_baseline"].get("top1")
    difference, words = "baseline", ""
    if against is not None:
        difference, words = f"{against['mean']:+.2f}", against["in_words"]
        if against["t"] is not None:
            low, high = against["t"]
            difference += f" ({low:+.2f} to {high:+.2f})"
    return (
        name,
        _spread(scores["top1"]),
        difference,
        words,
        f"{scores['nll']['mean']:.3f}",
        f"{scores['ece']['mean']:.1f}",
        f"{scores['fitted_ece']['mean']:.1f}",
    )


def _spread(score: Mapping[str, float | None]) -> str:
    text = f"{score['mean']:.2f}"
    return text if score["deviation"] is None else f"{text} ± {score['deviation']:.2f}"
