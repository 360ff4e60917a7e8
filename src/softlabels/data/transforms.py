"""What is done to a single image between reading and batching."""

# The fields' types are also read where subclasses are defined, so they are not deferred to text.

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from typing import Literal, cast, get_args

import torch
from PIL import Image, ImageOps
from timm.data import auto_augment as policies
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.data.transforms_factory import create_transform
from torch import Tensor
from torch.nn import functional
from torchvision import transforms
from torchvision.transforms import v2
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

from softlabels.data import augment
from softlabels.data.augment import Augmentation, CropFlip
from softlabels.data.randomness import seeded

AugmentationName = Literal["random_resized_crop", "crop_flip", "none"]
Interpolation = Literal["bilinear", "bicubic"]
Geometry = Callable[[Tensor], Tensor]  # of an image, [3, H, W] uint8

# Of the covariance of ImageNet's RGB values in 0..1, as the published RegNet recipes use them.
_EIGENVALUES = (0.2175, 0.0188, 0.0045)
_EIGENVECTORS = (  # a row for red, green, blue; a column for each eigenvalue
    (-0.5675, 0.7192, 0.4009),
    (-0.5808, -0.0045, -0.8140),
    (-0.5836, -0.6948, 0.4203),
)


@dataclass(frozen=True)
class Lighting:
    """Random lighting: adds sum_i a_i * eigenvalue_i * eigenvector_i, a_i ~ N(0, std).

    Source: Krizhevsky, Sutskever and Hinton, "ImageNet Classification with Deep Convolutional
    Neural Networks", NeurIPS 2012, section 4.1. What leaves the range 0..1 is not cut off.

    Args:
        std: Standard deviation of the three draws; 0.1 for images in 0..1, as published (25.5 in
            recipes whose images are in 0..255).

    Raises:
        ValueError: If `std` is negative or not finite.
    """

    std: float = 0.1

    def __post_init__(self) -> None:
        if not 0 <= self.std < math.inf:
            raise ValueError(f"lighting must be at least 0, got {self.std}")

    def __call__(self, image: Tensor) -> Tensor:
        """Draw from torch's running generator and light an image.

        Args:
            image: [3, H, W] float in 0..1, red first; not changed.

        Returns:
            [3, H, W].
        """
        draws = torch.randn(3).mul_(self.std)
        color = torch.tensor(_EIGENVECTORS) @ (draws * torch.tensor(_EIGENVALUES))
        return image + color[:, None, None]


