"""Residual networks of pre-activation blocks for 32x32 images, registered with timm.

`wrn_16_2`, `wrn_40_1` and `wrn_40_2` are the Wide ResNets (Zagoruyko and Komodakis, BMVC 2016) that
distillation papers compare on, as RepDistiller writes them. `preact_resnet18_cifar` is the
ResNet-18 of the runs of Zipf's label smoothing on CIFAR-100 and TinyImageNet.
"""

from __future__ import annotations

from typing import Any

from timm.layers import BatchNormAct2d, create_conv2d
from timm.models.resnetv2 import DownsampleConv, PreActBasic
from torch import nn

from softlabels.models.zoo.small_network import (
    SmallNetwork,
    cifar_cfg,
    normal_weights,
    register,
    stages,
)

__all__ = ["PreActResNet", "WideResNet"]


class WideResNet(SmallNetwork):
    """A Wide ResNet: three stages of pre-activation blocks, then batch norm and ReLU.

    Args:
        depth: Number of layers with weights: 6n + 4, for n blocks a stage.
        width_factor: How many times as wide as 16, 32 and 64 channels the stages are.
        in_chans: Channels of the images.
        **head: `num_classes`, `global_pool` and `drop_rate` of `SmallNetwork`.

    Raises:
        ValueError: If `depth` is not 6n + 4 with n at least 1.
    """

    def __init__(self, *, depth: int, width_factor: int, in_chans: int = 3, **head: Any) -> None:
        if depth < 10 or (depth - 4) % 6 != 0:
            raise ValueError(f"depth must be 6n + 4 (10, 16, 22, ...), got {depth}")
        depths = [(depth - 4) // 6] * 3
        widths = [width * width_factor for width in (16, 32, 64)]
        stem = nn.Conv2d(in_chans, 16, 3, padding=1, bias=False)
        layers, described = stages(_block, 16, zip(depths, widths, (1, 2, 2), strict=True))
        norm = BatchNormAct2d(widths[-1])
        chain = {"conv1": stem, **layers, "norm": norm}
        super().__init__(chain, described, num_features=widths[-1], **head)
        normal_weights(self)
        if isinstance(self.fc, nn.Linear):
            nn.init.zeros_(self.fc.bias)


class PreActResNet(SmallNetwork):
    """The pre-activation ResNet of the code of Zipf's label smoothing (`CIFAR_ResNet18`).

    It differs from that of He et al., "Identity Mappings in Deep Residual Networks" (ECCV 2016):
    every shortcut starts after a block's first batch norm and ReLU, the identity too; the first
    convolution has batch norm and ReLU; and none come before the pooling. Weights start as
    PyTorch's do.

    Args:
        num_blocks: Blocks in each of the four stages, of 64, 128, 256 and 512 channels.
        in_chans: Channels of the images.
        **head: `num_classes`, `global_pool` and `drop_rate` of `SmallNetwork`.
    """

    def __init__(self, *, num_blocks: int, in_chans: int = 3, **head: Any) -> None:
        stem = nn.Conv2d(in_chans, 64, 3, padding=1, bias=False)
        shapes = [(num_blocks, 64, 1), *((num_blocks, width, 2) for width in (128, 256, 512))]
        layers, described = stages(_activated_block, 64, shapes)
        chain = {"conv1": stem, "norm1": BatchNormAct2d(64), **layers}
        super().__init__(chain, described, num_features=512, **head)


def _block(in_width: int, width: int, stride: int) -> PreActBasic:
    return PreActBasic(
        in_width,
        width,
        stride=stride,
        conv_layer=create_conv2d,
        norm_layer=BatchNormAct2d,
        proj_layer=DownsampleConv,
    )


def _activated_block(in_width: int, width: int, stride: int) -> PreActBasic:
    block = _block(in_width, width, stride)
    if block.downsample is None:
        block.downsample = nn.Identity()  # timm's block gives it what is normalized and rectified
    return block


_WIDE = {
    "wrn_16_2": {"depth": 16, "width_factor": 2},
    "wrn_40_1": {"depth": 40, "width_factor": 1},
    "wrn_40_2": {"depth": 40, "width_factor": 2},
}

register(WideResNet, _WIDE, cifar_cfg(), num_stages=3)
register(
    PreActResNet,
    {"preact_resnet18_cifar": {"num_blocks": 2}},
    cifar_cfg(pool_size=(4, 4)),
    num_stages=4,
)
