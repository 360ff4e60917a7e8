"""VGG for 32x32 images, registered with timm: `vgg8_cifar` and `vgg13_cifar`.

The shapes of RepDistiller's `vgg8_bn` and `vgg13_bn`, which distillation papers compare on: five
groups of 3x3 convolutions with bias, batch norm and ReLU, a max pooling after each of the first
three, and a single linear layer for the three of Simonyan and Zisserman's (ICLR 2015).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from torch import nn

from softlabels.models.zoo.small_network import SmallNetwork, cifar_cfg, normal_weights, register

__all__ = ["SmallVGG"]

_WIDTHS = (64, 128, 256, 512, 512)
_REDUCTIONS = (1, 2, 4, 8, 8)


class SmallVGG(SmallNetwork):
    """A VGG for small images.

    Args:
        depth: Convolutions in each of the five groups, of 64, 128, 256, 512 and 512 channels.
        in_chans: Channels of the images.
        **head: `num_classes`, `global_pool` and `drop_rate` of `SmallNetwork`.
    """

    def __init__(self, *, depth: int, in_chans: int = 3, **head: Any) -> None:
        chain: dict[str, nn.Module] = {}
        in_width = in_chans
        for group, width in enumerate(_WIDTHS):
            chain[f"block{group}"] = _group([in_width, *[width] * depth])
            if group < 3:
                chain[f"pool{group}"] = nn.MaxPool2d(2)
            in_width = width
        names = [name for name in chain if name.startswith("block")]
        super().__init__(
            chain, zip(names, _REDUCTIONS, _WIDTHS, strict=True), num_features=in_width, **head
        )
        normal_weights(self, linear_std=0.01)


def _group(widths: Sequence[int]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for in_width, width in pairwise(widths):
        layers += [
            nn.Conv2d(in_width, width, 3, padding=1),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
        ]
    return nn.Sequential(*layers)


register(
    SmallVGG,
    {"vgg8_cifar": {"depth": 1}, "vgg13_cifar": {"depth": 2}},
    cifar_cfg(pool_size=(4, 4), first_conv="block0.0"),
    num_stages=5,
)