@dataclass(kw_only=True, eq=False)
class ImageSettings:
    """What is done to the images of a data set.

    Args:
        image_size: Height and width of the images that are read, pixels. None: the size of the
            files if they have at most 64 pixels, else 224.
        augmentation: `"random_resized_crop"`: a crop of random size and shape, and a mirror image
            half of the time. `"crop_flip"`: the shorter side is resized to `image_size`, then a
            random crop with a border of an eighth, and the mirror image. `"none"`: as for testing.
            None: `"crop_flip"` for small files without an `image_size`, else the first.
        interpolation: How images are resized.
        auto_augment: timm's description of a policy that follows the crop, for example
            `"rand-m9-mstd0.5-inc1"`, or None.
        random_erasing: Probability with which a rectangle is replaced by noise, 0..1.
        lighting: Standard deviation of the random lighting along the main directions of ImageNet's
            colors, for images in 0..1; published runs have 0.1. 0: none.
        crop_fraction: The central part of a test image that is kept, 0..1 of its shorter side; None
            is 0.875 with `"random_resized_crop"` and 1 otherwise.
        mean: Mean of the red, green and blue channel, for images in 0..1.
        std: Standard deviation of the three channels, for images in 0..1.

    Raises:
        ValueError: If one is out of its range.
    """

    image_size: int | None = None
    augmentation: AugmentationName | None = None
    interpolation: Interpolation = "bilinear"
    auto_augment: str | None = None
    random_erasing: float = 0.0
    lighting: float = 0.0
    crop_fraction: float | None = None
    mean: tuple[float, float, float] = IMAGENET_DEFAULT_MEAN
    std: tuple[float, float, float] = IMAGENET_DEFAULT_STD

    def __post_init__(self) -> None:
        self.image_size = 224 if self.image_size is None else self.image_size
        self.augmentation = self.augmentation or "random_resized_crop"
        for name, value, choices in (
            ("augmentation", self.augmentation, get_args(AugmentationName)),
            ("interpolation", self.interpolation, get_args(Interpolation)),
        ):
            if value not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
        if self.image_size < 1:
            raise ValueError(f"image_size must be above 0, got {self.image_size}")
        if not 0 <= self.random_erasing <= 1:
            raise ValueError(f"random_erasing must be in 0..1, got {self.random_erasing}")
        Lighting(self.lighting)  # checks its range
        if self.crop_fraction is None:
            self.crop_fraction = 0.875 if self.augmentation == "random_resized_crop" else 1.0
        if not 0 < self.crop_fraction <= 1:
            raise ValueError(f"crop_fraction must be above 0, at most 1, got {self.crop_fraction}")
        self.mean, self.std = (*self.mean,), (*self.std,)

    @property
    def side(self) -> int:
        """Height and width of the images that are read, pixels."""
        assert self.image_size is not None, "it is filled in when the settings are made"
        return self.image_size

    def resize(self) -> Geometry:
        """Resizing of the shorter side."""
        return ShorterSide(self.side, self.interpolation)

    def evaluation_geometry(self) -> Geometry:
        """Resizing and central crop of a test image."""
        return evaluation_geometry(
            self.side,
            interpolation=self.interpolation,
            crop_fraction=cast("float", self.crop_fraction),
        )


def resized(image: Tensor, size: tuple[int, int], interpolation: str) -> Tensor:
    """Resize an image as Pillow does, within rounding: [3, H, W] uint8 -> [3, *size] uint8."""
    # As a batch whose channels lie side by side, as decoders leave them: torch is twice as fast
    # with those, and torchvision's own function does not pass them on as such.
    batch = image.permute(1, 2, 0).unsqueeze(0).permute(0, 3, 1, 2)
    return functional.interpolate(batch, size, mode=interpolation, antialias=True)[0]


