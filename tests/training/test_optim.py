"""Which parameters decay: the groups of the optimizer, name by name."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from softlabels import Distiller, USKDLoss
from softlabels.models import build_model
from softlabels.training.optim import build_optimizer
from softlabels.training.settings import OptimizerSettings

NORMS = (nn.BatchNorm2d, nn.LayerNorm, nn.GroupNorm)


def networks() -> dict[str, nn.Module]:
    vit = {"depth": 2, "embed_dim": 24, "num_heads": 2}
    swin = {"depths": (1, 1), "embed_dim": 12, "num_heads": (2, 2), "window_size": 4}
    return {
        "shufflenet": build_model("torchvision:shufflenet_v2_x0_5", num_classes=5),
        "deit": build_model(
            "timm:deit_tiny_patch16_224", num_classes=5, image_size=32, settings=vit
        ),
        "swin": build_model(
            "timm:swin_tiny_patch4_window7_224", num_classes=5, image_size=32, settings=swin
        ),
        "swin of torchvision": build_model("torchvision:swin_t", num_classes=5),
        "norms of one channel group": build_model(
            "timm:test_resnet", num_classes=5, settings={"norm_layer": "groupnorm1"}
        ),
    }


NETWORKS = networks()


def not_decaying(trained: nn.Module, **settings: bool) -> set[str]:
    optimizer = build_optimizer(
        OptimizerSettings(name="adamw", weight_decay=0.05, **settings), trained
    )
    names = {id(parameter): name for name, parameter in trained.named_parameters()}
    seen = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(seen) == sorted(names)  # each once
    assert {group["weight_decay"] for group in optimizer.param_groups} <= {0.0, 0.05}
    return {
        names[id(parameter)]
        for group in optimizer.param_groups
        if group["weight_decay"] == 0
        for parameter in group["params"]
    }


def of_norms(network: nn.Module) -> set[str]:
    return {
        f"{path}.{name}"
        for path, module in network.named_modules()
        if isinstance(module, NORMS)
        for name, _ in module.named_parameters(recurse=False)
    }


def biases(network: nn.Module) -> set[str]:
    return {name for name, _ in network.named_parameters() if name.endswith("bias")}


@pytest.mark.parametrize("name", NETWORKS)
def test_everything_decays_unless_told_otherwise(name):
    assert not_decaying(Distiller(NETWORKS[name]).trainable) == set()


@pytest.mark.parametrize("name", NETWORKS)
def test_norms_alone_can_be_left_out(name):
    trained = Distiller(NETWORKS[name]).trainable
    expected = of_norms(trained)
    assert len(expected) >= 10
    assert not_decaying(trained, decay_norm=False) == expected


def test_shufflenets_classifier_has_a_bias_that_decays_with_norms_left_out():
    assert "fc.bias" not in not_decaying(NETWORKS["shufflenet"], decay_norm=False)
    assert "fc.bias" in not_decaying(NETWORKS["shufflenet"], decay_norm_and_bias=False)


@pytest.mark.parametrize(
    ("name", "further"),
    [
        ("shufflenet", set()),
        ("deit", {"student.cls_token", "student.pos_embed"}),
        (
            "swin",
            {
                f"student.layers.{stage}.blocks.0.attn.relative_position_bias_table"
                for stage in (0, 1)
            },
        ),
    ],
)
@pytest.mark.parametrize("decay_norm", [True, False])
def test_norms_biases_tokens_and_places_can_be_left_out(name, further, decay_norm):
    trained = Distiller(NETWORKS[name]).trainable
    expected = of_norms(trained) | biases(trained) | further
    found = not_decaying(trained, decay_norm_and_bias=False, decay_norm=decay_norm)
    assert found == expected


def test_torchvisions_places_are_known_by_their_names():
    trained = Distiller(NETWORKS["swin of torchvision"]).trainable
    found = not_decaying(trained, decay_norm_and_bias=False)
    tables = {name for name, _ in trained.named_parameters() if "position_bias_table" in name}
    assert len(tables) == 12
    assert found == of_norms(trained) | biases(trained) | tables


def test_a_methods_heads_are_among_the_groups():
    distiller = Distiller(
        build_model("timm:resnet8", num_classes=5), USKDLoss(), example_shape=(3, 32, 32)
    )
    found = not_decaying(distiller.trainable, decay_norm_and_bias=False)
    heads = {name for name in found if not name.startswith("student.")}
    assert heads
    assert all(name.endswith("bias") for name in heads)


def test_frozen_parameters_are_in_no_group_of_theirs():
    network = build_model("timm:resnet8", num_classes=5)
    network.requires_grad_(False)
    network.get_classifier().requires_grad_(True)
    optimizer = build_optimizer(OptimizerSettings(decay_norm=False), network)
    sizes = [len(group["params"]) for group in optimizer.param_groups]
    assert sum(sizes) == 2
    assert isinstance(optimizer, torch.optim.SGD)
