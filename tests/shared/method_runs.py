"""Every method on networks of three families: how it is built, fed and trained in these tests."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from importlib.resources import files
from typing import Any

import torch
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from shared.small_networks import NUM_CLASSES, small_cnn
from softlabels import Distiller, StepOutput
from softlabels.data import Batch
from softlabels.data.augment import Affine, Compose, Noise
from softlabels.data.in_memory import InMemorySource, Split
from softlabels.data.mixup import MIXUP_EXTRAS, mixup_extras
from softlabels.data.sources.glyphs import GlyphSource
from softlabels.distill.external_inputs import checked_inputs
from softlabels.inputs import Input, PeerLogits, TeacherLogits
from softlabels.io.weights import load_weights
from softlabels.losses import METHODS, Method
from softlabels.losses._method import setting_fields
from softlabels.models import build_model

STUDENT = "trainable.student."  # how the names of its parameters begin
TEACHER_WEIGHTS = "recipes/glyphs100/teacher.safetensors"

# What an architecture cannot give, and what the error says.
_NO_NORM = "needs a BatchNorm with weight and bias at the end of"
_NO_TOKENS = "found no run of blocks that return tokens in"
UNABLE = {
    ("ofd", "vit"): _NO_NORM,
    ("ofd", "nhwc"): _NO_NORM,
    ("vitkd", "cnn"): _NO_TOKENS,
    ("vitkd", "nhwc"): _NO_TOKENS,
}


@dataclass(frozen=True)
class Family:
    """Networks of one kind.

    Attributes:
        name: `"cnn"`, `"vit"`, or `"nhwc"`: maps whose channels come last.
        student: A new network, with the weights of a seed.
        teacher: A trained network.
        logits_teacher: One for methods that read logits alone.
        shape: (C, H, W) of the images.
    """

    name: str
    student: Callable[[int], nn.Module]
    teacher: Callable[[], nn.Module]
    logits_teacher: Callable[[], nn.Module]
    shape: tuple[int, int, int]


def able(kind: str, family: Family) -> bool:
    """Whether a method runs on this architecture."""
    return (kind, family.name) not in UNABLE


def pairs(*families: Family) -> list[tuple[str, Family]]:
    """All methods on all families that they run on."""
    return [(kind, family) for kind in METHODS for family in families if able(kind, family)]


def pair_name(value: object) -> str | None:
    """The name of a pair's half in the name of a test."""
    return value.name if isinstance(value, Family) else None


# Tiny networks on noise, for the default suite


