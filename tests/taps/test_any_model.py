"""Networks of timm, torchvision and of nobody: where they are tapped, with no settings."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import timm
import torch
import torchvision
from torch import Tensor, distributed, multiprocessing, nn
from torch.nn.parallel import DistributedDataParallel

import softlabels.models  # noqa: F401  # registers resnet20 and the like with timm
from softlabels import Distiller, FeatureTap, USKDLoss, ZipfLSLoss, uskd_loss, zipf_ls_loss
from softlabels.inputs import Logits, Target, Votes, WeakLogits
from softlabels.losses import Method
from softlabels.taps import Layout, TapPoint

NUM_CLASSES = 10


def of_timm(name: str) -> Callable[[], nn.Module]:
    return lambda: timm.create_model(name, num_classes=NUM_CLASSES)


def of_torchvision(name: str) -> Callable[[], nn.Module]:
    return lambda: torchvision.models.get_model(name, num_classes=NUM_CLASSES)


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
        nn.Linear(16, NUM_CLASSES),
    )


@dataclass(frozen=True)
class Row:
    """A network, and where its middle feature (USKD) and its last map (Zipf's votes) are.

    Attributes:
        build: Gives it with random weights.
        middle: The tap for images of its own size.
        last: Likewise.
        step_size: Side of the images of the training steps: for a CNN small ones do.
        own_size: Whether the size is known without being told.
        slow: Whether it takes too long for every day.
    """

    build: Callable[[], nn.Module]
    middle: TapPoint
    last: TapPoint
    step_size: int = 64
    own_size: int | None = 224
    slow: bool = False


def cnn(
    build: Callable[[], nn.Module],
    middle: tuple[str, int, int],
    last: tuple[str, int, int],
    **settings: Any,
) -> Row:
    """Paths, widths and sides of square maps."""
    points = [TapPoint(path, "NCHW", width, side, side) for path, width, side in (middle, last)]
    return Row(build, *points, **settings)


def vit(build: Callable[[], nn.Module], middle: str, last: str, width: int, *, slow=False) -> Row:
    """A class token and 14x14 patches."""
    points = [TapPoint(path, "tokens", width, 14, 14, 1, True) for path in (middle, last)]
    return Row(build, *points, step_size=224, slow=slow)


# fmt: off
# Published places (of USKD's runs, at 224x224): last stage but one of ResNet, RegNetX and Swin;
# the 512-channel part of MobileNet; 320 and 464 channels at 7x7 of MobileNetV2 and ShuffleNetV2;
# the class token after block 6 of 12 of DeiT.
TABLE = {
    "timm resnet18": cnn(of_timm("resnet18"), ("layer3", 256, 14), ("layer4", 512, 7)),
    "timm resnet34": cnn(of_timm("resnet34"), ("layer3", 256, 14), ("layer4", 512, 7), slow=True),
    "timm resnet50": cnn(of_timm("resnet50"), ("layer3", 1024, 14), ("layer4", 2048, 7)),
    "timm resnet101": cnn(
        of_timm("resnet101"), ("layer3", 1024, 14), ("layer4", 2048, 7), slow=True),
    "timm mobilenetv1_100": cnn(
        of_timm("mobilenetv1_100"), ("blocks.3", 512, 14), ("bn2", 1024, 7)),
    "timm mobilenetv2_100": cnn(
        of_timm("mobilenetv2_100"), ("blocks.6", 320, 7), ("bn2", 1280, 7)),
    "timm regnetx_016": cnn(of_timm("regnetx_016"), ("s3", 408, 14), ("final_conv", 912, 7)),
    "timm deit_tiny_patch16_224": vit(
        of_timm("deit_tiny_patch16_224"), "blocks.5", "norm", 192),
    "timm deit_small_patch16_224": vit(
        of_timm("deit_small_patch16_224"), "blocks.5", "norm", 384, slow=True),
    "timm deit_base_patch16_224": vit(
        of_timm("deit_base_patch16_224"), "blocks.5", "norm", 768, slow=True),
    "timm deit3_small_patch16_224": vit(
        of_timm("deit3_small_patch16_224"), "blocks.5", "norm", 384, slow=True),
    "timm deit3_large_patch16_224": vit(
        of_timm("deit3_large_patch16_224"), "blocks.11", "norm", 1024, slow=True),
    "timm vit_small_patch16_224": vit(
        of_timm("vit_small_patch16_224"), "blocks.5", "norm", 384, slow=True),
    "timm swin_tiny_patch4_window7_224": Row(
        of_timm("swin_tiny_patch4_window7_224"),
        TapPoint("layers.2", "NHWC", 384, 14, 14, layer_norm=True),
        TapPoint("norm", "NHWC", 768, 7, 7),
        step_size=224),
    "timm convnext_tiny": cnn(
        of_timm("convnext_tiny"), ("stages.2", 384, 14), ("norm_pre", 768, 7)),
    "timm efficientnet_b0": cnn(
        of_timm("efficientnet_b0"), ("blocks.4", 112, 14), ("bn2", 1280, 7)),
    "timm densenet121": cnn(
        of_timm("densenet121"), ("features.denseblock3", 1024, 14), ("features", 1024, 7)),
    "timm resnext50_32x4d": cnn(
        of_timm("resnext50_32x4d"), ("layer3", 1024, 14), ("layer4", 2048, 7), slow=True),
    "timm resnext101_32x8d": cnn(
        of_timm("resnext101_32x8d"), ("layer3", 1024, 14), ("layer4", 2048, 7), slow=True),
    "timm vgg11_bn": cnn(
        of_timm("vgg11_bn"), ("features.27", 512, 14), ("features", 512, 7),
        slow=True),
    "torchvision resnet18": cnn(
        of_torchvision("resnet18"), ("layer3", 256, 14), ("layer4", 512, 7), slow=True),
    "torchvision mobilenet_v2": cnn(
        of_torchvision("mobilenet_v2"), ("features.17", 320, 7), ("features", 1280, 7)),
    "torchvision shufflenet_v2_x1_0": cnn(
        of_torchvision("shufflenet_v2_x1_0"), ("stage4", 464, 7), ("conv5", 1024, 7)),
    "torchvision densenet121": cnn(
        of_torchvision("densenet121"), ("features.denseblock3", 1024, 14), ("features", 1024, 7),
        slow=True),
    "torchvision vit_b_16": vit(
        of_torchvision("vit_b_16"), "encoder.layers.encoder_layer_5", "encoder", 768, slow=True),
    "torchvision swin_t": Row(
        of_torchvision("swin_t"),
        TapPoint("features.5", "NHWC", 384, 14, 14, layer_norm=True),
        TapPoint("permute", "NCHW", 768, 7, 7),
        slow=True),
    "torchvision convnext_tiny": cnn(
        of_torchvision("convnext_tiny"), ("features.5", 384, 14), ("features", 768, 7), slow=True),
    "torchvision regnet_x_1_6gf": cnn(
        of_torchvision("regnet_x_1_6gf"), ("trunk_output.block3", 408, 14),
        ("trunk_output", 912, 7), slow=True),
    "small-image resnet20": cnn(
        of_timm("resnet20"), ("layer2", 32, 16), ("layer3", 64, 8), own_size=32, step_size=32),
    "small-image resnet8x4": cnn(
        of_timm("resnet8x4"), ("layer2", 128, 16), ("layer3", 256, 8), own_size=32, step_size=32),
    "plain Sequential": cnn(
        plain_sequential, ("2", 8, 32), ("5", 16, 16), own_size=None, step_size=32),
}
# fmt: on
NAMES = [pytest.param(n, marks=pytest.mark.slow) if row.slow else n for n, row in TABLE.items()]


def built(name: str) -> nn.Module:
    """The same weights for the same name."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = TABLE[name].build()
        for module in model.modules():
            # torchvision's ViT starts with a classifier of zeros: nothing would flow back.
            if isinstance(module, nn.Linear) and not module.weight.any():
                nn.init.normal_(module.weight, std=0.02)
        return model


def batch_for(row: Row) -> tuple[Tensor, Tensor]:
    """Images and labels; of large images one alone: these networks have no batch statistics."""
    generator = torch.Generator().manual_seed(1)
    labels = torch.tensor([1] if row.step_size == 224 else [1, 7])
    size = row.step_size
    return torch.randn(len(labels), 3, size, size, generator=generator), labels


def distiller_of(model: nn.Module, row: Row, method: nn.Module, **settings: Any) -> Distiller:
    return Distiller(model, method, example_shape=(3, row.step_size, row.step_size), **settings)


# The check, which a wrong tap must fail


def check_places(model: nn.Module, row: Row, taps: Mapping[str, str] | None = None) -> None:
    shape = None if row.own_size else (3, row.step_size, row.step_size)
    layout = Layout(model, shape, taps)

    assert layout.point("middle") == row.middle
    assert layout.point("last") == row.last
    assert layout.head().point == row.last
    assert layout.num_classes == NUM_CLASSES
    assert layout.example_shape == (3, *[row.own_size or row.step_size] * 2)


def check_feature(feature: Tensor, point: TapPoint, scale: float) -> None:
    """The feature of a training step is as the table says, for images `scale` times as large."""
    height, width = round(scale * point.height), round(scale * point.width)
    shapes = {
        "NCHW": (point.channels, height, width),
        "NHWC": (height, width, point.channels),
        "tokens": (point.prefix_tokens + height * width, point.channels),
    }
    assert tuple(feature.shape[1:]) == shapes[point.kind]
    assert tuple(point.pooled(feature).shape) == (len(feature), point.channels)
    assert feature.isfinite().all()


def first_layer(model: nn.Module) -> Tensor:
    return next(m.weight for m in model.modules() if isinstance(m, nn.Conv2d))


def check_uskd(model: nn.Module, row: Row, taps: Mapping[str, str] | None = None) -> None:
    distiller = distiller_of(model, row, USKDLoss(weak_weight=1.0), taps=taps)
    with FeatureTap(model, [row.middle.path]) as tap:
        step = distiller(*batch_for(row))
        feature = tap.pop()[row.middle.path]

    check_feature(feature, row.middle, row.step_size / (row.own_size or row.step_size))
    _, weak_logits = step.heads
    at_place, at_start = torch.autograd.grad(
        weak_logits.square().sum(), (feature, first_layer(model)), retain_graph=True
    )
    assert at_place.any()  # or PyTorch says that the feature takes no part
    assert at_start.any()
    step.loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in distiller.parameters())


