"""A data set that lies in memory as a whole and is augmented on the device, batch by batch."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from softlabels.data.augment import Augmentation
from softlabels.data.batch import Batch, DataInfo, shard_indices, steps_per_epoch, train_indices
from softlabels.data.extra_views import (
    NOTHING_FURTHER,
    PARTNER,
    FurtherImages,
    Partners,
    check_further_images,
)
from softlabels.data.randomness import permutation
from softlabels.data.split import divide

_CHUNK = 256


class Part(Protocol):
    """What an `InMemorySource` reads from: a `Split`, or one that makes its images when asked."""

    @property
    def target(self) -> Tensor:
        """Class indices [N] int64."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """(channels, height, width) of an image."""
        ...

    def read(self, rows: Tensor) -> Tensor:
        """Gather images.

        Args:
            rows: Their indices, [B] int64 on the part's device.

        Returns:
            [B, C, H, W] float32 in 0..1 on that device, new.
        """
        ...

    def to(self, device: torch.device) -> Part:
        """Copy the part to a device, unless it lies there already."""
        ...

    def some(self, rows: Tensor) -> Part:
        """Only the images of these indices, [M] int64, in this order."""
        ...

    def content(self) -> Iterator[memoryview]:
        """What tells the images and targets from others, as bytes."""
        ...


@dataclass(frozen=True)
class Split:
    """One part of a data set, all of whose images lie in memory.

    Args:
        images: [N, C, H, W] uint8.
        target: Class indices [N] int64.
    """

    images: Tensor
    target: Tensor

    @classmethod
    def from_arrays(cls, images: NDArray[np.uint8], target: NDArray[np.integer]) -> Split:
        """Bring arrays into a split's shape.

        Args:
            images: [N, H, W] for gray images, or [N, H, W, C]; uint8.
            target: Class indices [N], any integer type.

        Returns:
            The split, on the CPU.

        Raises:
            TypeError: If the images are not uint8 or the targets not integers.
            ValueError: If the shapes do not fit, or there are no images.
        """
        if images.dtype != np.uint8:
            raise TypeError(f"images must be uint8, got {images.dtype}")
        if not np.issubdtype(target.dtype, np.integer):
            raise TypeError(f"targets must be integers, got {target.dtype}")
        if images.ndim not in (3, 4):
            raise ValueError(f"images must be [N, H, W] or [N, H, W, C], got {images.shape}")
        if not len(images) or target.shape != images.shape[:1]:
            raise ValueError(
                "there must be images and a target for each,"
                f" got shapes {images.shape} and {target.shape}"
            )
        with_channels = images[..., None] if images.ndim == 3 else images
        # torch wants arrays that may be written to.
        channels_first = np.require(with_channels.transpose(0, 3, 1, 2), requirements=("C", "W"))
        return cls(torch.from_numpy(channels_first), torch.from_numpy(target.astype(np.int64)))

    def augmented(self, augmentation: Augmentation, *key: int | str) -> Split:
        """Apply one fixed draw of an augmentation, rounded to 256 levels.

        Args:
            augmentation: What is done to the images.
            *key: What the draw belongs to.

        Returns:
            A split of new images with the same targets.
        """
        drawn = torch.empty_like(self.images)
        for index in torch.split(torch.arange(len(self.target)), _CHUNK):
            images = augmentation(self.images[index].float().div_(255), index, *key)
            drawn[index] = images.mul_(255).round_().byte()
        return Split(drawn, self.target)

    @property
    def shape(self) -> tuple[int, ...]:
        """(channels, height, width) of an image."""
        return tuple(self.images.shape[1:])

    def read(self, rows: Tensor) -> Tensor:
        """Gather images; see `Part`."""
        return self.images[rows].float().div_(255)

    def content(self) -> Iterator[memoryview]:
        """The images and the targets as bytes."""
        for tensor in (self.images, self.target):
            yield tensor.cpu().numpy().data

    def to(self, device: torch.device) -> Split:
        """Copy the split to a device, unless it lies there already.

        Args:
            device: Where it shall lie.

        Returns:
            The split on that device.
        """
        return Split(self.images.to(device), self.target.to(device))

    def some(self, rows: Tensor) -> Split:
        """Copy some of the images; see `Part`."""
        rows = rows.to(self.target.device)
        return Split(self.images[rows], self.target[rows])


def channel_statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel, as fractions of 255.

    Args:
        images: [N, C, H, W] uint8, N > 0.

    Returns:
        The means and the standard deviations, C numbers each. The deviation of a channel that never
        changes is given as 1, so that one can divide by it.
    """
    levels = torch.arange(256, dtype=torch.float64) / 255
    counts = [torch.bincount(channel.flatten(), minlength=256) for channel in images.unbind(1)]
    share = torch.stack(counts).double() / (images.numel() / images.shape[1])
    mean = share @ levels
    std = (share * (levels - mean.unsqueeze(1)).square()).sum(dim=1).sqrt()
    return tuple(mean.tolist()), tuple(torch.where(std > 0, std, 1.0).tolist())


