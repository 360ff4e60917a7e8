"""The networks of the papers' tables: their shapes, their timm side, and our taps on them."""

from __future__ import annotations

import copy
from typing import NamedTuple

import pytest
import timm
import torch
from torch import Tensor, nn

import softlabels.models  # noqa: F401  registers the models
from softlabels import Distiller, USKDLoss, ZipfLSLoss
from softlabels.models.zoo.preact_resnet import WideResNet
from softlabels.taps import Layout, TapPoint


class Row(NamedTuple):
    """A network, as it is with 100 classes for images of 3x32x32.

    Attributes:
        parameters: Their number. CRD and its successors report, in millions, vgg8 3.96, vgg13
            9.46, ResNet50 23.71, MobileNetV2 0.81, ShuffleNetV1 0.95, ShuffleNetV2 1.36,
            wrn_16_2 0.70, wrn_40_1 0.57 and wrn_40_2 2.26; the other numbers follow from the
            widths.
        stages: Channels and side of the map that each stage returns.
        middle: Where the middle feature is: the last stage at twice the final resolution.
        logits: The first three, with the weights of `filled`, of a second program: one written
            from the layers that RepDistiller, OpenMMLab and the code of Zipf's LS list.
    """

    parameters: int
    stages: list[tuple[int, int]]
    middle: str
    logits: tuple[float, float, float]


# fmt: off
TABLE = {
    "vgg8_cifar": Row(
        3_965_028, [(64, 32), (128, 16), (256, 8), (512, 4), (512, 4)], "block2",
        (-0.098565, -0.312684, -0.277062)),
    "vgg13_cifar": Row(
        9_462_180, [(64, 32), (128, 16), (256, 8), (512, 4), (512, 4)], "block2",
        (0.245571, 0.25318, -0.10847)),
    "resnet50_cifar": Row(
        23_705_252, [(64, 32), (256, 32), (512, 16), (1024, 8), (2048, 4)], "layer3",
        (-0.266845, 0.149032, -1.047174)),
    "mobilenetv2_050_cifar": Row(
        812_836, [(12, 16), (16, 8), (48, 4), (160, 2)], "blocks.4",
        (0.296428, -0.276957, -0.168627)),
    "shufflenetv1_cifar": Row(
        949_258, [(240, 16), (480, 8), (960, 4)], "layer2",
        (0.441712, -1.309569, -1.394025)),
    "shufflenetv2_cifar": Row(
        1_355_528, [(116, 16), (232, 8), (464, 4)], "layer2",
        (-0.293606, 0.253159, 0.107689)),
    "wrn_16_2": Row(
        703_284, [(32, 32), (64, 16), (128, 8)], "layer2",
        (-0.531821, -0.339078, -0.015797)),
    "wrn_40_1": Row(
        569_780, [(16, 32), (32, 16), (64, 8)], "layer2",
        (2.798603, -0.150461, -3.139637)),
    "wrn_40_2": Row(
        2_255_156, [(32, 32), (64, 16), (128, 8)], "layer2",
        (-0.575706, -2.117702, 1.894434)),
    "resnet18_cifar": Row(
        11_220_132, [(64, 32), (64, 32), (128, 16), (256, 8), (512, 4)], "layer3",
        (0.09544, 1.02093, 1.314609)),
    "resnet34_cifar": Row(
        21_328_292, [(64, 32), (64, 32), (128, 16), (256, 8), (512, 4)], "layer3",
        (-1.174071, 1.737518, 4.88503)),
    "preact_resnet18_cifar": Row(
        11_217_444, [(64, 32), (128, 16), (256, 8), (512, 4)], "layer3",
        (0.13831, -1.602515, -0.559923)),
    "densenet121_cifar": Row(
        7_048_548, [(64, 32), (256, 32), (512, 16), (1024, 8), (1024, 4)], "features.denseblock3",
        (-0.051083, 0.085564, -0.124326)),
}
# fmt: on


class Built(NamedTuple):
    """A network of the table in training mode. A test that changes it takes a copy."""

    name: str
    row: Row
    model: nn.Module

    def copy(self) -> nn.Module:
        return copy.deepcopy(self.model)


@pytest.fixture(scope="module", params=TABLE)
def built(request) -> Built:
    return Built(request.param, TABLE[request.param], make(request.param))


def make(name: str, **settings: object) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, **settings)


