"""Where the middle and the last feature of a model are, found by a dry run."""

from __future__ import annotations

import warnings

import pytest
import timm
import torch
import torchvision
from timm.models.cait import Cait
from torch import Tensor, nn

import softlabels.models  # noqa: F401  # registers resnet20 and the like with timm
from shared.small_networks import SmallCNN, hard_labels, images_of, num_hooks, small_cnn, small_vit
from softlabels import FeatureTap
from softlabels.taps import Layout, TapPoint

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


# Modules that run more than once


class Shared(nn.Module):
    """One ReLU after each of two convolutions, as many hand-written networks have it."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, 2, 1)
        self.second = nn.Conv2d(8, 16, 3, 2, 1)
        self.relu = nn.ReLU()
        self.fc = nn.Linear(16, 5)

    def forward(self, images: Tensor) -> Tensor:
        return self.forward_head(self.relu(self.second(self.relu(self.first(images)))))

    def forward_head(self, feature: Tensor) -> Tensor:
        return self.fc(feature.mean((2, 3)))


class SharedInTwoHalves(Shared):
    def forward_features(self, images: Tensor) -> Tensor:
        return self.relu(self.second(self.relu(self.first(images))))


@pytest.mark.parametrize("build", [Shared, SharedInTwoHalves])
def test_a_module_that_runs_twice_is_no_tap(build):
    model = build()
    layout = Layout(model, (3, 16, 16))

    assert layout.point("middle") == TapPoint("first", "NCHW", 8, 8, 8)
    assert layout.point("last") == TapPoint("second", "NCHW", 16, 4, 4)
    feature = model.second(model.relu(model.first(images_of())))
    expected = model.fc(feature.relu().flatten(2).transpose(1, 2)).argmax(2)
    assert torch.equal(layout.head().votes(model, feature), expected)
    with pytest.raises(ValueError, match=r"'relu' runs 2 times in a forward and cannot be tapped"):
        layout.at("relu")


def test_a_model_named_like_a_stage_of_ours_is_tapped_by_its_path():
    model = nn.Sequential()
    model.middle, model.last = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 8, 3)
    model.pool, model.flat, model.fc = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)
    layout = Layout(model, (3, 8, 8), {"last": "middle"})

    assert layout.point("last").path == layout.at("middle").path == "middle"
    assert layout.found("last") == "last"


# Halves that are not timm's


class OtherHalves(SmallCNN):
    """Has methods of timm's names that do something else."""

    def forward_features(self, images: Tensor, scale: float) -> Tensor:
        return scale * self.stem(images)

    def forward_head(self, feature: Tensor) -> Tensor:
        return feature


def test_methods_of_timms_names_that_do_something_else_are_not_used():
    layout = Layout(OtherHalves(), (3, 16, 16))

    assert layout.point("last").path == "stage2"
    assert layout.head().steps == (("pool", 4), ("dropout", 2), ("fc", 2))


class WholeMapHead(SmallCNN):
    """In timm's two halves, with a head that needs the whole map."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(16 * 4 * 4, 5)

    def forward_features(self, images: Tensor) -> Tensor:
        return self.stage2(self.stage1(self.stem(images)))

    def forward_head(self, feature: Tensor) -> Tensor:
        return self.fc(feature.flatten(1))

    def forward(self, images: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(images))


def test_a_head_in_halves_that_needs_the_whole_map_is_an_error():
    layout = Layout(WholeMapHead(), (3, 16, 16))

    with pytest.raises(ValueError, match=r"single position .*'stage2', 4x4.*WholeMapHead does not"):
        layout.head()


# Classifiers that are maps


class MapOfClasses(nn.Module):
    """The last convolution has one channel for each class; no module comes after it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 5, 3, 2, 1)

    def forward(self, images: Tensor) -> Tensor:
        return self.second(self.first(images)).mean((2, 3))


class PooledMapOfClasses(MapOfClasses):
    def __init__(self) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)

    def forward(self, images: Tensor) -> Tensor:
        return self.pool(self.second(self.first(images))).flatten(1)


@pytest.mark.parametrize("build", [MapOfClasses, PooledMapOfClasses])
def test_a_map_of_classes_votes_by_itself(build):
    model = build()
    with FeatureTap(model, ["second"]) as tap:
        model(images_of())
        feature = tap.pop()["second"]

    votes = Layout(model, (3, 16, 16)).head().votes(model, feature)

    assert torch.equal(votes, feature.argmax(1).flatten(1))


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
    layout = Layout(small_cnn(), (3, 16, 16))

    point = layout.point("dropout")

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
    with pytest.raises(
        ValueError,
        match=r"no run of blocks that return tokens in _Mixer: .* name a middle with taps",
    ):
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
