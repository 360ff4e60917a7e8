"""What a method may read from the student, from inner layers of either network, and from a peer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

import torch
from torch import Tensor, nn

from softlabels.inputs.base import (
    Input,
    LogitsProvider,
    Provider,
    StudentInput,
    TeacherInput,
    Value,
)

if TYPE_CHECKING:
    from softlabels.taps import Layout, PositionHead, TapPoint

__all__ = ["AuxLogits", "Features", "Logits", "PeerLogits", "SecondPass", "Votes", "WeakLogits"]

_Form: TypeAlias = Literal["raw", "map", "pooled"]


@dataclass(frozen=True)
class Logits(StudentInput):
    """The student's logits, [B, C]."""

    def provider(self, layout: Callable[[], Layout]) -> Provider:
        """Provides the logits as they are."""
        return LogitsProvider()


@dataclass(frozen=True)
class WeakLogits(StudentInput):
    """Logits of a linear head on a pooled feature inside the student, [B, C].

    Attributes:
        tap: Where the feature is read: `"middle"`, `"last"`, or a dotted module path.
    """

    tap: str = "middle"

    def provider(self, layout: Callable[[], Layout]) -> Provider:
        """Finds the feature and makes the head."""
        found = layout()
        return _WeakLogitsProvider(found.point(self.tap), found.num_classes)


class _WeakLogitsProvider(Provider):
    """A linear head on the pooled feature, normalized first where the point says so.

    Default PyTorch initialization.
    """

    def __init__(self, point: TapPoint, num_classes: int) -> None:
        super().__init__([point])
        self.norm = nn.LayerNorm(point.channels) if point.layer_norm else nn.Identity()
        self.fc = nn.Linear(point.channels, num_classes)

    def forward(self, network: nn.Module, logits: Tensor, features: Mapping[str, Tensor]) -> Value:
        point = self.points[0]
        weak_logits: Tensor = self.fc(point.pooled(self.norm(features[point.key])))
        return weak_logits


@dataclass(frozen=True)
class Votes(StudentInput):
    """The class that the student's own head predicts at every position, [B, K], no gradient.

    Attributes:
        upsample: Factor by which the last map is enlarged before voting.
        mode: How it is enlarged.
    """

    upsample: int = 1
    mode: Literal["bilinear", "bicubic"] = "bilinear"

    def provider(self, layout: Callable[[], Layout]) -> Provider:
        """Finds the head."""
        return _VotesProvider(layout().head(), self)


class _VotesProvider(Provider):
    def __init__(self, head: PositionHead, kind: Votes) -> None:
        super().__init__([head.point])
        self.head = head
        self.kind = kind

    def forward(self, network: nn.Module, logits: Tensor, features: Mapping[str, Tensor]) -> Value:
        feature = features[self.head.point.key]
        return self.head.votes(network, feature, self.kind.upsample, self.kind.mode)

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


@dataclass(frozen=True)
class AuxLogits(StudentInput):
    """Linear heads of their own at inner places of the student: logits and votes of each in turn.

    A list of 2 tensors for each place: the head's logits of the pooled feature, [B, C], and the
    class that it predicts at every position, [B, K], without gradient.

    Attributes:
        taps: `"middle"`, `"last"`, or dotted module paths.
    """

    taps: tuple[str, ...] = ("middle",)

    def provider(self, layout: Callable[[], Layout]) -> Provider:
        """Finds the places and makes a head for each."""
        found = layout()
        return _AuxLogitsProvider([found.point(tap) for tap in self.taps], found.num_classes)


class _AuxLogitsProvider(Provider):
    """Default PyTorch initialization."""

    def __init__(self, points: Sequence[TapPoint], num_classes: int) -> None:
        super().__init__(points)
        self.fcs = nn.ModuleList(nn.Linear(point.channels, num_classes) for point in points)

    def forward(self, network: nn.Module, logits: Tensor, features: Mapping[str, Tensor]) -> Value:
        values: list[Tensor] = []
        for point, fc in zip(self.points, self.fcs, strict=True):
            feature = features[point.key]
            values.append(fc(point.pooled(feature)))
            with torch.no_grad():
                values.append(point.votes_of(point.as_map(feature.detach()), logits.shape[1], fc))
        return values


@dataclass(frozen=True)
class Features(StudentInput, TeacherInput):
    """Outputs of inner modules, a list of tensors in the order of `stages`, shallow to deep.

    Names of stages:

    * `"middle"`, `"last"`: as for the other inputs;
    * `"stage:K"`: the K-th resolution of a network with a pyramid of maps, its stem left out, or
      the K-th of four evenly spaced blocks of one without; `"stages"` stands for all of them;
    * `"block:K"`: the K-th block of the longest run of equal blocks, as in a vision transformer;
    * any other: a dotted module path.

    K counts from 0, or from the end if it is negative.

    Attributes:
        of: Which network they are read from.
        stages: Names of stages.
        form: `"raw"`: as the module returns them; `"map"`: [B, D, H, W], patch tokens on their
            grid; `"pooled"`: [B, D], the mean over positions, or the class token.
        before_activation: Read the map before the activation that ends the stage, where one does.
        teacher: Which of several teachers, for `of="teacher"`.
    """

    of: Literal["student", "teacher"] = "student"
    stages: tuple[str, ...] = ("last",)
    form: _Form = "raw"
    before_activation: bool = False
    teacher: int = 0

    @property
    def reads_teacher(self) -> bool:
        """Whether they come from a teacher."""
        return self.of == "teacher"

    def provider(self, layout: Callable[[], Layout]) -> Provider:
        """Finds the stages.

        Raises:
            ValueError: One is not there, or a map is asked for where there is no grid.
        """
        found = layout()
        find = found.before_activation if self.before_activation else found.point
        points = [find(stage) for stage in found.expanded(self.stages)]
        for point in points:
            if self.form == "map" and not point.has_grid:
                raise ValueError(
                    f"the method needs maps with rows and columns, but {point.path!r} of the "
                    f"{self.of} gives a feature of kind {point.kind!r} without a grid: name other "
                    "places in the method's settings, or a network with maps"
                )
        return _FeaturesProvider(points, self.form)


class _FeaturesProvider(Provider):
    def __init__(self, points: Sequence[TapPoint], form: _Form) -> None:
        super().__init__(points)
        self.form = form

    def forward(self, network: nn.Module, logits: Tensor, features: Mapping[str, Tensor]) -> Value:
        if self.form == "raw":
            return [features[point.key] for point in self.points]
        if self.form == "map":
            return [point.as_map(features[point.key]) for point in self.points]
        return [point.pooled(features[point.key]) for point in self.points]


@dataclass(frozen=True)
class SecondPass(StudentInput):
    """Another input from the student, from a further forward on other images of the batch.

    Learned parts are those of the same input on the batch's own images.

    Attributes:
        images: Name of the batch's extra with the images, [B, ...]: `"second_view"`, another draw
            of the augmentation; `"partner"`, another image of the same class; `"mixup"`, the
            batch's own images mixed (beside it `mixup_index`, [B], whom each image is mixed with,
            and `mixup_weight`, [B], its own share); or one that the caller provides.
        of: The input.
        gradient: Whether the forward is trained through.
    """

    images: str = "second_view"
    of: StudentInput = Logits()
    gradient: bool = True

    @property
    def extras(self) -> tuple[str, ...]:
        """The name of the images."""
        return (self.images,)

    def provider(self, layout: Callable[[], Layout]) -> Provider:
        """That of the input."""
        return self.of.provider(layout)


@dataclass(frozen=True)
class PeerLogits(Input):
    """Logits of the second network that is trained along with the student, [B, C]."""