@dataclass(frozen=True)
class ShorterSide:
    """Resizes the shorter side of an image, and the other one in proportion."""

    size: int
    interpolation: str

    def __call__(self, image: Tensor) -> Tensor:
        """Resize an image, [3, H, W] uint8."""
        height, width = image.shape[1:]
        shorter = min(height, width)
        size = (self.size * height // shorter, self.size * width // shorter)
        return resized(image, size, self.interpolation)


@dataclass(frozen=True)
class RandomResizedCrop:
    """A crop of random area and shape, resized to a square; draws from torch's generator."""

    size: int
    interpolation: str

    def __call__(self, image: Tensor) -> Tensor:
        """Crop and resize an image, [3, H, W] uint8."""
        top, left, height, width = transforms.RandomResizedCrop.get_params(
            image, scale=[0.08, 1.0], ratio=[3 / 4, 4 / 3]
        )
        crop = image[:, top : top + height, left : left + width]
        return resized(crop, (self.size, self.size), self.interpolation)


def evaluation_geometry(
    image_size: int | tuple[int, int], *, interpolation: str, crop_fraction: float
) -> Geometry:
    """What is done to a test image of 8 bits: resizing and central crop, as timm's evaluation."""
    whole = create_transform(image_size, interpolation=interpolation, crop_pct=crop_fraction)
    assert isinstance(whole, transforms.Compose)
    resize, crop, *_ = whole.transforms
    if isinstance(resize, transforms.Resize):
        resize = ShorterSide(resize.size, interpolation)
    geometry: Geometry = transforms.Compose([resize, crop])
    return geometry


def batch_augmentation(settings: ImageSettings) -> tuple[Geometry | None, Augmentation | None]:
    """The training transform in two parts, for images that lie in memory.

    Returns:
        What is done once to each image, and what is done to whole batches of them.

    Raises:
        ValueError: If something is done that needs single images.
    """
    for name in ("auto_augment", "random_erasing", "lighting"):
        if getattr(settings, name):
            raise ValueError(f"{name} is done to single images, got {getattr(settings, name)!r}")
    if settings.augmentation == "random_resized_crop":
        return None, augment.RandomResizedCrop(settings.side, settings.interpolation == "bicubic")
    if settings.augmentation == "none":
        return settings.evaluation_geometry(), None
    return settings.resize(), CropFlip(settings.side // 8)


@dataclass(frozen=True)
class ImageTransform:
    """What is done to a single image by the process that reads it.

    Args:
        geometry: Gives all images one size.
        policy: A policy of timm, on Pillow's images, or None.
        finish: What is done to the image in 0..1, the normalization among it; or None, and the
            image keeps its 8 bits.
    """

    geometry: Geometry
    policy: Callable[[Image.Image], Image.Image] | None = None
    finish: Callable[[Tensor], Tensor] | None = None

    def __call__(self, image: Tensor, *key: int | str) -> Tensor:
        """Transform an image.

        Args:
            image: [3, H, W] uint8.
            *key: What its draws belong to; see `derive_seed`.

        Returns:
            [image_size, image_size, 3] uint8; if there is a `finish`, [3, image_size, image_size]
            float32.
        """
        # Policies and random erasing draw from every generator there is, all others from torch's.
        simple = self.policy is None and self.finish is None
        with seeded(*key, torch_alone=simple):
            image = self.geometry(image)
            if self.policy is not None:
                image = pil_to_tensor(self.policy(to_pil_image(image)))
            if self.finish is None:
                return image.permute(1, 2, 0).contiguous()
            return self.finish(image.float().div_(255))


def training_transform(settings: ImageSettings) -> ImageTransform:
    """What is done to a training image, but for the mirror image.

    Raises:
        ValueError: If timm does not know the policy.
    """
    if settings.augmentation == "none":
        return ImageTransform(settings.evaluation_geometry())
    size, interpolation = settings.side, settings.interpolation
    geometry: Geometry
    if settings.augmentation == "crop_flip":
        geometry = transforms.Compose([settings.resize(), v2.RandomCrop(size, padding=size // 8)])
    else:
        geometry = RandomResizedCrop(size, interpolation)
    try:
        _, policy, finish = create_transform(
            size,
            is_training=True,
            color_jitter=0.0,
            auto_augment=settings.auto_augment,
            interpolation=interpolation,
            mean=settings.mean,
            std=settings.std,
            re_prob=settings.random_erasing,
            re_mode="pixel",
            separate=True,
        )
    except AssertionError as error:  # how timm refuses a policy
        raise ValueError(
            "auto_augment must be a policy that timm knows, such as rand-m9-mstd0.5-inc1,"
            f" got {settings.auto_augment!r}"
        ) from error
    _allow_full_posterization(policy)
    _, *steps = finish.transforms  # without the conversion to a tensor
    if settings.lighting:  # on values in 0..1: before the normalization
        steps.insert(0, Lighting(settings.lighting))
    plain = not settings.lighting and not settings.random_erasing
    return ImageTransform(
        geometry,
        policy if settings.auto_augment else None,
        None if plain else transforms.Compose(steps),
    )


def _allow_full_posterization(policy: transforms.Compose) -> None:
    """Give timm's policies a posterization that may keep no bit at all.

    At full strength timm asks Pillow for 0 bits, which was a black image and is an error in later
    versions of Pillow: it would stop a run after about a thousand images.
    """
    for step in policy.transforms:
        sub_policies = getattr(step, "policy", [getattr(step, "ops", [])])
        for operation in chain.from_iterable(sub_policies):
            if operation.aug_fn is policies.posterize:
                operation.aug_fn = _posterize


def _posterize(image: Image.Image, bits: int, **_: object) -> Image.Image:
    """Keep the highest bits of each channel, 0..8."""
    if bits == 0:
        return Image.new(image.mode, image.size)
    return ImageOps.posterize(image, bits) if bits < 8 else image
