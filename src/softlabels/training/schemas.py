"""What the files of a run's folder hold: a schema of each, for the writer and for the reader."""

from __future__ import annotations

import json
import math
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import ConfigDict, Field
from pydantic_core import core_schema

from softlabels.io.records import Record

__all__ = [
    "Analysis",
    "DataContent",
    "Environment",
    "Failure",
    "Features",
    "Gallery",
    "GalleryImage",
    "Metrics",
    "Numbers",
    "Reliability",
    "Summary",
    "TeacherScore",
    "Temperature",
    "Timing",
    "Zipf",
]

_MOST_POINTS = 400
_SHARE_TOLERANCE = 1e-6  # rounding may lead a little beyond 0 and 1


# What is written while a run goes.


class DataContent(Record):
    """`data.json`: what a run's data are, wherever they lie.

    Attributes:
        train_images: Number of training images.
        test_images: Number of test images.
        digest: Of the training images and labels; None for a source that tells none.
    """

    train_images: int
    test_images: int
    digest: str | None = None


class Metrics(Record):
    """A line of `metrics.jsonl`: scalars by `split/name`, which a repetition gives again.

    Attributes:
        epoch: Finished epochs for an evaluation, else the running one, from 0.
        step: Optimizer steps so far.
    """

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, float] = Field(init=False)

    epoch: int = Field(ge=0, lt=2**53)
    step: int = Field(ge=0, lt=2**53)

    @property
    def scalars(self) -> dict[str, float]:
        """The scalars alone."""
        return {name: v for name, v in self.__pydantic_extra__.items() if "/" in name}


class Timing(Record):
    """A line of `timings.jsonl`: how long an epoch's training took.

    Attributes:
        epoch: Its number, from 1.
        seconds: Without evaluation.
        images_per_second: Of all processes together.
    """

    epoch: int
    seconds: float
    images_per_second: float


class Environment(Record):
    """`environment.json`: what a run ran on. Versions are of packages that are installed.

    Attributes:
        commit: Of the checkout; None for an installed wheel.
        threads: CPU threads of each process.
        accelerator: Name of the GPU.
        processes: How many trained together.
        command: That started the run.
        host: Of the process at work; it is shown nowhere.
        process: Its number, likewise.
        earlier_starts: What earlier starts of the run ran on.
    """

    python: str
    softlabels: str | None = None
    torch: str | None = None
    torchvision: str | None = None
    timm: str | None = None
    accelerate: str | None = None
    torchmetrics: str | None = None
    numpy: str | None = None
    commit: str | None
    system: str
    processor: str
    cores: int | None
    threads: int
    device: str
    accelerator: str | None
    processes: int
    seed: int | None = None
    command: str | None = None
    host: str | None = None
    process: int | None = None
    earlier_starts: tuple[Environment, ...] = ()

    def texts(self) -> dict[str, str]:
        """Each value as a text for a page, which may be published; of earlier starts the number."""
        values = self.model_dump(exclude={"host", "process", "earlier_starts"}, exclude_unset=True)
        if self.earlier_starts:
            values["earlier_starts"] = len(self.earlier_starts)
        return {k: v if isinstance(v, str) else json.dumps(v) for k, v in values.items()}


class TeacherScore(Record):
    """`teacher.json`: how well a teacher does on the test images of a run.

    Attributes:
        name: The teacher's.
        top1: Share of the images that it is right on, in percent.
        test_images: How many there are.
        num_classes: Of the data.
    """

    name: str
    top1: float = Field(ge=0, le=100)
    test_images: int = Field(ge=1)
    num_classes: int = Field(ge=2)


class Failure(Record):
    """`failure.json`: why a run cannot go on.

    Attributes:
        error: The message.
        step: After which it was found.
        parts: Terms of the loss, or weights, that are not finite.
        images: Indices of the images of the step.
    """

    error: str
    step: int
    parts: tuple[str, ...]
    images: tuple[int, ...]


# What is written at its end.


class NamedScore(Record):
    """A network's name, and its top-1 on the test images in percent."""

    name: str
    top1: float


