import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer

import softlabels.models  # noqa: F401  registers the models

SHAPES = {"vit_tiny_patch4_32": (192, 9, 3), "vit_mini_patch4_32": (64, 6, 4)}


@pytest.mark.parametrize("name", SHAPES)
def test_shape(name):
    model = timm.create_model(name)
    width, depth, heads = SHAPES[name]
    assert isinstance(model, VisionTransformer)
    assert model.embed_dim == width
    assert len(model.blocks) == depth
    assert model.blocks[0].attn.num_heads == heads
    assert model.patch_embed.grid_size == (8, 8)
    assert model.cls_token.shape == (1, 1, width)
    assert model.global_pool == "token"


@pytest.mark.parametrize("name", SHAPES)
def test_head_of_features_is_the_model(name):
    model = timm.create_model(name, num_classes=10, in_chans=1).eval()
    images = torch.randn(2, 1, 32, 32)
    features = model.forward_features(images)
    assert features.shape == (2, 65, SHAPES[name][0])
    assert torch.equal(model.forward_head(features), model(images))
    assert model(images).shape == (2, 10)


@pytest.mark.parametrize("name", SHAPES)
def test_configuration(name):
    model = timm.create_model(name)
    cfg = model.pretrained_cfg
    assert cfg["input_size"] == (3, 32, 32)
    assert cfg["fixed_input_size"]
    assert model.get_submodule(cfg["first_conv"]) is model.patch_embed.proj
    assert model.get_submodule(cfg["classifier"]) is model.head
    assert model.num_classes == 100
    assert not timm.models.is_model_pretrained(name)


def test_other_sizes_and_settings():
    model = timm.create_model("vit_mini_patch4_32", img_size=48, patch_size=8, depth=2)
    assert model.patch_embed.grid_size == (6, 6)
    assert len(model.blocks) == 2
    assert model(torch.randn(1, 3, 48, 48)).shape == (1, 100)
