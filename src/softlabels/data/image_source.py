"""What the data sources that read image files have in common."""

# The fields' types are also read where subclasses are defined, so they are not deferred to text.

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor
from typing_extensions import Self

from softlabels.data.batch import Batch, DataInfo
from softlabels.data.extra_views import FurtherImages
from softlabels.data.source import DataSource, What
from softlabels.data.transforms import (
    AugmentationName,
    ImageSettings,
    ImageTransform,
    Interpolation,
    default_crop_fraction,
    image_transforms,
)
from softlabels.data.workers import BadImages, ImageReader, Images, SomeImages, Split, View

__all__ = ["ImageSource"]


@dataclass(kw_only=True, eq=False)
class ImageSource(DataSource):
    """A data source over images that worker processes read one by one.

    An image is transformed with draws that belong to a seed, a number and its index, whichever
    worker reads it. Workers never touch an accelerator. A subclass finds the images (`_find`) and
    tells them apart (`_identity`); its own fields are further settings.

    Args:
        path: Where the images are.
        image_size: Height and width of the images that are read, pixels.
        workers: Number of processes that read images; 0 reads in this one.
        augmentation: `"random_resized_crop"`: a crop of random size and shape, and a mirror image
            half of the time. `"crop_flip"`: the shorter side is resized to `image_size`, then a
            random crop with a border of an eighth, and the mirror image. `"none"`: as for testing.
        interpolation: How images are resized.
        auto_augment: timm's description of a policy that follows the crop, for example
            `"rand-m9-mstd0.5-inc1"`, or None.
        random_erasing: Probability with which a rectangle is replaced by noise, 0..1.
        lighting: Standard deviation of the random lighting along the main directions of ImageNet's
            colors, for images in 0..1; published runs have 0.1. 0: none.
        crop_fraction: The central part of a test image that is kept, 0..1 of its shorter side; None
            is 0.875 with `"random_resized_crop"` and 1 otherwise.
        mean: Mean of the red, green and blue channel, for images in 0..1.
        std: Standard deviation of the three channels, for images in 0..1.
        bad_images: What to do about an image that cannot be read. `"error"`: stop. `"skip"`:
            warn once; in training read the next good image instead, in testing leave it out. For a
            partner that cannot be read, another image of the class stands in; where there is none,
            the next good image that has a partner is read in place of the two.
        max_bad_images: How many different ones may be skipped before the run stops after all.
        max_worker_restarts: How many times worker processes that died are replaced by new ones.

    Raises:
        ValueError: If the images are not where and as the subclass describes, or a setting is out
            of its range.
    """

    path: str | Path = field(kw_only=False)
    image_size: int = 224
    workers: int = 2
    augmentation: AugmentationName = "random_resized_crop"
    interpolation: Interpolation = "bilinear"
    auto_augment: str | None = None
    random_erasing: float = 0.0
    lighting: float = 0.0
    crop_fraction: float | None = None
    mean: tuple[float, float, float] = IMAGENET_DEFAULT_MEAN
    std: tuple[float, float, float] = IMAGENET_DEFAULT_STD
    bad_images: BadImages = "error"
    max_bad_images: int = 100
    max_worker_restarts: int = 3

    def __post_init__(self) -> None:
        for name in ("workers", "max_bad_images", "max_worker_restarts"):
            value: int = getattr(self, name)
            if value < 0:
                raise ValueError(f"{name} must be at least 0, got {value}")
        if self.bad_images not in ("error", "skip"):
            raise ValueError(f"bad_images must be one of error, skip, got {self.bad_images!r}")
        if self.crop_fraction is None:
            self.crop_fraction = default_crop_fraction(self.augmentation)
        named = {each.name: getattr(self, each.name) for each in fields(ImageSettings)}
        named.update(mean=tuple(self.mean), std=tuple(self.std))
        settings = ImageSettings(**named)
        self._recipe = repr(settings)
        of_train, of_test = image_transforms(settings)
        self._transforms: dict[Split, ImageTransform] = {"train": of_train, "test": of_test}
        class_names, train, test = self._find()
        self._info = DataInfo(
            self._root.resolve().name,
            class_names,
            3,
            (self.image_size, self.image_size),
            settings.mean,
            settings.std,
            crop_fraction=self.crop_fraction,
            interpolation=self.interpolation,
        )
        # The training images as they were found; some of them may be trained on.
        self._found = train
        self._rows = np.arange(len(train))
        self._read_from(train, test)

    def _read_from(self, train: Images, test: Images) -> None:
        """Take these images from now on."""
        self._targets, self._num_test = train.targets, len(test)
        self._images: dict[Split, Images] = {"train": train, "test": test}
        self._reader = ImageReader(
            self._images,
            self._transforms,
            num_workers=self.workers,
            bad_images=self.bad_images,
            max_bad_images=self.max_bad_images,
            max_worker_restarts=self.max_worker_restarts,
        )

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
        return {each.name: getattr(self, each.name) for each in fields(self)}

    @property
    def skipped(self) -> Mapping[str, str]:
        """The images that could not be read so far, with reasons (with `bad_images="skip"`)."""
        return self._reader.skipped

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
        self,
        what: What,
        steps: Iterator[Tensor],
        draw: tuple[int, int],
        device: torch.device,
        further: FurtherImages,
    ) -> Iterator[Batch]:
        """Let the workers read, and move what they send to the device."""
        split: Split = "test" if what == "test" else "train"
        replaced = what == "train"
        views = (
            [View(split, *draw, i, replaced, further) for i in step.tolist()] for step in steps
        )
        for samples in self._reader.read(views, pin=device.type == "cuda"):
            if samples.images is None:
                if what == "train":
                    raise ValueError(f"no training image in {self.path} can be read")
                continue
            yield Batch(
                samples.images.to(device, non_blocking=True),
                samples.targets.to(device, non_blocking=True),
                samples.indices,
                None if what == "test" else torch.full_like(samples.indices, draw[1]),
                {n: x.to(device, non_blocking=True) for n, x in samples.extras.items()},
            )
