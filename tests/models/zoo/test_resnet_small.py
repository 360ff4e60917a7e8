import pytest
import timm
import torch
from torch import nn

import softlabels.models  # noqa: F401  registers the models
from softlabels.models.zoo.resnet_small import SmallResNet

# Parameters with 100 classes and 3 channels. resnet20, 32, 56, 110, 8x4 and 32x4 are the sizes that
# CRD and its successors report (0.28, 0.47, 0.86, 1.74, 1.23 and 7.43 million); the others follow
# from the widths: each block of width w adds 2 * 9 * w^2 + 4 * w.
PARAMETERS = {
    "resnet8": 83_892,
    "resnet14": 181_108,
    "resnet20": 278_324,
    "resnet32": 472_756,
    "resnet44": 667_188,
    "resnet56": 861_620,
    "resnet110": 1_736_564,
    "resnet8x4": 1_233_540,
    "resnet32x4": 7_433_860,
    "resnet8_glyphs": 22_924,
    "resnet14x4_glyphs": 708_228,
}
SMALL = ["resnet8", "resnet8x4", "resnet8_glyphs", "resnet14x4_glyphs"]


def make(name, **settings):
    torch.manual_seed(0)
    return timm.create_model(name, **{"num_classes": 100, "in_chans": 3} | settings)


@pytest.mark.parametrize("name", PARAMETERS)
def test_number_of_parameters(name):
    assert sum(p.numel() for p in make(name).parameters()) == PARAMETERS[name]


@pytest.mark.parametrize("name", SMALL)
def test_feature_info_is_true(name):
    model = make(name)
    shapes = {}
    for info in model.feature_info:
        model.get_submodule(info["module"]).register_forward_hook(
            lambda _module, _inputs, output, key=info["module"]: shapes.update({key: output.shape})
        )
    model(torch.zeros(2, 3, 32, 32))
    assert [info["module"] for info in model.feature_info] == ["layer1", "layer2", "layer3"]
    for info in model.feature_info:
        side = 32 // info["reduction"]
        assert shapes[info["module"]] == (2, info["num_chs"], side, side)
    assert model.num_features == model.head_hidden_size == model.feature_info[-1]["num_chs"]


@pytest.mark.parametrize(
    ("name", "widths", "stem_stride"),
    [
        ("resnet20", [16, 16, 32, 64], 1),
        ("resnet8x4", [32, 64, 128, 256], 1),
        ("resnet8_glyphs", [8, 8, 16, 32], 2),
        ("resnet14x4_glyphs", [32, 32, 64, 128], 2),
    ],
)
def test_widths_and_stem(name, widths, stem_stride):
    model = make(name)
    assert model.conv1.stride == (stem_stride, stem_stride)
    assert [model.conv1.out_channels, *(i["num_chs"] for i in model.feature_info)] == widths


def test_projection_only_where_the_shape_changes():
    def projected(name):
        return {key.split(".downsample")[0] for key in make(name).state_dict() if "downs" in key}

    assert projected("resnet20") == {"layer2.0", "layer3.0"}
    assert projected("resnet8x4") == {"layer1.0", "layer2.0", "layer3.0"}


def test_a_block_adds_its_input():
    block = make("resnet8").eval().layer1[0]
    nn.init.zeros_(block.bn2.weight)
    x = torch.randn(1, 16, 4, 4)
    torch.testing.assert_close(block(x), x.relu())


def test_every_stage_sees_rectified_maps():
    model = make("resnet8")
    minima = []
    for stage in (model.layer1, model.layer2, model.layer3):
        stage.register_forward_pre_hook(lambda _module, inputs: minima.append(inputs[0].min()))
    model(torch.randn(2, 3, 32, 32))
    assert minima == [0, 0, 0]


