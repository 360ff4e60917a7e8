"""Residual networks for 32x32 images, registered with timm.

The CIFAR family of He et al., "Deep Residual Learning for Image Recognition" (CVPR 2016), with
projection shortcuts, in the shapes that distillation papers compare on: `resnet8` to `resnet110`,
the wide `resnet8x4` and `resnet32x4`, and two smaller ones for the embedded glyphs.
Parameter names are those of RepDistiller's networks, so its checkpoints load as they are.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from timm.models import generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock
from torch import nn

from softlabels.models.zoo.small_network import (
    SmallNetwork,
    build,
    cifar_cfg,
    normal_weights,
    stage,
)

__all__ = ["SmallResNet"]


class SmallResNet(SmallNetwork):
    """A residual network of three stages for small images.

    A 3x3 convolution, three stages of basic blocks with strides 1, 2 and 2, global pooling and a
    linear classifier. A shortcut is a 1x1 convolution where the shape changes, else the identity.

    Args:
        depth: Number of layers with weights: 6n + 2, for n blocks a stage.
        stem_width: Channels after the first convolution.
        stage_widths: Channels of the three stages.
        stem_stride: Stride of the first convolution.
        in_chans: Channels of the images.
        **head: `num_classes`, `global_pool` and `drop_rate` of `SmallNetwork`.

    Raises:
        ValueError: If `depth` is not 6n + 2 with n at least 1.
    """

    def __init__(
        self,
        *,
        depth: int,
        stem_width: int = 16,
        stage_widths: tuple[int, int, int] = (16, 32, 64),
        stem_stride: int = 1,
        in_chans: int = 3,
        **head: Any,
    ) -> None:
        if depth < 8 or (depth - 2) % 6 != 0:
            raise ValueError(f"depth must be 6n + 2 (8, 14, 20, ...), got {depth}")
        make = partial(stage, _block, (depth - 2) // 6)
        first, second, third = stage_widths
        super().__init__(
            {
                "conv1": nn.Conv2d(
                    in_chans, stem_width, 3, stride=stem_stride, padding=1, bias=False
                ),
                "bn1": nn.BatchNorm2d(stem_width),
                "act1": nn.ReLU(inplace=True),
                "layer1": make(stem_width, first, 1),
                "layer2": make(first, second, 2),
                "layer3": make(second, third, 2),
            },
            [
                ("layer1", stem_stride, first),
                ("layer2", 2 * stem_stride, second),
                ("layer3", 4 * stem_stride, third),
            ],
            num_features=third,
            **head,
        )
        normal_weights(self)


def _block(in_width: int, width: int, stride: int) -> nn.Module:
    shortcut = None
    if stride != 1 or in_width != width:
        shortcut = nn.Sequential(
            nn.Conv2d(in_width, width, 1, stride=stride, bias=False), nn.BatchNorm2d(width)
        )
    block: nn.Module = BasicBlock(in_width, width, stride=stride, downsample=shortcut)
    return block


_CIFAR_CFG = cifar_cfg()
_GLYPHS_CFG = cifar_cfg(
    input_size=(1, 32, 32),
    pool_size=(4, 4),
    # Statistics of the clean training glyphs.
    mean=(0.0758,),
    std=(0.2384,),
)

default_cfgs = generate_default_cfgs(
    {
        "resnet8": _CIFAR_CFG,
        "resnet14": _CIFAR_CFG,
        "resnet20": _CIFAR_CFG,
        "resnet32": _CIFAR_CFG,
        "resnet44": _CIFAR_CFG,
        "resnet56": _CIFAR_CFG,
        "resnet110": _CIFAR_CFG,
        "resnet8x4": _CIFAR_CFG,
        "resnet32x4": _CIFAR_CFG,
        "resnet8_glyphs": _GLYPHS_CFG,
        "resnet14x4_glyphs": _GLYPHS_CFG,
    }
)


_build = partial(build, SmallResNet, num_stages=3)


@register_model
def resnet8(pretrained: bool = False, **settings: Any) -> SmallResNet:
    """ResNet-8: widths 16, 32 and 64."""
    return _build("resnet8", pretrained, settings, depth=8)


@register_model
def resnet14(pretrained: bool = False, **settings: Any) -> SmallResNet:
    """ResNet-14: widths 16, 32 and 64."""
    return _build("resnet14", pretrained, settings, depth=14)


@register_model
def resnet20(pretrained: bool = False, **settings: Any) -> SmallResNet:
    """ResNet-20: widths 16, 32 and 64."""
    return _build("resnet20", pretrained, settings, depth=20)


@register_model
def resnet32(pretrained: bool = False, **settings: Any) -> SmallResNet:
    """ResNet-32: widths 16, 32 and 64."""
    return _build("resnet32", pretrained, settings, depth=32)


@register_model
def resnet44(pretrained: bool = False, **settings: Any) -> SmallResNet:
    """ResNet-44: widths 16, 32 and 64."""
    return _build("resnet44", pretrained, settings, depth=44)


@register_model
def resnet56(pretrained: bool = False, **settings: Any) -> SmallResNet:
    """ResNet-56: widths 16, 32 and 64."""
    return _build("resnet56", pretrained, settings, depth=56)


@register_model
def resnet110(pretrained: bool = False, **settings: Any) -> SmallResNet:
    """ResNet-110: widths 16, 32 and 64."""
    return _build("resnet110", pretrained, settings, depth=110)


@register_model
def resnet8x4(pretrained: bool = False, **settings: Any) -> SmallResNet:
    """ResNet-8, four times as wide, with a stem of 32 channels."""
    return _build(
        "resnet8x4", pretrained, settings, depth=8, stem_width=32, stage_widths=(64, 128, 256)
    )


@register_model
def resnet32x4(pretrained: bool = False, **settings: Any) -> SmallResNet:
    """ResNet-32, four times as wide, with a stem of 32 channels."""
    return _build(
        "resnet32x4", pretrained, settings, depth=32, stem_width=32, stage_widths=(64, 128, 256)
    )


@register_model
def resnet8_glyphs(pretrained: bool = False, **settings: Any) -> SmallResNet:
    """ResNet-8 for the glyphs: widths 8, 16 and 32, at half the resolution."""
    return _build(
        "resnet8_glyphs",
        pretrained,
        settings,
        depth=8,
        stem_width=8,
        stage_widths=(8, 16, 32),
        stem_stride=2,
    )


@register_model
def resnet14x4_glyphs(pretrained: bool = False, **settings: Any) -> SmallResNet:
    """ResNet-14, four times as wide as `resnet8_glyphs`: the glyphs' teacher."""
    return _build(
        "resnet14x4_glyphs",
        pretrained,
        settings,
        depth=14,
        stem_width=32,
        stage_widths=(32, 64, 128),
        stem_stride=2,
    )
