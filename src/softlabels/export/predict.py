"""A trained student by its file: build it, read images for it, classify them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

from softlabels.data import open_source
from softlabels.data.augment import Normalization
from softlabels.data.decoding import DECODING_ERRORS, read_rgb
from softlabels.data.sources.by_name import kind_of, settings_of
from softlabels.data.transforms import evaluation_geometry
from softlabels.distill.teacher import Teacher
from softlabels.models import build_model
from softlabels.models.record import FileRecord, read_record
from softlabels.training.build import build_source, try_out
from softlabels.training.config import load_recipe, parse
from softlabels.training.metrics import evaluate

__all__ = ["Prediction", "evaluate_file", "find_images", "load_student", "predict"]

_ENDINGS = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm", ".pgm"}


@dataclass(frozen=True)
class Prediction:
    """What a student says of an image.

    Attributes:
        path: The image.
        classes: Names, most probable first.
        probabilities: Of these classes, 0 to 1.
    """

    path: Path
    classes: tuple[str, ...]
    probabilities: tuple[float, ...]


def load_student(path: str | Path) -> tuple[nn.Module, FileRecord]:
    """Build a student from its own file, or from its run's folder.

    Args:
        path: `student.safetensors`, or a folder that holds one.

    Returns:
        The plain network in eval mode, and what its file says of it.

    Raises:
        FileNotFoundError: No such file.
        ValueError: The file does not say which network it is for, or the network cannot run on
            images of the size that it says.
    """
    file = Path(path)
    file = file / "student.safetensors" if file.is_dir() else file
    record = read_record(str(file))
    model = build_model(
        f"file:{file}", num_classes=record.num_classes, in_channels=record.in_channels
    )
    model.eval()
    if record.image_size is not None:
        shape = (record.in_channels, *record.image_size)
        try_out(model, f"the network in {file}", shape, record.num_classes)
    return model, record


def find_images(paths: Sequence[str | Path]) -> list[Path]:
    """The images among files and folders, folders with all that is below them.

    Raises:
        ValueError: A path that does not exist, or a folder without images.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            files = (p for p in path.rglob("*") if p.suffix.lower() in _ENDINGS)
            inside = sorted(p for p in files if p.is_file())  # no named pipe, which would wait
            if not inside:
                raise ValueError(f"{path} holds no images ({', '.join(sorted(_ENDINGS))})")
            found += inside
        elif path.is_file():
            found.append(path)
        else:
            raise ValueError(f"{path} does not exist: expected an image or a folder of images")
    return found


def _read(path: Path, in_channels: int) -> Tensor:
    try:
        image = read_rgb(str(path))
    except DECODING_ERRORS as error:
        raise ValueError(f"{path} is no readable image: {error}") from error
    return pil_to_tensor(to_pil_image(image).convert("L")) if in_channels == 1 else image


def predict(
    student: nn.Module,
    record: FileRecord,
    images: Sequence[Path],
    *,
    top: int = 3,
    batch_size: int = 64,
) -> list[Prediction]:
    """Classify images from files.

    Args:
        student: From `load_student`.
        record: Likewise.
        images: Files.
        top: How many classes are named for each.
        batch_size: Images per forward.

    Raises:
        ValueError: An image that cannot be read, or to which the student's answer is not finite;
            with its path.
    """
    if record.image_size is None or record.mean is None or record.std is None:
        raise ValueError("the student's file does not say the size and normalization of its images")
    geometry = evaluation_geometry(  # as the data source of the student's run evaluated
        record.image_size, interpolation=record.interpolation, crop_fraction=record.crop_fraction
    )
    normalized = Normalization(record.mean, record.std)
    names = record.class_names or tuple(str(label) for label in range(record.num_classes))
    predictions = []
    for start in range(0, len(images), batch_size):
        paths = images[start : start + batch_size]
        batch = torch.stack([geometry(_read(path, record.in_channels)) for path in paths])
        with torch.inference_mode():
            probabilities = student(normalized(batch)).float().softmax(1)
        for path, row in zip(paths, probabilities, strict=True):
            if not bool(row.isfinite().all()):
                raise ValueError(f"the student's answer to {path} is not finite")
        values, classes = probabilities.topk(min(top, record.num_classes), dim=1)
        predictions += [
            Prediction(path, tuple(names[label] for label in labels), tuple(row))
            for path, labels, row in zip(paths, classes.tolist(), values.tolist(), strict=True)
        ]
    return predictions


def evaluate_file(
    student: str | Path,
    *,
    path: str | None = None,
    source: str | None = None,
    batch_size: int = 256,
) -> dict[str, float]:
    """Measure a trained student on a test set.

    Args:
        student: A run's folder, or `student.safetensors`.
        path: Folder of the data; without path and source, the data of the student's run.
        source: Kind of the data.
        batch_size: Images per forward.

    Returns:
        As `softlabels.training.metrics`.

    Raises:
        FileNotFoundError: No such file.
        ValueError: Data that do not fit the student: other classes, channels or no such folder;
            or answers that are not finite.
    """
    model, record = load_student(student)
    folder = Path(student) if Path(student).is_dir() else Path(student).parent
    run = folder / "config.yaml"
    config = parse(load_recipe(str(run))) if run.is_file() else None
    if path is None and source is None:
        if config is None:
            raise ValueError(f"{student} stands in no run's folder: name the data with --path")
        data = build_source(config)
    else:
        trained_with = {
            "image_size": max(record.image_size) if record.image_size else None,
            "crop_fraction": record.crop_fraction,
            "interpolation": record.interpolation,
        }
        taken = settings_of(kind_of(source, path))
        settings = {k: v for k, v in trained_with.items() if k in taken and v is not None}
        data = open_source(source, path, **settings)
    info = data.info
    try:
        for what, got, expected in (
            ("classes", info.num_classes, record.num_classes),
            ("channels", info.in_channels, record.in_channels),
        ):
            if got != expected:
                raise ValueError(
                    f"the data {info.name} have {got} {what}, the student was trained for "
                    f"{expected}"
                )
        normalization = (record.mean, record.std) if record.mean and record.std else None
        # A frozen network on images that were normalized for another one: that is a Teacher.
        network = Teacher(
            model,
            normalization=normalization,
            student_normalization=None if normalization is None else (info.mean, info.std),
        )
        batches = data.test_batches(batch_size=batch_size, device="cpu")
        # As the run evaluated, so that the figures are the same.
        half = config is not None and config.precision == "bf16"
        autocast = partial(torch.autocast, "cpu", torch.bfloat16, enabled=half)
        metrics = evaluate(network, batches, info, torch.device("cpu"), autocast)
    finally:
        data.close()
    if not all(map(math.isfinite, metrics.values())):
        raise ValueError(f"the student's answers to {info.name} are not all finite")
    return metrics
