"""What a weights file says of its network, and how much a network built from that may take."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, ValidationError, model_validator
from torch.utils._python_dispatch import TorchDispatchMode

from softlabels.io.records import problem_of
from softlabels.io.weights import read_metadata

__all__ = ["METADATA_KEY", "FileRecord", "SizeLimit", "find_record", "read_record", "weights_file"]

METADATA_KEY = "softlabels"

_STUDENT = "student.safetensors"

_FEW = 64 << 20  # numbers that any network may take: 256 MB in float32
_MOST_OPERATIONS = 100_000
_Count = Annotated[int, Field(ge=1, le=1_000_000)]
_Pixels = Annotated[int, Field(ge=1, le=16_384)]
_Mean = Annotated[float, Field(allow_inf_nan=False)]
_Deviation = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class FileRecord(BaseModel, frozen=True):
    """How the model of a weights file is built and fed, as kept in the file's header.

    Attributes:
        model: Name, as for `build_model`.
        num_classes: Number of classes.
        in_channels: Channels of the images.
        image_size: Height and width in pixels.
        settings: Further arguments of the model.
        mean: Mean of each channel of the images, in 0 to 1.
        std: Standard deviation of each channel, likewise.
        class_names: One for each class.
        crop_fraction: The central part of a test image that is kept.
        interpolation: How images are resized.
    """

    model: str
    num_classes: _Count
    in_channels: _Count
    image_size: tuple[_Pixels, _Pixels] | None = None
    settings: dict[str, Any] = {}
    mean: tuple[_Mean, ...] | None = None
    std: tuple[_Deviation, ...] | None = None
    class_names: tuple[str, ...] | None = None
    crop_fraction: float = Field(1.0, gt=0, le=1)
    interpolation: Literal["nearest", "box", "bilinear", "hamming", "bicubic", "lanczos"] = (
        "bilinear"
    )

    @model_validator(mode="after")
    def _lengths_fit(self) -> FileRecord:
        for name, values, lengths in (
            ("mean", self.mean, {1, self.in_channels}),
            ("std", self.std, {1, self.in_channels}),
            ("class_names", self.class_names, {self.num_classes}),
        ):
            if values is not None and len(values) not in lengths:
                raise ValueError(f"{name} has {len(values)} entries, expected {max(lengths)}")
        return self


def weights_file(path: str | os.PathLike[str]) -> Path:
    """The file itself; of the folder of a run, that of its student."""
    return Path(path) / _STUDENT if Path(path).is_dir() else Path(path)


def find_record(path: str | os.PathLike[str]) -> FileRecord | None:
    """As `read_record`; None for a file that is no `.safetensors`, or whose header does not say.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If its header says what cannot be.
    """
    path = Path(path)
    if path.suffix != ".safetensors" or METADATA_KEY not in read_metadata(path):
        return None
    return read_record(path)


def read_record(path: str | os.PathLike[str]) -> FileRecord:
    """Read how the model of a weights file, or of the student of a run's folder, is built and fed.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If its header does not say, or says what cannot be.
    """
    path = weights_file(path)
    metadata = read_metadata(path)
    if METADATA_KEY not in metadata:
        raise ValueError(
            f"the header of {path} does not say which model its weights are for; expected a file "
            "written with model_metadata. Otherwise build the model and use load_weights"
        )
    try:
        return FileRecord.model_validate_json(metadata[METADATA_KEY])
    except ValidationError as error:
        raise ValueError(
            f"the header of {path} has a damaged model record: {problem_of(error)}"
        ) from error


class SizeLimit(TorchDispatchMode):
    """Refuses tensors that a network with a file's weights cannot need, before they are made.

    The header of a small file may ask for a network that fills the memory.

    Args:
        num_stored: How many numbers the file holds.

    Raises:
        ValueError: From the operation that goes beyond the limit.
    """

    def __init__(self, num_stored: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch has no annotation here
        self._left = _FEW + 8 * num_stored  # a head is made twice, and drawing takes copies
        self._operations_left = _MOST_OPERATIONS

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        options = dict(kwargs or {})
        names = [argument.name for argument in func._schema.arguments]
        given = {**dict(zip(names, args, strict=False)), **options}
        size, steps = given.get("size"), given.get("steps")
        if isinstance(size, (list, tuple)):
            self._left -= math.prod(size)
        # Steps of a schedule over layers, each of which becomes an object.
        self._operations_left -= 1 + (steps if isinstance(steps, int) else 0)
        if self._left < 0 or self._operations_left < 0:
            raise ValueError("the network is larger than the weights that the file holds")
        return func(*args, **options)
