"""A model's own classifier, applied at every position of its last map."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, Protocol, cast, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional

from softlabels.taps.feature_tap import TapPoint, find_module

__all__ = ["PositionHead", "TwoHalves"]


@runtime_checkable
class TwoHalves(Protocol):
    """A timm model: `forward_head(forward_features(images))` are its logits."""

    def forward_features(self, x: Tensor) -> object:
        """Images to the last map or tokens."""

    def forward_head(self, x: Tensor) -> Tensor:
        """The last map or tokens to logits."""


@dataclass(frozen=True)
class PositionHead:
    """A model's own classifier, applied at every position of its last map.

    It holds no module, only paths: the model is passed in, so that a deep copy uses its own.

    Attributes:
        point: The last map or tokens.
        steps: Paths of the modules after it, each with the number of dimensions of its input;
            None: the model's own `forward_head`.
        activation: Whether the model applies a ReLU to the map that no module shows.
        mode_dependent: Paths of modules in the head that act otherwise in training mode.
        num_classes: Width of the logits, by which `votes` sizes its chunks.
    """

    point: TapPoint
    steps: tuple[tuple[str, int], ...] | None = None
    activation: bool = False
    mode_dependent: tuple[str, ...] = ()
    num_classes: int = 0

    def logits(self, model: nn.Module, positions: Tensor) -> Tensor:
        """Class logits of single positions, [n, D] -> [n, C]."""
        point = self.point
        if point.kind == "tokens":
            value = positions
        elif point.kind == "NHWC":
            value = positions[:, None, None]
        else:
            value = positions[:, :, None, None]
        if self.steps is None:
            if point.kind == "tokens":
                # As class token and as only patch: right for either way of pooling.
                value = positions[:, None].expand(-1, point.prefix_tokens + 1, -1)
            return cast("TwoHalves", model).forward_head(value)
        for path, input_dims in self.steps:
            module = find_module(model, path)
            if isinstance(module, nn.AvgPool2d | nn.MaxPool2d):
                continue  # already a single position
            if input_dims == 2:
                value = value.flatten(1)
            value = module(value)
        return value.flatten(1)

    def votes(
        self,
        model: nn.Module,
        feature: Tensor,
        upsample: int = 1,
        mode: Literal["bilinear", "bicubic"] = "bilinear",
    ) -> Tensor:
        """The class with the largest logit at each position, [B, K], without gradient.

        Args:
            model: The network that gave the feature; its head runs in eval mode.
            feature: Output of the module at `point`.
            upsample: Factor by which the map is enlarged first.
            mode: How.
        """
        with torch.no_grad(), _in_eval(model, self.mode_dependent):
            maps = self.point.as_map(feature.detach())
            if self.activation:
                maps = functional.relu(maps)
            if upsample > 1:
                maps = functional.interpolate(
                    maps, scale_factor=float(upsample), mode=mode, align_corners=False
                )
            return self.point.votes_of(
                maps, self.num_classes, lambda part: self.logits(model, part)
            )


@contextmanager
def _in_eval(model: nn.Module, paths: Sequence[str]) -> Iterator[None]:
    """Put just these modules into eval mode, not what is inside them."""
    changed = [module for path in paths if (module := find_module(model, path)).training]
    for module in changed:
        module.training = False
    try:
        yield
    finally:
        for module in changed:
            module.training = True
