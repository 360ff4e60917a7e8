"""The bases of what a method may read, and of what provides it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from torch import Tensor, nn

if TYPE_CHECKING:
    from softlabels.taps import Layout, TapPoint

__all__ = [
    "BatchInput",
    "Input",
    "LogitsProvider",
    "NetworkInput",
    "Provider",
    "StudentInput",
    "TeacherInput",
    "Value",
]

Value: TypeAlias = "Tensor | list[Tensor]"


class Provider(nn.Module):
    """Gives the value of an input in each forward of the network that it is read from.

    Attributes:
        points: Where it reads features.
    """

    def __init__(self, points: Sequence[TapPoint] = ()) -> None:
        super().__init__()
        self.points = tuple(points)

    def forward(self, network: nn.Module, logits: Tensor, features: Mapping[str, Tensor]) -> Value:
        """The value.

        Args:
            network: The student, or a `softlabels.Teacher`.
            logits: Its logits, [B, C].
            features: What it gave at each of `points`, by the point's `key`.
        """
        raise NotImplementedError

    def monitored(self, value: Value, logits: Tensor) -> dict[str, Tensor]:
        """Scalars about a value of the student that are worth a log line, without gradient."""
        return {}


class LogitsProvider(Provider):
    """Provides the network's logits."""

    def forward(self, network: nn.Module, logits: Tensor, features: Mapping[str, Tensor]) -> Value:
        """The logits as they are."""
        return logits


@dataclass(frozen=True)
class Input:
    """Base of all inputs: one kind of tensor that a method's `terms` may ask for."""

    @property
    def reads_teacher(self) -> bool:
        """Whether it comes from a teacher."""
        return False

    @property
    def extras(self) -> tuple[str, ...]:
        """Names of what the batch must bring for it, besides images and labels."""
        return ()


class NetworkInput(Input):
    """Base of `StudentInput` and `TeacherInput`."""

    def provider(self, layout: Callable[[], Layout]) -> Provider:
        """What provides it.

        Args:
            layout: Gives the network's layout, by a dry run; called only if the input needs it.

        Raises:
            ValueError: The network has no such layer.
        """
        raise NotImplementedError


class StudentInput(NetworkInput):
    """Base of the inputs from the student; parameters of the provider are trained with it."""


class TeacherInput(NetworkInput):
    """Base of the inputs from a teacher, without gradient, and without parameters of their own."""

    @property
    def reads_teacher(self) -> bool:
        """Whether it comes from a teacher."""
        return True

    @property
    def teacher(self) -> int | None:
        """Which of several teachers; None: all of them, whose logits alone can be read then."""
        return 0


class BatchInput(Input):
    """Base of the inputs from the batch."""

    def read(self, target: Tensor, extras: Mapping[str, Tensor]) -> Value:
        """The value, from the batch's labels and what it brings besides, by name, on their device.

        All of `extras` is there.
        """
        raise NotImplementedError
