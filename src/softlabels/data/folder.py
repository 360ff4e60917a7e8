"""A folder of images with a subfolder for each class, read by worker processes."""

from __future__ import annotations

import struct
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import torch
from PIL import Image
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from softlabels.data.batch import Batch, DataInfo, shard_indices, steps_per_epoch, train_indices
from softlabels.data.listing import ImageList, list_images
from softlabels.data.randomness import seeded
from softlabels.data.transforms import (
    AugmentationName,
    ImageTransform,
    Interpolation,
    image_transforms,
)

BadImages = Literal["error", "skip"]
_SplitName = Literal["train", "test"]

# What Pillow's decoders raise for damaged files.
DECODING_ERRORS = (OSError, SyntaxError, ValueError, EOFError, struct.error, IndexError)


@dataclass(frozen=True)
class _Key:
    """What a worker needs to know to make one sample."""

    split: _SplitName
    seed: int
    epoch: int
    index: int


@dataclass(frozen=True)
class _Sample:
    """An image, or None, and what could not be read on the way to it: (path, reason) of each."""

    image: Tensor | None
    target: int
    index: int
    draw: int
    bad: list[tuple[str, str]]


class _Samples(NamedTuple):
    """The readable samples of a batch (None if there are none), and what could not be read."""

    images: Tensor | None
    targets: Tensor
    indices: Tensor
    draws: Tensor
    bad: list[tuple[str, str]]


class _KeyBatches:
    """A batch sampler that hands out the batches it was given last."""

    def __init__(self) -> None:
        self.batches: Iterator[list[_Key]] = iter(())

    def __iter__(self) -> Iterator[list[_Key]]:
        return self.batches


class _Reader(Dataset[_Sample]):
    """Reads and transforms single images; all it needs travels with the key."""

    def __init__(
        self, images: dict[str, ImageList], transform: dict[str, ImageTransform], replace: bool
    ) -> None:
        self._images = images
        self._transform = transform
        self._replace = replace

    def __getitem__(self, key: _Key) -> _Sample:
        images, bad = self._images[key.split], list[tuple[str, str]]()
        # A bad training image is replaced by the next good one, so that batches keep their size and
        # the replacement depends on the index alone. A bad test image is left out.
        tries = len(images) if self._replace and key.split == "train" else 1
        for offset in range(tries):
            index = (key.index + offset) % len(images)
            try:
                image = read_rgb(images.path(index))
            except (*DECODING_ERRORS, Image.DecompressionBombError) as error:
                bad.append((images.path(index), f"{type(error).__name__}: {error}"))
                continue
            # The draws are the image's own, also where it stands in for another.
            with seeded(key.seed, key.epoch, index, "augment"):
                tensor = self._transform[key.split](image)
            return _Sample(tensor, int(images.targets[index]), index, key.epoch, bad)
        return _Sample(None, -1, key.index, key.epoch, bad)


def read_rgb(path: str) -> Image.Image:
    """Read an image file of any mode as 8-bit RGB."""
    with Image.open(path) as image:
        return _to_rgb(image)


