"""The branch of FRSKD: maps of all stages, refined in two passes across them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from softlabels.losses._features import Values, tensors_of

__all__ = ["FRSKDAdapters"]

_EPSILON = 1e-6  # beside the sum of a fusion's weights


def _lateral(in_channels: int, channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, channels, 1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()
    )


def _separable(channels: int, depth: int) -> nn.Sequential:
    """Depthwise and pointwise convolutions, with BatchNorm and ReLU."""
    layers: list[nn.Module] = []
    for _ in range(depth):
        layers += [
            nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False),
            nn.Conv2d(channels, channels, 1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
        ]
    return nn.Sequential(*layers)


class _Fusion(nn.Module):
    """A mean of maps with learned weights that are not negative, and a block on it."""

    def __init__(self, num_maps: int, channels: int, depth: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(num_maps))
        self.block = _separable(channels, depth)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        weights = self.weight.relu()
        shares = (weights / (weights.sum() + _EPSILON)).unbind()
        mean = shares[0] * maps[0]
        for share, feature in zip(shares[1:], maps[1:], strict=True):
            mean = mean + share * feature
        return cast("Tensor", self.block(mean))


class FRSKDAdapters(nn.Module):
    """A bidirectional feature pyramid with a linear classifier on its deepest map.

    A pass from the deepest map to the shallowest is followed by one back; on both ways each map is
    fused with its neighbor's by learned weights and depthwise separable convolutions. Maps keep
    their sizes, which may be any. Default PyTorch initialization.

    Args:
        widths: Channels of the network's maps, shallow to deep.
        num_classes: Width of the logits.
        width: Factor by which the branch's maps are wider.
        depth: Separable convolutions in each block.
    """

    def __init__(
        self, widths: Sequence[int], num_classes: int, *, width: int = 2, depth: int = 2
    ) -> None:
        super().__init__()
        wide = [width * channels for channels in widths]
        pairs = [*pairwise(wide)]
        self.lateral = nn.ModuleList(map(_lateral, widths, wide))
        self.skip = nn.ModuleList(map(_lateral, widths[1:], wide[1:]))
        # Entry l is between levels l and l + 1.
        self.from_deep = nn.ModuleList(_lateral(deep, shallow) for shallow, deep in pairs)
        self.from_shallow = nn.ModuleList(_lateral(shallow, deep) for shallow, deep in pairs)
        self.inward = nn.ModuleList(_Fusion(2, channels, depth) for channels in wide[:-1])
        self.outward = nn.ModuleList(
            _Fusion(3 if level < len(wide) - 1 else 2, channels, depth)
            for level, channels in enumerate(wide[1:], start=1)
        )
        self.fc = nn.Linear(wide[-1], num_classes)

    def forward(self, values: Values) -> dict[str, Tensor | list[Tensor]]:
        """`branch_logits` and `branch_maps`, as `FRSKDLoss.terms` takes them."""
        maps = tensors_of(values, "maps")
        inner = [lateral(feature) for lateral, feature in zip(self.lateral, maps, strict=True)]
        for level in range(len(inner) - 2, -1, -1):
            # Before it is enlarged, which gives the same and costs less.
            deeper = self.from_deep[level](inner[level + 1])
            enlarged = functional.interpolate(deeper, inner[level].shape[2:])
            inner[level] = self.inward[level]([inner[level], enlarged])
        refined = inner[:1]
        for level in range(1, len(inner)):
            fused = [self.skip[level - 1](maps[level])]
            if level < len(inner) - 1:
                fused.append(inner[level])
            smaller = _shrunk(refined[-1], inner[level].shape[2:])
            fused.append(self.from_shallow[level - 1](smaller))
            refined.append(self.outward[level - 1](fused))
        return {"branch_logits": self.fc(refined[-1].mean((2, 3))), "branch_maps": refined}


def _shrunk(feature: Tensor, size: torch.Size) -> Tensor:
    """A map that is not negative, max-pooled to a size: 3x3 windows where that is the half."""
    if feature.shape[2:] == size:
        return feature
    if all(-(-old // 2) == new for old, new in zip(feature.shape[2:], size, strict=True)):
        over = [2 * new + 1 - old for old, new in zip(feature.shape[2:], size, strict=True)]
        before = [extra // 2 for extra in over]
        left, right, top, bottom = before[1], over[1] - before[1], before[0], over[0] - before[0]
        return functional.max_pool2d(functional.pad(feature, (left, right, top, bottom)), 3, 2)
    return functional.adaptive_max_pool2d(feature, [*size])
