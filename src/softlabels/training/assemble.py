"""Turns a run's configuration into the objects that train."""

from __future__ import annotations

from importlib.resources import files
from typing import Any

import torch
from timm.optim import create_optimizer_v2, list_optimizers
from timm.optim import param_groups_weight_decay as decay_groups
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch import Tensor, nn

from softlabels.data import DataInfo, DataSource, open_source
from softlabels.data.mixup import MixupCutmix
from softlabels.data.randomness import seeded
from softlabels.distiller import Distiller
from softlabels.losses import LabelSmoothingLoss
from softlabels.losses.table import METHODS
from softlabels.models import build_model, model_input
from softlabels.taps import undisturbed
from softlabels.teacher import Teacher
from softlabels.teacher_cache import TeacherCache
from softlabels.training.config import (
    Config,
    OptimizerSettings,
    ScheduleSettings,
    TeacherSettings,
    build_method,
)
from softlabels.weights import UNREADABLE, load_weights

__all__ = [
    "build_distiller",
    "build_mixer",
    "build_optimizer",
    "build_schedule",
    "build_source",
    "build_teacher",
    "try_out",
    "with_defaults",
]

_SMALL_IMAGE = 64  # pixels; up to here a network for small images is the default student


def build_source(config: Config) -> DataSource:
    """Open the data that a configuration names.

    Raises:
        ValueError: Data that cannot be read, or settings that its kind does not take.
    """
    settings = config.data.model_dump(exclude={"source", "path"}, exclude_none=True)
    return open_source(config.data.source, config.data.path, **settings)


def with_defaults(config: Config, info: DataInfo) -> Config:
    """Fill in what a configuration leaves to the data and the method."""
    name = config.student.name
    if name is None:
        name = "timm:resnet20" if max(info.image_size) <= _SMALL_IMAGE else "timm:resnet18"
    weight = config.method_weight
    if weight is None:
        method = METHODS.get(config.method.kind)
        weight = float(getattr(method, "recommended_weight", 1.0))
    student = config.student.model_copy(update={"name": name})
    return config.model_copy(update={"student": student, "method_weight": weight})


def build_distiller(
    config: Config,
    info: DataInfo,
    *,
    student: nn.Module | None = None,
    teacher: TeacherCache | nn.Module | None = None,
    method: nn.Module | None = None,
) -> Distiller:
    """Build student, teacher and method, each from random numbers of its own.

    A teacher cache is opened, and not yet compared with the data: `check_cache` does that.

    Args:
        config: With its defaults filled in.
        info: Classes, channels and size of the images.
        student: To train in place of the one that the configuration names.
        teacher: Likewise.
        method: Likewise.

    Raises:
        ValueError: A name, a setting or weights that do not fit.
    """
    if student is None:
        with seeded(config.seed, "student"):
            student = build_model(
                config.student.name or "",
                num_classes=info.num_classes,
                in_channels=info.in_channels,
                image_size=info.image_size,
                settings=config.student.settings,
                pretrained=config.student.pretrained,
            )
        if config.student.weights is not None:
            load_weights(student, _file(config.student.weights))
        shape = (info.in_channels, *info.image_size)
        try_out(student, f"the student {config.student.name!r}", shape, info.num_classes)
    if teacher is None and config.teacher.cache is not None:
        teacher = TeacherCache(config.teacher.cache)
    elif teacher is None and config.teacher.name is not None:
        teacher = build_teacher(config.teacher, info)
        shape = (info.in_channels, *info.image_size)
        try_out(teacher, f"the teacher {config.teacher.name!r}", shape, None)
    task = config.task
    task_loss = (
        LabelSmoothingLoss(smoothing=task.label_smoothing, smooth_over=task.smooth_over)
        if task.label_smoothing
        else None
    )
    with seeded(config.seed, "heads"):
        return Distiller(
            student,
            method or build_method(config.method),
            teacher=teacher,
            task_loss=task_loss,
            task_weight=task.weight,
            method_weight=1.0 if config.method_weight is None else config.method_weight,
            taps=config.taps,
            example_shape=(info.in_channels, *info.image_size),
        )


def try_out(
    network: nn.Module, name: str, shape: tuple[int, int, int], num_classes: int | None
) -> None:
    """Run a network once, on the CPU, and leave it as it was.

    Args:
        network: [B, C, H, W] -> [B, classes].
        name: What an error calls it.
        shape: (C, H, W) of the images.
        num_classes: Number of classes that it must have; None: any.

    Raises:
        ValueError: It fails, or gives something else.
    """
    try:
        with undisturbed(network):
            logits = network(torch.zeros(1, *shape))
    except UNREADABLE as error:
        raise ValueError(
            f"{name} fails on images of {shape} (channels, height, width): "
            f"{type(error).__name__}: {error!s:.300}"
        ) from error
    if not isinstance(logits, Tensor):
        raise ValueError(f"{name} must give a tensor, got {type(logits).__name__}")
    if logits.dim() != 2 or len(logits) != 1 or num_classes not in (None, logits.shape[1]):
        raise ValueError(
            f"{name} must give [B, {num_classes or 'classes'}], got {tuple(logits.shape)} for one "
            "image"
        )


