"""Reads all images of a data set once, in parallel, to bytes in memory."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import get_args

import psutil
import torch
from rich.console import Console
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from typing_extensions import Self

from softlabels.data.augment import Augmentation
from softlabels.data.batch import DataInfo
from softlabels.data.decoding import DECODING_ERRORS, Images
from softlabels.data.in_memory import InMemorySource, Split
from softlabels.data.transforms import (
    Geometry,
    ImageSettings,
    batch_augmentation,
)
from softlabels.data.workers import Split as SplitName
from softlabels.io.console import progress_bar

__all__ = ["CannotLoadError", "StoredForm", "load_images", "size_of_first"]

_CHUNK = 250  # images that a process sends at a time
_FEW = 2 * _CHUNK  # up to here no processes are started
_SHARE = 0.5  # of the free memory
_LARGEST_CROPPED = 128  # pixels of files of which crops of any size are taken
_FIRST = 10  # images of which one must be readable, to know their size


class CannotLoadError(ValueError):
    """Images that cannot lie in memory; the message says why."""


class _Chunks(Dataset[Tensor | str]):
    """Chunks of a split's images, or the text of what is wrong with one of them."""

    def __init__(self, images: Images, geometry: Geometry | None, size: tuple[int, int]) -> None:
        self.images, self.geometry, self.size = images, geometry, size

    def __len__(self) -> int:
        return -(-len(self.images) // _CHUNK)

    def __getitem__(self, number: int) -> Tensor | str:
        first = number * _CHUNK
        rows = range(first, min(first + _CHUNK, len(self.images)))
        pixels = torch.empty((len(rows), 3, *self.size), dtype=torch.uint8)
        for place, row in enumerate(rows):
            try:
                image = self.images.read(row)
            except DECODING_ERRORS as error:
                name = self.images.name(row)
                return f"cannot read the image {name} ({type(error).__name__}: {error})"
            image = image if self.geometry is None else self.geometry(image)
            height, width = image.shape[1:]
            if (height, width) != self.size:
                there, here = f"{width} x {height}", f"{self.size[1]} x {self.size[0]}"
                return f"{self.images.name(row)} has {there} pixels, others have {here}"
            pixels[place] = image
        return pixels


def load_images(
    images: Images,
    geometry: Geometry | None,
    size: tuple[int, int],
    *,
    title: str,
    console: Console | None = None,
) -> Split:
    """Read all images of a split, on all cores.

    Args:
        images: The split.
        geometry: What is done to each after decoding, or None.
        size: Height and width that each has then, pixels.
        title: What the progress bar calls them.
        console: Where progress is shown; None: nowhere.

    Raises:
        CannotLoadError: An image cannot be read, or has another size.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    loader = DataLoader(
        _Chunks(images, geometry, size),
        batch_size=None,
        num_workers=0 if len(images) <= _FEW else min(cores or 1, 16),
        # Without its own generator a loader would draw from torch's, on which models depend.
        generator=torch.Generator(),
    )
    pixels = torch.empty((len(images), 3, *size), dtype=torch.uint8)
    first = 0
    with progress_bar(console) as progress:
        task = progress.add_task(title, total=len(images), speed="", news="")
        for chunk in loader:
            if isinstance(chunk, str):
                raise CannotLoadError(chunk)
            pixels[first : first + len(chunk)] = chunk
            first += len(chunk)
            progress.advance(task, len(chunk))
    return Split(pixels, torch.from_numpy(images.targets))


def size_of_first(images: Images) -> tuple[int, int] | None:
    """Width and height of the first image that can be read; None if none of the first ten can."""
    for index in range(min(len(images), _FIRST)):
        try:
            _, height, width = images.read(index).shape
            return width, height
        except DECODING_ERRORS:
            continue
    return None


@dataclass(frozen=True)
class StoredForm:
    """How the images of a data set lie in memory.

    Attributes:
        geometries: What is done to an image of each split before it is stored, or None.
        sizes: Height and width that each has then, pixels.
        augmentation: What is done to batches of training images.
    """

    geometries: Mapping[SplitName, Geometry | None]
    sizes: Mapping[SplitName, tuple[int, int]]
    augmentation: Augmentation | None

    @classmethod
    def of(
        cls,
        settings: ImageSettings,
        first: tuple[int, int] | None,
        num_train: int,
        num_test: int,
    ) -> Self:
        """The form that settings ask for.

        Args:
            settings: What is done to the images.
            first: Width and height of the first training image, if it is known.
            num_train: Number of training images.
            num_test: Number of test images.

        Raises:
            CannotLoadError: These images cannot be augmented in batches, or take too much.
        """
        if first is None:
            raise CannotLoadError("the first training images cannot be read")
        try:
            geometry, augmentation = batch_augmentation(settings)
        except ValueError as error:
            raise CannotLoadError(str(error)) from error
        width, height = first
        pixels = f"{width} x {height} pixels"
        if geometry is None and max(first) > _LARGEST_CROPPED:
            raise CannotLoadError(f"crops are taken of whole files, which have {pixels}")
        if settings.augmentation == "crop_flip" and width != height:
            raise CannotLoadError(f"the training images are not square: {pixels}")
        side = (settings.side, settings.side)
        stored = (height, width) if geometry is None else side
        num_bytes = 3 * (num_train * math.prod(stored) + num_test * math.prod(side))
        # Each process of this host has its own.
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        free: int = psutil.virtual_memory().available
        if num_bytes * processes > _SHARE * free:
            taken, left = (f"{size / 2**30:.1f}" for size in (num_bytes * processes, free))
            raise CannotLoadError(
                f"they take {taken} GiB, more than half of the {left} that are free"
            )
        return cls(
            {"train": geometry, "test": settings.evaluation_geometry()},
            {"train": stored, "test": side},
            augmentation,
        )

    def read(
        self, images: Mapping[SplitName, Images], info: DataInfo, console: Console | None
    ) -> InMemorySource:
        """Read both splits.

        Raises:
            CannotLoadError: An image cannot be read, or has another size than the others.
        """
        train, test = (
            load_images(
                images[name],
                self.geometries[name],
                self.sizes[name],
                title=f"{name} images",
                console=console,
            )
            for name in get_args(SplitName)
        )
        return InMemorySource(train, test, info, augmentation=self.augmentation)
