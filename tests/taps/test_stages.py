"""Stages, blocks, the norm and the activation at their ends, and the classifier."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import pytest
import timm
import torch
import torchvision
from timm.models.swin_transformer import SwinTransformer
from torch import Tensor, nn
from torch.nn import functional

import softlabels.models  # noqa: F401  # registers resnet20 and the like with timm
from shared.recording import Recording
from shared.small_networks import IMAGE_SHAPE, hard_labels, images_of, small_cnn, small_vit
from softlabels import Distiller
from softlabels.inputs import Features
from softlabels.taps import Layout

SHAPE = (3, 32, 32)


def swin() -> nn.Module:
    """Three stages of [B, H, W, D]."""
    return SwinTransformer(
        img_size=32, patch_size=2, window_size=4, embed_dim=8, depths=(1, 1, 1),
        num_heads=(1, 1, 2), num_classes=10,
    )  # fmt: skip


def chain() -> nn.Module:
    """Single layers in a row, as in a VGG of torchvision."""
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.MaxPool2d(2),
        nn.Conv2d(4, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.MaxPool2d(2),
        nn.Conv2d(8, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 10),
    )  # fmt: skip


MODELS = {
    "swin": swin,
    "chain": chain,
    "torchvision resnet18": lambda: torchvision.models.resnet18(num_classes=10),
    "small_vit": small_vit,
    "small_cnn": small_cnn,
}


@cache
def network(name: str) -> nn.Module:
    """A network in eval mode whose norms all do something."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = MODELS[name]() if name in MODELS else timm.create_model(name, num_classes=10)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                for tensor in (module.weight.data, module.bias.data, module.running_mean):
                    tensor.normal_(0.1, 0.3)
                module.running_var.uniform_(0.5, 2)
    return model.eval()


def shape_of(name: str) -> tuple[int, int, int]:
    return IMAGE_SHAPE if name.startswith("small_") else SHAPE


@cache
def layout(name: str) -> Layout:
    return Layout(network(name), shape_of(name))


def path_of(model: nn.Module, wanted: nn.Module) -> str:
    return next(path for path, module in model.named_modules() if module is wanted)


# Where stages are


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("resnet18", ["layer1", "layer2", "layer3", "layer4"]),
        ("torchvision resnet18", ["layer1", "layer2", "layer3"]),  # layer4 has one position
        ("resnet20", ["layer1", "layer2", "layer3"]),
        ("vgg8_cifar", ["block0", "block1", "block2", "block4"]),  # block3 is as large as block4
        ("wrn_16_2", ["layer1", "layer2", "norm"]),
        ("preact_resnet18_cifar", ["layer1", "layer2", "layer3", "layer4"]),
        ("mobilenetv2_050_cifar", ["blocks.1", "blocks.2", "blocks.4", "bn2"]),
        ("swin", ["layers.0", "layers.1", "norm"]),
        ("chain", ["2", "6", "10"]),
        ("small_cnn", ["stem", "stage1", "stage2"]),  # all are of one layer
        ("small_vit", ["blocks.0", "blocks.1", "blocks.2", "blocks.3"]),
        ("vit_mini_patch4_32", ["blocks.1", "blocks.2", "blocks.4", "blocks.5"]),
    ],
)
def test_stages_go_from_shallow_to_deep(name, expected):
    found = layout(name)

    assert found.stages() == expected
    points = [found.point(f"stage:{k}") for k in range(len(expected))]
    assert [point.path for point in points] == expected
    assert points[-1] == found.point("stage:-1")
    if found.point("last").kind != "tokens":
        assert points[-1] == found.point("last")


@pytest.mark.parametrize("name", ["resnet18", "swin", "chain", "small_vit"])
def test_each_stage_of_a_pyramid_has_a_size_of_its_own(name):
    found = layout(name)
    sizes = [found.point(f"stage:{k}").height for k in range(len(found.stages()))]

    if name == "small_vit":
        assert sizes == [4] * 4
    else:
        assert sizes == sorted(set(sizes), reverse=True)