def _file(name: str) -> str:
    """A path, or that of a file in this package for `package:PATH`.

    Raises:
        ValueError: PATH leads out of the package.
    """
    scheme, colon, path = name.partition(":")
    if not colon or scheme != "package":
        return name
    inside = all(part.strip(".") for part in path.split("/")) and not {"\\", ":"} & {*path}
    if not inside:
        raise ValueError(
            f"expected package:PATH with a path inside of softlabels, got {name!r:.200}"
        )
    return str(files("softlabels") / path)


def build_teacher(settings: TeacherSettings, info: DataInfo) -> Teacher:
    """Build the network that teaches.

    Args:
        settings: With a name.
        info: Classes, channels, size and normalisation of the images.

    Raises:
        ValueError: A name, a setting or weights that do not fit.
    """
    name = settings.name or ""
    model = build_model(
        name,
        num_classes=settings.num_classes
        or (None if settings.pretrained or settings.class_map else info.num_classes),
        in_channels=info.in_channels,
        image_size=settings.input_size or info.image_size,
        settings=settings.settings,
        pretrained=settings.pretrained,
    )
    from_file = settings.pretrained or name.startswith("file:")
    expects = model_input(name) if from_file else model_input(nn.Identity())
    mean, std = settings.mean or expects.mean, settings.std or expects.std
    own = (mean, std) if mean is not None and std is not None else None
    return Teacher(
        model,
        weights=None if settings.weights is None else _file(settings.weights),
        normalization=own,
        student_normalization=(info.mean, info.std) if own is not None else None,
        input_size=settings.input_size,
        class_map=settings.class_map,
        mode=settings.mode,
    )


def build_optimizer(settings: OptimizerSettings, trained: nn.Module) -> torch.optim.Optimizer:
    """An optimiser of timm's factory over all parameters of a module.

    Raises:
        ValueError: timm has no optimiser of this name.
    """
    name = settings.name.lower()
    if name not in list_optimizers():
        raise ValueError(
            f"optimizer.name must be a name of timm's factory (sgd, adamw, ...), got {name!r}"
        )
    if name == "sgd" and not settings.nesterov:
        name = "momentum"  # timm's "sgd" is Nesterov's
    groups: Any = trained
    if not settings.decay_norm_and_bias:
        exempt = getattr(getattr(trained, "student", None), "no_weight_decay", set)
        names = tuple(f"student.{parameter}" for parameter in exempt())
        groups = decay_groups(trained, settings.weight_decay, no_weight_decay_list=names)
    optimizer: torch.optim.Optimizer = create_optimizer_v2(
        groups,
        opt=name,
        lr=settings.lr,
        weight_decay=settings.weight_decay,
        momentum=settings.momentum,
        filter_bias_and_bn=False,
    )
    return optimizer


def build_schedule(
    settings: ScheduleSettings,
    optimizer: torch.optim.Optimizer,
    *,
    epochs: int,
    steps_per_epoch: int,
) -> Scheduler:
    """A schedule of timm's factory, per step."""
    form = {"constant": "multistep"}.get(settings.name, settings.name)
    milestones = [round(epoch * steps_per_epoch) for epoch in settings.decay_epochs]
    num_steps = epochs * steps_per_epoch
    # timm's epochs are steps here: its factory takes whole numbers of them.
    scheduler: Scheduler
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched=form,
        num_epochs=num_steps,
        decay_epochs=milestones[0] if milestones else num_steps,
        # timm's multistep looks one step ahead.
        decay_milestones=[milestone + 1 for milestone in milestones or [num_steps]],
        decay_rate=settings.decay_rate,
        min_lr=settings.min_lr,
        warmup_epochs=round(settings.warmup_epochs * steps_per_epoch),
        warmup_lr=settings.warmup_lr,
        step_on_epochs=False,
        updates_per_epoch=1,
    )
    return scheduler


def build_mixer(config: Config, info: DataInfo) -> MixupCutmix | None:
    """Mixup and cutmix, or None where both are off."""
    mix = config.mix
    if not (mix.mixup or mix.cutmix):
        return None
    return MixupCutmix(
        mixup_alpha=mix.mixup,
        cutmix_alpha=mix.cutmix,
        probability=mix.probability,
        switch_probability=mix.switch_probability,
        num_classes=info.num_classes,
    )
