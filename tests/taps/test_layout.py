"""Where the middle and the last feature of a model are, found by a dry run."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import timm
import torch
import torchvision
from timm.models.cait import Cait
from torch import Tensor, nn

import softlabels.models  # noqa: F401  # registers resnet20 and the like with timm
from small_networks import SmallCNN, hard_labels, images_of, num_hooks, small_cnn, small_vit
from softlabels import FeatureTap
from softlabels.taps import Layout, TapPoint


def plain_sequential() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 10),
    )


def of_timm(name: str) -> Callable[[], nn.Module]:
    return lambda: timm.create_model(name, num_classes=10)


def of_torchvision(name: str) -> Callable[[], nn.Module]:
    return lambda: getattr(torchvision.models, name)(num_classes=10)


@dataclass(frozen=True)
class Row:
    """A network, and where its middle and its last feature are."""

    build: Callable[[], nn.Module]
    size: int
    middle: TapPoint
    last: TapPoint


def tokens(path: str, channels: int) -> TapPoint:
    return TapPoint(path, "tokens", channels, 14, 14, prefix_tokens=1, class_token=True)


# fmt: off
TABLE = {
    "resnet20": Row(
        of_timm("resnet20"), 32,
        TapPoint("layer2", "NCHW", 32, 16, 16), TapPoint("layer3", "NCHW", 64, 8, 8)),
    "resnet8x4": Row(
        of_timm("resnet8x4"), 32,
        TapPoint("layer2", "NCHW", 128, 16, 16), TapPoint("layer3", "NCHW", 256, 8, 8)),
    "timm resnet18": Row(
        of_timm("resnet18"), 224,
        TapPoint("layer3", "NCHW", 256, 14, 14), TapPoint("layer4", "NCHW", 512, 7, 7)),
    "timm mobilenetv2_100": Row(
        of_timm("mobilenetv2_100"), 224,
        TapPoint("blocks.6", "NCHW", 320, 7, 7), TapPoint("bn2", "NCHW", 1280, 7, 7)),
    "timm vit_tiny_patch16_224": Row(
        of_timm("vit_tiny_patch16_224"), 224,
        tokens("blocks.5", 192), tokens("norm", 192)),
    "timm swin_tiny_patch4_window7_224": Row(
        of_timm("swin_tiny_patch4_window7_224"), 224,
        TapPoint("layers.2", "NHWC", 384, 14, 14), TapPoint("norm", "NHWC", 768, 7, 7)),
    "torchvision resnet18": Row(
        of_torchvision("resnet18"), 224,
        TapPoint("layer3", "NCHW", 256, 14, 14), TapPoint("layer4", "NCHW", 512, 7, 7)),
    "torchvision mobilenet_v2": Row(
        of_torchvision("mobilenet_v2"), 224,
        TapPoint("features.17", "NCHW", 320, 7, 7), TapPoint("features", "NCHW", 1280, 7, 7)),
    "torchvision shufflenet_v2_x1_0": Row(
        of_torchvision("shufflenet_v2_x1_0"), 224,
        TapPoint("stage4", "NCHW", 464, 7, 7), TapPoint("conv5", "NCHW", 1024, 7, 7)),
    "torchvision vit_b_16": Row(
        of_torchvision("vit_b_16"), 224,
        tokens("encoder.layers.encoder_layer_5", 768), tokens("encoder", 768)),
    "plain Sequential": Row(
        plain_sequential, 16,
        TapPoint("2", "NCHW", 8, 16, 16), TapPoint("5", "NCHW", 16, 8, 8)),
}
# fmt: on


@dataclass(frozen=True)
class Found:
    row: Row
    model: nn.Module
    layout: Layout
    features: dict[str, Tensor]
    logits: Tensor


@pytest.fixture(scope="module", params=TABLE)
def found(request) -> Found:
    row = TABLE[request.param]
    model = row.build().eval()
    shape = (3, row.size, row.size) if request.param == "plain Sequential" else None
    layout = Layout(model, shape)
    paths = (row.middle.path, row.last.path)
    with torch.no_grad(), FeatureTap(model, paths) as tap:
        logits = model(images_of(2, (3, row.size, row.size)))
        return Found(row, model, layout, tap.pop(), logits)


def check_feature(feature: Tensor, point: TapPoint) -> None:
    """The feature that a real forward gives at a place is as the table says."""
    size = (point.height, point.width)
    shapes = {
        "NCHW": (2, point.channels, *size),
        "NHWC": (2, *size, point.channels),
        "tokens": (2, point.prefix_tokens + point.height * point.width, point.channels),
    }
    assert tuple(feature.shape) == shapes[point.kind]
    assert point.pooled(feature).shape == (2, point.channels)
    assert point.as_map(feature).shape == (2, point.channels, *size)


# The table


def test_the_middle_and_the_last_feature_are_where_the_table_says(found):
    assert found.layout.point("middle") == found.row.middle
    assert found.layout.point("last") == found.row.last


def test_a_forward_gives_there_what_the_table_says(found):
    check_feature(found.features[found.row.middle.path], found.row.middle)
    check_feature(found.features[found.row.last.path], found.row.last)
    assert found.layout.num_classes == 10
    assert found.layout.example_shape == (3, found.row.size, found.row.size)


def test_a_tap_at_another_place_would_not_pass(found):
    row, layout = found.row, found.layout

    assert layout.point(row.last.path) == row.last != row.middle
    assert layout.point(row.middle.path) == row.middle != row.last
    for wrong in (
        replace(row.middle, channels=row.middle.channels + 1),
        replace(row.middle, height=row.middle.height + 1),
        replace(row.middle, kind="NHWC" if row.middle.kind == "NCHW" else "NCHW"),
    ):
        with pytest.raises(AssertionError):
            check_feature(found.features[row.middle.path], wrong)


def test_the_logits_come_from_the_last_feature(found):
    """The pooled last feature, through the classifier alone, gives the model's logits."""
    layers = [m for m in found.model.modules() if isinstance(m, nn.Linear)]
    pooled = found.row.last.pooled(found.features[found.row.last.path])

    torch.testing.assert_close(layers[-1](pooled), found.logits, rtol=1e-3, atol=1e-4)


