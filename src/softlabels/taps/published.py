"""Where the published USKD runs read their middle feature, for the networks that they had."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

__all__ = ["PublishedTap", "published_tap"]


@dataclass(frozen=True)
class PublishedTap:
    """The place of the middle feature in the published runs of one family of networks.

    Attributes:
        family: The networks of these runs.
        place: The place, in words.
        timm: Pattern of timm's architecture names.
        torchvision: Class of torchvision's models.
        timm_path: Path in timm's model, where the general rule finds another place.
        torchvision_path: Likewise in torchvision's.
        layer_norm: Whether those runs put a LayerNorm of their own on it before the mean.
    """

    family: str
    place: str
    timm: str | None = None
    torchvision: str | None = None
    timm_path: str | None = None
    torchvision_path: str | None = None
    layer_norm: bool = False


_STAGE = "stage 2, counted from 0: the last but one"
_BEFORE_LAST_CONVOLUTION = (
    "the last block before the final 1x1 convolution, already at the final resolution"
)

# yzd-v/cls_KD, its configs and backbones. Its ShuffleNetV2 config has a width of 484, which cannot
# run: the stage has 464 channels.
_PUBLISHED = (
    PublishedTap("ResNet", _STAGE, r"resnet(18|50|101)", "ResNet"),
    PublishedTap("MobileNet", "the end of the 512-channel part", r"mobilenetv1_\d+"),
    PublishedTap(
        "MobileNetV2",
        _BEFORE_LAST_CONVOLUTION,
        r"mobilenetv2_\d+d?",
        "MobileNetV2",
        timm_path="blocks.6",
        torchvision_path="features.17",
    ),
    PublishedTap(
        "ShuffleNetV2",
        _BEFORE_LAST_CONVOLUTION,
        torchvision="ShuffleNetV2",
        torchvision_path="stage4",
    ),
    PublishedTap("RegNetX", _STAGE, r"regnetx_\d+", "RegNet"),
    PublishedTap(
        "Swin",
        _STAGE,
        r"swin_tiny_\w+",
        "SwinTransformer",
        layer_norm=True,
    ),
    PublishedTap("DeiT", "the class token after half of the blocks", r"deit_(tiny|small)_\w+"),
)


def published_tap(model: nn.Module) -> tuple[PublishedTap, str | None] | None:
    """The published place for a model, with its path where the general rule finds another.

    None for a network without a published run.
    """
    config = getattr(model, "pretrained_cfg", None)
    architecture = config.get("architecture") if isinstance(config, Mapping) else None
    is_torchvision = type(model).__module__.startswith("torchvision.models")
    for tap in _PUBLISHED:
        if tap.timm and architecture and re.fullmatch(tap.timm, str(architecture)):
            return tap, tap.timm_path
        if is_torchvision and type(model).__name__ == tap.torchvision:
            return tap, tap.torchvision_path
    return None