def _to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image of any mode to 8-bit RGB; transparency is dropped."""
    if image.mode == "F":
        raise ValueError("an image of floating-point numbers has no known range")
    if image.mode.startswith("I"):
        # 16 bits. Pillow's own conversion would turn all above 255 into white.
        return image.convert("I").point(lambda level: level * (1 / 257)).convert("RGB")
    if image.mode == "P" and "transparency" in image.info:
        # Pillow warns about the direct way.
        image = image.convert("RGBA")
    return image.convert("RGB")


def _collate(samples: list[_Sample]) -> _Samples:
    images = [sample.image for sample in samples if sample.image is not None]
    good = [sample for sample in samples if sample.image is not None]
    return _Samples(
        torch.stack(images) if images else None,
        torch.tensor([sample.target for sample in good], dtype=torch.int64),
        torch.tensor([sample.index for sample in good], dtype=torch.int64),
        torch.tensor([sample.draw for sample in good], dtype=torch.int64),
        [entry for sample in samples for entry in sample.bad],
    )


class FolderSource:
    """A data source over image files.

    An image is transformed with draws that belong to the seed, the epoch and its index, whichever
    worker reads it. The workers stay alive between epochs until `close`. They never touch an
    accelerator.

    Args:
        path: The folder, with `train/` and `val/` (or `valid`, `validation`, `test`) and a
            subfolder for each class in both; or with the classes' subfolders alone.
        image_size: Height and width of the images that are read, pixels.
        workers: Number of processes that read images; 0 reads in this one.
        augmentation: `"random_resized_crop"`: a crop of random size and shape, and a mirror image
            half of the time. `"crop_flip"`: the shorter side is resized to `image_size`, then a
            random crop with a border of an eighth, and the mirror image. `"none"`: as for testing.
        interpolation: How images are resized.
        auto_augment: timm's description of a policy that follows the crop, for example
            `"rand-m9-mstd0.5-inc1"`, or None.
        random_erasing: Probability with which a rectangle is replaced by noise, 0..1.
        crop_fraction: The central part of a test image that is kept, 0..1 of its shorter side; None
            is 0.875 with `"random_resized_crop"` and 1 otherwise.
        mean: Mean of the red, green and blue channel, for images in 0..1.
        std: Standard deviation of the three channels, for images in 0..1.
        validation_fraction: Share of each class that is held out for testing if there is no folder
            of test images.
        bad_images: What to do about a file that cannot be decoded. `"error"`: stop. `"skip"`:
            warn once; in training read the next good image instead, in testing leave it out.

    Raises:
        ValueError: If the folder is not as described, or a setting is out of its range.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        image_size: int = 224,
        workers: int = 2,
        augmentation: AugmentationName = "random_resized_crop",
        interpolation: Interpolation = "bilinear",
        auto_augment: str | None = None,
        random_erasing: float = 0.0,
        crop_fraction: float | None = None,
        mean: tuple[float, float, float] = IMAGENET_DEFAULT_MEAN,
        std: tuple[float, float, float] = IMAGENET_DEFAULT_STD,
        validation_fraction: float = 0.1,
        bad_images: BadImages = "error",
    ) -> None:
        _check_choice("augmentation", augmentation, get_args(AugmentationName))
        _check_choice("interpolation", interpolation, get_args(Interpolation))
        _check_choice("bad_images", bad_images, get_args(BadImages))
        if image_size < 1 or workers < 0:
            raise ValueError(
                f"image_size must be above 0 and workers at least 0, got {image_size} and {workers}"
            )
        if not 0 <= random_erasing <= 1:
            raise ValueError(f"random_erasing must be in 0..1, got {random_erasing}")
        if crop_fraction is None:
            crop_fraction = 0.875 if augmentation == "random_resized_crop" else 1.0
        if not 0 < crop_fraction <= 1:
            raise ValueError(f"crop_fraction must be above 0, at most 1, got {crop_fraction}")

        self._path = path
        class_names, self._train, self._test = list_images(path, validation_fraction)
        size = (image_size, image_size)
        name = Path(path).expanduser().resolve().name
        self._info = DataInfo(
            name,
            class_names,
            3,
            size,
            tuple(mean),
            tuple(std),
            crop_fraction=crop_fraction,
            interpolation=interpolation,
        )
        train_transform, test_transform = image_transforms(
            image_size,
            augmentation=augmentation,
            interpolation=interpolation,
            auto_augment=auto_augment,
            random_erasing=random_erasing,
            crop_fraction=crop_fraction,
            mean=mean,
            std=std,
        )
        self._reader = _Reader(
            {"train": self._train, "test": self._test},
            {"train": train_transform, "test": test_transform},
            replace=bad_images == "skip",
        )
        self._workers = workers
        self._bad_images = bad_images
        self._skipped: dict[str, str] = {}
        self._idle: list[DataLoader[_Sample]] = []

    @property
    def info(self) -> DataInfo:
        """Facts about the data set."""
        return self._info

    @property
    def num_train(self) -> int:
        """Number of training samples."""
        return len(self._train)

    @property
    def num_test(self) -> int:
        """Number of test samples, unreadable ones included."""
        return len(self._test)

    @property
    def skipped(self) -> Mapping[str, str]:
        """The files that could not be read so far, with reasons (with `bad_images="skip"`)."""
        return self._skipped

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
        device: torch.device | str,
    ) -> Iterator[Batch]:
        """Read training batches; see `DataSource`."""
        steps = train_indices(
            self.num_train,
            seed=seed,
            epoch=epoch,
            batch_size=batch_size,
            rank=rank,
            world_size=world_size,
            start_step=start_step,
        )
        view = (seed, epoch) if draw is None else draw
        keys = ([_Key("train", *view, i) for i in index.tolist()] for index in steps)
        return self._read("train", keys, torch.device(device))

    def test_batches(
        self, *, batch_size: int, rank: int = 0, world_size: int = 1, device: torch.device | str
    ) -> Iterator[Batch]:
        """Read test batches; see `DataSource`."""
        parts = shard_indices(
            self.num_test, batch_size=batch_size, rank=rank, world_size=world_size
        )
        keys = ([_Key("test", 0, 0, i) for i in index.tolist()] for index in parts)
        return self._read("test", keys, torch.device(device))

    def close(self) -> None:
        """End the worker processes; the next read starts new ones."""
        self._idle.clear()

    def _read(
        self, split: _SplitName, keys: Iterator[list[_Key]], device: torch.device
    ) -> Iterator[Batch]:
        """Let the workers read, and move what they send to the device."""
        # A loader serves one reader at a time; a second reader gets a loader of its own.
        loader = self._idle.pop() if self._idle else self._new_loader(pin=device.type == "cuda")
        assert isinstance(loader.batch_sampler, _KeyBatches)
        loader.batch_sampler.batches = keys
        try:
            for samples in loader:
                self._report(samples.bad)
                if samples.images is None and split == "train":
                    raise ValueError(f"no training image in {self._path} can be read")
                if samples.images is not None:
                    yield Batch(
                        samples.images.to(device, non_blocking=True),
                        samples.targets.to(device, non_blocking=True),
                        samples.indices,
                        samples.draws if split == "train" else None,
                    )
        finally:
            self._idle.append(loader)

    def _new_loader(self, *, pin: bool) -> DataLoader[_Sample]:
        return DataLoader(
            self._reader,
            batch_sampler=_KeyBatches(),
            num_workers=self._workers,
            collate_fn=_collate,
            pin_memory=pin,
            persistent_workers=self._workers > 0,
            # Without its own generator a loader would draw from torch's, on which models depend.
            generator=torch.Generator(),
        )

    def _report(self, bad: list[tuple[str, str]]) -> None:
        """Raise for, or warn once about, each file that could not be read."""
        for path, reason in bad:
            if self._bad_images == "error":
                raise ValueError(
                    f"cannot read the image {path} ({reason}); expected an image file that Pillow"
                    ' can decode. bad_images="skip" goes on without it'
                )
            if path not in self._skipped:
                self._skipped[path] = reason
                warnings.warn(f"skipped the unreadable image {path} ({reason})", stacklevel=3)


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
