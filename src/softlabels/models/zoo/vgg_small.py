"""VGG for 32x32 images, registered with timm: `vgg8_cifar` and `vgg13_cifar`.

The shapes of RepDistiller's `vgg8_bn` and `vgg13_bn`, which distillation papers compare on: five
groups of 3x3 convolutions with bias, batch norm and ReLU, a max pooling after each of the first
three, and a single linear layer for the three of Simonyan and Zisserman's (ICLR 2015).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import Any

from timm.models import generate_default_cfgs, register_model
from torch import nn

from softlabels.models.zoo.small_network import SmallNetwork, build, cifar_cfg, normal_weights

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


_CFG = cifar_cfg(pool_size=(4, 4), first_conv="block0.0")

default_cfgs = generate_default_cfgs({"vgg8_cifar": _CFG, "vgg13_cifar": _CFG})

_build = partial(build, SmallVGG, num_stages=5)


@register_model
def vgg8_cifar(pretrained: bool = False, **settings: Any) -> SmallVGG:
    """VGG-8: one convolution a group."""
    return _build("vgg8_cifar", pretrained, settings, depth=1)


@register_model
def vgg13_cifar(pretrained: bool = False, **settings: Any) -> SmallVGG:
    """VGG-13: two convolutions a group."""
    return _build("vgg13_cifar", pretrained, settings, depth=2)
