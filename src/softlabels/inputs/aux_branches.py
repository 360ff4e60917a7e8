"""Exits of the student with layers and a classifier of their own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from torch import Tensor, nn
from torch.nn import functional

from softlabels.inputs.base import Provider, StudentInput, Value

if TYPE_CHECKING:
    from softlabels.taps import Layout, TapPoint

__all__ = ["AuxBranches", "AuxBranchesProvider", "Branch"]

_WIDENING = 2  # hidden width of a token block over the width that it gives


@dataclass(frozen=True)
class AuxBranches(StudentInput):
    """Exits of the student with layers and a classifier of their own, shallow to deep.

    A list of 2 E tensors: first the logits of the E exits, [B, C] each, then their maps before
    pooling, all of the last map's shape [B, D, H, W]. All are learned with the student.

    Attributes:
        stages: Where the exits begin, as of `Features`; a place that is the last map is left out.
    """

    stages: tuple[str, ...] = ("stages",)

    def provider(self, layout: Callable[[], Layout]) -> Provider:
        """Finds the places and makes a `Branch` at each."""
        found = layout()
        points = [found.point(stage) for stage in found.expanded(self.stages)]
        last = found.point("last")
        if last.kind == "tokens" and self.stages == ("stages",):
            points = points[:-1]  # the last block, which the final norm alone parts from the end
        return AuxBranchesProvider(points, last, found.num_classes)


class _TokenBlock(nn.Module):
    """A pre-norm MLP on the channels of [B, D, H, W], each position by itself.

    Added to its input where the widths are the same.
    """

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(in_channels)
        self.fc1 = nn.Linear(in_channels, _WIDENING * channels)
        self.fc2 = nn.Linear(_WIDENING * channels, channels)
        self.residual = in_channels == channels

    def forward(self, feature: Tensor) -> Tensor:
        positions = feature.permute(0, 2, 3, 1)
        hidden: Tensor = self.fc2(functional.gelu(self.fc1(self.norm(positions))))
        return (positions + hidden if self.residual else hidden).permute(0, 3, 1, 2)


class Branch(nn.Module):
    """One exit: layers from a place of the student to a map like the last one, and a classifier.

    On a map: 3x3 convolutions with BatchNorm and ReLU, one for each halving on the way to the last
    map's size and at least one; each doubles the channels, and the last one gives those of the
    last map. A size that halving does not reach is made by adaptive average pooling. On tokens
    (vision transformers): a pre-norm MLP with a residual, where the grid stays as it is. The
    classifier is linear, on the mean over positions. Default PyTorch initialization.

    Args:
        point: Where the exit begins.
        last: The last map.
        num_classes: Width of the logits.
    """

    def __init__(self, point: TapPoint, last: TapPoint, num_classes: int) -> None:
        super().__init__()
        size, wanted = (point.height, point.width), (last.height, last.width)
        blocks: list[nn.Module]
        if point.kind in ("tokens", "vector") and size == wanted:
            blocks = [_TokenBlock(point.channels, last.channels)]
        else:
            blocks, size = _convolutions(point, last)
        if size != wanted:
            blocks.append(nn.AdaptiveAvgPool2d(wanted))
        self.blocks = nn.Sequential(*blocks)
        self.fc = nn.Linear(last.channels, num_classes)

    def forward(self, feature: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [B, C] and the map before pooling [B, D, H, W], of the place's map."""
        reached = self.blocks(feature)
        return self.fc(reached.mean((2, 3))), reached


def _convolutions(point: TapPoint, last: TapPoint) -> tuple[list[nn.Module], tuple[int, int]]:
    """Blocks from one map to the channels of another, and the size that they reach."""
    height, width = point.height, point.width
    strides: list[tuple[int, int]] = []
    while (stride := (_stride(height, last.height), _stride(width, last.width))) != (1, 1):
        strides.append(stride)
        height, width = _after(height, stride[0]), _after(width, stride[1])
    strides = strides or [(1, 1)]
    blocks: list[nn.Module] = []
    channels = point.channels
    for number, stride in enumerate(strides, start=1):
        doubled = min(2 * channels, last.channels) if number < len(strides) else last.channels
        blocks.append(
            nn.Sequential(
                nn.Conv2d(channels, doubled, 3, stride=stride, padding=1, bias=False),
                nn.BatchNorm2d(doubled),
                nn.ReLU(),
            )
        )
        channels = doubled
    return blocks, (height, width)


def _stride(size: int, wanted: int) -> int:
    """2 while a halving does not go below the size that is wanted."""
    return 2 if size > wanted and _after(size, 2) >= wanted else 1


def _after(size: int, stride: int) -> int:
    return -(-size // stride)


class AuxBranchesProvider(Provider):
    """Provides `AuxBranches`: a `Branch` at each place, shallow to deep, that is not the last map.

    Raises:
        ValueError: No place is left.
    """

    def __init__(self, points: Sequence[TapPoint], last: TapPoint, num_classes: int) -> None:
        super().__init__([point for point in points if point.path != last.path])
        if not self.points:
            raise ValueError(
                f"exits need a place before the last map ({last.path!r}), got "
                f"{', '.join(repr(point.path) for point in points) or 'none'}: name places with "
                "stages=('path.of.module', ...)"
            )
        self.branches = nn.ModuleList(Branch(point, last, num_classes) for point in self.points)

    def forward(self, network: nn.Module, logits: Tensor, features: Mapping[str, Tensor]) -> Value:
        """Logits of the exits, [B, C] each, shallow to deep; then their maps [B, D, H, W]."""
        reached = [
            cast("tuple[Tensor, Tensor]", branch(point.as_map(features[point.key])))
            for point, branch in zip(self.points, self.branches, strict=True)
        ]
        return [of_exit for of_exit, _ in reached] + [of_map for _, of_map in reached]
