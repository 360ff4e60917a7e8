"""Votes: the model's own classifier at every position of its last map, against brute force."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import timm
import torch
import torchvision
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional

import softlabels.models  # noqa: F401  # registers resnet20 and the like with timm
from shared.small_networks import NUM_CLASSES, SmallCNN, images_of, small_cnn
from softlabels import FeatureTap
from softlabels.taps import Layout, PositionHead, TapPoint


class FunctionalRelu(SmallCNN):
    """Applies a ReLU to the last map that no module shows."""

    def __init__(self) -> None:
        super().__init__()
        self.stage2 = self.stage2[:2]

    def forward(self, images: Tensor) -> Tensor:
        feature = self.stage2(self.stage1(self.stem(images)))
        return self.fc(self.pool(functional.relu(feature)).flatten(1))


class DeepHead(SmallCNN):
    """A classifier of several layers after the pooling, with batch norm and dropout."""

    def __init__(self, norm: type[nn.Module] = nn.BatchNorm1d) -> None:
        super().__init__()
        self.fc = nn.Sequential(
            nn.Linear(16, 8), norm(8), nn.Hardswish(), nn.Dropout(0.9), nn.Linear(8, NUM_CLASSES)
        )
        self.fc[1].running_mean.uniform_(-1, 1)
        self.fc[1].running_var.uniform_(0.5, 2)


def sequential() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, padding=1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, NUM_CLASSES),
    )


def register_vit() -> nn.Module:
    """Patch tokens after a class token and two registers; the class token classifies."""
    return VisionTransformer(
        img_size=16,
        patch_size=4,
        embed_dim=24,
        depth=2,
        num_heads=2,
        num_classes=NUM_CLASSES,
        reg_tokens=2,
    )


def pooled_vit() -> nn.Module:
    """The mean of the patch tokens, without two registers, classifies after a norm of its own."""
    return VisionTransformer(
        img_size=16,
        patch_size=4,
        embed_dim=24,
        depth=2,
        num_heads=2,
        num_classes=NUM_CLASSES,
        class_token=False,
        global_pool="avg",
        reg_tokens=2,
    )


def of_timm(name: str, **settings: object) -> Callable[[], nn.Module]:
    return lambda: timm.create_model(name, num_classes=NUM_CLASSES, **settings)


def of_torchvision(name: str, **settings: object) -> Callable[[], nn.Module]:
    return lambda: getattr(torchvision.models, name)(num_classes=NUM_CLASSES, **settings)


def tv_vit() -> nn.Module:
    return torchvision.models.VisionTransformer(16, 4, 2, 2, 8, 16, num_classes=NUM_CLASSES)


def features_of(model: nn.Module, images: Tensor) -> Tensor:
    """timm's name, on [B, N, D] or a map."""
    features: Tensor = model.forward_features(images)
    return features


def channels_last(map_: Tensor) -> Tensor:
    return map_.permute(0, 2, 3, 1)


# By hand: the vectors that are classified, [B, H, W, D], and the classifier of one vector.
# fmt: off
BY_HAND = {
    "resnet20": (
        of_timm("resnet20"), 32,
        lambda m, x: channels_last(features_of(m, x)), lambda m, v: m.fc(v)),
    "timm resnet18": (
        of_timm("resnet18"), 64,
        lambda m, x: channels_last(features_of(m, x)), lambda m, v: m.fc(v)),
    "timm mobilenetv3": (
        of_timm("mobilenetv3_small_050"), 64,
        lambda m, x: channels_last(features_of(m, x)),
        lambda m, v: m.classifier(m.act2(m.conv_head(v[:, :, None, None]))[:, :, 0, 0])),
    "timm swin": (
        of_timm("swin_tiny_patch4_window7_224", img_size=64, window_size=2,
                depths=(1, 1, 1, 1), embed_dim=24),
        64, features_of, lambda m, v: m.head.fc(v)),
    "timm vit": (
        of_timm("vit_tiny_patch16_224", img_size=64, depth=2), 64,
        lambda m, x: features_of(m, x)[:, 1:].unflatten(1, (4, 4)), lambda m, v: m.head(v)),
    "timm vit with registers": (
        register_vit, 16,
        lambda m, x: features_of(m, x)[:, 3:].unflatten(1, (4, 4)), lambda m, v: m.head(v)),
    "timm vit, pooled": (
        pooled_vit, 16,
        lambda m, x: features_of(m, x)[:, 2:].unflatten(1, (4, 4)),
        lambda m, v: m.head(m.fc_norm(v))),
    "torchvision resnet18": (
        of_torchvision("resnet18"), 64,
        lambda m, x: channels_last(nn.Sequential(*list(m.children())[:-2])(x)),
        lambda m, v: m.fc(v)),
    "torchvision densenet121": (
        of_torchvision("densenet121"), 64,
        lambda m, x: channels_last(m.features(x).relu()), lambda m, v: m.classifier(v)),
    "torchvision mobilenet_v2": (
        of_torchvision("mobilenet_v2"), 64,
        lambda m, x: channels_last(m.features(x)), lambda m, v: m.classifier[1](v)),
    "torchvision convnext_tiny": (
        lambda: torchvision.models.convnext.ConvNeXt(
            [torchvision.models.convnext.CNBlockConfig(8, 16, 1),
             torchvision.models.convnext.CNBlockConfig(16, None, 1)], num_classes=NUM_CLASSES),
        32, lambda m, x: channels_last(m.features(x)),
        lambda m, v: m.classifier(v[:, :, None, None])),
    "torchvision vit": (
        tv_vit, 16,
        lambda m, x: m.encoder(torch.cat(
            (m.class_token.expand(len(x), -1, -1), m._process_input(x)), 1))[:, 1:]
        .unflatten(1, (4, 4)),
        lambda m, v: m.heads(v)),
    "functional relu": (
        FunctionalRelu, 16,
        lambda m, x: channels_last(m.stage2(m.stage1(m.stem(x))).relu()), lambda m, v: m.fc(v)),
    "deep head": (
        DeepHead, 16,
        lambda m, x: channels_last(m.stage2(m.stage1(m.stem(x)))), lambda m, v: m.fc(v)),
    "plain Sequential": (
        sequential, 16, lambda m, x: channels_last(m[:3](x)), lambda m, v: m[5](v)),
}
# fmt: on


