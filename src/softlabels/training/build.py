"""Turns a run's configuration into the objects that train."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from importlib.resources import files
from typing import Any

import torch
from timm.data import ImageNetInfo, infer_imagenet_subset
from torch import Tensor, nn

from softlabels.data import DataInfo, DataSource, open_source
from softlabels.data.randomness import seeded
from softlabels.distill.distiller import Distiller
from softlabels.distill.external_inputs import checked_inputs
from softlabels.distill.teacher import Teacher, Teachers
from softlabels.distill.teacher_cache import TeacherCache
from softlabels.inputs import PeerLogits, TeacherLogits
from softlabels.io.weights import UNREADABLE, load_weights
from softlabels.losses import LabelSmoothingLoss, Method
from softlabels.models import InputSpec, build_model, model_input
from softlabels.models.class_names import map_by_names, read_class_names
from softlabels.models.record import FileRecord, find_record, weights_file
from softlabels.taps import undisturbed
from softlabels.training.config import (
    Config,
    build_method,
    method_reads_teacher,
    with_method_defaults,
)
from softlabels.training.errors import RunError
from softlabels.training.settings import (
    OBJECT,
    PeerSettings,
    StudentSettings,
    TeacherSettings,
    settings_class,
)

__all__ = [
    "build_distiller",
    "build_source",
    "build_teacher",
    "opened_source",
    "try_out",
    "with_defaults",
    "with_findings",
]

_NUM_SAMPLES = "num_samples"  # the setting of methods that keep something for each image
_SMALL_IMAGE = 64  # pixels; up to here a network for small images is the default student


def build_source(config: Config) -> DataSource:
    """Open the data that a configuration names, and hold out what it says.

    Raises:
        ValueError: Data that cannot be read, settings that its kind does not take, or a training
            set that is too small to be divided.
    """
    data = config.data
    if data.source.startswith(OBJECT):
        raise ValueError(
            f"the run's data were an object, {data.source.removeprefix(OBJECT)}, which no setting "
            "opens: give it again, softlabels.train(data=...)"
        )
    shares = {"validation": data.validation, "train_share": data.train_share}
    source = open_source(**data.model_dump(exclude={*shares}))
    return source if shares == dict.fromkeys(shares) else source.split(**shares)


@contextmanager
def opened_source(config: Config, given: DataSource | None = None) -> Iterator[DataSource]:
    """The data that were given; else those of `build_source`, which are closed at the end.

    Raises:
        RunError: A worker of the data is lost.
    """
    try:
        with closing(build_source(config)) if given is None else nullcontext(given) as source:
            yield source
    except ChildProcessError as error:
        raise RunError(str(error)) from error


def with_defaults(
    config: Config, info: DataInfo, num_train: int | None = None, method: Method | None = None
) -> Config:
    """Fill in what a configuration leaves to the data and the methods.

    Args:
        config: As resolved.
        info: Of the data.
        num_train: Number of training images, for methods that keep something for each.
        method: In place of the one that the configuration names.
    """
    name = config.student.name
    if name is None:
        name = "timm:resnet20" if max(info.image_size) <= _SMALL_IMAGE else "timm:resnet18"
    filled = with_method_defaults(config, method)
    changed: dict[str, Any] = {"student": config.student.model_copy(update={"name": name})}
    if num_train is not None:
        own = {_NUM_SAMPLES: num_train}
        if method is None and getattr(config.method, _NUM_SAMPLES, 0) is None:
            changed["method"] = config.method.model_copy(update=own)
        further_methods = []
        for further in filled.further_methods:
            keeps = _NUM_SAMPLES in settings_class(further.kind).model_fields
            if keeps and further.settings.get(_NUM_SAMPLES) is None:
                further = further.model_copy(update={"settings": further.settings | own})
            further_methods.append(further)
        changed["further_methods"] = tuple(further_methods)
    return filled.model_copy(update=changed)


def with_findings(config: Config, source: DataSource) -> Config:
    """Fill in what the data and the teachers' weights say of themselves, for the record.

    Raises:
        ValueError: A teacher's file of weights that cannot be read.
    """
    told = getattr(source, "found_settings", {})
    left = {n for n in type(config.data).model_fields if getattr(config.data, n) in (None, "auto")}
    return config.model_copy(
        update={
            "data": config.data.model_copy(update={n: told[n] for n in left & {*told}}),
            "teacher": _with_its_input(config.teacher, source.info),
            "further_teachers": tuple(
                _with_its_input(teacher, source.info) for teacher in config.further_teachers
            ),
        }
    )


def _with_its_input(settings: TeacherSettings, info: DataInfo) -> TeacherSettings:
    """With the mean, deviation and size of images that a teacher's weights expect."""
    if settings.name is None or settings.name.startswith(OBJECT):
        return settings
    _, _, expects = _read_header(settings)
    height, width = expects.image_size or info.image_size
    size = height if height == width and (height, width) != info.image_size else None
    found = {"mean": expects.mean, "std": expects.std, "input_size": settings.input_size or size}
    return settings.model_copy(update=found)


