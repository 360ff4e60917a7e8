"""ShuffleNets for 32x32 images, registered with timm: `shufflenetv1_cifar`, `shufflenetv2_cifar`.

The shapes of RepDistiller's `ShuffleV1` and `ShuffleV2`, which distillation papers compare on: a
1x1 convolution to 24 channels at full resolution, no pooling after it, and three stages that begin
with stride 2. Weights start as PyTorch's do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torchvision.models.shufflenetv2 import InvertedResidual, channel_shuffle

from softlabels.models.zoo.small_network import SmallNetwork, cifar_cfg, register, stages

__all__ = ["SmallShuffleNet"]

_STEM_WIDTH = 24
_GROUPS = 3


class SmallShuffleNet(SmallNetwork):
    """A ShuffleNet of 4, 8 and 4 blocks for small images.

    Args:
        block: Makes a block from its channels in, its channels out and its stride.
        stage_widths: Channels of the three stages.
        last_width: Channels of a 1x1 convolution before the pooling. None: there is none.
        in_chans: Channels of the images.
        **head: `num_classes`, `global_pool` and `drop_rate` of `SmallNetwork`.
    """

    def __init__(
        self,
        *,
        block: Callable[[int, int, int], nn.Module],
        stage_widths: tuple[int, int, int],
        last_width: int | None = None,
        in_chans: int = 3,
        **head: Any,
    ) -> None:
        chain = {
            "conv1": nn.Conv2d(in_chans, _STEM_WIDTH, 1, bias=False),
            "norm1": BatchNormAct2d(_STEM_WIDTH),
        }
        shapes = zip((4, 8, 4), stage_widths, (2, 2, 2), strict=True)
        layers, described = stages(block, _STEM_WIDTH, shapes)
        chain.update(layers)
        third = stage_widths[-1]
        if last_width is not None:
            chain["conv2"] = nn.Conv2d(third, last_width, 1, bias=False)
            chain["norm2"] = BatchNormAct2d(last_width)
        super().__init__(chain, described, num_features=last_width or third, **head)


class _GroupedBlock(nn.Module):
    """A block of ShuffleNet, with one more ReLU after its depthwise convolution.

    At stride 2 its input is pooled and joined to the channels that it computes.
    """

    def __init__(self, in_width: int, width: int, stride: int) -> None:
        super().__init__()
        computed = width - in_width if stride == 2 else width
        inner = computed // 4
        # The stem is too narrow for groups.
        self.first_groups = 1 if in_width == _STEM_WIDTH else _GROUPS
        self.reduce = nn.Sequential(
            nn.Conv2d(in_width, inner, 1, groups=self.first_groups, bias=False),
            BatchNormAct2d(inner),
        )
        self.expand = nn.Sequential(
            nn.Conv2d(inner, inner, 3, stride=stride, padding=1, groups=inner, bias=False),
            BatchNormAct2d(inner),
            nn.Conv2d(inner, computed, 1, groups=_GROUPS, bias=False),
            nn.BatchNorm2d(computed),
        )
        self.pool = nn.AvgPool2d(3, stride=2, padding=1) if stride == 2 else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.expand(channel_shuffle(self.reduce(x), self.first_groups))
        return (x + y if self.pool is None else torch.cat([y, self.pool(x)], dim=1)).relu()


_VARIANTS = {
    # With 3 groups (Zhang et al., CVPR 2018).
    "shufflenetv1_cifar": {"block": _GroupedBlock, "stage_widths": (240, 480, 960)},
    # At width 1 (Ma et al., ECCV 2018).
    "shufflenetv2_cifar": {
        "block": InvertedResidual,
        "stage_widths": (116, 232, 464),
        "last_width": 1024,
    },
}

register(SmallShuffleNet, _VARIANTS, cifar_cfg(pool_size=(4, 4)), num_stages=3)