# Agreement with timm's own table of stages


@pytest.mark.parametrize(
    "name",
    [
        "convnext_atto",
        "densenet121",
        "dla34",
        "efficientnet_b0",
        "mobilenetv3_small_050",
        "mobilenetv4_conv_small",
        "pvt_v2_b0",
        "regnetx_002",
        "resnet8x4",
        "resnet18",
        "resnetv2_18",
        "swin_tiny_patch4_window7_224",
    ],
)
def test_the_middle_is_timms_second_to_last_stage(name):
    size = 224 if name.startswith("swin") else 64
    model = timm.create_model(name, num_classes=10)
    stage = model.feature_info[-2]

    point = Layout(model, (3, size, size)).point("middle")

    assert (point.path, point.channels) == (stage["module"], stage["num_chs"])
    assert point.height == size // stage["reduction"]


@pytest.mark.parametrize("name", ["mobilenetv2_050", "mobilenetv2_100"])
def test_mobilenet_v2_is_tapped_where_the_published_runs_did(name):
    model = timm.create_model(name, num_classes=10)

    path = Layout(model, (3, 64, 64)).point("middle").path

    assert path == model.feature_info[-1]["module"] == "blocks.6"


# Networks without an exact halving


class Strides(nn.Module):
    """A stem at full size, and stages of the given strides in a container."""

    def __init__(self, strides: list[int]) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.stages = nn.Sequential(*(nn.Conv2d(4, 4, 3, stride, 1) for stride in strides))
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.stages(self.stem(images)))


def middle_with_warning(model: nn.Module, size: int) -> TapPoint:
    layout = Layout(model, (3, size, size))
    with pytest.warns(UserWarning, match="no map at twice the final resolution") as caught:
        point = layout.point("middle")
    (warning,) = caught
    assert f"taking '{point.path}' as its middle" in str(warning.message)
    assert "taps={'middle': 'path.of.module'}" in str(warning.message)
    return point


@pytest.mark.parametrize(
    ("strides", "size", "path", "map_size"),
    [
        ([1, 2, 2], 30, "stages.1", 15),  # 30, 15, 8
        ([1, 2, 2, 1], 30, "stages.1", 15),
        ([2, 3, 1], 36, "stages.0", 18),  # 36, 18, 6, 6
        ([4, 1], 32, "stem", 32),  # 32, 8, 8
    ],
)
def test_an_odd_size_takes_the_last_child_above_the_final_resolution(strides, size, path, map_size):
    point = middle_with_warning(Strides(strides), size)

    assert (point.path, point.height) == (path, map_size)


