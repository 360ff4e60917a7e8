"""Checks before the first step: what a method needs of a batch, whose answers a cache holds."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from softlabels.data import DataInfo, DataSource
from softlabels.data.extra_views import PARTNER
from softlabels.data.mixup import MIXUP_EXTRAS
from softlabels.distill.answers import FINGERPRINTS
from softlabels.distill.distiller import Distiller
from softlabels.distill.teacher import Teacher
from softlabels.distill.teacher_cache import TeacherCache
from softlabels.models import FileRecord, model_metadata
from softlabels.training.build import build_teacher
from softlabels.training.config import Config
from softlabels.training.settings import TeacherSettings

__all__ = ["check_cache", "check_fingerprints", "check_needs", "teacher_fingerprint"]

_WRONG = {
    "teacher": "another teacher's answers",
    "data": "answers to other training images or labels",
    "augmentation": "answers to images that were augmented in another way",
}


def check_needs(
    config: Config, distiller: Distiller, source: DataSource, num_processes: int
) -> None:
    """Check that each batch can bring what the method reads.

    Raises:
        ValueError: It cannot.
    """
    further = [name for name in distiller.extras if name not in ("index", "draw")]
    mixed = bool(config.mix.mixup or config.mix.cutmix)
    label = config.label
    if config.task.weight == "rest":
        if distiller.method is None:
            raise ValueError("task.weight rest is 1 - method_weight, and there is no method")
        if config.method_weight is not None and config.method_weight > 1:
            raise ValueError(
                "task.weight rest is 1 - method_weight: method_weight must be at most 1, got "
                f"{config.method_weight:g}"
            )
    if PARTNER in further and mixed:
        raise ValueError(
            f"{label} reads another image of each image's class, and mixed images have two "
            "classes: mix.mixup and mix.cutmix must be 0"
        )
    if MIXUP_EXTRAS & {*further}:
        if mixed:
            raise ValueError(f"{label} mixes images itself: mix.mixup and mix.cutmix must be 0")
        if config.grad_accum_steps > 1:
            raise ValueError(
                f"{label} mixes the images of a batch: grad_accum_steps must be 1, got "
                f"{config.grad_accum_steps}"
            )
        if config.batch_size % (2 * num_processes):
            raise ValueError(
                f"{label} mixes pairs of images: batch_size must be a multiple of "
                f"{2 * num_processes}, got {config.batch_size}"
            )
        if source.num_train < config.batch_size and source.num_train % (2 * num_processes):
            raise ValueError(
                f"{label} mixes pairs of images: a training set that is smaller than batch_size "
                f"must be a multiple of {2 * num_processes}, got {source.num_train} images"
            )
    asked = [name for name in further if name not in MIXUP_EXTRAS]
    if not asked:
        return
    parameters = inspect.signature(source.train_batches).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    if "extras" not in parameters and not takes_any:
        raise ValueError(
            f"{label} reads {', '.join(asked)} from the batch, but train_batches of "
            f"{type(source).__name__} takes no `extras`"
        )
    # The call alone checks what the source can give; no batch is read.
    source.train_batches(
        seed=config.seed,
        epoch=0,
        batch_size=config.batch_size,
        rank=0,
        world_size=num_processes,
        device="cpu",
        extras=asked,
    )


def check_cache(cache: TeacherCache, config: Config, source: DataSource) -> None:
    """Check that a cache holds the answers that a run would get from its teacher, if it names one.

    Raises:
        ValueError: They are another teacher's, or to other images.
    """
    found = dict(source.fingerprints())
    if config.teacher.name is not None:
        teacher = build_teacher(config.teacher, source.info)
        found["teacher"] = teacher_fingerprint(teacher, config.teacher, source.info)
    check_fingerprints(cache.path, cache.fingerprints, found)


def check_fingerprints(path: Path, stored: Mapping[str, str], found: Mapping[str, str]) -> None:
    """Compare the fingerprints of the cache in a folder with all or some of those `found` now.

    Raises:
        ValueError: One of them is another.
    """
    for name in FINGERPRINTS:
        if name in found and stored[name] != found[name]:
            raise ValueError(
                f"{path} holds {_WRONG[name]}: the {name} fingerprint is {stored[name]} there, "
                f"{found[name]} here; `softlabels cache-teacher` makes a cache for these settings"
            )


def teacher_fingerprint(teacher: Teacher, settings: TeacherSettings, info: DataInfo) -> str:
    """A digest of all that a teacher's answers to an image depend on, whatever its device.

    Args:
        teacher: Weights, normalization, input size, class map and mode.
        settings: Name and settings of its network. Where a file lies does not matter.
        info: Facts about the images.
    """
    network = model_metadata(
        FileRecord(
            model=settings.name or type(teacher.model).__qualname__,
            num_classes=settings.num_classes or info.num_classes,
            in_channels=3,
            settings=settings.settings,
        )
    )
    digest = hashlib.blake2b(digest_size=16)
    facts = (network, teacher.mode, teacher.input_size, teacher.normalizes, teacher.maps_classes)
    digest.update(repr(facts).encode())
    tensors = {
        "scale": teacher.scale,
        "shift": teacher.shift,
        "class_index": teacher.class_index,
        **{f"model.{name}": value for name, value in teacher.model.state_dict().items()},
    }
    for name, value in tensors.items():
        if not isinstance(value, Tensor):  # what a module calls its extra state
            digest.update(repr((name, value)).encode())
            continue
        digest.update(repr((name, str(value.dtype), tuple(value.shape))).encode())
        content = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(content.numpy().data)
    return digest.hexdigest()
