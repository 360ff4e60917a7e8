"""What a method reads from the student, and who provides it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from softlabels.distill.aux_heads import AuxBranchesProvider
from softlabels.distill.provider import Provider, Value
from softlabels.distill.tap_points import Form, in_form, points_of
from softlabels.inputs import (
    AuxBranches,
    AuxLogits,
    Features,
    Input,
    Logits,
    SecondPass,
    Votes,
    WeakLogits,
)
from softlabels.taps import Layout, PositionHead, TapPoint, votes_of

__all__ = ["provider_for"]


class _LogitsProvider(Provider):
    def forward(self, student: nn.Module, logits: Tensor, features: Mapping[str, Tensor]) -> Value:
        return logits


class _WeakLogitsProvider(Provider):
    """A linear head on the pooled feature, normalized first where the point says so.

    Default PyTorch initialization.
    """

    def __init__(self, point: TapPoint, num_classes: int) -> None:
        super().__init__([point])
        self.norm = nn.LayerNorm(point.channels) if point.layer_norm else nn.Identity()
        self.fc = nn.Linear(point.channels, num_classes)

    def forward(self, student: nn.Module, logits: Tensor, features: Mapping[str, Tensor]) -> Value:
        point = self.points[0]
        weak_logits: Tensor = self.fc(point.pooled(self.norm(features[point.key])))
        return weak_logits


class _VotesProvider(Provider):
    def __init__(self, head: PositionHead, kind: Votes) -> None:
        super().__init__([head.point])
        self.head = head
        self.kind = kind

    def forward(self, student: nn.Module, logits: Tensor, features: Mapping[str, Tensor]) -> Value:
        feature = features[self.head.point.key]
        return self.head.votes(student, feature, self.kind.upsample, self.kind.mode)

    def monitored(self, value: Value, logits: Tensor) -> dict[str, Tensor]:
        """Share of samples whose majority vote is their prediction.

        Only where a class token predicts: no task loss trains the patch tokens then, and the
        votes may mean nothing.
        """
        if not self.head.point.class_token or not isinstance(value, Tensor):
            return {}
        counts = torch.zeros_like(logits).scatter_add(
            1, value, torch.ones_like(value, dtype=logits.dtype)
        )
        agrees = counts.argmax(1) == logits.argmax(1)
        return {"votes_agree": agrees.float().mean()}


class _AuxLogitsProvider(Provider):
    """A linear head at each place: logits of the pooled feature, and votes of its positions."""

    def __init__(self, points: Sequence[TapPoint], num_classes: int) -> None:
        super().__init__(points)
        self.fcs = nn.ModuleList(nn.Linear(point.channels, num_classes) for point in points)

    def forward(self, student: nn.Module, logits: Tensor, features: Mapping[str, Tensor]) -> Value:
        values: list[Tensor] = []
        for point, fc in zip(self.points, self.fcs, strict=True):
            feature = features[point.key]
            values.append(fc(point.pooled(feature)))
            with torch.no_grad():
                values.append(votes_of(point.as_map(feature.detach()), logits.shape[1], fc))
        return values


class _FeaturesProvider(Provider):
    def __init__(self, points: Sequence[TapPoint], form: Form) -> None:
        super().__init__(points)
        self.form = form

    def forward(self, student: nn.Module, logits: Tensor, features: Mapping[str, Tensor]) -> Value:
        return [in_form(point, features[point.key], self.form) for point in self.points]


def provider_for(kind: Input, layout: Callable[[], Layout]) -> Provider | None:
    """The provider of an input from the student; None for one that comes from outside.

    Args:
        kind: What a method reads.
        layout: Gives the student's layout; called only if the input needs it.

    Raises:
        ValueError: The student has no such layer.
    """
    if isinstance(kind, Logits):
        return _LogitsProvider()
    if isinstance(kind, WeakLogits):
        found = layout()
        return _WeakLogitsProvider(found.point(kind.tap), found.num_classes)
    if isinstance(kind, Votes):
        return _VotesProvider(layout().head(), kind)
    if isinstance(kind, AuxLogits):
        found = layout()
        return _AuxLogitsProvider([found.point(tap) for tap in kind.taps], found.num_classes)
    if isinstance(kind, AuxBranches):
        found = layout()
        points = [found.point(stage) for stage in found.expanded(kind.stages)]
        last = found.point("last")
        if last.kind == "tokens" and kind.stages == ("stages",):
            points = points[:-1]  # the last block, which the final norm alone parts from the end
        return AuxBranchesProvider(points, last, found.num_classes)
    if isinstance(kind, Features) and kind.of == "student":
        return _FeaturesProvider(points_of(kind, layout()), kind.form)
    if isinstance(kind, SecondPass):
        return provider_for(kind.of, layout)
    return None