def test_the_middle_never_comes_after_the_last_map():
    """Squeezenet: a 1x1 classifier map follows the last one, and 27 is not twice 13."""
    point = middle_with_warning(torchvision.models.squeezenet1_1(num_classes=10), 224)

    assert (point.path, point.channels, point.height) == ("features.7", 256, 27)


def test_a_container_of_the_final_resolution_is_looked_into():
    """53, 27, 14, 7, 4: only the stem comes before the container of all the blocks."""
    point = middle_with_warning(timm.create_model("tinynet_e", num_classes=10), 106)

    assert (point.path, point.height) == ("blocks.4", 7)


@pytest.mark.parametrize(
    ("layers", "path"),
    [
        ([nn.Conv2d(3, 4, 1), nn.Conv2d(4, 6, 1), nn.Conv2d(6, 8, 1)], "1"),
        ([nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 8, 1), nn.ReLU()], "0"),
        (
            [nn.Conv2d(3, 4, 1), nn.Conv2d(4, 6, 1), nn.AdaptiveAvgPool2d(1), nn.Conv2d(6, 8, 1)],
            "0",
        ),
    ],
    ids=["convolutions", "activations", "a classifier's map"],
)
def test_a_network_of_one_resolution_takes_its_second_to_last_stage(layers, path):
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)]

    assert middle_with_warning(nn.Sequential(*layers, *head), 8).path == path


def test_the_order_is_that_of_running_not_of_declaring():
    class Backwards(SmallCNN):
        def __init__(self) -> None:
            super().__init__()
            stages = {name: self._modules.pop(name) for name in ("stem", "stage1", "stage2")}
            self.before = nn.Conv2d(12, 12, 1)  # at the middle's resolution, run before stage1
            self.stage1_end = nn.Conv2d(12, 12, 1)
            self.stage2, self.stage1, self.stem = reversed(stages.values())

        def forward(self, images: Tensor) -> Tensor:
            feature = self.before(self.stage1_end(self.stage1(self.stem(images))))
            return self.fc(self.pool(self.stage2(feature)).flatten(1))

    assert Layout(Backwards(), (3, 16, 16)).point("middle").path == "before"


def test_an_exact_halving_gives_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Layout(small_cnn(), (3, 16, 16)).point("middle")


# Maps and tokens of other shapes