class Case:
    """A network in float64, so that no two classes tie by rounding; its last map, its head."""

    def __init__(self, name: str) -> None:
        build, size, self.vectors_of, self.classify = BY_HAND[name]
        torch.manual_seed(2)
        self.model = build().double().eval()
        self.images = images_of(3, (3, size, size)).double()
        self._spread_the_votes()
        self.head = Layout(self.model, (3, size, size)).head()

    @torch.no_grad()
    def _spread_the_votes(self) -> None:
        """A fresh network votes for one class everywhere: take its mean logits off."""
        classifier = [m for m in self.model.modules() if isinstance(m, nn.Linear)][-1]
        classifier.weight.normal_()
        vectors = self.vectors_of(self.model, self.images)
        classifier.bias -= self.classify(self.model, vectors.flatten(0, 2)).mean(0)

    def feature(self) -> Tensor:
        return feature_of(self.model, self.head, self.images)

    def by_hand(self, upsample: int = 1) -> Tensor:
        """One classifier call for each position of each image."""
        with torch.no_grad():
            vectors = self.vectors_of(self.model, self.images)
            if upsample > 1:
                vectors = functional.interpolate(
                    vectors.permute(0, 3, 1, 2),
                    scale_factor=upsample,
                    mode="bilinear",
                    align_corners=False,
                ).permute(0, 2, 3, 1)
            return torch.tensor(
                [
                    [int(self.classify(self.model, vector[None])[0].argmax()) for vector in row]
                    for row in vectors.flatten(1, 2)
                ]
            )


def feature_of(model: nn.Module, head: PositionHead, images: Tensor) -> Tensor:
    with FeatureTap(model, [head.point.path]) as tap:
        model(images)
        return tap.pop()[head.point.path]


@pytest.fixture(scope="module", params=BY_HAND)
def case(request) -> Case:
    return Case(request.param)


# Against brute force


def test_votes_equal_the_classifier_at_each_position(case):
    votes = case.head.votes(case.model, case.feature())

    expected = case.by_hand()
    assert torch.equal(votes, expected)
    assert expected.unique().numel() > 1
    assert votes.shape == (3, case.head.point.height * case.head.point.width)


def test_upsampling_by_two_gives_four_times_the_votes(case):
    votes = case.head.votes(case.model, case.feature(), upsample=2)

    assert votes.shape == (3, 4 * case.head.point.height * case.head.point.width)
    assert torch.equal(votes, case.by_hand(upsample=2))


def test_the_size_of_the_chunks_does_not_change_the_votes(case, monkeypatch):
    feature = case.feature()
    whole = case.head.votes(case.model, feature)

    calls = []
    logits = PositionHead.logits
    monkeypatch.setattr(
        PositionHead, "logits", lambda *args: calls.append(len(args[2])) or logits(*args)
    )
    monkeypatch.setattr("softlabels.taps.feature_tap._CHUNK_BYTES", 1)
    chunked = case.head.votes(case.model, feature)

    assert torch.equal(chunked, whole)
    assert calls == [1] * whole.numel()  # one position at a time


def test_votes_carry_no_gradient_and_leave_the_mode(case, monkeypatch):
    grad_modes = set()
    logits = PositionHead.logits
    monkeypatch.setattr(
        PositionHead,
        "logits",
        lambda *args: grad_modes.add(torch.is_grad_enabled()) or logits(*args),
    )
    case.model.train()
    try:
        feature = case.feature().requires_grad_()
        votes = case.head.votes(case.model, feature)
        modes = {module.training for module in case.model.modules()}
    finally:
        case.model.eval()

    assert votes.dtype == torch.int64
    assert not votes.requires_grad
    assert grad_modes == {False}
    assert modes == {True}


