"""Worker processes that read, decode and transform single images, and what may go wrong there."""

# The fields' types are also read where subclasses are defined, so they are not deferred to text.

import os
import signal
import threading
import warnings
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from softlabels.data.decoding import DECODING_ERRORS, Images
from softlabels.data.extra_views import PARTNER, Partners, Reading
from softlabels.data.transforms import ImageTransform

__all__ = ["ImageReader", "ReaderSettings", "Samples", "SomeImages", "Split"]

Split = Literal["train", "test"]
View: TypeAlias = "tuple[Reading, int]"  # with the number of an image


class SomeImages(Images):
    """Some of a split's images, numbered anew.

    Args:
        images: All of them.
        rows: [M] int64, which ones.
    """

    def __init__(self, images: Images, rows: NDArray[np.int64]) -> None:
        self.images = images
        self.rows = rows
        self.targets = images.targets[rows]

    def name(self, index: int) -> str:
        """What an error calls an image; see `Images`."""
        return self.images.name(int(self.rows[index]))

    def read(self, index: int) -> Tensor:
        """Read an image; see `Images`."""
        return self.images.read(int(self.rows[index]))


class Samples(NamedTuple):
    """The readable images of a batch, or one image.

    Attributes:
        values: `"image"`, `"target"`, `"index"` and further images by name; None if there are none.
        bad: What could not be read on the way: (name, reason) of each.
    """

    values: dict[str, Any] | None
    bad: list[tuple[str, str]]


def _collate(samples: list[Samples]) -> Samples:
    good = [sample.values for sample in samples if sample.values is not None]
    bad = [entry for sample in samples for entry in sample.bad]
    return Samples(default_collate(good) if good else None, bad)


class _ViewBatches:
    """A batch sampler that hands out the batches it was given last."""

    def __init__(self) -> None:
        self.batches: Iterator[list[View]] = iter(())

    def __iter__(self) -> Iterator[list[View]]:
        return self.batches


class _Views(Dataset[Samples]):
    """Reads and transforms single images; all it needs travels with the view."""

    def __init__(
        self,
        images: Mapping[Split, Images],
        transforms: Mapping[Split, ImageTransform],
        replacements: int,
    ) -> None:
        self._images = images
        self._transforms = transforms
        self._replacements = replacements

    def __getitem__(self, view: View) -> Samples:
        reading, number = view
        split: Split = "test" if reading.what == "test" else "train"
        images, transform = self._images[split], self._transforms[split]
        bad: list[tuple[str, str]] = []
        # So many that there are more unreadable ones than allowed if all are in vain: of an image
        # and its partner, each of which may be the unreadable one, one stands for two tries.
        most = (1 + self._replacements) * (2 if PARTNER in reading.extras else 1)
        tries = min(len(images), most) if reading.what == "train" else 1
        for offset in range(tries):
            index = (number + offset) % len(images)
            image = _image(images, index, bad)
            if image is None:
                continue
            further = self._further(reading, index, image, bad)
            if further is None:
                continue
            # The draws are the image's own, also where it stands in for another.
            tensor = transform(image, *reading.draw, index, "augment")
            target = int(images.targets[index])
            return Samples({"image": tensor, "target": target, "index": index, **further}, bad)
        return Samples(None, bad)

    def _further(
        self, reading: Reading, index: int, image: Tensor, bad: list[tuple[str, str]]
    ) -> dict[str, Tensor] | None:
        """What an image's sample carries besides; None if no partner of it can be read."""
        made = {}
        for name in reading.extras:
            shown = self._partner(reading, index, bad) if name == PARTNER else image
            if shown is None:
                return None
            made[name] = self._transforms["train"](shown, *reading.key(name), index)
        return made

    def _partner(self, reading: Reading, index: int, bad: list[tuple[str, str]]) -> Tensor | None:
        """The first readable one of the other images of a class, from the partner on."""
        for skip in range(min(self._partners.num_others(index), 1 + self._replacements)):
            partner = self._partners.of(
                torch.tensor([index]), seed=reading.seed, epoch=reading.epoch, skip=skip
            )
            image = _image(self._images["train"], int(partner), bad)
            if image is not None:
                return image
        return None

    @cached_property
    def _partners(self) -> Partners:
        return Partners(self._images["train"].targets)


def _image(images: Images, index: int, bad: list[tuple[str, str]]) -> Tensor | None:
    """Read an image, or note why it cannot be read."""
    try:
        return images.read(index)
    except DECODING_ERRORS as error:
        bad.append((images.name(index), f"{type(error).__name__}: {error}"))
        return None


@dataclass(kw_only=True, eq=False)
class ReaderSettings:
    """Who reads images, and what is done where it fails.

    Args:
        workers: Number of processes that read images; 0 reads in this one.
        bad_images: What to do about an image that cannot be read. `"error"`: stop. `"skip"`:
            warn once; in training read the next good image instead, in testing leave it out. For a
            partner that cannot be read, another image of the class stands in; where there is none,
            the next good image that has a partner is read in place of the two.
        max_bad_images: How many different ones may be skipped before the run stops after all.
        max_worker_restarts: How many times worker processes that died are replaced by new ones.

    Raises:
        ValueError: If one is out of its range.
    """

    workers: int = 2
    bad_images: Literal["error", "skip"] = "error"
    max_bad_images: int = 100
    max_worker_restarts: int = 3

    def __post_init__(self) -> None:
        for name in ("workers", "max_bad_images", "max_worker_restarts"):
            value: int = getattr(self, name)
            if value < 0:
                raise ValueError(f"{name} must be at least 0, got {value}")
        if self.bad_images not in ("error", "skip"):
            raise ValueError(f"bad_images must be one of error, skip, got {self.bad_images!r}")


