"""What a method may read from a teacher."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from softlabels.inputs.base import LogitsProvider, Provider, TeacherInput, Value

if TYPE_CHECKING:
    from softlabels.distill import Teacher
    from softlabels.taps import Layout

__all__ = ["Classifier", "NormParameters", "TeacherLogits"]


@dataclass(frozen=True)
class TeacherLogits(TeacherInput):
    """The teacher's logits, [B, C], without gradient, in the student's class order.

    Attributes:
        teacher: Which of several teachers; None: all of them together, as the logarithm of their
            mean prediction.
    """

    teacher: int | None = None

    def provider(self, layout: Callable[[], Layout]) -> Provider:
        """Provides the logits as they are."""
        return LogitsProvider()


@dataclass(frozen=True)
class NormParameters(TeacherInput):
    """Scale and shift of the BatchNorm that a teacher's stage comes out of, a list of [2, D].

    Row 0 is the BatchNorm's weight, row 1 its bias; one tensor for each stage, without gradient.

    Attributes:
        stages: As of `Features`.
        teacher: Which of several teachers.
    """

    stages: tuple[str, ...] = ("stages",)
    teacher: int = 0

    def provider(self, layout: Callable[[], Layout]) -> Provider:
        """Finds the BatchNorms."""
        found = layout()
        return _NormProvider([found.norm(stage) for stage in found.expanded(self.stages)])


class _NormProvider(Provider):
    def __init__(self, norms: Sequence[nn.BatchNorm2d]) -> None:
        super().__init__()
        self.norms = norms

    def forward(self, network: nn.Module, logits: Tensor, features: Mapping[str, Tensor]) -> Value:
        return [torch.stack([norm.weight.detach(), norm.bias.detach()]) for norm in self.norms]


@dataclass(frozen=True)
class Classifier(TeacherInput):
    """The teacher's last linear layer on its pooled feature: a list of weight [C, D] and bias [C].

    Without gradient, rows in the student's class order.

    Attributes:
        teacher: Which of several teachers.
    """

    teacher: int = 0

    def provider(self, layout: Callable[[], Layout]) -> Provider:
        """Finds the layer."""
        return _ClassifierProvider(layout().classifier())


class _ClassifierProvider(Provider):
    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, network: nn.Module, logits: Tensor, features: Mapping[str, Tensor]) -> Value:
        layer, teacher = self.layer, cast("Teacher", network)
        weight = layer.weight.detach()
        bias = weight.new_zeros(len(weight)) if layer.bias is None else layer.bias.detach()
        if teacher.maps_classes:
            weight, bias = weight[teacher.class_index], bias[teacher.class_index]
        return [weight, bias]
