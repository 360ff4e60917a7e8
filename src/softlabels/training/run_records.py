"""Reads what the trainer left in a run folder."""

from __future__ import annotations

import base64
import binascii
import contextlib
import json
import statistics
import struct
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from softlabels.io.fields import Fields, number_of, read_object, read_text
from softlabels.training.analysis_record import Analysis, read_analysis

SCORES = ("top1", "top5", "group_top1", "nll", "ece")
"""The scores of an evaluation that the report knows; others are ignored."""

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PNG_SIZE = slice(16, 24)  # width and height in the header, which comes first
_MOST_PIXELS = 16_384
_BEYOND = 1e100  # of a run that went wrong; a chart's scale would overflow


@dataclass(frozen=True, eq=False)
class Curve:
    """One logged quantity.

    Attributes:
        x: Finished epochs or steps, rising, shape [N].
        y: The values, all finite (and below 1e100), shape [N].
    """

    x: NDArray[np.float64]
    y: NDArray[np.float64]


@dataclass(frozen=True)
class GalleryImage:
    """An image with its soft label and the network's answer.

    Attributes:
        index: The image's index in its split.
        height: Height in pixels.
        width: Width in pixels.
        png: The picture, a base64 PNG.
        true_class: Name of the true class.
        target_value: The soft label's value for the true class; any real number.
        non_target: Wrong classes and the share of the non-target weight that each gets, 0 to 1.
        prediction: The likeliest classes and their probabilities, 0 to 1.
        is_right: Whether the likeliest class is the true one; None without a prediction.
    """

    index: int
    height: int
    width: int
    png: str
    true_class: str
    target_value: float
    non_target: tuple[tuple[str, float], ...]
    prediction: tuple[tuple[str, float], ...]
    is_right: bool | None


@dataclass(frozen=True)
class Gallery:
    """The saved images of a run.

    Attributes:
        what: A sentence that says what the method's soft label is.
        images: The images.
        split: What they are of: `"test"`, or `"training"` where nothing else has soft labels.
    """

    what: str
    images: tuple[GalleryImage, ...]
    split: str = "test"


@dataclass(frozen=True, eq=False)
class RunRecord:
    """One run.

    Attributes:
        folder: Where the run lies.
        label: The run's name in tables and plots.
        method: Kind of the method, None for the task's loss alone.
        model: Name of the network.
        data: Name of the data.
        seed: The seed.
        epochs: Number of epochs.
        seconds: Time of the whole run in seconds.
        parameters: Number of the network's parameters.
        is_complete: False for a run that was stopped early.
        teacher: Name of the teacher, None where none was measured.
        teacher_top1: Its score on the test images, in percent, likewise.
        test_images: Number of test images, None where the run does not say it.
        final: Scores after the last epoch, by names of `SCORES`.
        best: Scores of the best epoch, by names of `SCORES`.
        best_epoch: The best epoch, None where the run does not say it.
        images_per_second: Median over epochs, None without timings.
        curves: Logged quantities by key: "eval/..." over finished epochs, others over steps.
        config: Text of the configuration, empty where there is none.
        environment: Versions, commit, hardware and the like.
        gallery: The saved test images, None where there are none.
        analysis: Statistics of the answers to the test images, None where there are none.
    """

    folder: Path
    label: str
    method: str | None
    model: str
    data: str
    seed: int
    epochs: int
    seconds: float
    parameters: int
    is_complete: bool
    teacher: str | None
    teacher_top1: float | None
    test_images: int | None
    final: Mapping[str, float]
    best: Mapping[str, float]
    best_epoch: int | None
    images_per_second: float | None
    curves: Mapping[str, Curve]
    config: str
    environment: Mapping[str, str]
    gallery: Gallery | None
    analysis: Analysis | None


def read_run(folder: Path) -> RunRecord:
    """Reads a run folder.

    `summary.json` must be there; everything else may be absent. Unknown keys are ignored.
    Unreadable lines of a log (the last one, where a run was killed while writing) are left out
    with a warning.

    Args:
        folder: The run folder.

    Returns:
        The run.

    Raises:
        ValueError: `summary.json` is missing, or a file is damaged; the message names the file.
    """
    folder = Path(folder)
    if not (folder / "summary.json").is_file():
        raise ValueError(f"{folder} has no summary.json; expected the folder of a run")
    summary = read_object(folder / "summary.json")
    best = summary.optional("best", dict) or {}
    teacher = Fields(summary.path, summary.optional("teacher", dict) or {})
    speeds = [
        number_of(line["images_per_second"], f"{folder / 'timings.jsonl'}: 'images_per_second'")
        for line in _read_lines(folder / "timings.jsonl")
        if line.get("images_per_second") is not None
    ]
    environment = folder / "environment.json"
    gallery = folder / "gallery.json"
    analysis = folder / "analysis.json"
    config = folder / "config.yaml"
    return RunRecord(
        folder=folder,
        label=summary.get("label", str),
        method=summary.optional("method", str),
        model=summary.get("model", str),
        data=summary.get("data", str),
        seed=summary.get("seed", int),
        epochs=summary.get("epochs", int),
        seconds=summary.number("seconds"),
        parameters=summary.get("parameters", int),
        is_complete=summary.get("complete", bool),
        teacher=teacher.optional("name", str),
        teacher_top1=teacher.number("top1") if teacher.values else None,
        test_images=summary.optional("test_images", int),
        final=_scores(summary, "final"),
        best=_scores(summary, "best") if best else {},
        best_epoch=Fields(summary.path, best).optional("epoch", int),
        images_per_second=statistics.median(speeds) if speeds else None,
        curves=_read_curves(folder / "metrics.jsonl"),
        config=read_text(config) if config.is_file() else "",
        environment=_read_environment(environment) if environment.is_file() else {},
        gallery=_read_gallery(gallery) if gallery.is_file() else None,
        analysis=read_analysis(analysis) if analysis.is_file() else None,
    )