class ImageReader:
    """Reads batches of views with worker processes, which stay alive between epochs.

    Args:
        images: Of both splits.
        transforms: What is done to an image of each.
        settings: How.

    Attributes:
        skipped: Names of the images that were skipped so far, with reasons.
    """

    def __init__(
        self,
        images: Mapping[Split, Images],
        transforms: Mapping[Split, ImageTransform],
        settings: ReaderSettings,
    ) -> None:
        self._settings = settings
        most_bad = settings.max_bad_images if settings.bad_images == "skip" else 0
        self._views = _Views(images, transforms, most_bad)
        self._num_restarts = 0
        self._idle: list[DataLoader[Samples]] = []
        self.skipped: dict[str, str] = {}

    def read(self, batches: Iterator[list[View]], *, pin: bool) -> Iterator[Samples]:
        """Read batches in their order.

        Args:
            batches: The views of each.
            pin: Whether to read into page-locked memory.

        Yields:
            The samples of each.

        Raises:
            ValueError: An image that cannot be read, if that is an error, or one too many.
            ChildProcessError: Workers died once too often.
        """
        waiting: deque[list[View]] = deque()

        def handed_out(batches: Iterator[list[View]]) -> Iterator[list[View]]:
            for batch in batches:
                waiting.append(batch)
                yield batch

        while True:
            # What was handed out to workers that died comes first again.
            again, waiting = [*waiting], deque()
            try:
                for samples in self._with_workers(handed_out(chain(again, batches)), pin):
                    waiting.popleft()
                    self._report(samples.bad)
                    yield samples
                return
            except _OF_DEAD_WORKERS as error:
                if self._settings.workers == 0 or not _tells_of_a_death(error):
                    raise
                self._count_restart(error)

    def _with_workers(self, batches: Iterator[list[View]], pin: bool) -> Iterator[Samples]:
        # A loader serves one reader at a time; a second reader gets a loader of its own.
        loader = self._idle.pop() if self._idle else self._new_loader(pin)
        assert isinstance(loader.batch_sampler, _ViewBatches)
        loader.batch_sampler.batches = batches
        with _without_signals_of_children():
            samples = iter(loader)
        is_dead = False
        try:
            yield from samples
        except _OF_DEAD_WORKERS:
            is_dead = True  # this loader is of no more use
            raise
        finally:
            if not is_dead:
                self._idle.append(loader)

    def _new_loader(self, pin: bool) -> DataLoader[Samples]:
        return DataLoader(
            self._views,
            batch_sampler=_ViewBatches(),
            num_workers=self._settings.workers,
            collate_fn=_collate,
            pin_memory=pin,
            persistent_workers=self._settings.workers > 0,
            # Without its own generator a loader would draw from torch's, on which models depend.
            generator=torch.Generator(),
            worker_init_fn=_leave_interrupts_to_the_reader,
        )

    def _count_restart(self, error: Exception) -> None:
        reason = " ".join(f"{type(error).__name__} {error}".split())
        self._num_restarts += 1
        limit = self._settings.max_worker_restarts
        if self._num_restarts > limit:
            raise ChildProcessError(
                f"workers that read images died {self._num_restarts} times, max_worker_restarts is "
                f"{limit}; often the memory is too small: try fewer workers ({reason:.200})"
            ) from error
        warnings.warn(
            f"a worker that reads images died; new ones go on, time {self._num_restarts} of at "
            f"most {limit} ({reason:.200})",
            stacklevel=4,
        )

    def _report(self, bad: list[tuple[str, str]]) -> None:
        """Warn once about each image that could not be read, or raise."""
        for name, reason in bad:
            if self._settings.bad_images == "error":
                raise ValueError(
                    f"cannot read the image {name} ({reason}); expected an image file that Pillow"
                    ' can decode. bad_images="skip" goes on without it'
                )
            if name in self.skipped:
                continue
            self.skipped[name] = reason
            if len(self.skipped) > self._settings.max_bad_images:
                raise ValueError(
                    f"{len(self.skipped)} images cannot be read, max_bad_images is "
                    f"{self._settings.max_bad_images}; the last one is {name} ({reason})"
                )
            warnings.warn(f"skipped the unreadable image {name} ({reason})", stacklevel=4)

    def close(self) -> None:
        """End the worker processes; the next read starts new ones."""
        self._idle.clear()


# torch says it in words, or what a dead worker had sent cannot be received any more.
_OF_DEAD_WORKERS = (RuntimeError, EOFError, ConnectionError, FileNotFoundError)


def _tells_of_a_death(error: Exception) -> bool:
    """Whether an error of a loader is that of a worker that died; not one that it reported."""
    text = str(error)
    if text.startswith("Caught "):
        return False
    return not isinstance(error, RuntimeError) or "DataLoader worker" in text


def _leave_interrupts_to_the_reader(worker: int) -> None:
    """Ctrl-C, and a launcher's SIGTERM, go to a whole group; the reader may finish a step first."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(os, "setsid"):
        os.setsid()


@contextmanager
def _without_signals_of_children() -> Iterator[None]:
    """Keep torch from raising at any place of the program when a worker dies.

    Who waits for the worker's batch is told soon enough.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGCHLD"):
        yield
        return
    before = signal.getsignal(signal.SIGCHLD)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, before)