# The head runs in eval mode


def votes_in_training(model: nn.Module, size: int) -> tuple[Tensor, Tensor]:
    """Votes on one map, once in eval and once in training mode, with the same weights."""
    model = model.double().eval()
    head = Layout(model, (3, size, size)).head()
    feature = feature_of(model, head, images_of(8, (3, size, size)).double())
    evaluated = head.votes(model, feature)
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    model.train()

    random_state = torch.get_rng_state()
    trained = head.votes(model, feature)

    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(module.training for module in model.modules())
    for name, value in model.named_buffers():
        assert torch.equal(value, buffers[name]), name
    return evaluated, trained


@pytest.mark.parametrize(
    ("build", "size"),
    [
        (lambda: small_cnn(dropout=0.9), 16),
        (DeepHead, 16),
        (lambda: DeepHead(nn.SyncBatchNorm), 16),
        (of_timm("resnet20", drop_rate=0.9), 32),
        (of_timm("resnet10t", drop_rate=0.9), 64),  # timm's functional dropout
        (of_timm("mobilenetv4_conv_small", drop_rate=0.9), 64),  # a norm after the pooling
        (of_torchvision("mobilenet_v2", dropout=0.9), 64),
    ],
    ids=["dropout", "batch norm", "sync norm", "resnet20", "functional", "norm head", "classifier"],
)
def test_the_head_votes_in_eval_mode_while_the_model_trains(build, size):
    evaluated, trained = votes_in_training(build(), size)

    assert torch.equal(trained, evaluated)


def test_a_frozen_part_of_the_head_stays_frozen():
    model = DeepHead().train()
    head = Layout(model, (3, 16, 16)).head()
    model.fc[1].eval()
    feature = feature_of(model, head, images_of())

    head.votes(model, feature)

    assert not model.fc[1].training
    assert model.fc[3].training


def test_the_modes_come_back_after_an_error():
    model = DeepHead().train()
    head = Layout(model, (3, 16, 16)).head()

    with pytest.raises(RuntimeError):
        head.votes(model, torch.zeros(2, 7, 4, 4))

    assert all(module.training for module in model.modules())


def test_votes_of_a_copy_come_from_the_copys_own_classifier():
    model, other = small_cnn(seed=0).eval(), small_cnn(seed=1).eval()
    head = Layout(model, (3, 16, 16)).head()
    feature = feature_of(model, head, images_of())

    assert not torch.equal(head.votes(other, feature), head.votes(model, feature))
    other.fc.load_state_dict(model.fc.state_dict())
    assert torch.equal(head.votes(other, feature), head.votes(model, feature))


# Classifiers that cannot vote


def test_a_classifier_of_the_whole_map_is_an_error():
    model = torchvision.models.vgg11_bn(num_classes=NUM_CLASSES, init_weights=False)

    with pytest.raises(
        ValueError,
        match=r"single position of the last map \('avgpool', 7x7\).*\(classifier\) do not give",
    ):
        Layout(model, (3, 32, 32)).head()


@pytest.mark.parametrize("build", [of_torchvision("resnet18"), of_timm("resnet18")])
def test_a_map_that_is_not_the_last_is_an_error(build):
    with pytest.raises(ValueError, match=r"\('layer3', 4x4\).*\(layer4, .*fc\) do not give"):
        Layout(build(), (3, 64, 64), {"last": "layer3"}).head()


def test_the_votes_may_be_read_before_a_norm_that_the_model_has():
    """With the last tap moved before timm's final norm, the norm becomes part of the head."""
    model = pooled_vit().double().eval()
    head = Layout(model, (3, 16, 16), {"last": "blocks.1"}).head()
    images = images_of().double()
    feature = feature_of(model, head, images)

    votes = head.votes(model, feature)

    assert torch.equal(votes, model.head(model.fc_norm(feature[:, 2:])).argmax(2))


def test_tokens_without_patches_are_an_error():
    """PiT gives its class token alone to the classifier."""
    model = timm.create_model("pit_ti_224", num_classes=NUM_CLASSES)

    with pytest.raises(ValueError, match="'norm' gives no patch tokens to vote"):
        Layout(model).head()


@pytest.mark.parametrize(("num_classes", "largest"), [(10, 128), (300, 59), (50_000, 1)])
def test_a_chunk_has_room_for_the_logits_too(num_classes, largest, monkeypatch):
    monkeypatch.setattr("softlabels.taps.feature_tap._CHUNK_BYTES", 100_000)
    sizes = []

    def classify(positions):
        sizes.append(len(positions))
        return torch.nn.functional.one_hot(torch.arange(len(positions)) % 3, 3)

    votes = TapPoint.votes_of(torch.zeros(7, 41, 8, 8), num_classes, classify)

    assert votes.shape == (7, 64)
    assert sum(sizes) == 7 * 64
    # 4 bytes for each of 3 x 41 features and the logits of a position; whole images if two fit.
    assert max(sizes) == largest
