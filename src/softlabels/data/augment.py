"""What is done to whole batches, on any device; draws belong to the sample and the epoch.

Each augmentation takes float images [B, C, H, W] in 0..1, the indices of their samples [B] and the
parts of a key, such as `(seed, epoch)`, and gives new images of the same shape in 0..1. The same
sample and key give the same image in any batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from softlabels.data.randomness import derive_seed, normal, uniform


class Augmentation(Protocol):
    """What an `InMemorySource` calls for every batch."""

    def __call__(self, images: Tensor, index: Tensor, *key: int | str) -> Tensor:
        """Augment a batch.

        Args:
            images: [B, C, H, W] float in 0..1; not changed.
            index: Indices of the samples, [B] int64.
            *key: What the draws belong to besides the sample, for example `seed, epoch`.

        Returns:
            [B, C, H, W] float in 0..1.
        """
        ...


def _between(draws: Tensor, low: float, high: float) -> Tensor:
    """Stretch draws from [0, 1) to [low, high)."""
    return draws * (high - low) + low


def _check_range(name: str, low: float, high: float) -> None:
    """Raise unless 0 < low <= high."""
    if not 0 < low <= high < math.inf:
        raise ValueError(f"{name} must be (low, high) with 0 < low <= high, got ({low}, {high})")


@dataclass(frozen=True)
class Affine:
    """Random rotation, scaling, horizontal shear and shift around the center, bilinear.

    What comes in from outside the image is 0: black, the background of white-on-black drawings.

    Args:
        rotation: Largest angle either way, degrees.
        scale: (low, high) factor of the size; 2 makes things twice as large.
        shear: Largest angle either way by which vertical lines lean, degrees, below 90.
        shift: Largest shift either way along each axis, pixels.
    """

    rotation: float = 15.0
    scale: tuple[float, float] = (0.8, 1.2)
    shear: float = 10.0
    shift: float = 3.0

    def __post_init__(self) -> None:
        _check_range("scale", *self.scale)
        if not 0 <= self.shear < 90:
            raise ValueError(f"shear must be in [0, 90) degrees, got {self.shear}")
        for name, value in (("rotation", self.rotation), ("shift", self.shift)):
            if not 0 <= value < math.inf:
                raise ValueError(f"{name} must be at least 0, got {value}")

    def __call__(self, images: Tensor, index: Tensor, *key: int | str) -> Tensor:
        """Augment a batch; see `Augmentation`."""
        height, width = images.shape[-2:]
        draws = uniform(derive_seed(*key, "affine"), index, 5)
        angle = _between(draws[:, 0], -self.rotation, self.rotation).deg2rad_()
        lean = _between(draws[:, 1], -self.shear, self.shear).deg2rad_().tan_()
        zoom = _between(draws[:, 2], *self.scale).reciprocal_()
        shift = _between(draws[:, 3:], -self.shift, self.shift)

        # For each output pixel, where to read: undo the shift, then the turn and the zoom, then the
        # shear. All in pixels from the center.
        cos, sin = angle.cos() * zoom, angle.sin() * zoom
        # grid_sample wants -1..1 from edge to edge.
        wide, high = 2 / width, 2 / height
        along_x = torch.stack(((cos + lean * sin) * wide, -sin * high), dim=1)
        along_y = torch.stack(((sin - lean * cos) * wide, cos * high), dim=1)
        x = torch.arange(width, device=images.device) - (width - 1) / 2 - shift[:, :1]
        y = torch.arange(height, device=images.device) - (height - 1) / 2 - shift[:, 1:]
        # The grid is a sum of a row and a column part, which is several times faster than torch's
        # affine_grid.
        columns = x.unsqueeze(2) * along_x.unsqueeze(1)
        rows = y.unsqueeze(2) * along_y.unsqueeze(1)
        grid = rows.unsqueeze(2) + columns.unsqueeze(1)
        return F.grid_sample(images, grid, mode="bilinear", align_corners=False)


@dataclass(frozen=True)
class Contrast:
    """Random contrast: every pixel's distance from its image's mean is scaled by one factor.

    Args:
        low: Smallest factor, above 0.
        high: Largest factor.
    """

    low: float = 0.5
    high: float = 1.0

    def __post_init__(self) -> None:
        _check_range("contrast", self.low, self.high)

    def __call__(self, images: Tensor, index: Tensor, *key: int | str) -> Tensor:
        """Augment a batch; see `Augmentation`."""
        draws = uniform(derive_seed(*key, "contrast"), index, 1)
        factor = _between(draws, self.low, self.high)[:, :, None, None]
        mean = images.mean(dim=(1, 2, 3), keepdim=True)
        return torch.lerp(mean, images, factor).clamp_(0, 1)


@dataclass(frozen=True)
class Noise:
    """Normal noise, independent at each pixel and channel.

    Args:
        std: Standard deviation; the images' range is 0..1.
    """

    std: float = 0.1

    def __post_init__(self) -> None:
        if not 0 <= self.std < math.inf:
            raise ValueError(f"std must be at least 0, got {self.std}")

    def __call__(self, images: Tensor, index: Tensor, *key: int | str) -> Tensor:
        """Augment a batch; see `Augmentation`."""
        noise = normal(derive_seed(*key, "noise"), index, images[0].numel())
        return noise.mul_(self.std).view(images.shape).add_(images).clamp_(0, 1)


def _halves(purpose: str, index: Tensor, *key: int | str) -> Tensor:
    """Half of the samples, [B, 1, 1, 1] bool."""
    return (uniform(derive_seed(*key, purpose), index, 1) < 0.5)[:, :, None, None]


def mirror_(images: Tensor, index: Tensor, *key: int | str, width: int = 3) -> Tensor:
    """Mirror half of a batch left and right, in place.

    Args:
        images: [B, ...] of any type.
        index: Indices of the samples, [B] int64 on the CPU, so that no device is waited for.
        *key: What the draws belong to besides the sample.
        width: Which dimension goes from left to right.

    Returns:
        The images.
    """
    rows = _halves("mirror", index, *key).flatten().nonzero()[:, 0]
    rows = rows.to(images.device, non_blocking=True)
    return images.index_copy_(0, rows, images.index_select(0, rows).flip(width))


@dataclass(frozen=True)
class CropFlip:
    """Random crop of the image with a black border, then perhaps a mirror image; exact pixels.

    Args:
        padding: Width of the border, pixels; the crop has the image's own size.
        flip: Whether to mirror left and right with probability 1/2.
    """

    padding: int = 4
    flip: bool = True

    def __post_init__(self) -> None:
        if self.padding < 0:
            raise ValueError(f"padding must be at least 0, got {self.padding}")

    def __call__(self, images: Tensor, index: Tensor, *key: int | str) -> Tensor:
        """Augment a batch; see `Augmentation`."""
        height, width = images.shape[-2:]
        draws = uniform(derive_seed(*key, "crop and flip"), index, 3)
        corner = (draws[:, :2] * (2 * self.padding + 1)).long()
        # Every possible crop, as a view; indexing copies one of them for each image.
        windows = F.pad(images, [self.padding] * 4).unfold(2, height, 1).unfold(3, width, 1)
        each = torch.arange(len(images), device=images.device)
        crops = windows[each, :, corner[:, 0], corner[:, 1]]
        if not self.flip:
            return crops
        mirrored = (draws[:, 2] < 0.5)[:, None, None, None]
        return torch.where(mirrored, crops.flip(3), crops)


@dataclass(frozen=True)
class RandomResizedCrop:
    """A crop of random area and shape, resized to a square, then perhaps a mirror image.

    Ten pairs of area and shape are drawn and the first that fits into the image is taken; if none
    does, it is the largest central part of a shape in range. Resizing is Pillow's with its
    antialiasing, as two products with matrices, one along each axis: torchvision's
    `RandomResizedCrop` within rounding.

    Args:
        size: Height and width of the result, pixels.
        bicubic: Whether the filter is bicubic, else bilinear.
        area: (low, high) share of the image's area.
        shape: (low, high) of width over height.
        flip: Whether to mirror left and right with probability 1/2.
    """

    size: int
    bicubic: bool = False
    area: tuple[float, float] = (0.08, 1.0)
    shape: tuple[float, float] = (3 / 4, 4 / 3)
    flip: bool = True

    def __call__(self, images: Tensor, index: Tensor, *key: int | str) -> Tensor:
        """Augment a batch; see `Augmentation`."""
        top, left, high, wide = self._crops(images.shape[-2:], index, *key)
        rows = self._weights(top, high, images.shape[-2])
        columns = self._weights(left, wide, images.shape[-1])
        if self.flip:
            mirrored = _halves("mirror", index, *key)[:, 0]
            columns = torch.where(mirrored, columns.flip(1), columns)
        # Bicubic weights may be negative: as Pillow does, the range is kept after each axis.
        narrowed = (images @ columns.transpose(1, 2).unsqueeze(1)).clamp_(0, 1)
        return (rows.unsqueeze(1) @ narrowed).clamp_(0, 1)

    def _crops(
        self, size: torch.Size, index: Tensor, *key: int | str
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Top, left, height and width of each crop, [B] float32, whole numbers."""
        height, width = size
        draws = uniform(derive_seed(*key, "crop"), index, 22)
        area = _between(draws[:, :10], *self.area) * (height * width)
        low, high = map(math.log, self.shape)
        shape = _between(draws[:, 10:20], low, high).exp_()
        wide, tall = (area * shape).sqrt_().round_(), (area / shape).sqrt_().round_()
        # The last one stands for none that fits.
        central = min(max(width / height, self.shape[0]), self.shape[1])
        whole = (min(height, round(width / central)), min(width, round(height * central)))
        fits = (wide > 0) & (wide <= width) & (tall > 0) & (tall <= height)
        first = fits.int().argmax(1, keepdim=True)
        found = fits.any(1)
        tall = torch.where(found, tall.gather(1, first)[:, 0], whole[0])
        wide = torch.where(found, wide.gather(1, first)[:, 0], whole[1])
        top = torch.where(found, draws[:, 20], 0.5) * (height - tall + found)
        left = torch.where(found, draws[:, 21], 0.5) * (width - wide + found)
        return top.floor_(), left.floor_(), tall, wide

    def _weights(self, start: Tensor, length: Tensor, size: int) -> Tensor:
        """What each pixel along an axis counts for each of the result, [B, self.size, size]."""
        pixels = torch.arange(size, device=start.device) + 0.5
        places = (torch.arange(self.size, device=start.device) + 0.5) / self.size
        scale = length / self.size
        centers = start[:, None] + places * length[:, None]
        # A filter is as wide as a pixel of the result where that is the larger one.
        distance = (pixels - centers.unsqueeze(2)).div_(scale.clamp(min=1)[:, None, None]).abs_()
        if self.bicubic:  # Keys' filter with a = -1/2
            near = (1.5 * distance - 2.5) * distance.square() + 1
            far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
            weights = torch.where(distance < 1, near, torch.where(distance < 2, far, 0.0))
        else:
            weights = (1 - distance).clamp_(min=0)
        inside = (pixels > start[:, None]) & (pixels < (start + length)[:, None])
        weights = weights * inside.unsqueeze(1)
        return weights / weights.sum(2, keepdim=True)


