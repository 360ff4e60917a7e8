"""Images made on the spot: a fixed pattern for each class under noise. They prove that things run.

Nothing is read and hardly anything is stored, so they stand in for data of any size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from softlabels.data.augment import CropFlip
from softlabels.data.batch import DataInfo
from softlabels.data.in_memory import InMemorySource, Part
from softlabels.data.randomness import derive_seed, normal

_CELLS = 8  # a pattern has at most so many along each side, so that it outlives a crop
_PATTERN_STD = 0.2
_NOISE_STD = 0.1
_MOST_CLASSES = 10**6
_LARGEST_SIDE = 2**14
_MOST_CHANNELS = 2**10
_MOST_IMAGES = 10**7


@dataclass(frozen=True)
class _Patterns(Part):
    """Images that are functions of their index; see `Part`.

    Args:
        name: What tells the images of two parts from each other.
        number: What the images are functions of, [N] int64.
        target: Class indices [N] int64; the images lie where these do.
        size: (channels, height, width) of an image.
    """

    name: str
    number: Tensor
    target: Tensor
    size: tuple[int, int, int]

    @property
    def shape(self) -> tuple[int, ...]:
        """(channels, height, width) of an image."""
        return self.size

    def read(self, rows: Tensor) -> Tensor:
        """Make images; see `Part`."""
        channels, *size = self.size
        cells = (channels, *(min(side, _CELLS) for side in size))
        count = cells[0] * cells[1] * cells[2]
        pattern = normal(derive_seed("noise", "class"), self.target[rows], count)
        noise = normal(derive_seed("noise", self.name), self.number[rows], count)
        small = pattern.mul_(_PATTERN_STD).add_(noise, alpha=_NOISE_STD).add_(0.5).clamp_(0, 1)
        return F.interpolate(small.view(-1, *cells), size, mode="nearest")

    def content(self) -> Iterator[memoryview]:
        """What the images are functions of."""
        yield memoryview(f"{self.name} {len(self.target)} {self.shape}".encode())
        yield from super().content()


def noise(
    *,
    num_classes: int = 10,
    image_size: int = 32,
    in_channels: int = 3,
    num_train: int = 1000,
    num_test: int = 200,
) -> InMemorySource:
    """Make a data set of coarse patterns under noise, one pattern a class.

    An image is a function of its index alone, and made when a batch is asked for. What there is to
    learn is learnt in seconds: the set tells whether a run works, not how well a method does.

    Args:
        num_classes: Number of classes, 2 or more.
        image_size: Height and width of the images, pixels.
        in_channels: Channels of the images.
        num_train: Number of training images. The classes take turns, in pairs of images where there
            are fewer than two images a class.
        num_test: Number of test images, likewise.

    Returns:
        The data source. Training images are shifted by up to an eighth and mirrored at random.

    Raises:
        ValueError: If a number is out of its range.
    """
    for name, value, low, high in (
        ("num_classes", num_classes, 2, _MOST_CLASSES),
        ("image_size", image_size, 1, _LARGEST_SIDE),
        ("in_channels", in_channels, 1, _MOST_CHANNELS),
        ("num_train", num_train, 1, _MOST_IMAGES),
        ("num_test", num_test, 1, _MOST_IMAGES),
    ):
        if not low <= value <= high:
            raise ValueError(f"{name} must be in {low}..{high}, got {value}")
    shape = (in_channels, image_size, image_size)
    # In turn; but two of a class in a row, where there are too few, so that each has a partner.
    in_a_row = 2 if num_train < 2 * num_classes else 1
    number = torch.arange(num_train)
    train = _Patterns("train", number, number // in_a_row % num_classes, shape)
    number = torch.arange(num_test)
    test = _Patterns("test", number, number % num_classes, shape)
    info = DataInfo(
        "noise",
        tuple(str(label) for label in range(num_classes)),
        in_channels,
        (image_size, image_size),
        (0.5,) * in_channels,
        (_PATTERN_STD,) * in_channels,
    )
    return InMemorySource(train, test, info, augmentation=CropFlip(image_size // 8))