@pytest.mark.parametrize(("depth", "expected"), [(2, [0, 1]), (3, [0, 1, 2]), (12, [2, 5, 8, 11])])
def test_stages_of_a_vit_are_four_evenly_spaced_blocks(depth, expected):
    model = timm.models.vision_transformer.VisionTransformer(
        img_size=16, patch_size=8, embed_dim=8, depth=depth, num_heads=1, num_classes=5
    )

    assert Layout(model).stages() == [f"blocks.{number}" for number in expected]


def test_blocks_are_counted_from_both_ends():
    found = layout("small_vit")

    assert found.blocks() == [f"blocks.{k}" for k in range(4)]
    paths = [found.point(name).path for name in ("block:0", "block:3", "block:-1", "block:-4")]
    assert paths == ["blocks.0", "blocks.3", "blocks.3", "blocks.0"]


def test_stages_stand_for_all_of_them_among_other_names():
    found = layout("resnet20")

    assert found.expanded(("conv1", "stages", "last")) == [
        "conv1", "stage:0", "stage:1", "stage:2", "last",
    ]  # fmt: skip
    assert found.expanded(()) == []


def test_a_network_with_one_map_has_one_stage():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)
    )

    assert Layout(model, (3, 8, 8)).stages() == ["0"]


@pytest.mark.parametrize(
    ("name", "stage", "message"),
    [
        ("resnet20", "stage:3", r"'stage:3' does not exist: the network has 3 stages"),
        ("resnet20", "stage:-4", r"'stage:-4' does not exist: the network has 3 stages"),
        ("small_vit", "block:4", r"'block:4' does not exist: the network has 4 blocks"),
        ("resnet20", "block:0", r"found no run of blocks .* in SmallResNet"),
        ("resnet20", "stage:one", r"has no module 'stage:one'"),
        ("resnet20", "stage:1.5", r"has no module 'stage:1.5'"),
        ("resnet20", "layer9", r"has no module 'layer9'; near names: .*layer1"),
    ],
)
@pytest.mark.parametrize("kind", ["point", "before_activation"])
def test_a_stage_that_is_not_there(name, stage, message, kind):
    with pytest.raises(ValueError, match=message):
        getattr(layout(name), kind)(stage)


# Features before the activation


def normed(norm: nn.BatchNorm2d, values: Tensor) -> Tensor:
    """A norm without the activation that timm's hold."""
    return functional.batch_norm(
        values, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps
    )


def of_basic_block(block: nn.Module, values: Tensor) -> Tensor:
    """What a BasicBlock of timm or torchvision adds up before its last ReLU."""
    inner = functional.relu(normed(block.bn1, block.conv1(values)))
    shortcut = values if block.downsample is None else block.downsample(values)
    return normed(block.bn2, block.conv2(inner)) + shortcut


def of_resnet(model: nn.Module, images: Tensor) -> list[Tensor]:
    values = functional.relu(normed(model.bn1, model.conv1(images)))
    values = model.maxpool(values) if hasattr(model, "maxpool") else values
    found = []
    for name in ("layer1", "layer2", "layer3", "layer4"):
        for block in getattr(model, name, ()):
            before = of_basic_block(block, values)
            values = functional.relu(before)
        if hasattr(model, name):
            found.append(before)
    return found


def of_vgg(model: nn.Module, images: Tensor) -> list[Tensor]:
    values, found = images, []
    for number in range(5):
        convolution, norm, _ = getattr(model, f"block{number}")
        before = normed(norm, convolution(values))
        values = functional.relu(before)
        if number < 3:
            values = functional.max_pool2d(values, 2)
        if number != 3:
            found.append(before)
    return found


def of_wide(model: nn.Module, images: Tensor) -> list[Tensor]:
    first = model.layer1(model.conv1(images))
    second = model.layer2(first)
    third = model.layer3(second)
    return [
        normed(model.layer2[0].norm1, first),
        normed(model.layer3[0].norm1, second),
        normed(model.norm, third),
    ]