class Normalization:
    """Gives each channel of the data set a mean of 0 and a deviation of 1.

    Args:
        mean: Of each channel, for images in 0..1.
        std: Its standard deviation, likewise.
    """

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        self._mean, self._std = torch.tensor((mean, std)).view(2, 1, -1, 1, 1).unbind()

    def __call__(self, images: Tensor) -> Tensor:
        """Normalize a batch.

        Args:
            images: [B, C, H, W], uint8 or float in 0..1; not changed.

        Returns:
            [B, C, H, W] float32, contiguous if the images are uint8.
        """
        if self._mean.device != images.device:
            self._mean, self._std = self._mean.to(images.device), self._std.to(images.device)
        if images.dtype != torch.uint8:
            return (images - self._mean).div_(self._std)
        scale, shift = 1 / (255 * self._std), -self._mean / self._std
        if images.device.type != "cpu":  # one kernel
            normalized = torch.empty(images.shape, device=images.device)
            return torch.addcmul(shift, images, scale, out=normalized)
        # NumPy asks the system for large pages: half of the time went into getting small ones.
        normalized = torch.from_numpy(np.empty(images.shape, np.float32))
        return normalized.copy_(images).mul_(scale).add_(shift)


@dataclass(frozen=True)
class Compose:
    """Several augmentations, one after the other.

    Args:
        steps: The augmentations; the position of each is part of its key.
    """

    steps: tuple[Augmentation, ...]

    def __call__(self, images: Tensor, index: Tensor, *key: int | str) -> Tensor:
        """Augment a batch; see `Augmentation`."""
        for position, step in enumerate(self.steps):
            images = step(images, index, *key, position)
        return images