class ChannelsLast(nn.Module):
    """Maps of [B, H, W, C], the first of nearly as many channels as columns."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 9, 2, 2)
        self.to_last = _Permute(0, 2, 3, 1)
        self.first = nn.Linear(9, 9)
        self.merge = _Merge(9, 12)
        self.norm = nn.LayerNorm(12)
        self.fc = nn.Linear(12, 5)

    def forward(self, images: Tensor) -> Tensor:
        x = self.first(self.to_last(self.patch(images)))
        return self.fc(self.norm(self.merge(x)).mean((1, 2)))


class _Permute(nn.Module):
    def __init__(self, *dims: int) -> None:
        super().__init__()
        self.dims = dims

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(self.dims)


class _Merge(nn.Module):
    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.fc = nn.Linear(4 * width, out)

    def forward(self, x: Tensor) -> Tensor:
        batch, height, width, channels = x.shape
        x = x.reshape(batch, height // 2, 2, width // 2, 2, channels).transpose(2, 3)
        return self.fc(x.flatten(3))


def test_maps_with_channels_last_are_seen_as_such():
    model = ChannelsLast().eval()
    layout = Layout(model, (3, 16, 16))

    middle, last = layout.point("middle"), layout.point("last")

    assert middle == TapPoint("first", "NHWC", 9, 8, 8)
    assert last == TapPoint("norm", "NHWC", 12, 4, 4)
    with torch.no_grad(), FeatureTap(model, ["norm"]) as tap:
        logits = model(images_of())
        feature = tap.pop()["norm"]
    torch.testing.assert_close(model.fc(last.pooled(feature)), logits)
    torch.testing.assert_close(last.as_map(feature)[:, 7, 1, 2], feature[:, 1, 2, 7])


@pytest.mark.parametrize(("height", "width"), [(16, 32), (32, 16), (16, 24)])
def test_images_that_are_not_square(height, width):
    shape = (3, height, width)
    for model, kind, paths in (
        (small_cnn(), "NCHW", ("stage1", "stage2")),
        (ChannelsLast(), "NHWC", ("first", "norm")),
    ):
        layout = Layout(model, shape)
        middle, last = layout.point("middle"), layout.point("last")

        assert (middle.path, last.path) == paths
        assert last.kind == kind
        assert (last.height, last.width) == (height // 4, width // 4)


@pytest.mark.parametrize(("height", "width"), [(16, 16), (8, 16), (8, 32), (32, 8)])
def test_patch_tokens_know_their_grid(height, width):
    model = timm.models.vision_transformer.VisionTransformer(
        img_size=(height, width), patch_size=4, embed_dim=24, depth=2, num_heads=2, num_classes=5
    )
    point = Layout(model).point("last")

    assert (point.height, point.width) == (height // 4, width // 4)
    patches = torch.arange(height * width // 16.0).view(height // 4, width // 4)
    feature = torch.cat((torch.tensor([-1.0]), patches.flatten()))[None, :, None].expand(1, -1, 24)
    torch.testing.assert_close(point.as_map(feature)[0, 0], patches)
    assert point.pooled(feature).unique().item() == -1


def test_a_vit_without_class_token_pools_its_patch_tokens():
    model = timm.models.vision_transformer.VisionTransformer(
        img_size=16,
        patch_size=4,
        embed_dim=24,
        depth=6,
        num_heads=2,
        num_classes=5,
        class_token=False,
        global_pool="avg",
        reg_tokens=2,
    )
    point = Layout(model).point("middle")
    feature = torch.randn(3, 18, 24)

    assert point == TapPoint("blocks.2", "tokens", 24, 4, 4, prefix_tokens=2)
    torch.testing.assert_close(point.pooled(feature), feature[:, 2:].mean(1))
    assert point.as_map(feature).shape == (3, 24, 4, 4)


def test_blocks_before_the_class_token_joins_have_none():
    """In CaiT and XCiT, the class token meets the patches only after the ordinary blocks."""
    model = Cait(img_size=16, patch_size=4, embed_dim=24, depth=4, num_heads=2, num_classes=5)
    layout = Layout(model)

    middle, last = layout.point("middle"), layout.point("last")

    assert middle == TapPoint("blocks.1", "tokens", 24, 4, 4)
    assert last == TapPoint("norm", "tokens", 24, 4, 4, prefix_tokens=1, class_token=True)


def test_a_path_that_gives_a_vector_is_a_feature_too():
    layout = Layout(plain_sequential(), (3, 16, 16))

    point = layout.point("7")

    assert (point.kind, point.channels) == ("vector", 16)
    vector = torch.randn(2, 16)
    assert point.pooled(vector) is vector
    torch.testing.assert_close(point.as_map(vector)[:, :, 0, 0], vector)


# Overrides


def test_overrides_name_another_middle_and_last():
    layout = Layout(small_cnn(), (3, 16, 16), {"middle": "stem", "last": "stage1.0"})

    assert layout.point("middle") == TapPoint("stem", "NCHW", 8, 16, 16)
    assert layout.point("last") == TapPoint("stage1.0", "NCHW", 12, 8, 8)


def test_an_override_wins_over_the_published_place():
    model = timm.create_model("mobilenetv2_050", num_classes=10)

    assert Layout(model, (3, 64, 64), {"middle": "blocks.4"}).point("middle").path == "blocks.4"


def test_an_override_helps_a_model_that_no_rule_fits():
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 12), nn.ReLU(), nn.Linear(12, 5))

    point = Layout(model, (3, 4, 4), {"middle": "2"}).point("middle")

    assert point == TapPoint("2", "vector", 12)


def test_a_wrong_override_is_an_error_that_lists_near_names():
    with pytest.raises(ValueError, match=r"no module 'stagel'; near names: .*stage1"):
        Layout(small_cnn(), (3, 16, 16), {"middle": "stagel"})
    with pytest.raises(ValueError, match="must name 'middle' or 'last', got 'first'"):
        Layout(small_cnn(), (3, 16, 16), {"first": "stem"})


# Errors


@pytest.mark.parametrize("stage", ["middle", "last"])
def test_a_model_without_maps_or_tokens_is_an_error(stage):
    layout = Layout(nn.Sequential(nn.Flatten(), nn.Linear(48, 5)), (3, 4, 4))

    with pytest.raises(ValueError, match="no last map or tokens in Sequential; name one"):
        layout.point(stage)


class _Mixer(nn.Module):
    """Tokens without a run of blocks: two layers of one class are not yet two blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 8, 4, 4)
        self.flatten = nn.Flatten(2)
        self.first = nn.Linear(16, 16)
        self.second = nn.Linear(16, 16)
        self.fc = nn.Linear(8, 5)

    def forward(self, images: Tensor) -> Tensor:
        x = self.second(self.first(self.flatten(self.patch(images))))
        return self.fc(x.mean(2))