def _scores(fields: Fields, key: str) -> dict[str, float]:
    given = fields.get(key, dict)
    return {
        name: number_of(given[name], f"{fields.path}: {key!r}, {name!r}")
        for name in SCORES
        if given.get(name) is not None
    }


def _read_lines(path: Path) -> list[dict[str, object]]:
    """The objects of a JSON-lines file; none where the file is absent."""
    lines: list[dict[str, object]] = []
    if not path.is_file():
        return lines
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except (ValueError, RecursionError):
            values = None
        if isinstance(values, dict):
            lines.append(values)
        else:
            warnings.warn(f"{path}, line {number} is unreadable and left out", stacklevel=2)
    return lines


def _read_curves(path: Path) -> dict[str, Curve]:
    points: dict[str, dict[float, float]] = {}
    for line in _read_lines(path):
        for key, value in line.items():
            position = line.get("epoch" if key.startswith("eval/") else "step")
            if "/" not in key or isinstance(value, bool) or isinstance(position, bool):
                continue
            if isinstance(value, (int, float)) and isinstance(position, (int, float)):
                # A resumed run may log a step again: the later line counts.
                with contextlib.suppress(OverflowError):  # a number of hundreds of digits
                    points.setdefault(key, {})[float(position)] = float(value)
    curves = {}
    for key, values in points.items():
        x, y = np.array(sorted(values.items()), dtype=np.float64).reshape(-1, 2).T
        finite = (np.abs(x) < _BEYOND) & (np.abs(y) < _BEYOND)  # False for NaN
        if finite.any():
            curves[key] = Curve(x[finite], y[finite])
    return curves


# Of use to who looks for a living run, and to nobody who reads its report.
_OF_THE_PROCESS = ("host", "process")


def _read_environment(path: Path) -> dict[str, str]:
    values = read_object(path).values
    # A page may be published; of the earlier starts their number is enough.
    shown = {
        key: len(value) if key == "earlier_starts" and isinstance(value, list) else value
        for key, value in values.items()
        if key not in _OF_THE_PROCESS
    }
    return {k: v if isinstance(v, str) else json.dumps(v) for k, v in shown.items()}


def _read_gallery(path: Path) -> Gallery:
    fields = read_object(path)
    names = fields.get("class_names", list)
    images = []
    for values in fields.get("images", list):
        if not isinstance(values, dict):
            raise ValueError(f"{path}: 'images' holds {values!r:.80}, expected JSON objects")
        images.append(_read_image(Fields(path, values), names))
    split = fields.optional("split", str) or "test"
    if split not in ("test", "training"):
        raise ValueError(f"{path}: 'split' must be test or training, got {split!r:.80}")
    return Gallery(fields.optional("what", str) or "", tuple(images), split)


def _read_image(fields: Fields, names: list[object]) -> GalleryImage:
    path = fields.path

    def class_name(index: int) -> str:
        name = names[index] if 0 <= index < len(names) else None
        return name if isinstance(name, str) else f"class {index}"

    def pairs(key: str) -> list[tuple[int, float]]:
        found = []
        for pair in fields.get(key, list):
            if not isinstance(pair, list) or len(pair) != 2 or type(pair[0]) is not int:
                raise ValueError(f"{path}: {key!r} holds {pair!r:.80}, expected [class, number]")
            found.append((pair[0], number_of(pair[1], f"{path}: {key!r}")))
        return found

    shape = fields.get("shape", list)
    if len(shape) not in (2, 3) or not all(type(n) is int and 0 < n <= _MOST_PIXELS for n in shape):
        raise ValueError(f"{path}: 'shape' is {shape!r:.80}, expected [height, width, ...]")
    png = fields.get("png", str)
    try:
        content = base64.b64decode(png, validate=True)
    except (binascii.Error, ValueError):
        content = b""
    if not content.startswith(_PNG_SIGNATURE):
        raise ValueError(f"{path}: 'png' is {png!r:.40}, expected a PNG file in base64")
    height, width = shape[:2]
    if content[_PNG_SIZE] != struct.pack(">II", width, height):
        raise ValueError(f"{path}: 'png' is a picture of another size than 'shape', {shape}")
    target = fields.get("target", int)
    prediction = pairs("prediction")
    return GalleryImage(
        index=fields.get("index", int),
        height=height,
        width=width,
        png=base64.b64encode(content).decode(),
        true_class=class_name(target),
        target_value=fields.number("target_value"),
        non_target=tuple((class_name(index), share) for index, share in pairs("non_target")),
        prediction=tuple((class_name(index), share) for index, share in prediction),
        is_right=prediction[0][0] == target if prediction else None,
    )
