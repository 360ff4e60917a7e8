"""Small networks and labels that the tests of taps, signals, teacher and distiller share."""

from __future__ import annotations

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

NUM_CLASSES = 5
IMAGE_SHAPE = (3, 16, 16)


def _stage(in_channels: int, channels: int, stride: int, norm: str) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1),
        nn.BatchNorm2d(channels) if norm == "batch" else nn.GroupNorm(4, channels),
        nn.ReLU(inplace=True),
    )


class SmallCNN(nn.Module):
    """Maps of 16x16, 8x8 (the middle) and 4x4 (the last) for images of 16x16."""

    def __init__(
        self,
        num_classes: int = NUM_CLASSES,
        *,
        norm: str = "batch",
        dropout: float = 0.0,
        channels: int = 3,
    ) -> None:
        super().__init__()
        self.stem = _stage(channels, 8, 1, norm)
        self.stage1 = _stage(8, 12, 2, norm)
        self.stage2 = _stage(12, 16, 2, norm)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(16, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        feature = self.stage2(self.stage1(self.stem(images)))
        logits: Tensor = self.fc(self.dropout(self.pool(feature).flatten(1)))
        return logits


def small_cnn(num_classes: int = NUM_CLASSES, *, seed: int = 0, **settings: object) -> SmallCNN:
    """The same weights for the same seed; the random state stays as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return SmallCNN(num_classes, **settings)


def small_vit(num_classes: int = NUM_CLASSES) -> VisionTransformer:
    """Four blocks over 4x4 patches and a class token; the same weights at each call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return VisionTransformer(
            img_size=16, patch_size=4, embed_dim=24, depth=4, num_heads=2, num_classes=num_classes
        )


def images_of(batch_size: int = 4, shape: tuple[int, int, int] = IMAGE_SHAPE) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch_size, *shape, generator=generator)


def hard_labels(batch_size: int = 4, num_classes: int = NUM_CLASSES) -> Tensor:
    return torch.arange(batch_size) % num_classes


def mixed_labels(batch_size: int = 4, num_classes: int = NUM_CLASSES) -> Tensor:
    """Two labeled classes of 0.7 and 0.3; the last row has one."""
    labels = 0.7 * nn.functional.one_hot(hard_labels(batch_size), num_classes)
    labels = labels + 0.3 * nn.functional.one_hot(
        (hard_labels(batch_size) + 2) % num_classes, num_classes
    )
    labels[-1] = nn.functional.one_hot(torch.tensor(1), num_classes)
    return labels


def num_hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
