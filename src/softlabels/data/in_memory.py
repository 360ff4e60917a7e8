"""A data set that lies in memory as a whole and is augmented on the device, batch by batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from typing_extensions import Self

from softlabels.data.augment import Augmentation, Normalization, RandomResizedCrop
from softlabels.data.batch import Batch, DataInfo
from softlabels.data.extra_views import PARTNER, Partners, Reading
from softlabels.data.source import DataSource

_CHUNK = 256


class Part:
    """What an `InMemorySource` reads from. A subclass is a dataclass whose tensors are [N, ...].

    Attributes:
        target: Class indices [N] int64.
    """

    target: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """(channels, height, width) of an image."""
        raise NotImplementedError

    def read(self, rows: Tensor) -> Tensor:
        """Gather images.

        Args:
            rows: Their indices, [B] int64 on the part's device.

        Returns:
            [B, C, H, W] float32 in 0..1 on that device, new.
        """
        raise NotImplementedError

    def content(self) -> Iterator[memoryview]:
        """What tells the images and targets from others, as bytes."""
        for tensor in self._tensors().values():
            yield tensor.cpu().numpy().data

    def to(self, device: torch.device) -> Self:
        """Copy the part to a device, unless it lies there already."""
        return self._each(lambda tensor: tensor.to(device))

    def some(self, rows: Tensor) -> Self:
        """Only the images of these indices, [M] int64, in this order."""
        rows = rows.to(self.target.device)
        return self._each(lambda tensor: tensor[rows])

    def _tensors(self) -> dict[str, Tensor]:
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    def _each(self, change: Callable[[Tensor], Tensor]) -> Self:
        part: Any = self
        changed: Self = replace(part, **{n: change(x) for n, x in self._tensors().items()})
        return changed


@dataclass(frozen=True)
class Split(Part):
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
        """Apply one fixed draw of an augmentation, that of a key, rounded to 256 levels."""
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


class InMemorySource(DataSource):
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
        resizes = isinstance(augmentation, RandomResizedCrop)
        for name, split in (("training", train), ("test", test)):
            if split.shape != shape and not (resizes and split is train):
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
        self._normalized = Normalization(info.mean, info.std)
        self._augmentation = augmentation
        self._recipe = repr((augmentation, info.mean, info.std))
        self._train, self._test = train, test
        self._targets, self._num_test = train.target.cpu().numpy(), len(test.target)

    def _content(self) -> Iterator[memoryview]:
        return self._train.content()

    def _part(self, kept: NDArray[np.int64], held_out: NDArray[np.int64] | None) -> InMemorySource:
        return InMemorySource(
            self._train.some(torch.from_numpy(kept)),
            self._test if held_out is None else self._train.some(torch.from_numpy(held_out)),
            self._info,
            augmentation=self._augmentation,
            found=self.found_settings,
        )

    @cached_property
    def _partners(self) -> Partners:
        return Partners(self._targets)

    def _read(
        self, steps: Iterator[Tensor], reading: Reading, device: torch.device
    ) -> Iterator[Batch]:
        if reading.what == "test":
            self._test = self._test.to(device)
            return (self._test_batch(index) for index in steps)
        self._train = self._train.to(device)
        return (self._train_batch(index, reading) for index in steps)

    def _train_batch(self, index: Tensor, reading: Reading) -> Batch:
        """Gather, augment and normalize training samples on their device."""
        rows = index.to(self._train.target.device, non_blocking=True)
        images = self._train.read(rows)
        extras = {}
        for name in reading.extras:
            shown = images
            if name == PARTNER:
                partners = self._partners.of(index, seed=reading.seed, epoch=reading.epoch)
                shown = self._train.read(partners.to(rows.device, non_blocking=True))
            extras[name] = self._augmented(shown, rows, *reading.key(name))
        images = self._augmented(images, rows, *reading.draw)
        target = self._train.target[rows]
        return Batch(images, target, index, torch.full_like(index, reading.draw[1]), extras)

    def _test_batch(self, index: Tensor) -> Batch:
        rows = index.to(self._test.target.device, non_blocking=True)
        return Batch(self._normalized(self._test.read(rows)), self._test.target[rows], index)

    def _augmented(self, images: Tensor, rows: Tensor, *key: int | str) -> Tensor:
        if self._augmentation is not None:
            images = self._augmentation(images, rows, *key)
        return self._normalized(images)