def of_mobilenet(model: nn.Module, images: Tensor) -> list[Tensor]:
    """Blocks end without an activation; the last convolution has one."""
    values, found = model.bn1(model.conv_stem(images)), []
    for number, block in enumerate(model.blocks):
        values = block(values)
        if number in (1, 2, 4):
            found.append(values)
    return [*found, normed(model.bn2, model.conv_head(values))]


def of_chain(model: nn.Module, images: Tensor) -> list[Tensor]:
    values, found = images, []
    for layer in model[:11]:
        if isinstance(layer, nn.ReLU):
            found.append(values)
        values = functional.relu(values) if isinstance(layer, nn.ReLU) else layer(values)
    return found


def of_swin(model: nn.Module, images: Tensor) -> list[Tensor]:
    first = model.layers[0](model.patch_embed(images))
    second = model.layers[1](first)
    maps = [first, second, model.norm(model.layers[2](second))]
    return [each.permute(0, 3, 1, 2) for each in maps]


def of_vit(model: nn.Module, images: Tensor) -> list[Tensor]:
    tokens = model._pos_embed(model.patch_embed(images))
    found = []
    for block in model.blocks:
        tokens = block(tokens)
        found.append(tokens[:, 1:].transpose(1, 2).unflatten(2, (4, 4)))
    return found


def features_of(name: str, images: Tensor, **settings: object) -> Sequence[Tensor]:
    method = Recording(features=Features(stages=("stages",), **settings))
    Distiller(network(name), method, example_shape=shape_of(name))(images, hard_labels())
    return method.values["features"]


@pytest.mark.parametrize(
    ("name", "by_hand"),
    [
        ("resnet18", of_resnet),
        ("torchvision resnet18", lambda *given: of_resnet(*given)[:3]),
        ("resnet20", of_resnet),
        ("vgg8_cifar", of_vgg),
        ("wrn_16_2", of_wide),
        ("mobilenetv2_050_cifar", of_mobilenet),
        ("chain", of_chain),
        ("swin", of_swin),
        ("small_vit", of_vit),
    ],
)
def test_features_before_the_activation_are_those_of_the_modules_run_again(name, by_hand):
    images = images_of(4, shape_of(name))

    found = features_of(name, images, form="map", before_activation=True)

    expected = by_hand(network(name), images)
    assert len(found) == len(expected) > 1
    for feature, wanted in zip(found, expected, strict=True):
        assert feature.requires_grad
        torch.testing.assert_close(feature, wanted)


@pytest.mark.parametrize("name", ["resnet18", "torchvision resnet18", "vgg8_cifar", "chain"])
def test_what_the_activation_makes_of_them_is_the_stage(name):
    images = images_of(4, SHAPE)

    before = features_of(name, images, before_activation=True)

    for feature, wanted in zip(before, features_of(name, images), strict=True):
        assert bool((feature < 0).any())
        torch.testing.assert_close(feature.relu(), wanted)


def test_a_stage_without_an_activation_is_read_as_it_is():
    found = layout("mobilenetv2_050_cifar")

    assert found.before_activation("blocks.2") == found.point("blocks.2")
    assert found.before_activation("bn2").key == "bn2.act:input"
    for name in ("swin", "small_vit"):
        assert layout(name).before_activation("last") == layout(name).point("last")


@pytest.mark.parametrize("in_place", [False, True])
def test_a_placeholder_after_the_last_stage_hides_no_activation(in_place):
    """timm's RegNet and others have an Identity where some variants have a last convolution."""
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(in_place), nn.Identity(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5),
    )  # fmt: skip
    found = Layout(model, (3, 8, 8))

    assert found.point("last").path == "3"
    assert found.before_activation("last").key == "2:input"
    assert found.norm("last") is model[1]


