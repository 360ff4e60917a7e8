"""Training that nobody should do: extreme images, labels, rates; odd networks, taps, settings."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from hypothesis import event, given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn

from shared.fuzzing import (
    NUMBERS,
    as_yaml,
    assert_finite,
    case,
    check_refusal,
    command,
    fuzz,
    texts,
)
from shared.tiny_runs import SIDE, train_arguments
from softlabels import train
from softlabels.data import Batch, DataInfo
from softlabels.training.errors import NonFiniteLossError

NUM_CLASSES = 3


class TensorSource:
    """A data source over tensors that are given as they are."""

    info = DataInfo("tensors", ("a", "b", "c"), 1, (SIDE, SIDE), (0.0,), (1.0,))
    num_train = 8
    num_test = 4

    def __init__(self, images: Tensor, target: Tensor) -> None:
        self.images, self.target = images, target

    def steps_per_epoch(self, batch_size: int) -> int:
        return self.num_train // batch_size

    def train_batches(
        self, *, batch_size: int, start_step: int = 0, **_: object
    ) -> Iterator[Batch]:
        for index in torch.arange(self.num_train).split(batch_size)[start_step:]:
            yield Batch(self.images[index], self.target[index], index)

    def test_batches(self, **_: object) -> Iterator[Batch]:
        index = torch.arange(self.num_test)
        target = self.target if self.target.dim() == 1 else self.target.argmax(1)
        yield Batch(self.images[index], target[index], index)

    def close(self) -> None:
        """Nothing is open."""


def network(normalized: bool) -> nn.Module:
    norm = nn.BatchNorm2d(4) if normalized else nn.Identity()
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), norm, nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 4, 1),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, NUM_CLASSES),
    )  # fmt: skip


magnitudes = st.sampled_from([0.0, 1e-38, 1e-20, 1.0, 1.0, 1e4, 1e10, 1e19, 1e30, 3e38])
rates = st.sampled_from([1e-300, 1e-30, 1e-3, 0.1, 1.0, 1e4, 1e15, 1e30, 1e38, 1e300])
methods = st.sampled_from(
    [
        None, "kd", "nkd", "uskd", "zipf_ls", "dkd", "reviewkd", "crd", "rkd", "ps_kd", "byot",
        {"kind": "nkd", "temperature": 1e-3}, {"kind": "nkd", "temperature": 1e6},
        {"kind": "kd", "temperature": 1e-30}, {"kind": "uskd", "target_weight": 1e30},
        {"kind": "zipf_ls", "power": 50.0}, {"kind": "zipf_ls", "rank_from": "logits"},
        {"kind": "uskd", "rank_from": "final", "squared": False},
    ]
)  # fmt: skip
WITH_TEACHER = {"kd", "nkd", "dkd", "reviewkd", "crd", "rkd"}


@dataclass(frozen=True, repr=False)
class Drawn:
    """Images and labels; a failure must not print them."""

    images: Tensor
    labels: Tensor


@st.composite
def pictures_and_labels(draw) -> Drawn:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    images = torch.randn(8, 1, SIDE, SIDE, generator=generator)
    images = (images * draw(magnitudes)).clamp(-3e38, 3e38)
    kind = draw(st.sampled_from(["plain", "one", "constant", "sign"]))
    if kind == "one":
        images[draw(st.integers(0, 7))] = draw(st.sampled_from([3e38, -3e38, 1e-45, 0.0]))
    elif kind == "constant":
        images = images[:1].expand_as(images).clone()
    elif kind == "sign":
        images = images.sign() * 3e38
    labels = torch.randint(NUM_CLASSES, (8,), generator=generator)
    if draw(st.booleans()):
        labels = torch.full((8,), draw(st.integers(0, NUM_CLASSES - 1)))
    return Drawn(images, labels)


@fuzz("training steps", cost=2)
@given(
    data=pictures_and_labels(),
    method=methods,
    normalized=st.booleans(),
    lr=rates,
    optimizer=st.sampled_from(["sgd", "adamw", "rmsprop", "lion", "lamb", "adafactor"]),
    more=st.fixed_dictionaries(
        {},
        optional={
            "max_grad_norm": st.sampled_from([1e-30, 1.0, 1e30]),
            "ema_decay": st.sampled_from([1e-9, 0.5, 0.999999]),
            "grad_accum_steps": st.sampled_from([1, 2, 4]),
            "precision": st.sampled_from(["no", "bf16"]),
            "task": st.sampled_from(
                [{"label_smoothing": 1.0}, {"weight": 0.0}, {"weight": 1e30},
                 {"label_smoothing": 0.5, "smooth_over": "non_target"}]
            ),
            "method_weight": st.sampled_from([0.0, 1e-30, 1e30, 1e38]),
            "mix": st.sampled_from([{"mixup": 1.0}, {"cutmix": 1e-3}, {"mixup": 1e9}]),
            "checkpoint": st.just({"every": 1}),
        },
    ),
)  # fmt: skip
def test_training_steps(data, method, normalized, lr, optimizer, more):
    with case("training steps"), tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        run = Path(folder) / "run"
        kind = method["kind"] if isinstance(method, dict) else method
        try:
            result = train(
                TensorSource(data.images, data.labels),
                network(normalized),
                method,
                network(normalized) if kind in WITH_TEACHER else None,
                epochs=2, batch_size=4, optimizer={"name": optimizer, "lr": lr}, seed=0,
                output=str(run), gallery=1, device="cpu", threads=1, progress=False, **more,
            )  # fmt: skip
        except (NonFiniteLossError, ValueError) as error:
            check_refusal(error)
            event(type(error).__name__)
        else:
            event("trained")
            assert_finite(result.student.state_dict())
        for stored in run.glob("*.safetensors"):
            assert_finite(load_file(stored))
        for checkpoint in run.glob("checkpoints/*.pt"):
            assert_finite(torch.load(checkpoint, weights_only=True)["parts"]["trained"])


MODELS = (
    "timm:resnet8", "timm:resnet14", "timm:vit_mini_patch4_32", "timm:vit_tiny_patch16_224",
    "timm:resnet10t", "timm:convnext_atto", "timm:mobilenetv3_small_050", "timm:mixer_b32_224",
    "timm:test_resnet", "timm:test_vit", "timm:test_efficientnet", "timm:test_byobnet",
    "torchvision:squeezenet1_1", "torchvision:shufflenet_v2_x0_5", "torchvision:maskrcnn",
    "timm:", ":", "timm:nothing", "torchvision:", "file:/etc/passwd", "file:", "file:.",
    "torch.nn:Linear", "torch.nn:Module", "torch.nn:Identity", "torch.nn:Sequential",
    "torch.hub:load", "os:system", "builtins:exec", "softlabels.models:build_model",
    "softlabels.models.build:build_model", "timm.models:create_model", "numpy:zeros", "a.b.c:d",
    "object:Sequential",
)  # fmt: skip
SETTINGS = (
    "width", "depth", "embed_dim", "num_heads", "patch_size", "img_size", "drop_rate", "act_layer",
    "norm_layer", "global_pool", "features_only", "num_classes", "in_chans", "pretrained",
    "checkpoint_path", "pretrained_cfg", "scriptable", "output_stride", "block", "layers", "x",
    "in_features", "out_features", "name", "model_name", "command", "drop_path_rate", "class_token",
)  # fmt: skip
PATHS = (
    "layer1", "layer2", "layer3", "layer1.0", "layer1.0.conv1", "conv1", "fc", "", ".", "..",
    "blocks.0", "blocks.99", "layer3.0.downsample", "__class__", "weight", "layer1.0.conv1.weight",
)  # fmt: skip

settings = st.dictionaries(
    st.sampled_from(SETTINGS),
    st.one_of(
        st.integers(-2, 64), st.sampled_from([n for n in NUMBERS if n == n]), st.booleans(),
        st.sampled_from(["gelu", "layernorm", "avg", "", "nothing"]), texts,
    ),
    max_size=2,
)  # fmt: skip
usual = st.sampled_from(["timm:resnet8", "timm:resnet8", "timm:test_efficientnet"])


@fuzz("models, taps and settings", cost=2)
@given(
    name=st.one_of(st.sampled_from(MODELS), usual, usual, texts),
    given_settings=st.one_of(st.just({}), st.just({}), settings),
    taps=st.one_of(
        st.just({}),
        st.dictionaries(
            st.one_of(st.sampled_from(["middle", "last", "teacher.last", "teacher.middle"]), texts),
            st.one_of(st.sampled_from(PATHS), texts),
            max_size=2,
        ),
    ),
    method=st.sampled_from(["none", "uskd", "zipf_ls", "nkd"]),
    more=st.lists(
        st.sampled_from(
            ["--channels-last", "--data.image-size=1", "--batch-size=1",
             "--data.image-size=33", "--grad-accum-steps=3", "--teacher.mode=train",
             "--batch-size=9",
             "--teacher.num-classes=5", "--teacher.input-size=1", "--teacher.class-map=1",
             "--teacher.mean=0.5", "--optimizer.name=lbfgs", "--optimizer.name=nothing"]
        ),
        max_size=2,
    ),
)  # fmt: skip
def test_models_and_taps(pictures, name, given_settings, taps, method, more):
    recipe = {
        "student": {"name": name, "settings": given_settings},
        "taps": taps,
        "method": method,
    }
    if method in WITH_TEACHER:
        recipe["teacher"] = {"name": "timm:resnet8"}
    with case("models, taps and settings"), tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        arguments = train_arguments(pictures, run)
        at = arguments.index("--student.name")
        del arguments[at : at + 2]
        path = Path(folder) / "recipe.yaml"
        path.write_text(as_yaml(recipe))
        command(["train", str(path), *arguments[1:], *more], statuses=(0, 1, 2))
        for stored in run.glob("*.safetensors"):
            assert_finite(load_file(stored))
        assert {entry.name for entry in Path(folder).iterdir()} <= {"run", "recipe.yaml"}
