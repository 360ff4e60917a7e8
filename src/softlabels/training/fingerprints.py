"""Whether a teacher cache answers what a run asks: fingerprints of teacher, data, augmentation."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from softlabels.data import DataInfo, DataSource
from softlabels.distill.cache_format import FINGERPRINTS
from softlabels.distill.teacher import Teacher
from softlabels.distill.teacher_cache import TeacherCache
from softlabels.models import model_metadata
from softlabels.training.build import build_teacher
from softlabels.training.config import Config
from softlabels.training.settings import TeacherSettings

__all__ = ["check_cache", "check_fingerprints", "teacher_fingerprint"]

_WRONG = {
    "teacher": "another teacher's answers",
    "data": "answers to other training images or labels",
    "augmentation": "answers to images that were augmented in another way",
}


def check_cache(cache: TeacherCache, config: Config, source: DataSource) -> None:
    """Check that a cache holds the answers that a run would get from its teacher.

    Args:
        cache: The answers.
        config: The run's settings. The teacher is compared if they name one.
        source: The run's data.

    Raises:
        ValueError: They are another teacher's, or to other images.
    """
    found = dict(source.fingerprints())
    if config.teacher.name is not None:
        teacher = build_teacher(config.teacher, source.info)
        found["teacher"] = teacher_fingerprint(teacher, config.teacher, source.info)
    check_fingerprints(cache.path, cache.fingerprints, found)


def check_fingerprints(path: Path, stored: Mapping[str, str], found: Mapping[str, str]) -> None:
    """Compare what a cache was made from with what it is to be used for.

    Args:
        path: The cache's folder.
        stored: Its fingerprints.
        found: All or some of the present ones.

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
        settings.name or type(teacher.model).__qualname__,
        num_classes=settings.num_classes or info.num_classes,
        settings=settings.settings,
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