def test_parameter_names_are_those_of_the_published_checkpoints():
    names = set(dict(make("resnet8x4").named_parameters()))
    convolutions = ("conv1", "conv2", "downsample.0")
    norms = ("bn1", "bn2", "downsample.1")
    block = [f"{name}.weight" for name in (*convolutions, *norms)]
    block += [f"{name}.bias" for name in norms]
    blocks = {f"layer{stage}.0.{name}" for stage in (1, 2, 3) for name in block}
    assert names == blocks | {"conv1.weight", "bn1.weight", "bn1.bias", "fc.weight", "fc.bias"}


@pytest.mark.parametrize("name", SMALL)
def test_head_of_features_is_the_model(name):
    model = make(name).eval()
    images = torch.randn(2, 3, 32, 32)
    features = model.forward_features(images)
    assert features.shape[:2] == (2, model.num_features)
    assert torch.equal(model.forward_head(features), model(images))
    pooled = model.forward_head(features, pre_logits=True)
    torch.testing.assert_close(pooled, features.mean(dim=(2, 3)))
    assert torch.equal(model.fc(pooled), model(images))


def test_head_takes_one_position():
    model = make("resnet8").eval()
    assert model.forward_head(torch.randn(3, 64, 1, 1)).shape == (3, 100)


def test_any_image_size_and_channels():
    assert make("resnet8", in_chans=5, num_classes=7)(torch.randn(2, 5, 40, 28)).shape == (2, 7)


def test_defaults_come_from_the_configuration():
    assert timm.create_model("resnet8_glyphs")(torch.randn(2, 1, 32, 32)).shape == (2, 100)


@pytest.mark.parametrize("name", PARAMETERS)
def test_configuration(name):
    model = timm.create_model(name)
    cfg = model.pretrained_cfg
    assert cfg is model.default_cfg
    channels = 1 if "glyphs" in name else 3
    assert cfg["input_size"] == (channels, 32, 32)
    assert len(cfg["mean"]) == len(cfg["std"]) == channels
    assert model.get_submodule(cfg["first_conv"]) is model.conv1
    assert model.get_submodule(cfg["classifier"]) is model.get_classifier()
    side = 32 // model.feature_info[-1]["reduction"]
    assert cfg["pool_size"] == (side, side)
    assert not timm.models.is_model_pretrained(name)


def test_reset_classifier():
    model = make("resnet8").double()
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    old = model.fc
    model.reset_classifier(7)
    assert model.get_classifier() is model.fc is not old
    assert model.num_classes == 7
    assert model(images).shape == (2, 7)
    model.reset_classifier(0)
    assert model(images).shape == (2, 64)
    model.reset_classifier(0, "")
    assert model(images).shape == (2, 64, 8, 8)


def test_no_classes_gives_pooled_features():
    model = make("resnet8", num_classes=0).eval()
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(model(images), model.forward_features(images).mean(dim=(2, 3)))


def test_dropout_before_the_classifier():
    model = make("resnet8", drop_rate=0.5)
    pooled = model.forward_head(torch.ones(1, 64, 1, 1), pre_logits=True)
    assert set(pooled.unique().tolist()) == {0.0, 2.0}
    assert torch.equal(
        model.eval().forward_head(torch.ones(1, 64, 1, 1), pre_logits=True), torch.ones(1, 64)
    )
    assert torch.equal(
        make("resnet8").forward_head(torch.ones(1, 64, 1, 1), pre_logits=True), torch.ones(1, 64)
    )


def test_initialization():
    for name, module in make("resnet32x4").named_modules():
        if isinstance(module, nn.Conv2d):
            fan_out = module.out_channels * module.kernel_size[0] ** 2
            assert module.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.1), name
            assert module.bias is None
        if isinstance(module, nn.BatchNorm2d):
            assert torch.equal(module.weight, torch.ones_like(module.weight))
            assert torch.equal(module.bias, torch.zeros_like(module.bias))


def test_every_parameter_gets_a_gradient():
    model = make("resnet8x4")
    model(torch.randn(4, 3, 32, 32)).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("depth", [2, 9, 18])
def test_impossible_depth(depth):
    with pytest.raises(ValueError, match=f"6n \\+ 2.*got {depth}"):
        SmallResNet(depth=depth)