def check_zipf(model: nn.Module, row: Row, taps: Mapping[str, str] | None = None) -> None:
    distiller = distiller_of(model, row, ZipfLSLoss(), taps=taps, task_weight=0.0)
    model.zero_grad()
    with FeatureTap(model, [row.last.path]) as tap:
        step = distiller(*batch_for(row))
        feature = tap.pop()[row.last.path]

    check_feature(feature, row.last, row.step_size / (row.own_size or row.step_size))
    assert [point.path for point in distiller.trainable.providers["votes"].points] == [
        row.last.path
    ]
    step.loss.backward()
    assert step.loss.isfinite()
    assert first_layer(model).grad.any()


@pytest.mark.parametrize("name", NAMES)
def test_the_network_is_tapped_at_the_right_places_and_learns_from_there(name):
    row, model = TABLE[name], built(name)

    check_places(model, row)
    check_uskd(model, row)
    check_zipf(model, row)


@pytest.mark.parametrize(
    ("name", "taps"),
    [
        ("timm resnet18", {"middle": "layer2"}),
        ("timm resnet18", {"middle": "layer3.0"}),  # the same shape
        ("timm resnet18", {"last": "layer3"}),
        ("timm mobilenetv2_100", {"middle": "blocks.4"}),  # twice the final resolution
        ("timm deit_tiny_patch16_224", {"middle": "blocks.6"}),
        ("torchvision shufflenet_v2_x1_0", {"middle": "stage3"}),
        ("plain Sequential", {"middle": "5"}),
    ],
)
def test_a_wrong_tap_fails_the_check_of_places(name, taps):
    with pytest.raises(AssertionError):
        check_places(built(name), TABLE[name], taps)


