"""What the data sources that read image files have in common."""

# The fields' types are also read where subclasses are defined, so they are not deferred to text.

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from torch import Tensor
from typing_extensions import Self

from softlabels.data.augment import Normalization, mirror_
from softlabels.data.batch import Batch, DataInfo
from softlabels.data.decoding import Images
from softlabels.data.extra_views import Reading
from softlabels.data.in_memory import InMemorySource
from softlabels.data.loading import CannotLoadError, StoredForm, size_of_first
from softlabels.data.source import DataSource
from softlabels.data.transforms import ImageSettings, ImageTransform, training_transform
from softlabels.data.workers import ImageReader, ReaderSettings, SomeImages, Split
from softlabels.io.console import say

__all__ = ["ImageSource"]

_SMALL = 64  # pixels; up to here a file is read at its own size if nobody says another


@dataclass(kw_only=True, eq=False)
class ImageSource(ImageSettings, ReaderSettings, DataSource):
    """A data source over images that worker processes read one by one.

    An image is transformed with draws that belong to a seed, a number and its index, whichever
    worker reads it. Workers never touch an accelerator. A subclass finds the images (`_find`) and
    tells them apart (`_identity`); its own fields are further settings.

    Args:
        path: Where the images are.
        in_memory: Whether all images are decoded once, and augmented batch by batch on the device.
            Not with `auto_augment`, `random_erasing` and `lighting`; the training images must be
            square, and for `"random_resized_crop"` of one size, of at most 128 pixels. `"auto"`: if
            that is so, and they take at most half of the free memory.

    Raises:
        ValueError: If the images are not where and as the subclass describes, are damaged or do not
            fit each other, or a setting is out of its range.
    """

    path: str | Path = field(kw_only=False)
    in_memory: Literal["auto"] | bool = "auto"

    def __post_init__(self) -> None:
        ReaderSettings.__post_init__(self)
        class_names, train, test = self._find()
        size = size_of_first(train)
        self._has_own_size = self.image_size is None and size is not None and max(size) <= _SMALL
        if self._has_own_size and size is not None:
            self.image_size = min(size)
            self.augmentation = self.augmentation or "crop_flip"
        ImageSettings.__post_init__(self)
        self._transforms: dict[Split, ImageTransform] = {
            "train": training_transform(self),
            "test": ImageTransform(self.evaluation_geometry()),
        }
        self._normalized = Normalization(self.mean, self.std)
        self._must_load = self.in_memory is True
        if self.in_memory:
            try:
                self._form = StoredForm.of(self, size, len(train), len(test))
                self.in_memory = True
            except CannotLoadError as error:
                self._not_in_memory(error)
        self._info = DataInfo(
            self._root.resolve().name,
            class_names,
            3,
            (self.side, self.side),
            self.mean,
            self.std,
            crop_fraction=cast("float", self.crop_fraction),
            interpolation=self.interpolation,
        )
        # The training images as they were found; some of them may be trained on.
        self._found = train
        self._rows = np.arange(len(train))
        self._read_from(train, test)

    def _read_from(self, train: Images, test: Images) -> None:
        """Take these images from now on."""
        self._targets, self._num_test = train.targets, len(test)
        self._stored: InMemorySource | None = None
        self._images: dict[Split, Images] = {"train": train, "test": test}
        self._reader = ImageReader(self._images, self._transforms, self)

    def _not_in_memory(self, error: CannotLoadError) -> None:
        """Read from files, unless that was not wanted."""
        if self._must_load:
            raise ValueError(f"in_memory must be false or auto: {error}") from error
        self.in_memory = False

    def prepare(self, console: Console | None = None) -> None:
        """Decode what is to lie in memory; see `DataSource`."""
        if self._stored is not None or not self.in_memory:
            return
        size = f"{self.side} pixels"
        how = f"their own size, {size}, with crop and flip" if self._has_own_size else size
        number = f"{self.num_train + self.num_test:,} images"
        say(console, f"{self._info.name}: {number} are decoded into memory at {how}")
        try:
            self._stored = self._form.read(self._images, self._info, console)
        except CannotLoadError as error:
            self._not_in_memory(error)
            say(console, f"{self._info.name} is read from disk: {error}")

    @property
    def _root(self) -> Path:
        """The path, with `~` replaced."""
        return Path(self.path).expanduser()

    def _find(self) -> tuple[tuple[str, ...], Images, Images]:
        """The names of the classes, the training images and the test images."""
        raise NotImplementedError

    def _identity(self, index: int) -> str:
        """What tells a training image, as it was found, from others, wherever the data set lies."""
        raise NotImplementedError

    @property
    def found_settings(self) -> dict[str, object]:
        """The settings by name, also those that were left to the data or to each other."""
        self.prepare()
        return {each.name: getattr(self, each.name) for each in fields(self)}

    @property
    def images(self) -> Mapping[Split, Images]:
        """The images of each split, one by one."""
        return self._images

    @property
    def skipped(self) -> Mapping[str, str]:
        """The images that could not be read so far, with reasons (with `bad_images="skip"`)."""
        return self._reader.skipped

    @property
    def _recipe(self) -> str:  # type: ignore[override]  # images from memory have other draws
        self.prepare()
        named = (f"{each.name}={getattr(self, each.name)!r}" for each in fields(ImageSettings))
        return (
            f"ImageSettings({', '.join(named)}){' in memory' if self.in_memory else ' of 8 bits'}"
        )

    def _content(self) -> Iterator[bytes]:
        yield self._targets.tobytes()
        for row in self._rows.tolist():
            yield self._identity(row).encode()

    def _part(self, kept: NDArray[np.int64], held_out: NDArray[np.int64] | None) -> Self:
        other = copy.copy(self)
        other._rows = self._rows[kept]
        other._read_from(
            SomeImages(self._found, other._rows),
            self._images["test"]
            if held_out is None
            else SomeImages(self._found, self._rows[held_out]),
        )
        return other

    def close(self) -> None:
        """End the worker processes; the next read starts new ones."""
        self._reader.close()

    def _read(
        self, steps: Iterator[Tensor], reading: Reading, device: torch.device
    ) -> Iterator[Batch]:
        """Read from memory, or let the workers read and move what they send to the device."""
        self.prepare()
        if self._stored is not None:
            yield from self._stored._read(steps, reading, device)
            return
        views = ([(reading, index) for index in step.tolist()] for step in steps)
        for values, _ in self._reader.read(views, pin=device.type == "cuda"):
            if values is None:
                if reading.what == "train":
                    raise ValueError(f"no training image in {self.path} can be read")
                continue
            index = values.pop("index")
            draw = None if reading.what == "test" else torch.full_like(index, reading.draw[1])
            there = {name: x.to(device, non_blocking=True) for name, x in values.items()}
            target = there.pop("target")
            images = self._finished(there.pop("image"), index, reading, *reading.draw)
            extras = {
                name: self._finished(x, index, reading, *reading.key(name))
                for name, x in there.items()
            }
            yield Batch(images, target, index, draw, extras)

    def _finished(self, images: Tensor, index: Tensor, reading: Reading, *key: int | str) -> Tensor:
        """Mirror images and normalization of a batch, on its device."""
        is_raw = images.dtype == torch.uint8  # then channels are the last dimension
        if reading.what != "test" and self.augmentation != "none":
            images = mirror_(images, index, *key, width=2 if is_raw else 3)
        return self._normalized(images.permute(0, 3, 1, 2)) if is_raw else images