class Summary(Record):
    """`summary.json`: what a run was, and what came out.

    Attributes:
        label: The run's name in tables and plots.
        method: Kind of the method, None for the task's loss alone.
        model: Name of the network.
        teacher: None where none was measured.
        data: Name of the data.
        test_images: How many there are, None where the run does not say it.
        final: Scores after the last epoch, by name.
        best: Scores of the best epoch, and its number as `epoch`; empty without evaluation.
        seconds: Of training.
        seconds_per_epoch: Their median over the epochs.
        peak_memory: Bytes.
        parameters: Number of the network's parameters.
        assumed: What a recipe takes for granted, with reasons.
        skipped_images: Number of images that could not be read.
        complete: False for a run that was stopped early.
    """

    label: str
    method: str | None
    model: str
    teacher: NamedScore | None = None
    data: str
    test_images: int | None = None
    seed: int
    epochs: int
    final: dict[str, float]
    best: dict[str, int | float] = Field({})
    seconds: float
    seconds_per_epoch: float | None = None
    peak_memory: int | None = None
    parameters: int
    assumed: dict[str, str] = Field({})
    skipped_images: int = 0
    complete: bool

    def _check(self) -> None:
        if self.best and not {"top1", "epoch"} <= self.best.keys():
            raise ValueError(f"best must have top1 and epoch, got {', '.join(self.best):.80}")


class GalleryImage(Record):
    """An image with its soft label and the network's answer.

    Attributes:
        index: The image's index in its split.
        target: Its class.
        shape: Height, width and perhaps channels of the picture.
        png: The picture, a PNG file in base64.
        target_value: The soft label's value for the true class; any real number.
        non_target: Wrong classes and the share of the non-target weight that each gets, 0 to 1.
        prediction: The likeliest classes and their probabilities, 0 to 1.
    """

    index: int
    target: int
    shape: tuple[int, ...] = Field(min_length=2, max_length=3)
    png: str = Field(pattern="^iVBORw0KGgo[A-Za-z0-9+/]*={0,2}$")
    target_value: float
    non_target: tuple[tuple[int, float], ...]
    prediction: tuple[tuple[int, float], ...]

    @property
    def is_right(self) -> bool:
        """Whether the likeliest class is the true one."""
        return bool(self.prediction) and self.prediction[0][0] == self.target


class Gallery(Record):
    """`gallery.json`: some images of a run.

    Attributes:
        class_names: By class.
        what: A sentence that says what the method's soft label is.
        split: What they are of; training images where nothing else has soft labels.
        images: The images.
    """

    class_names: tuple[str, ...]
    what: str = ""
    split: Literal["test", "training"] = "test"
    images: tuple[GalleryImage, ...]

    def name_of(self, label: int) -> str:
        """Name of a class."""
        return self.class_names[label] if 0 <= label < len(self.class_names) else f"class {label}"


class _Column:
    """Makes a field's array of the list that a file holds, and the other way round."""

    def __init__(self, items: Any, dtype: type[np.generic]) -> None:
        self._items = items
        self._dtype = dtype

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> core_schema.CoreSchema:
        return core_schema.no_info_after_validator_function(
            lambda values: np.array(values, dtype=self._dtype),
            handler.generate_schema(list[self._items]),  # type: ignore[name-defined]  # a value
            serialization=core_schema.plain_serializer_function_ser_schema(_listed),
        )


def _listed(values: NDArray[Any]) -> list[Any]:
    """Its items; None for what is not finite."""
    if values.ndim > 1:
        return [_listed(row) for row in values]
    return [value if math.isfinite(value) else None for value in values.tolist()]


_Count = Annotated[int, Field(ge=0, lt=2**53)]
_Share = Annotated[float, Field(ge=-_SHARE_TOLERANCE, le=1 + _SHARE_TOLERANCE)]

Numbers = Annotated[NDArray[np.float64], _Column(float | None, np.float64)]
"""A column of numbers; NaN where there is none."""
Shares = Annotated[NDArray[np.float64], _Column(_Share | None, np.float64)]
"""Numbers from 0 to 1; NaN where there is none."""
Counts = Annotated[NDArray[np.int64], _Column(_Count, np.int64)]
"""Whole numbers from 0."""


