"""Residual networks for 32x32 images, registered with timm.

The CIFAR family of He et al., "Deep Residual Learning for Image Recognition" (CVPR 2016), with
projection shortcuts, in the shapes that distillation papers compare on: `resnet8` to `resnet110`,
the wide `resnet8x4` and `resnet32x4`, and two smaller ones for the embedded glyphs.
Parameter names are those of RepDistiller's networks, so its checkpoints load as they are.
"""

from __future__ import annotations

from typing import Any

from timm.layers.classifier import create_classifier
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock
from torch import Tensor, nn

__all__ = ["SmallResNet"]


class SmallResNet(nn.Module):
    """A residual network of three stages for small images.

    A 3x3 convolution, three stages of basic blocks with strides 1, 2 and 2, global pooling and a
    linear classifier. A shortcut is a 1x1 convolution where the shape changes, else the identity.

    Args:
        depth: Number of layers with weights: 6n + 2, for n blocks a stage.
        stem_width: Channels after the first convolution.
        stage_widths: Channels of the three stages.
        stem_stride: Stride of the first convolution.
        num_classes: Number of classes; 0 leaves out the classifier.
        in_chans: Channels of the images.
        global_pool: timm's name of the pooling before the classifier; "" for none.
        drop_rate: Dropout probability before the classifier, 0 to 1.

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
        num_classes: int = 100,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__()
        if depth < 8 or (depth - 2) % 6 != 0:
            raise ValueError(f"depth must be 6n + 2 (8, 14, 20, ...), got {depth}")
        num_blocks = (depth - 2) // 6
        self.num_classes = num_classes
        self.num_features = self.head_hidden_size = stage_widths[-1]

        self.conv1 = nn.Conv2d(in_chans, stem_width, 3, stride=stem_stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(stem_width)
        self.act1 = nn.ReLU(inplace=True)
        self.layer1 = _stage(num_blocks, stem_width, stage_widths[0], stride=1)
        self.layer2 = _stage(num_blocks, stage_widths[0], stage_widths[1], stride=2)
        self.layer3 = _stage(num_blocks, stage_widths[1], stage_widths[2], stride=2)
        self.feature_info: list[dict[str, Any]] = [
            {
                "num_chs": width,
                "reduction": stem_stride * 2**stage,
                "module": f"layer{stage + 1}",
            }
            for stage, width in enumerate(stage_widths)
        ]

        self.global_pool: nn.Module
        self.fc: nn.Module
        self.global_pool, self.fc = create_classifier(
            self.num_features, num_classes, pool_type=global_pool
        )
        self.head_drop = nn.Dropout(drop_rate)

        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.ones_(module.weight)
                nn.init.zeros_(module.bias)

    def get_classifier(self) -> nn.Module:
        """Return the last layer (an identity if `num_classes` is 0)."""
        return self.fc

    def reset_classifier(self, num_classes: int, global_pool: str = "avg") -> None:
        """Replace the last layer by a freshly initialised one.

        Args:
            num_classes: Number of classes; 0 leaves out the classifier.
            global_pool: timm's name of the pooling before the classifier; "" for none.
        """
        self.num_classes = num_classes
        self.global_pool, fc = create_classifier(
            self.num_features, num_classes, pool_type=global_pool
        )
        self.fc = fc.to(self.conv1.weight)

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the last map.

        Args:
            x: Images, [B, in_chans, H, W].

        Returns:
            The map after the last stage, [B, num_features, h, w].
        """
        x = self.act1(self.bn1(self.conv1(x)))
        x = self.layer2(self.layer1(x))
        features: Tensor = self.layer3(x)
        return features

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Return the logits of a last map.

        Args:
            x: What `forward_features` returns, [B, num_features, h, w].
            pre_logits: Return the pooled features, [B, num_features], instead.

        Returns:
            Logits, [B, num_classes].
        """
        x = self.head_drop(self.global_pool(x))
        if not pre_logits:
            x = self.fc(x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits, [B, num_classes], of images, [B, in_chans, H, W]."""
        return self.forward_head(self.forward_features(x))


def _stage(num_blocks: int, in_width: int, width: int, *, stride: int) -> nn.Sequential:
    shortcut = None
    if stride != 1 or in_width != width:
        shortcut = nn.Sequential(
            nn.Conv2d(in_width, width, 1, stride=stride, bias=False), nn.BatchNorm2d(width)
        )
    first = BasicBlock(in_width, width, stride=stride, downsample=shortcut)
    return nn.Sequential(first, *(BasicBlock(width, width) for _ in range(num_blocks - 1)))


_CIFAR_CFG: dict[str, Any] = {
    "num_classes": 100,
    "input_size": (3, 32, 32),
    "pool_size": (8, 8),
    "crop_pct": 1.0,
    "interpolation": "bilinear",
    # Statistics of CIFAR-100's training images.
    "mean": (0.5071, 0.4867, 0.4408),
    "std": (0.2675, 0.2565, 0.2761),
    "first_conv": "conv1",
    "classifier": "fc",
}
_GLYPHS_CFG = _CIFAR_CFG | {
    "input_size": (1, 32, 32),
    "pool_size": (4, 4),
    # Statistics of the clean training glyphs.
    "mean": (0.0758,),
    "std": (0.2384,),
}

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


def _build(variant: str, pretrained: bool, settings: dict[str, Any], **shape: Any) -> SmallResNet:
    model: SmallResNet = build_model_with_cfg(
        SmallResNet, variant, pretrained, **(shape | settings)
    )
    return model


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
