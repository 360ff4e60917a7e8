"""How the scores of an evaluation are called and shown, wherever they are."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["SCORES", "Score"]


@dataclass(frozen=True)
class Score:
    """A score of an evaluation.

    Attributes:
        key: Its name in a run's files.
        heading: Its name for a reader.
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

    @property
    def column(self) -> str:
        """The heading with the unit, as `NLL nats`."""
        return f"{self.heading} {self.unit}".strip()


_GROUP_TOP1 = "Group top-1: an answer in the true class's group counts as right."
SCORES = {
    score.key: score
    for score in (
        Score("top1", "top-1", "%", "higher", 2),
        Score("top5", "top-5", "%", "higher", 2),
        Score("group_top1", "group top-1", "%", "higher", 2, _GROUP_TOP1),
        Score("nll", "NLL", "nats", "lower", 4, "NLL: mean negative log-likelihood."),
        Score("ece", "ECE", "%", "lower", 2, "ECE: expected calibration error."),
    )
}
"""All scores by key, in the order of a page."""