@pytest.mark.parametrize(
    ("check", "taps"),
    [(check_uskd, {"middle": "layer2"}), (check_zipf, {"last": "layer3"})],
)
def test_a_wrong_tap_fails_the_check_of_a_step(check, taps):
    with pytest.raises((AssertionError, RuntimeError, ValueError)):
        check(built("timm resnet18"), TABLE["timm resnet18"], taps)


# Compiled, copied, and in two processes: a CNN, a ViT and a Swin of fewer blocks


class ReadsBoth(Method):
    """A method that reads what USKD and Zipf's LS read, so that one network serves for both."""

    of_batch = True
    inputs: ClassVar = {
        "logits": Logits(), "target": Target(), "weak": WeakLogits(), "votes": Votes(),
    }  # fmt: skip

    def terms(
        self, logits: Tensor, target: Tensor, weak: Tensor, votes: Tensor
    ) -> dict[str, Tensor]:
        return {
            "uskd": uskd_loss(logits, weak, target, weak_weight=1.0),
            "zipf_ls": zipf_ls_loss(logits, target, votes),
        }


SHALLOW: dict[str, tuple[str, dict[str, Any], str, str]] = {
    "CNN": ("resnet18", {}, "layer3", "layer4"),
    "ViT": ("deit_tiny_patch16_224", {"depth": 4, "img_size": 64}, "blocks.1", "norm"),
    "Swin": (
        "swin_tiny_patch4_window7_224",
        {"depths": (1, 1, 2, 1), "img_size": 64},
        "layers.2",
        "norm",
    ),
}
NUM_SAMPLES = 4


def shallow(name: str) -> Distiller:
    """In eval mode: without batch statistics, nothing differs in two processes."""
    architecture, settings, _, _ = SHALLOW[name]
    torch.manual_seed(0)
    student = timm.create_model(architecture, num_classes=NUM_CLASSES, **settings).eval()
    return Distiller(student, ReadsBoth(), example_shape=(3, 64, 64))


