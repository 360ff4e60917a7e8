"""Vision transformers for 32x32 images: timm's own `VisionTransformer` in two small shapes."""

from __future__ import annotations

from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer

from softlabels.models.zoo.small_network import cifar_cfg

__all__: list[str] = []

_CFG = cifar_cfg(
    fixed_input_size=True,
    pool_size=None,
    first_conv="patch_embed.proj",
    classifier="head",
)

default_cfgs = generate_default_cfgs({"vit_tiny_patch4_32": _CFG, "vit_mini_patch4_32": _CFG})


def _build(
    variant: str, pretrained: bool, settings: dict[str, Any], **shape: Any
) -> VisionTransformer:
    model: VisionTransformer = build_model_with_cfg(
        VisionTransformer, variant, pretrained, **({"patch_size": 4} | shape | settings)
    )
    return model


@register_model
def vit_tiny_patch4_32(pretrained: bool = False, **settings: Any) -> VisionTransformer:
    """DeiT-Tiny's block (192 channels, 3 heads), nine times, on 8x8 patches of 4x4 pixels."""
    return _build("vit_tiny_patch4_32", pretrained, settings, embed_dim=192, depth=9, num_heads=3)


@register_model
def vit_mini_patch4_32(pretrained: bool = False, **settings: Any) -> VisionTransformer:
    """A transformer of 64 channels, 4 heads and 6 blocks, that trains in seconds."""
    return _build("vit_mini_patch4_32", pretrained, settings, embed_dim=64, depth=6, num_heads=4)