class Temperature(Record):
    """What dividing the logits by a temperature repairs, measured on other images than it is of.

    Attributes:
        value: The temperature.
        nll: In nats.
        ece: In percent.
        fitted_on: Number of images, None for all.
    """

    value: float
    nll: float
    ece: float
    fitted_on: int | None = None


class Zipf(Record):
    """The sorted softmax, and the straight line through its logarithm over that of the rank.

    Attributes:
        mean_sorted_softmax: Mean over images at rank 1, 2, ..., shape [R].
        exponent: Minus the slope.
        r2: Share of the variance that the line explains, at most 1.
        ranks: The first and the last rank of the fit, from 1.
    """

    mean_sorted_softmax: Shares
    exponent: float | None
    r2: float | None
    ranks: tuple[_Count, _Count]

    def _check(self) -> None:
        if not 1 <= self.ranks[0] <= self.ranks[1] <= len(self.mean_sorted_softmax):
            raise ValueError(
                f"ranks must be in 1..{len(self.mean_sorted_softmax)}, got {self.ranks}"
            )


class Reliability(Record):
    """Bins of the confidence; shares from 0 to 1, NaN in an empty bin.

    Attributes:
        confidence: Mean confidence, shape [15].
        accuracy: Share of right answers, shape [15].
        count: Number of images, shape [15].
    """

    confidence: Shares
    accuracy: Shares
    count: Counts

    def _check(self) -> None:
        _check_lengths(self, "confidence", "accuracy", "count")


class TaughtBy(NamedScore):
    """A teacher, and how often the student's first class is the teacher's, in percent."""

    agreement: float


class Features(Record):
    """Some images in the plane of the first two principal components.

    Attributes:
        what: What the components are of.
        classes: Class of each image, shape [N].
        x: First component, shape [N].
        y: Second component, shape [N].
        explained: Share of the variance that each of the two explains, 0 to 1.
    """

    what: str = ""
    classes: Counts = Field(alias="class")
    x: Numbers
    y: Numbers
    explained: tuple[_Share, _Share]

    def _check(self) -> None:
        if len(self.classes) > _MOST_POINTS:
            raise ValueError(f"expected at most {_MOST_POINTS} points, got {len(self.classes)}")
        _check_lengths(self, "classes", "x", "y")


class Analysis(Record):
    """`analysis.json`: what is known of a run's answers to the test images.

    Attributes:
        images: Number of test images.
        class_names: Name of each class, C of them.
        groups: The group of similar classes of each class, None without groups.
        temperature: None for too few images, or logits that are not finite.
        zipf: The sorted softmax.
        reliability: Accuracy over confidence.
        per_class: Top-1 of each class in percent, shape [C]; NaN for a class without images.
        confusion: Rows of true class, predicted class, number of images, shape [K, 3]; the
            most frequent confusions first.
        teacher: None where no network taught.
        features: A picture of the features, None without one.
    """

    images: int
    class_names: tuple[str, ...]
    groups: tuple[int | str, ...] | None = None
    temperature: Temperature | None = None
    zipf: Zipf
    reliability: Reliability
    per_class: Numbers
    confusion: tuple[tuple[_Count, _Count, _Count], ...]
    teacher: TaughtBy | None = None
    features: Features | None = None

    def _check(self) -> None:
        _check_lengths(self, "class_names", "per_class", "groups")
        labels = {label for row in self.confusion for label in row[:2]}
        labels |= set() if self.features is None else set(self.features.classes.tolist())
        if labels and max(labels) >= len(self.class_names):
            raise ValueError(f"expected {len(self.class_names)} classes, got {max(labels)}")


def _check_lengths(record: Record, *names: str) -> None:
    """Columns of these names, as far as there are any, belong together."""
    columns = {name: getattr(record, name) for name in names}
    lengths = {name: len(column) for name, column in columns.items() if column is not None}
    if len(set(lengths.values())) > 1:
        told = ", ".join(f"{name} has {length}" for name, length in lengths.items())
        raise ValueError(f"expected columns of one length: {told}")
