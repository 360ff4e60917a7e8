"""The base of the data sources: a training set and a test set that can be read in batches."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from hashlib import blake2b

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from torch import Tensor

from softlabels.data.batch import Batch, DataInfo, shard_indices, steps_per_epoch, train_indices
from softlabels.data.extra_views import Reading, check_further_images
from softlabels.data.randomness import permutation
from softlabels.data.split import divide

__all__ = ["DataSource"]


class DataSource:
    """A training set and a test set that can be read in batches.

    Order and augmentation are functions of the seed, the epoch and the sample's index, so that any
    step can be read alone, on any number of processes and workers. A subclass reads images by
    their numbers; another class with the same methods will do as well.
    """

    _info: DataInfo
    _recipe: str  # what tells all that is done to the images from something else
    _targets: NDArray[np.int64]  # [N] class indices of the training images
    _num_test: int

    def _read(
        self, steps: Iterator[Tensor], reading: Reading, device: torch.device
    ) -> Iterator[Batch]:
        """Read the images of these indices, [B] for each batch."""
        raise NotImplementedError

    def _content(self) -> Iterable[bytes | memoryview]:
        """What tells the training images and labels from others."""
        raise NotImplementedError

    def _part(self, kept: NDArray[np.int64], held_out: NDArray[np.int64] | None) -> DataSource:
        """A source that trains on some of the training images, and tests on others, if any."""
        raise NotImplementedError

    @property
    def info(self) -> DataInfo:
        """Facts about the data set."""
        return self._info

    @property
    def num_train(self) -> int:
        """Number of training samples."""
        return len(self._targets)

    @property
    def num_test(self) -> int:
        """Number of test samples, unreadable ones included."""
        return self._num_test

    def steps_per_epoch(self, batch_size: int) -> int:
        """Number of training batches in an epoch.

        Args:
            batch_size: Size of the global batch, that of all processes together.

        Returns:
            The number of whole batches; 1 if the training set is smaller than a batch.
        """
        return steps_per_epoch(self.num_train, batch_size)

    def _order(self, seed: int, epoch: int) -> Tensor:
        """The order in which an epoch visits the training images, [N] int64."""
        return permutation(seed, epoch, self.num_train)

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
        check_further_images(extras, self._targets, self._info.class_names)
        steps = train_indices(
            self._order(seed, epoch),
            batch_size=batch_size,
            rank=rank,
            world_size=world_size,
            start_step=start_step,
        )
        reading = Reading("train", draw or (seed, epoch), tuple(extras), seed, epoch)
        return self._read(steps, reading, torch.device(device))

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
        steps = iter(torch.arange(self.num_train)[start:stop].split(batch_size))
        return self._read(steps, Reading("views", draw), torch.device(device))

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
        steps = shard_indices(
            self.num_test, batch_size=batch_size, rank=rank, world_size=world_size
        )
        return self._read(steps, Reading("test"), torch.device(device))

    def fingerprints(self) -> dict[str, str]:
        """What the training views depend on.

        Returns:
            Hexadecimal digests: `"data"` of the training images and labels, `"augmentation"` of
            all that is done to them.
        """
        data = blake2b(digest_size=16)
        for content in self._content():
            data.update(content)
        augmentation = blake2b(self._recipe.encode(), digest_size=16)
        return {"data": data.hexdigest(), "augmentation": augmentation.hexdigest()}

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
        kept, held_out = divide(self._targets, validation=validation, train_share=train_share)
        return self._part(kept, None if validation is None else held_out)

    def prepare(self, console: Console | None = None) -> None:
        """Read what is to lie in memory, and find out what is left to the images.

        It is done at the first batch anyway; before, progress can be shown and settings be told.

        Args:
            console: Where progress is shown; None: nowhere.
        """

    def close(self) -> None:
        """End the worker processes, if there are any. The source can still be read after it."""