def test_a_relu_that_runs_several_times_in_place_is_read_at_the_end_of_its_block():
    point = layout("torchvision resnet18").before_activation("layer2")

    assert (point.path, point.of_input) == ("layer2.1.relu", True)
    assert (point.kind, point.channels, point.height) == ("NCHW", 128, 4)
    with pytest.raises(ValueError, match=r"'layer2.1.relu' runs 2 times in a forward"):
        layout("torchvision resnet18").point("layer2.1.relu")


@pytest.mark.parametrize("name", ["torchvision resnet18", "chain"])
def test_the_gradient_before_an_activation_in_place_is_right(name):
    """It reaches the layers below, and the activation works on as without a tap."""
    model, images = network(name), images_of(2, SHAPE)
    expected = model(images)
    method = Recording(features=Features(stages=("stages",), before_activation=True))
    step = Distiller(model, method, example_shape=SHAPE)(images, hard_labels(2))
    by_hand = {"torchvision resnet18": of_resnet, "chain": of_chain}[name](model, images)
    features = method.values["features"]
    last = len(features) - 1
    first = next(model.parameters())

    torch.testing.assert_close(step.logits, expected)
    (found,) = torch.autograd.grad(features[-1].square().sum(), first, retain_graph=True)
    (wanted,) = torch.autograd.grad(by_hand[last].square().sum(), first)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)
    assert step.loss.backward() is None


# The norm before it, and the classifier


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("resnet18", ["layer1.1.bn2", "layer2.1.bn2", "layer3.1.bn2", "layer4.1.bn2"]),
        ("torchvision resnet18", ["layer1.1.bn2", "layer2.1.bn2", "layer3.1.bn2"]),
        ("vgg8_cifar", ["block0.1", "block1.1", "block2.1", "block4.1"]),
        ("wrn_16_2", ["layer2.0.norm1", "layer3.0.norm1", "norm"]),
        ("mobilenetv2_050_cifar", ["blocks.1.1.bn3", "blocks.2.2.bn3", "blocks.4.2.bn3", "bn2"]),
        ("chain", ["1", "5", "9"]),
    ],
)
def test_the_norm_of_a_stage_is_the_one_that_its_map_comes_out_of(name, expected):
    found = layout(name)

    norms = [found.norm(f"stage:{k}") for k in range(len(expected))]

    assert [path_of(network(name), norm) for norm in norms] == expected


def test_the_norm_of_a_shortcut_is_not_taken():
    """The first block of a stage ends with a shortcut that has a norm of its own."""
    found = layout("resnet18")

    assert found.norm("layer2.0") is network("resnet18").layer2[0].bn2


@pytest.mark.parametrize(
    ("model", "stage", "name"),
    [
        (small_vit(), "last", "VisionTransformer"),
        (small_cnn(norm="group"), "stage1", "SmallCNN"),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=False), nn.ReLU(),
                       nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)), "2", "Sequential"),
    ],
)  # fmt: skip
def test_a_stage_without_a_norm(model, stage, name):
    found = Layout(model, IMAGE_SHAPE)

    with pytest.raises(
        ValueError, match=rf"needs a BatchNorm with weight and bias .* of {name}, found none"
    ):
        found.norm(stage)


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("resnet18", "fc"),
        ("torchvision resnet18", "fc"),
        ("vgg8_cifar", "fc"),
        ("wrn_16_2", "fc"),
        ("mobilenetv2_050_cifar", "classifier"),
        ("swin", "head.fc"),
        ("small_vit", "head"),
        ("chain", "13"),
    ],
)
def test_the_classifier_is_the_last_linear_layer(name, path):
    found = layout(name)

    assert found.classifier() is network(name).get_submodule(path)
    assert found.classifier().out_features == found.num_classes


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(nn.Conv2d(3, 5, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 6),
                      nn.Unflatten(1, (3, 2)), nn.Flatten(1), nn.LPPool1d(2, 2)),
    ],
    ids=["convolution", "other width"],
)  # fmt: skip
def test_logits_of_no_linear_layer_have_no_classifier(model):
    with pytest.raises(ValueError, match="needs a linear classifier at the end of Sequential"):
        Layout(model, (3, 8, 8)).classifier()
