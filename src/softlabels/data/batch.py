"""What a data source gives to its reader, and which samples belong to a step and a process."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor


@dataclass
class Batch:
    """Images with their labels.

    Args:
        images: [B, C, H, W] float32, normalized with the mean and std of `DataInfo`.
        target: Class indices [B] int64, or probabilities [B, classes] float32 after mixing.
        index: [B] int64 on the CPU, the samples' indices in their split.
        draw: [B] int64 on the CPU, the number of the augmentation's draw that each image shows;
            None for test images.
        extras: Further tensors by name, on the images' device, such as the `extras` that
            `DataSource.train_batches` was asked for.
    """

    images: Tensor
    target: Tensor
    index: Tensor
    draw: Tensor | None = None
    extras: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class DataInfo:
    """Facts about a data set.

    Args:
        name: Short name for reports.
        class_names: One name for each class, in the order of the class indices.
        in_channels: Channels of the images.
        image_size: (height, width), pixels.
        mean: Mean that was subtracted, one number a channel, for images in 0..1.
        std: Standard deviation that divided, one number a channel, for images in 0..1.
        groups: A group of similar classes for each class, from 0, or None if there are no groups.
        crop_fraction: The central part of a test image that was kept, above 0, at most 1.
        interpolation: How images were resized.
    """

    name: str
    class_names: tuple[str, ...]
    in_channels: int
    image_size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    groups: tuple[int, ...] | None = None
    crop_fraction: float = 1.0
    interpolation: str = "bilinear"

    def __post_init__(self) -> None:
        for name in ("mean", "std"):
            values: tuple[float, ...] = getattr(self, name)
            if len(values) != self.in_channels:
                raise ValueError(
                    f"{name} must have one number for each of {self.in_channels} channels,"
                    f" got {values}"
                )
        if min(self.std) <= 0:
            raise ValueError(f"std must be above 0, got {self.std}")
        for name in (self.name, *self.class_names):
            try:
                name.encode()
            except UnicodeEncodeError as error:
                raise ValueError(
                    f"{name!r} is no text in UTF-8, so no file of a run can hold it; expected "
                    "names of data sets and classes that are: rename the folder"
                ) from error

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)


class DataSource(Protocol):
    """A training set and a test set that can be read in batches.

    Order and augmentation are functions of the seed, the epoch and the sample's index, so that any
    step can be read alone, on any number of processes and workers.
    """

    @property
    def info(self) -> DataInfo:
        """Facts about the data set."""
        ...

    @property
    def num_train(self) -> int:
        """Number of training samples."""
        ...

    @property
    def num_test(self) -> int:
        """Number of test samples."""
        ...

    def steps_per_epoch(self, batch_size: int) -> int:
        """Number of training batches in an epoch.

        Args:
            batch_size: Size of the global batch, that of all processes together.

        Returns:
            The number of whole batches; 1 if the training set is smaller than a batch.
        """
        ...

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
        """Read this process's share of each training batch of an epoch.

        A source that takes no `extras` serves all methods that ask for none.

        Args:
            seed: The run's seed.
            epoch: The epoch, from 0.
            batch_size: Size of the global batch, that of all processes together; a multiple of
                `world_size`. The last, incomplete batch of an epoch is dropped.
            rank: This process, 0 <= rank < world_size.
            world_size: Number of processes.
            start_step: First step to read; those before it are skipped without reading.
            draw: (seed, number) that the augmentation's draws belong to; None: (seed, epoch).
            extras: Names of further images, normalized as the images and of their shape, that each
                batch carries in `Batch.extras`. They too are functions of the seed, the epoch and
                the sample's index, and of `draw`. `"second_view"`: the same images under another
                draw of the augmentation. `"partner"`: for each image another training image of
                its class, each of them with the same probability, under a draw of its own.
            device: Where the batches shall lie.

        Yields:
            Batches of `batch_size / world_size` samples.

        Raises:
            ValueError: If a size, the rank or the step makes no sense, the source does not give
                such further images, or partners are asked for where a class has a single image.
        """
        ...

    def train_views(
        self,
        *,
        draw: tuple[int, int],
        batch_size: int,
        start: int = 0,
        stop: int | None = None,
        device: torch.device | str,
    ) -> Iterator[Batch]:
        """Read training images as one draw of the augmentation shows them, in their own order.

        Args:
            draw: (seed, number) of the draw, as in `train_batches`.
            batch_size: Samples in a batch.
            start: The first image.
            stop: The image after the last one; None: all.
            device: Where the batches shall lie.

        Yields:
            Batches without the images that cannot be read.
        """
        ...

    def fingerprints(self) -> dict[str, str]:
        """What the training views depend on.

        Returns:
            Hexadecimal digests: `"data"` of the training images and labels, `"augmentation"` of
            all that is done to them.
        """
        ...

    def test_batches(
        self, *, batch_size: int, rank: int = 0, world_size: int = 1, device: torch.device | str
    ) -> Iterator[Batch]:
        """Read this process's share of the test set: samples rank, rank + world_size, ...

        Nothing is padded, so all processes together read each sample once, and their numbers of
        batches may differ.

        Args:
            batch_size: Largest number of samples in a batch, of all processes together.
            rank: This process, 0 <= rank < world_size.
            world_size: Number of processes.
            device: Where the batches shall lie.

        Yields:
            Batches of at most `batch_size / world_size` samples.

        Raises:
            ValueError: If a size or the rank makes no sense.
        """
        ...

    def close(self) -> None:
        """End the worker processes, if there are any. The source can still be read after it."""
        ...


class DividedSource(DataSource, Protocol):
    """A data source that can hold out a part of its training set."""

    def split(
        self, *, validation: float | None = None, train_share: float | None = None
    ) -> DataSource:
        """Hold out a part of the training set, or leave a part of it out.

        What is read is a function of the data and the shares alone, whatever a run's seed. Training
        images are numbered anew, from 0.

        Args:
            validation: Share of each class, 0 < v < 0.9, that takes the place of the test set. It
                is read as test images are, and the test set is not. None: none.
            train_share: Share of each class, of what is left, that is trained on, 0 < s <= 1.
                None: all.

        Returns:
            Another source, with the same facts.

        Raises:
            ValueError: If a share is out of its range, or nothing can be held out.
        """
        ...


def rank_positions(batch_size: int, rank: int, world_size: int) -> Tensor:
    """Which positions of the global batch a process works on, in its order.

    Mixup pairs a batch with its reverse. A process gets positions from the front and their mirror
    images from the end, so that reversing its own batch pairs the same samples as reversing the
    global one. A share of odd size cannot be paired; it is a plain slice.

    Args:
        batch_size: Size of the global batch; a multiple of `world_size`.
        rank: This process, 0 <= rank < world_size.
        world_size: Number of processes.

    Returns:
        [batch_size / world_size] int64; 0, 1, 2, ... on a single process.

    Raises:
        ValueError: If the batch cannot be divided, or the rank is out of range.
    """
    _check_shares(batch_size, rank, world_size)
    if batch_size % world_size:
        raise ValueError(
            f"batch_size must be a multiple of the number of processes ({world_size}),"
            f" got {batch_size}"
        )
    local = batch_size // world_size
    if local % 2:
        return torch.arange(rank * local, (rank + 1) * local)
    front = torch.arange(rank * local // 2, (rank + 1) * local // 2)
    return torch.cat((front, batch_size - 1 - front.flip(0)))


def steps_per_epoch(num_train: int, batch_size: int) -> int:
    """Number of training batches in an epoch; see `DataSource.steps_per_epoch`.

    Args:
        num_train: Number of training samples, above 0.
        batch_size: Size of the global batch, above 0.

    Returns:
        The number of whole batches; 1 if there are fewer samples than that.

    Raises:
        ValueError: If a number is not above 0.
    """
    if num_train < 1 or batch_size < 1:
        raise ValueError(
            f"num_train and batch_size must be above 0, got {num_train} and {batch_size}"
        )
    return max(1, num_train // batch_size)


def train_indices(
    order: Tensor,
    *,
    batch_size: int,
    rank: int,
    world_size: int,
    start_step: int,
) -> Iterator[Tensor]:
    """Which samples a process reads at each step of an epoch.

    A training set smaller than a batch gives one batch, without the few samples that would make
    the shares unequal or odd.

    Args:
        order: The training samples as the epoch visits them, [N] int64.
        batch_size: Size of the global batch; a multiple of `world_size`.
        rank: This process, 0 <= rank < world_size.
        world_size: Number of processes.
        start_step: First step.

    Returns:
        An iterator over the steps; each item is [B] int64.

    Raises:
        ValueError: If a size, the rank or the step makes no sense.
    """
    num_train = len(order)
    steps = steps_per_epoch(num_train, batch_size)
    if not 0 <= start_step <= steps:
        raise ValueError(f"start_step must be in 0..{steps}, got {start_step}")
    if num_train < batch_size:
        # An even number for any world size, so that one and two processes read the same samples.
        even = num_train - num_train % math.lcm(2, world_size)
        batch_size = even or num_train - num_train % world_size
    positions = rank_positions(batch_size, rank, world_size)
    return (order[step * batch_size + positions] for step in range(start_step, steps))


def shard_indices(
    num_test: int, *, batch_size: int, rank: int, world_size: int
) -> Iterator[Tensor]:
    """Which samples a process reads in each of its test batches.

    Args:
        num_test: Number of test samples.
        batch_size: Largest number of samples in a batch, of all processes together.
        rank: This process, 0 <= rank < world_size.
        world_size: Number of processes.

    Returns:
        An iterator over the batches; each item is [B] int64.

    Raises:
        ValueError: If a size or the rank makes no sense.
    """
    _check_shares(batch_size, rank, world_size)
    share = torch.arange(num_test)[rank::world_size]
    return (part for part in torch.split(share, batch_size // world_size) if len(part))


def _check_shares(batch_size: int, rank: int, world_size: int) -> None:
    """Raise unless the batch has a sample for each process and the rank is one of them."""
    if not 0 <= rank < world_size:
        raise ValueError(f"rank must be in 0..{world_size - 1}, got {rank}")
    if batch_size < world_size:
        raise ValueError(
            f"a batch needs a sample for each of {world_size} processes, got {batch_size} samples"
        )