def test_tokens_without_blocks_are_an_error():
    with pytest.raises(ValueError, match="no run of blocks in _Mixer; name a middle with taps"):
        Layout(_Mixer(), (3, 16, 16)).point("middle")


def test_a_network_of_one_map_has_no_middle():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)
    )

    with pytest.raises(ValueError, match="no middle feature in Sequential; name one with taps"):
        Layout(model, (3, 8, 8)).point("middle")


def test_a_path_without_a_feature_is_an_error():
    model = small_cnn()
    model.unused = nn.Linear(2, 2)
    layout = Layout(model, (3, 16, 16))

    with pytest.raises(ValueError, match="module 'unused' returns no map, tokens or vector"):
        layout.point("unused")
    with pytest.raises(ValueError, match=r"no module 'stage3'; near names: .*stage2"):
        layout.point("stage3")


@pytest.mark.parametrize("shape", [(3, 16), (3, 0, 16), (3, 16.0, 16), (3, 16, 16, 16)])
def test_an_example_shape_must_be_three_counts(shape):
    with pytest.raises(ValueError, match=r"must be \(channels, height, width\), got"):
        Layout(small_cnn(), shape)


def test_a_dry_run_that_fails_says_with_what_images():
    with pytest.raises(ValueError, match=r"\(2, 1, 16, 16\) failed: RuntimeError.*example_shape="):
        Layout(small_cnn(), (1, 16, 16))


@pytest.mark.parametrize(
    ("tail", "got"), [(nn.Unflatten(1, (5, 1)), r"\(2, 5, 1\)"), (nn.GRU(5, 3), "tuple")]
)
def test_a_model_that_gives_no_logits_is_an_error(tail, got):
    model = nn.Sequential(small_cnn(), tail)

    with pytest.raises(ValueError, match=rf"must return logits \[B, classes\].*got {got}"):
        Layout(model, (3, 16, 16))


# The example


@pytest.mark.parametrize(
    ("build", "shape"),
    [
        (lambda: timm.create_model("resnet20"), (3, 32, 32)),
        (small_vit, (3, 16, 16)),
        (lambda: torchvision.models.VisionTransformer(16, 8, 2, 2, 8, 16), (3, 16, 16)),
        (lambda: SmallCNN(channels=1), (1, 224, 224)),
    ],
)
def test_without_an_example_shape_the_models_own_is_taken(build, shape):
    assert Layout(build()).example_shape == shape


def test_the_example_has_the_models_type():
    layout = Layout(small_cnn().double(), (3, 16, 16))

    assert layout.example().dtype == torch.float64
    assert layout.example().shape == (2, 3, 16, 16)
    assert layout.point("middle").path == "stage1"


# What the dry run leaves as it was


class Counting(SmallCNN):
    """Changes a buffer and draws random numbers in eval mode, too."""

    def __init__(self) -> None:
        super().__init__(dropout=0.5)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, images: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(images + torch.rand(()))


def test_the_dry_run_leaves_no_trace():
    torch.manual_seed(3)
    model = Counting().train()
    model.stem.eval()  # a frozen stage
    nn.functional.cross_entropy(model(images_of()), hard_labels()).backward()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    modes = {name: module.training for name, module in model.named_modules()}
    random_state = torch.get_rng_state()

    layout = Layout(model, (3, 16, 16))
    layout.point("middle")
    layout.head()

    assert num_hooks(model) == 0
    assert torch.equal(torch.get_rng_state(), random_state)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert model.state_dict().keys() == state.keys()
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name
    assert state["calls"] == 1
    assert state["stage1.1.num_batches_tracked"] == 1
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.grad, gradients[name])
        assert parameter.requires_grad


def test_a_dry_run_that_fails_leaves_no_trace():
    class Failing(Counting):
        def forward(self, images: Tensor) -> Tensor:
            super().forward(images)
            raise RuntimeError("on purpose")

    model = Failing().train()
    random_state = torch.get_rng_state()

    with pytest.raises(ValueError, match="on purpose"):
        Layout(model, (3, 16, 16))

    assert num_hooks(model) == 0
    assert model.calls == 0
    assert all(module.training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), random_state)