class InMemorySource:
    """A data source over two splits in memory, or made there.

    Stored images are moved to the device once, as uint8; batches are made there.

    Args:
        train: The training split.
        test: The test split.
        info: Facts about the data set; its mean and std normalize the images.
        augmentation: What is done to training images, or None. Test images are read as they are.
        found: The settings that were left to the data, by name, as the data have them.

    Raises:
        ValueError: If the splits do not fit the facts.
    """

    def __init__(
        self,
        train: Part,
        test: Part,
        info: DataInfo,
        *,
        augmentation: Augmentation | None = None,
        found: Mapping[str, object] | None = None,
    ) -> None:
        self.found_settings = dict(found or {})
        shape = (info.in_channels, *info.image_size)
        for name, split in (("training", train), ("test", test)):
            if split.shape != shape:
                raise ValueError(
                    f"{name} images of {info.name} must be {shape} (channels, height, width),"
                    f" got {split.shape}"
                )
            if split.target.min() < 0 or split.target.max() >= info.num_classes:
                raise ValueError(
                    f"{name} targets of {info.name} must be in 0..{info.num_classes - 1},"
                    f" got {int(split.target.min())}..{int(split.target.max())}"
                )
        self._info = info
        self._mean, self._std = torch.tensor((info.mean, info.std)).view(2, 1, -1, 1, 1).unbind()
        self._augmentation = augmentation
        self._train = train
        self._test = test

    @property
    def info(self) -> DataInfo:
        """Facts about the data set."""
        return self._info

    @property
    def num_train(self) -> int:
        """Number of training samples."""
        return len(self._train.target)

    @property
    def num_test(self) -> int:
        """Number of test samples."""
        return len(self._test.target)

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
        if extras:
            check_further_images(extras, self._train_targets, self._info.class_names)
        steps = train_indices(
            permutation(seed, epoch, self.num_train),
            batch_size=batch_size,
            rank=rank,
            world_size=world_size,
            start_step=start_step,
        )
        self._train = self._train.to(torch.device(device))
        view = (seed, epoch) if draw is None else draw
        further = FurtherImages(tuple(extras), seed, epoch)
        return (self._train_batch(index, view, further) for index in steps)

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
        self._train = self._train.to(torch.device(device))
        parts = torch.arange(self.num_train)[start:stop].split(batch_size)
        return (self._train_batch(part, draw, NOTHING_FURTHER) for part in parts)

    def fingerprints(self) -> dict[str, str]:
        """What the training views depend on; see `DataSource`."""
        data = blake2b(digest_size=16)
        for content in self._train.content():
            data.update(content)
        settings = repr((self._augmentation, self._info.mean, self._info.std))
        augmentation = blake2b(settings.encode(), digest_size=16)
        return {"data": data.hexdigest(), "augmentation": augmentation.hexdigest()}

    def test_batches(
        self, *, batch_size: int, rank: int = 0, world_size: int = 1, device: torch.device | str
    ) -> Iterator[Batch]:
        """Read test batches; see `DataSource`."""
        parts = shard_indices(
            self.num_test, batch_size=batch_size, rank=rank, world_size=world_size
        )
        self._test = self._test.to(torch.device(device))
        return (self._test_batch(index) for index in parts)

    def split(
        self, *, validation: float | None = None, train_share: float | None = None
    ) -> InMemorySource:
        """Hold out a part of the training set; see `DividedSource`."""
        kept, held_out = divide(self._train_targets, validation=validation, train_share=train_share)
        return InMemorySource(
            self._train.some(torch.from_numpy(kept)),
            self._test if validation is None else self._train.some(torch.from_numpy(held_out)),
            self._info,
            augmentation=self._augmentation,
            found=self.found_settings,
        )

    def close(self) -> None:
        """Do nothing: there are no workers to end."""

    @property
    def _train_targets(self) -> NDArray[np.int64]:
        targets: NDArray[np.int64] = self._train.target.cpu().numpy()
        return targets

    @cached_property
    def _partners(self) -> Partners:
        return Partners(self._train_targets)

    def _train_batch(self, index: Tensor, draw: tuple[int, int], further: FurtherImages) -> Batch:
        """Gather, augment and normalize training samples on their device."""
        rows = index.to(self._train.target.device, non_blocking=True)
        images = self._train.read(rows)
        extras = {}
        for name in further.names:
            shown = images
            if name == PARTNER:
                partners = self._partners.of(index, seed=further.seed, epoch=further.epoch)
                shown = self._train.read(partners.to(rows.device, non_blocking=True))
            extras[name] = self._augmented(shown, rows, *further.key(name, draw))
        images = self._augmented(images, rows, *draw)
        target = self._train.target[rows]
        return Batch(images, target, index, torch.full_like(index, draw[1]), extras)

    def _test_batch(self, index: Tensor) -> Batch:
        rows = index.to(self._test.target.device, non_blocking=True)
        return Batch(self._normalized(self._test.read(rows)), self._test.target[rows], index)

    def _augmented(self, images: Tensor, rows: Tensor, *key: int | str) -> Tensor:
        if self._augmentation is not None:
            images = self._augmentation(images, rows, *key)
        return self._normalized(images)

    def _normalized(self, images: Tensor) -> Tensor:
        if self._mean.device != images.device:
            self._mean, self._std = self._mean.to(images.device), self._std.to(images.device)
        return (images - self._mean).div_(self._std)
