"""What a method may read from the batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from softlabels.inputs.base import BatchInput, Value

__all__ = ["FromBatch", "Target"]


@dataclass(frozen=True)
class Target(BatchInput):
    """The batch's labels: [B] class indices or [B, C] probabilities, never smoothed."""

    def read(self, target: Tensor, extras: Mapping[str, Tensor]) -> Value:
        """The labels as they came."""
        return target


@dataclass(frozen=True)
class FromBatch(BatchInput):
    """An extra tensor that the caller passes with the batch, by name.

    Attributes:
        name: The keyword, as in `distiller(images, target, index=...)`.
    """

    name: str = "index"

    @property
    def extras(self) -> tuple[str, ...]:
        """The name."""
        return (self.name,)

    def read(self, target: Tensor, extras: Mapping[str, Tensor]) -> Value:
        """The tensor."""
        return extras[self.name]
