"""What a data source gives to its reader, and which samples belong to a step and a process."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

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


def rank_positions(batch_size: int, rank: int, world_size: int) -> Tensor:
    """Which positions of the global batch a process works on, in its order.

    Mixup pairs a batch with its reverse. A process gets positions from the front and their mirror
    images from the end, so that reversing its own batch pairs the same samples as reversing the
    global one. A share of odd size cannot be paired; it is a plain slice.

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
    """Which samples a process reads at each step of an epoch, [B] int64 each.

    A training set smaller than a batch gives one batch, without the few samples that would make
    the shares unequal or odd. `order` is that in which the epoch visits the samples, [N] int64; for
    the others see `DataSource.train_batches`.

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
    """Which samples a process reads in each of its test batches, [B] int64 each.

    See `DataSource.test_batches`.

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
