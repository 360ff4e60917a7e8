"""The base of what provides an input from the student."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

from torch import Tensor, nn

from softlabels.taps import TapPoint

__all__ = ["Provider", "Value"]

Value: TypeAlias = "Tensor | list[Tensor]"


class Provider(nn.Module):
    """Provides one input from the student inside the trained module's forward.

    Attributes:
        points: Where it reads features.
    """

    def __init__(self, points: Sequence[TapPoint] = ()) -> None:
        super().__init__()
        self.points = tuple(points)

    def forward(self, student: nn.Module, logits: Tensor, features: Mapping[str, Tensor]) -> Value:
        """The input's value, from the student's logits and its tapped features by path."""
        raise NotImplementedError

    def monitored(self, value: Value, logits: Tensor) -> dict[str, Tensor]:
        """Scalars about the value that are worth a log line, without gradient."""
        return {}
