"""What the data sources that read image files have in common."""

# The fields' types are also read where subclasses are defined, so they are not deferred to text.

import copy
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, fields
from hashlib import blake2b
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor

from softlabels.data.batch import Batch, DataInfo, shard_indices, steps_per_epoch, train_indices
from softlabels.data.extra_views import NOTHING_FURTHER, FurtherImages, check_further_images
from softlabels.data.randomness import permutation
from softlabels.data.split import divide
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

_Source = TypeVar("_Source", bound="ImageSource")


@dataclass(kw_only=True, eq=False)
class ImageSource:
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
        self._settings = ImageSettings(
            self.image_size,
            self.augmentation,
            self.interpolation,
            self.auto_augment,
            self.random_erasing,
            self.lighting,
            self.crop_fraction,
            tuple(self.mean),
            tuple(self.std),
        )
        of_train, of_test = image_transforms(self._settings)
        self._transforms: dict[Split, ImageTransform] = {"train": of_train, "test": of_test}
        class_names, train, test = self._find()
        self._info = DataInfo(
            self._root.resolve().name,
            class_names,
            3,
            (self.image_size, self.image_size),
            self._settings.mean,
            self._settings.std,
            crop_fraction=self.crop_fraction,
            interpolation=self.interpolation,
        )
        # The training images as they were found; some of them may be trained on.
        self._found = train
        self._rows = np.arange(len(train))
        self._read_from(train, test)

    def _read_from(self, train: Images, test: Images) -> None:
        """Take these images from now on."""
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
    def info(self) -> DataInfo:
        """Facts about the data set."""
        return self._info

    @property
    def num_train(self) -> int:
        """Number of training samples."""
        return len(self._images["train"])

    @property
    def num_test(self) -> int:
        """Number of test samples, unreadable ones included."""
        return len(self._images["test"])

    @property
    def skipped(self) -> Mapping[str, str]:
        """The images that could not be read so far, with reasons (with `bad_images="skip"`)."""
        return self._reader.skipped

    def fingerprints(self) -> dict[str, str]:
        """What the training views depend on; see `DataSource`."""
        data = blake2b(self._images["train"].targets.tobytes(), digest_size=16)
        for row in self._rows.tolist():
            data.update(self._identity(row).encode())
        augmentation = blake2b(repr(self._settings).encode(), digest_size=16)
        return {"data": data.hexdigest(), "augmentation": augmentation.hexdigest()}

    def _order(self, seed: int, epoch: int) -> Tensor:
        """The order in which an epoch visits the training images, [N] int64."""
        return permutation(seed, epoch, self.num_train)

    def steps_per_epoch(self, batch_size: int) -> int:
        """Number of training batches in an epoch; see `DataSource`."""
        return steps_per_epoch(self.num_train, batch_size)

    def train_batches(
        self,
        *,
        seed: int,
        epoch: int,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        start_step: int = 0,
        draw: tuple[int, int] | None = None,
        extras: Collection[str] = (),
        device: torch.device | str,
    ) -> Iterator[Batch]:
        """Read training batches; see `DataSource`."""
        check_further_images(extras, self._images["train"].targets, self._info.class_names)
        steps = train_indices(
            self._order(seed, epoch),
            batch_size=batch_size,
            rank=rank,
            world_size=world_size,
            start_step=start_step,
        )
        further = FurtherImages(tuple(extras), seed, epoch)
        return self._read("train", steps, draw or (seed, epoch), torch.device(device), further)

    def train_views(
        self,
        *,
        draw: tuple[int, int],
        batch_size: int,
        start: int = 0,
        stop: int | None = None,
        device: torch.device | str,
    ) -> Iterator[Batch]:
        """Read training images in the order of their indices; see `DataSource`."""
        index = torch.arange(self.num_train)[start:stop]
        return self._read("views", iter(index.split(batch_size)), draw, torch.device(device))

    def test_batches(
        self, *, batch_size: int, rank: int = 0, world_size: int = 1, device: torch.device | str
    ) -> Iterator[Batch]:
        """Read test batches; see `DataSource`."""
        parts = shard_indices(
            self.num_test, batch_size=batch_size, rank=rank, world_size=world_size
        )
        return self._read("test", parts, (0, 0), torch.device(device))

    def split(
        self: _Source, *, validation: float | None = None, train_share: float | None = None
    ) -> _Source:
        """Hold out a part of the training set; see `DividedSource`."""
        kept, held_out = (
            self._rows[part]
            for part in divide(
                self._images["train"].targets, validation=validation, train_share=train_share
            )
        )
        other = copy.copy(self)
        other._rows = kept
        other._read_from(
            SomeImages(self._found, kept),
            self._images["test"] if validation is None else SomeImages(self._found, held_out),
        )
        return other

    def close(self) -> None:
        """End the worker processes; the next read starts new ones."""
        self._reader.close()

    def _read(
        self,
        what: str,
        steps: Iterator[Tensor],
        draw: tuple[int, int],
        device: torch.device,
        further: FurtherImages = NOTHING_FURTHER,
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