def images() -> Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def filled(model: nn.Module) -> Tensor:
    """Draw all weights, layer after layer, and one image, in float64."""
    generator = torch.Generator().manual_seed(0)

    def draw(shape: torch.Size, mean: float, std: float) -> Tensor:
        return mean + std * torch.randn(shape, generator=generator, dtype=torch.float64)

    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.copy_(draw(module.weight.shape, 1, 0.3))
            elif isinstance(module, nn.Conv2d | nn.Linear):
                fan_in = module.weight[0].numel()
                module.weight.copy_(draw(module.weight.shape, 0, fan_in**-0.5))
            else:
                continue
            if module.bias is not None:
                module.bias.copy_(draw(module.bias.shape, 0, 0.1))
    return draw(torch.Size([1, 3, 32, 32]), 0, 1)


# The table


def test_number_of_parameters(built):
    assert sum(p.numel() for p in built.model.parameters()) == built.row.parameters


def test_stages(built):
    model, maps = built.copy(), []
    for info in model.feature_info:
        module = model.get_submodule(info["module"])
        module.register_forward_hook(lambda _module, _inputs, output: maps.append(output))

    model(images())

    assert [(m.shape[1], m.shape[2]) for m in maps] == built.row.stages
    assert [(i["num_chs"], 32 // i["reduction"]) for i in model.feature_info] == built.row.stages


@pytest.mark.parametrize(
    "name", ["densenet121_cifar", "mobilenetv2_050_cifar", "shufflenetv1_cifar", "wrn_16_2"]
)
def test_timm_takes_the_stages_out(name):
    maps = make(name, features_only=True)(images())
    assert [(m.shape[1], m.shape[2]) for m in maps] == TABLE[name].stages


def test_logits_of_a_second_program(built):
    model = built.copy().double().eval()
    image = filled(model)

    logits = model(image)[0, :3]

    torch.testing.assert_close(logits.tolist(), [*built.row.logits], rtol=0, atol=1e-6)


def test_our_taps_find_the_middle_and_the_last_feature(built):
    side = built.row.stages[-1][1]
    width = next(width for width, s in reversed(built.row.stages) if s == 2 * side)

    layout = Layout(built.model, (3, 32, 32))
    last = layout.point("last")

    assert layout.point("middle") == TapPoint(built.row.middle, "NCHW", width, 2 * side, 2 * side)
    assert last == TapPoint(last.path, "NCHW", built.model.num_features, side, side)


def test_a_step_of_self_distillation_without_settings(built):
    model = built.copy()
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():  # a block that starts as its shortcut hides its weights
                nn.init.normal_(parameter)
    for method in (USKDLoss(), ZipfLSLoss()):
        distiller = Distiller(model, method, example_shape=(3, 32, 32))

        step = distiller(images(), torch.tensor([3, 99]))
        step.loss.backward()

        assert step.logits.shape == (2, 100)
        assert all(p.grad is not None and p.grad.isfinite().all() for p in distiller.parameters())
        assert all(p.grad.any() for p in model.parameters())
        model.zero_grad()


# What timm asks of a model


def test_names_do_not_shadow_any_of_timms():
    others = {"resnet8", "resnet14", "resnet20", "resnet32", "resnet44", "resnet56", "resnet110"}
    others |= {"resnet8x4", "resnet32x4", "resnet8_glyphs", "resnet14x4_glyphs"}
    others |= {"vit_tiny_patch4_32", "vit_mini_patch4_32"}

    ours = {
        name
        for name in timm.list_models()
        if timm.models.model_entrypoint(name).__module__.startswith("softlabels.")
    }

    assert ours == others | set(TABLE)
    assert hasattr(timm.models, "resnet18")  # its own names stand there too
    assert not [name for name in ours if hasattr(timm.models, name)]


def test_head_of_features_is_the_model(built):
    model = built.copy().eval()

    features = model.forward_features(images())
    logits = model(images())

    assert features.shape[:2] == (2, model.num_features)
    assert logits.shape == (2, 100)
    assert torch.equal(model.forward_head(features), logits)
    pooled = model.forward_head(features, pre_logits=True)
    torch.testing.assert_close(pooled, features.mean(dim=(2, 3)))
    assert torch.equal(model.get_classifier()(pooled), logits)


def test_other_classes_and_channels(built):
    with torch.device("meta"):  # shapes alone
        model = make(built.name, num_classes=7, in_chans=1)
        logits = model(torch.empty(2, 1, 32, 32))

    assert model.num_classes == 7
    assert logits.shape == (2, 7)


def test_reset_classifier(built):
    model = built.copy()
    old = model.get_classifier()

    model.reset_classifier(7)

    assert model.get_classifier() is not old
    assert model.num_classes == 7
    assert model(images()).shape == (2, 7)
    model.reset_classifier(0)
    assert model(images()).shape == (2, model.num_features)


def test_configuration(built):
    model = built.model
    cfg = model.pretrained_cfg

    assert cfg["architecture"] == built.name
    assert cfg["input_size"] == (3, 32, 32)
    assert cfg["num_classes"] == model.num_classes == 100
    assert model.get_submodule(cfg["first_conv"]).in_channels == 3
    assert model.get_submodule(cfg["classifier"]) is model.get_classifier()
    assert cfg["pool_size"] == (built.row.stages[-1][1],) * 2
    assert not timm.models.is_model_pretrained(built.name)


def test_the_state_dict_is_all_that_a_network_knows(built):
    model, other = built.copy(), built.copy().eval()
    model(images())  # running statistics are state too
    state = {name: value.clone() for name, value in model.eval().state_dict().items()}
    for value in other.state_dict().values():
        value.fill_(1)
    assert not torch.equal(other(images()), model(images()))

    other.load_state_dict(state)

    assert torch.equal(other(images()), model(images()))


# How weights start


def normal_std(convolution: nn.Conv2d) -> float:
    """Of He et al., from the fan-out."""
    return (2 / (convolution.out_channels * convolution.kernel_size[0] ** 2)) ** 0.5


def pytorch_std(layer: nn.Conv2d | nn.Linear) -> float:
    """Of PyTorch's uniform distribution within 1 / sqrt(fan-in)."""
    return (3 * layer.weight[0].numel()) ** -0.5


def test_convolutions_start_as_in_the_published_code(built):
    uniform = built.name.startswith(("densenet", "preact", "shufflenet"))
    expected = pytorch_std if uniform else normal_std
    convolutions = [m for m in built.model.modules() if isinstance(m, nn.Conv2d)]
    for convolution in convolutions:
        if convolution.weight.numel() > 10_000:
            std = convolution.weight.std().item()
            assert std == pytest.approx(expected(convolution), rel=0.05), convolution
        assert convolution.bias is None or not convolution.bias.any()
    assert convolutions[0].weight.std().item() == pytest.approx(expected(convolutions[0]), rel=0.3)


def test_classifiers_start_as_in_the_published_code(built):
    classifier = built.model.get_classifier()
    narrow = built.name.startswith(("vgg", "mobilenet", "resnet18", "resnet34"))

    std = 0.01 if narrow else pytorch_std(classifier)

    assert classifier.weight.std().item() == pytest.approx(std, rel=0.05)
    assert classifier.bias.any() == (not narrow and not built.name.startswith("wrn"))


def test_batch_norms_start_at_one_or_close_a_block(built):
    closed = [
        path
        for path, module in built.model.named_modules()
        if isinstance(module, nn.BatchNorm2d) and not torch.all(module.weight == 1)
    ]
    assert len(closed) == {"resnet18_cifar": 8, "resnet34_cifar": 16}.get(built.name, 0)
    assert all(path.endswith("bn2") for path in closed)


# Single networks


def without_residual(block: nn.Module) -> nn.Module:
    nn.init.zeros_(block.conv2.weight)
    return block.eval()


def test_the_shortcut_of_a_wide_resnet_is_the_identity():
    block = without_residual(make("wrn_16_2").layer1[1])
    x = torch.randn(1, 32, 4, 4)
    assert torch.equal(block(x), x)


def test_the_shortcuts_of_the_preactivation_resnet_start_after_the_activation():
    model = make("preact_resnet18_cifar")
    same, changing = without_residual(model.layer1[0]), without_residual(model.layer2[0])
    x = torch.randn(1, 64, 4, 4)

    torch.testing.assert_close(same(x), same.norm1(x))
    torch.testing.assert_close(changing(x), changing.downsample(changing.norm1(x)))
    assert same(x).min() == 0


@pytest.mark.parametrize(
    ("name", "rectified"),
    [("preact_resnet18_cifar", False), ("wrn_16_2", True), ("densenet121_cifar", True)],
)
def test_whether_the_last_map_is_rectified(name, rectified):
    assert (make(name).forward_features(images()).min() == 0) == rectified


def test_relus_of_the_mobilenet_have_no_upper_bound():
    model = make("mobilenetv2_050_cifar")
    nn.init.constant_(model.bn2.weight, 100)
    assert model.forward_features(images()).max() > 6


@pytest.mark.parametrize("depth", [4, 15, 20])
def test_impossible_depth_of_a_wide_resnet(depth):
    with pytest.raises(ValueError, match=rf"6n \+ 4.*got {depth}"):
        WideResNet(depth=depth, width_factor=2)


def test_another_stem_of_timms_resnet_is_refused():
    with pytest.raises(ValueError, match="one convolution, got Sequential"):
        timm.create_model("resnet18_cifar", stem_type="deep")


def test_timms_settings_are_taken():
    model = make("resnet18_cifar", zero_init_last=False, drop_rate=0.5)
    assert model.layer1[0].bn2.weight.all()
    assert model.drop_rate == 0.5