def build_distiller(
    config: Config,
    info: DataInfo,
    *,
    student: nn.Module | None = None,
    teacher: TeacherCache | nn.Module | None = None,
    method: Method | None = None,
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
    if method is None:
        method = build_method(config)
    shape = (info.in_channels, *info.image_size)
    inputs = checked_inputs(method).values()
    peer = None
    if any(isinstance(kind, PeerLogits) for kind in inputs):
        if config.peer.name is None and student is not None:
            raise ValueError(
                f"{config.label} trains a second network along: beside a student of your own it "
                "needs peer.name"
            )
        settings = config.student if config.peer.name is None else config.peer
        peer = _trained_network("peer", settings, info, config.seed)
    if student is None:
        pretrained = config.student.pretrained
        student = _trained_network("student", config.student, info, config.seed, pretrained)
        if config.student.weights is not None:
            load_weights(student, _file(config.student.weights))
    # A cache without a reader says which draws of the augmentation are shown.
    given = config.teacher.cache is None and config.teacher.name is not None
    if given and not method_reads_teacher(method):
        raise ValueError(
            f"{config.label} reads from no teacher, but one is given: leave teacher out"
        )
    if teacher is None and config.teacher.cache is not None:
        teacher = TeacherCache(config.teacher.cache)
    elif config.teacher.name is not None and not isinstance(teacher, TeacherCache | Teachers):
        reads_logits = any(isinstance(kind, TeacherLogits) for kind in inputs)
        every = [] if teacher is None else [teacher]
        for named in (config.teacher, *config.further_teachers)[len(every) :]:
            built = build_teacher(named, info)
            hint = ": teacher.class_map names the classes of the data among the teacher's"
            num_classes = info.num_classes if reads_logits else None
            try_out(built, f"the teacher {named.name!r}", shape, num_classes, hint=hint)
            every.append(built)
        teacher = every[0] if len(every) == 1 else Teachers(every)
    task = config.task
    task_loss = (
        LabelSmoothingLoss(smoothing=task.label_smoothing, smooth_over=task.smooth_over)
        if task.label_smoothing
        else None
    )
    with seeded(config.seed, "heads"):
        return Distiller(
            student,
            method,
            teacher=teacher,
            task_loss=task_loss,
            taps=config.taps,
            peer=peer,
            example_shape=shape,
        )


def _trained_network(
    what: str,
    settings: StudentSettings | PeerSettings,
    info: DataInfo,
    seed: int,
    pretrained: bool = False,
) -> nn.Module:
    """The student, or its peer, with random numbers of its own."""
    with seeded(seed, what):
        network = build_model(
            settings.name or "",
            num_classes=info.num_classes,
            in_channels=info.in_channels,
            image_size=info.image_size,
            settings=settings.settings,
            pretrained=pretrained,
        )
    shape = (info.in_channels, *info.image_size)
    try_out(network, f"the {what} {settings.name!r}", shape, info.num_classes)
    return network


def try_out(
    network: nn.Module,
    name: str,
    shape: tuple[int, int, int],
    num_classes: int | None,
    *,
    hint: str = "",
) -> None:
    """Run a network once, on the CPU, and leave it as it was.

    Args:
        network: [B, C, H, W] -> [B, classes].
        name: What an error calls it.
        shape: (C, H, W) of the images.
        num_classes: Number of classes that it must have; None: any.
        hint: What an error about that adds.

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
            f"image{hint}"
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

    What its own images look like is said by the settings, else by the header of the file of its
    weights, else by the weights' publisher; else they look like those of the data.

    Args:
        settings: With a name.
        info: Classes, channels, size and normalization of the images.

    Raises:
        FileNotFoundError: No such file of weights or of class names.
        ValueError: A name, a setting or weights that do not fit.
    """
    name = settings.name or ""
    weights, record, expects = _read_header(settings)
    own = (expects.mean, expects.std) if expects.mean and expects.std else None
    if own == (info.mean, info.std):
        own = None
    num_classes = settings.num_classes or (record.num_classes if record is not None else None)
    if num_classes is None and not settings.pretrained and settings.class_map is None:
        num_classes = info.num_classes
    size = expects.image_size or info.image_size
    # A teacher of colors sees gray images as colors.
    in_channels = info.in_channels if own is None else max(info.in_channels, len(own[0]))
    model = build_model(
        name,
        num_classes=num_classes,
        in_channels=in_channels,
        image_size=size,
        settings=settings.settings,
        pretrained=settings.pretrained,
    )
    class_map: Sequence[int] | str | None = settings.class_map
    if isinstance(class_map, str):
        names = _class_names_of(model, settings, record, (in_channels, *size))
        class_map = map_by_names(info.class_names, names, f"the teacher {name!r:.200}")
    if class_map is not None and len(class_map) != info.num_classes:
        raise ValueError(
            f"teacher.class_map must have an index for each of the {info.num_classes} classes of "
            f"{info.name}, got {len(class_map)}"
        )
    return Teacher(
        model,
        weights=weights,
        normalization=own,
        student_normalization=(info.mean, info.std) if own is not None else None,
        input_size=size if settings.input_size or size != info.image_size else None,
        class_map=class_map,
        mode=settings.mode,
    )


def _read_header(settings: TeacherSettings) -> tuple[str | None, FileRecord | None, InputSpec]:
    """The file of a teacher's weights, what it says of the network, and what that expects to see.

    Each as far as anybody says it.
    """
    weights = None if settings.weights is None else _file(settings.weights)
    kind, _, path = (settings.name or "").partition(":")
    record = None
    if weights is not None or kind == "file":
        record = find_record(weights_file(path) if weights is None else weights)
    known = record or (model_input(settings.name or "") if settings.pretrained else InputSpec())
    size = settings.input_size
    expects = InputSpec(
        mean=settings.mean or known.mean,
        std=settings.std or known.std,
        image_size=known.image_size if size is None else (size, size),
    )
    return weights, record, expects


def _class_names_of(
    model: nn.Module,
    settings: TeacherSettings,
    record: FileRecord | None,
    shape: tuple[int, int, int],
) -> Sequence[str]:
    """The names of a teacher's classes, in the order of its logits."""
    if settings.class_names is not None:
        names = read_class_names(settings.class_names)
        what = f"the teacher {settings.name!r:.200} with the class names in {settings.class_names}"
        try_out(model, what, shape, len(names))
        return names
    if record is not None and record.class_names is not None:
        return record.class_names
    if settings.pretrained and settings.weights is None and settings.num_classes is None:
        # torchvision's classifiers know the 1000 classes alone.
        subset = infer_imagenet_subset(model) or "imagenet-1k"
        labels: list[str] = ImageNetInfo(subset).label_names()
        return labels
    raise ValueError(
        "teacher.class_map names: nothing says the names of the classes of "
        f"{settings.name!r:.200}; give teacher.class_names, a file with one a line"
    )