def _seeded(make: Callable[[], nn.Module], seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()


def _tiny_vit() -> nn.Module:
    return VisionTransformer(
        img_size=16, patch_size=4, embed_dim=16, depth=4, num_heads=2, num_classes=NUM_CLASSES
    )


def _tiny_swin() -> nn.Module:
    """Stages of 8x8 and 4x4 windows whose outputs are [B, H, W, C]."""
    return SwinTransformer(
        img_size=16, patch_size=2, embed_dim=8, depths=(1, 1), num_heads=(1, 2), window_size=4,
        num_classes=NUM_CLASSES,
    )  # fmt: skip


def _tiny(name: str, make: Callable[[int], nn.Module]) -> Family:
    return Family(name, make, lambda: make(1), lambda: make(1), (3, 16, 16))


TINY_CNN = _tiny("cnn", lambda seed: small_cnn(seed=seed))
TINY_VIT = _tiny("vit", lambda seed: _seeded(_tiny_vit, seed))
TINY_NHWC = _tiny("nhwc", lambda seed: _seeded(_tiny_swin, seed))


def noise(family: Family, size: int, number: int = 0, num_classes: int = NUM_CLASSES) -> Batch:
    """A batch of noise with all the further images that a method may read.

    Args:
        family: Has the images' shape.
        size: Number of images.
        number: Of the batch; all differ, and so do the samples' indices.
        num_classes: Number of classes.
    """
    generator = torch.Generator().manual_seed(number)
    images, second, partner = torch.randn(3, size, *family.shape, generator=generator)
    index = torch.arange(size) + number * size
    batch = Batch(images, index % num_classes, index, None, {})
    batch = mixup_extras(batch, alpha=1.0, seed=0, epoch=0, step=number)
    batch.extras.update(second_view=second, partner=partner)
    return batch


# Networks for the glyphs, on real images


def _glyph_network(name: str, seed: int, **settings: Any) -> nn.Module:
    make = partial(
        build_model, name, num_classes=100, in_channels=1, image_size=(32, 32), settings=settings
    )
    return _seeded(make, seed)


@cache
def shipped_teacher() -> nn.Module:
    """The trained CNN that the package ships."""
    teacher = _glyph_network("timm:resnet14x4_glyphs", 0)
    load_weights(teacher, str(files("softlabels") / TEACHER_WEIGHTS))
    return teacher


VIT = "timm:vit_mini_patch4_32"
VIT_SETTINGS = {"patch_size": 8, "depth": 4}  # 17 tokens: seconds in place of minutes


def _vit(seed: int) -> nn.Module:
    return _glyph_network(VIT, seed, **VIT_SETTINGS)


@cache
def trained_vit() -> nn.Module:
    """A ViT as the student, with weights of its own that know the training images."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        distiller = Distiller(_vit(1))
        optimizer = torch.optim.AdamW(distiller.parameters(), 2e-3)
        for batch in batches(distiller, epochs=range(1000, 1012)):
            output_of(distiller, batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return distiller.student.eval()


CNN = Family(
    "cnn",
    lambda seed: _glyph_network("timm:resnet8_glyphs", seed),
    shipped_teacher,
    shipped_teacher,
    (1, 32, 32),
)
VITS = Family("vit", _vit, trained_vit, shipped_teacher, (1, 32, 32))

NUM_FONTS = 2
BATCH_SIZE = 40
STEPS_PER_EPOCH = NUM_FONTS * 100 // BATCH_SIZE


@cache
def source() -> InMemorySource:
    """All letters in two of the fonts, each moved and noisy anew in every epoch."""
    whole = GlyphSource(num_fonts=NUM_FONTS)
    augmentation = Compose((Affine(5, (0.95, 1.05), 3, 1), Noise(0.05)))
    few = Split(whole._test.images[:200], whole._test.target[:200])
    return InMemorySource(whole._train, few, whole.info, augmentation=augmentation)


def batches(
    distiller: Distiller, epochs: range, *, rank: int = 0, world_size: int = 1
) -> Iterator[Batch]:
    """The training batches of some epochs, with all that the method reads.

    Args:
        distiller: Says what that is.
        epochs: Their numbers.
        rank: Of the process whose share it is.
        world_size: Number of processes.
    """
    asked = [name for name in distiller.extras if name in ("partner", "second_view")]
    extras = {"extras": asked} if asked else {}
    for epoch in epochs:
        found = source().train_batches(
            seed=0,
            epoch=epoch,
            batch_size=BATCH_SIZE,
            rank=rank,
            world_size=world_size,
            device="cpu",
            **extras,
        )
        for number, batch in enumerate(found):
            if MIXUP_EXTRAS & {*distiller.extras}:
                batch = mixup_extras(batch, alpha=1.0, seed=0, epoch=epoch, step=number)
            yield batch


# Building and feeding


def method_of(kind: str, num_samples: int, **settings: Any) -> Method:
    """A method with its published settings."""
    method = METHODS[kind]
    if "num_samples" in setting_fields(method):
        settings["num_samples"] = num_samples
    return method(**settings)


def teacher_signals(kind: str) -> list[Input]:
    """What a method reads from a teacher."""
    inputs = checked_inputs(METHODS[kind]())
    return [kind for kind in inputs.values() if kind.reads_teacher]


def reads_logits_alone(kind: str) -> bool:
    """Whether a method's teacher may be of any architecture."""
    return all(isinstance(kind, TeacherLogits) for kind in teacher_signals(kind))


def built(
    kind: str,
    family: Family,
    *,
    num_samples: int,
    method_weight: float | None = None,
    **settings: Any,
) -> Distiller:
    """A method on a family's networks, with the weights that it recommends.

    Args:
        kind: Of `METHODS`.
        family: Student, teacher and peer.
        num_samples: Size of the training set.
        method_weight: In place of the recommended one.
        **settings: Of the method.
    """
    method = method_of(kind, num_samples, **settings)
    teacher = peer = None
    if teacher_signals(kind):
        teacher = family.logits_teacher() if reads_logits_alone(kind) else family.teacher()
        teacher = copy.deepcopy(teacher)  # it may be moved to another precision
    if any(isinstance(kind, PeerLogits) for kind in method.inputs.values()):
        peer = family.student(2)
    weight, task_weight = method.defaults.weight, method.defaults.task_weight
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)  # of the heads
        return Distiller(
            family.student(0),
            method,
            teacher=teacher,
            peer=peer,
            example_shape=family.shape,
            task_weight=1 - weight if task_weight == "rest" else task_weight,
            method_weight=weight if method_weight is None else method_weight,
        )


def read_extras(distiller: Distiller, batch: Batch) -> dict[str, Tensor]:
    """What the method reads of a batch besides images and labels."""
    found = {"index": batch.index, **batch.extras}
    return {name: found[name] for name in distiller.extras}


def output_of(distiller: Distiller, batch: Batch) -> StepOutput:
    """One forward."""
    return distiller(batch.images, batch.target, **read_extras(distiller, batch))


def without_gradient(distiller: Distiller) -> set[str]:
    """Names of the parameters that the last backward gave no gradient, or one of zeros alone."""
    named = distiller.named_parameters()
    return {name for name, p in named if p.grad is None or not bool(p.grad.any())}


def gradient_problems(distiller: Distiller) -> list[str]:
    """Parameters that the last backward left without a gradient, or with one that is not finite."""
    return [
        f"{name}: {'none' if parameter.grad is None else 'not finite'}"
        for name, parameter in distiller.named_parameters()
        if parameter.requires_grad
        and (parameter.grad is None or not bool(parameter.grad.isfinite().all()))
    ]


def num_hooks(model: nn.Module) -> int:
    """Hooks on any part of a network."""
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def assert_plain(exported: nn.Module, fresh: nn.Module) -> None:
    """An exported student is the network as it was built, with other weights."""
    state = exported.state_dict()
    assert [*state] == [*fresh.state_dict()]
    assert type(exported) is type(fresh)
    assert num_hooks(exported) == num_hooks(fresh) == 0
    fresh.load_state_dict(state, strict=True)
    assert all(p.grad is None for p in exported.parameters())
    assert all(bool(v.isfinite().all()) for v in state.values())
