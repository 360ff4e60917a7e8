"""Vision transformers for 32x32 images: timm's own `VisionTransformer` in two small shapes.

`vit_tiny_patch4_32` is DeiT-Tiny's block (192 channels, 3 heads), nine times, on 8x8 patches of 4x4
pixels; `vit_mini_patch4_32`, of 64 channels, trains in seconds.
"""

from __future__ import annotations

from typing import Any

from timm.models.vision_transformer import VisionTransformer

from softlabels.models.zoo.small_network import cifar_cfg, register


def _transformer(*, patch_size: int = 4, **settings: Any) -> VisionTransformer:
    return VisionTransformer(patch_size=patch_size, **settings)


register(
    _transformer,
    {
        "vit_tiny_patch4_32": {"embed_dim": 192, "depth": 9, "num_heads": 3},
        "vit_mini_patch4_32": {"embed_dim": 64, "depth": 6, "num_heads": 4},
    },
    cifar_cfg(
        fixed_input_size=True,
        pool_size=None,
        first_conv="patch_embed.proj",
        classifier="head",
    ),
)
