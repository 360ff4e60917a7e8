"""What the data sources that read image files have in common."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from hashlib import blake2b
from pathlib import Path

import torch
from torch import Tensor

from softlabels.data.batch import Batch, DataInfo, shard_indices, steps_per_epoch, train_indices
from softlabels.data.randomness import permutation
from softlabels.data.reading import BadImages, ImageReader, Images, Split, View
from softlabels.data.transforms import ImageSettings, image_transforms

__all__ = ["ImageSource"]


class ImageSource:
    """A data source over images that worker processes read one by one.

    An image is transformed with draws that belong to a seed, a number and its index, whichever
    worker reads it. Workers never touch an accelerator.

    Args:
        place: Where the images are, for messages.
        train: Training images.
        test: Test images.
        info: Facts about the data set.
        settings: What is done to the images.
        workers: Number of processes that read; 0 reads in this one.
        bad_images: See `ImageReader`.
        max_bad_images: Likewise.
        max_worker_restarts: Likewise.

    Raises:
        ValueError: If a setting is out of its range.
    """

    def __init__(
        self,
        place: str | Path,
        train: Images,
        test: Images,
        info: DataInfo,
        settings: ImageSettings,
        *,
        workers: int,
        bad_images: BadImages,
        max_bad_images: int,
        max_worker_restarts: int,
    ) -> None:
        for name, value in (
            ("workers", workers),
            ("max_bad_images", max_bad_images),
            ("max_worker_restarts", max_worker_restarts),
        ):
            if value < 0:
                raise ValueError(f"{name} must be at least 0, got {value}")
        if bad_images not in ("error", "skip"):
            raise ValueError(f"bad_images must be one of error, skip, got {bad_images!r}")
        self._place = place
        self._info = info
        self._settings = settings
        self._images: dict[Split, Images] = {"train": train, "test": test}
        of_train, of_test = image_transforms(settings)
        self._reader = ImageReader(
            self._images,
            {"train": of_train, "test": of_test},
            num_workers=workers,
            bad_images=bad_images,
            max_bad_images=max_bad_images,
            max_worker_restarts=max_worker_restarts,
        )

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
        images = self._images["train"]
        data = blake2b(images.targets.tobytes(), digest_size=16)
        for index in range(len(images)):
            data.update(self._identity(index).encode())
        augmentation = blake2b(repr(self._settings).encode(), digest_size=16)
        return {"data": data.hexdigest(), "augmentation": augmentation.hexdigest()}

    def _identity(self, index: int) -> str:
        """What tells a training image from others, wherever the data set lies."""
        raise NotImplementedError

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
        device: torch.device | str,
    ) -> Iterator[Batch]:
        """Read training batches; see `DataSource`."""
        steps = train_indices(
            self._order(seed, epoch),
            batch_size=batch_size,
            rank=rank,
            world_size=world_size,
            start_step=start_step,
        )
        return self._read("train", steps, draw or (seed, epoch), torch.device(device))

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

    def close(self) -> None:
        """End the worker processes; the next read starts new ones."""
        self._reader.close()

    def _read(
        self, what: str, steps: Iterator[Tensor], draw: tuple[int, int], device: torch.device
    ) -> Iterator[Batch]:
        """Let the workers read, and move what they send to the device."""
        split: Split = "test" if what == "test" else "train"
        replaced = what == "train"
        views = ([View(split, *draw, i, replaced) for i in step.tolist()] for step in steps)
        for samples in self._reader.read(views, pin=device.type == "cuda"):
            if samples.images is None:
                if what == "train":
                    raise ValueError(f"no training image in {self._place} can be read")
                continue
            yield Batch(
                samples.images.to(device, non_blocking=True),
                samples.targets.to(device, non_blocking=True),
                samples.indices,
                None if what == "test" else torch.full_like(samples.indices, draw[1]),
            )
