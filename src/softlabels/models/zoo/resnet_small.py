"""Residual networks for 32x32 images, registered with timm.

The CIFAR family of He et al., "Deep Residual Learning for Image Recognition" (CVPR 2016), with
projection shortcuts, in the shapes that distillation papers compare on: `resnet8` to `resnet110`,
the wide `resnet8x4` and `resnet32x4`, and two smaller ones for the embedded glyphs.
Parameter names are those of RepDistiller's networks, so its checkpoints load as they are.
"""

from __future__ import annotations

from typing import Any

from timm.models.resnet import BasicBlock
from torch import Tensor, nn
from torch.nn import functional

from softlabels.models.zoo.small_network import (
    SmallNetwork,
    cifar_cfg,
    normal_weights,
    register,
    stages,
)

__all__ = ["PointwiseConv2d", "SmallResNet"]


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
        depths = [(depth - 2) // 6] * 3
        stem: dict[str, nn.Module] = {
            "conv1": nn.Conv2d(in_chans, stem_width, 3, stride=stem_stride, padding=1, bias=False),
            "bn1": nn.BatchNorm2d(stem_width),
            "act1": nn.ReLU(inplace=True),
        }
        shapes = zip(depths, stage_widths, (1, 2, 2), strict=True)
        layers, described = stages(_block, stem_width, shapes, stem_stride)
        super().__init__({**stem, **layers}, described, num_features=stage_widths[-1], **head)
        normal_weights(self)


class PointwiseConv2d(nn.Conv2d):
    """A convolution of 1x1 that may be trained in channels last on a CPU, whatever its stride.

    With a stride and few channels torch's own gradient writes beyond its memory there
    (https://github.com/uxlfoundation/oneDNN/issues/6035).
    """

    def forward(self, images: Tensor) -> Tensor:
        """Convolve; in channels last the pixels that the stride leaves out go first."""
        if images.is_contiguous():
            return super().forward(images)
        down, right = self.stride
        return functional.conv2d(images[:, :, ::down, ::right], self.weight, self.bias)


def _block(in_width: int, width: int, stride: int) -> nn.Module:
    shortcut = None
    if stride != 1 or in_width != width:
        shortcut = nn.Sequential(
            PointwiseConv2d(in_width, width, 1, stride=stride, bias=False), nn.BatchNorm2d(width)
        )
    block: nn.Module = BasicBlock(in_width, width, stride=stride, downsample=shortcut)
    return block


_WIDE: dict[str, Any] = {"stem_width": 32, "stage_widths": (64, 128, 256)}
_CIFAR = {
    **{f"resnet{depth}": {"depth": depth} for depth in (8, 14, 20, 32, 44, 56, 110)},
    "resnet8x4": {"depth": 8, **_WIDE},
    "resnet32x4": {"depth": 32, **_WIDE},
}
# At half the resolution; the second one, four times as wide, is the teacher of the first.
_GLYPHS = {
    "resnet8_glyphs": {"depth": 8, "stem_width": 8, "stage_widths": (8, 16, 32)},
    "resnet14x4_glyphs": {"depth": 14, "stem_width": 32, "stage_widths": (32, 64, 128)},
}

register(SmallResNet, _CIFAR, cifar_cfg(), num_stages=3)
register(
    SmallResNet,
    {name: {**shape, "stem_stride": 2} for name, shape in _GLYPHS.items()},
    # Statistics of the clean training glyphs.
    cifar_cfg(input_size=(1, 32, 32), pool_size=(4, 4), mean=(0.0758,), std=(0.2384,)),
    num_stages=3,
)
