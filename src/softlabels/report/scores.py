"""How scores are shown."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Score:
    """A score of an evaluation.

    Attributes:
        key: Its name in a run's files.
        heading: Its name on the page.
        unit: Its unit.
        better: `"higher"` or `"lower"`.
        digits: Decimal places.
        meaning: A sentence for who does not know it.
    """

    key: str
    heading: str
    unit: str
    better: str
    digits: int
    meaning: str = ""


SCORES = (
    Score("top1", "top-1", "%", "higher", 2),
    Score("top5", "top-5", "%", "higher", 2),
    Score(
        "group_top1",
        "group top-1",
        "%",
        "higher",
        2,
        "Group top-1: an answer in the true class's group counts as right.",
    ),
    Score("nll", "NLL", "nats", "lower", 4, "NLL: mean negative log-likelihood."),
    Score("ece", "ECE", "%", "lower", 2, "ECE: expected calibration error."),
)
"""All scores, in the order of the page."""

CURVE_SCORES = tuple(score for score in SCORES if score.key in ("top1", "nll", "ece"))
"""Those that are drawn over epochs."""