def samples(part: slice = slice(None)) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(NUM_SAMPLES, 3, 64, 64, generator=generator)
    return images[part], torch.arange(NUM_SAMPLES)[part]


def gradients_of(distiller: Distiller, part: slice = slice(None)) -> dict[str, Tensor]:
    distiller(*samples(part)).loss.backward()
    trained = distiller.trainable
    trained = trained.module if isinstance(trained, DistributedDataParallel) else trained
    return {name: p.grad.clone() for name, p in trained.named_parameters()}


@pytest.mark.parametrize("name", SHALLOW)
def test_the_shallow_network_is_tapped_where_the_deep_one_is(name):
    _, _, middle, last = SHALLOW[name]
    providers = shallow(name).trainable.providers

    assert [point.path for point in providers["weak"].points] == [middle]
    assert [point.path for point in providers["votes"].points] == [last]


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n == "ViT" else pytest.mark.slow) for n in SHALLOW]
)
def test_a_compiled_network_gives_what_the_plain_one_gives(name):
    distiller = shallow(name)
    plain = distiller.trainable(samples()[0])
    expected = gradients_of(copy.deepcopy(distiller))

    distiller.trainable = torch.compile(distiller.trainable, backend="aot_eager")
    compiled = distiller.trainable(samples()[0])
    distiller(*samples()).loss.backward()

    assert torch.equal(compiled.read["votes"], plain.read["votes"])
    for got, expected_value in (
        (compiled.logits, plain.logits),
        (compiled.read["weak"], plain.read["weak"]),
    ):
        torch.testing.assert_close(got, expected_value, rtol=1e-4, atol=1e-5)
    for parameter, gradient in zip(distiller.parameters(), expected.values(), strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", SHALLOW)
def test_a_copy_reads_its_own_features(name):
    _, _, middle, last = SHALLOW[name]
    distiller = shallow(name)
    plain = distiller.trainable(samples()[0])
    copied = copy.deepcopy(distiller)
    with torch.no_grad():
        for parameter in copied.student.parameters():
            parameter.mul_(-0.5)

    of_copy = copied.trainable(samples()[0])

    assert not torch.allclose(of_copy.read["weak"], plain.read["weak"])
    assert torch.equal(distiller.trainable(samples()[0]).read["weak"], plain.read["weak"])
    tap = FeatureTap(distiller.student, [middle, last])
    tapped, tap_of_copy = copy.deepcopy((distiller.student, tap))
    tapped(samples()[0])
    assert set(tap_of_copy.pop()) == {middle, last}
    with pytest.raises(RuntimeError, match="did not run"):
        tap.pop()


def work(rank: int, folder: str) -> None:
    """All that one process computes, written to a file of its own."""
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2
    )
    part = slice(2 * rank, 2 * rank + 2)
    result = {}
    for name in SHALLOW:
        result[f"{name} alone"] = gradients_of(shallow(name), part)
        distiller = shallow(name)
        distiller.trainable = DistributedDataParallel(distiller.trainable)
        result[name] = gradients_of(distiller, part)
    torch.save(result, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def of_processes(tmp_path_factory) -> list[dict[str, dict[str, Tensor]]]:
    folder = Path(tmp_path_factory.mktemp("two_processes"))
    multiprocessing.spawn(work, (str(folder),), 2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("name", SHALLOW)
def test_two_processes_share_the_gradients_of_both(of_processes, name):
    first, second = of_processes
    alone = f"{name} alone"

    assert "providers.weak.fc.weight" in first[name]
    for parameter, gradient in first[name].items():
        assert torch.equal(gradient, second[name][parameter]), parameter
        mean = (first[alone][parameter] + second[alone][parameter]) / 2
        torch.testing.assert_close(gradient, mean, rtol=1e-4, atol=1e-6)
    weight = "providers.weak.fc.weight"
    assert not torch.allclose(first[alone][weight], second[alone][weight])  # other samples


def test_swins_middle_is_normalized_before_the_mean_as_in_the_published_runs():
    distiller = shallow("Swin")
    with torch.no_grad():
        distiller.trainable.providers["weak"].norm.weight.copy_(torch.linspace(-1, 2, 384))
    with FeatureTap(distiller.student, ["layers.2"]) as tap:
        weak = distiller.trainable(samples()[0]).read["weak"]
        feature = tap.pop()["layers.2"].double()

    head = distiller.trainable.providers["weak"]
    variance = feature.var(3, correction=0, keepdim=True)
    normalized = (feature - feature.mean(3, keepdim=True)) / (variance + 1e-5).sqrt()
    pooled = (normalized * head.norm.weight + head.norm.bias).mean((1, 2))
    torch.testing.assert_close(weak, head.fc(pooled.float()), rtol=1e-4, atol=1e-5)
    plain = shallow("CNN").trainable.state_dict()
    assert not [name for name in plain if "providers.weak.norm" in name]
