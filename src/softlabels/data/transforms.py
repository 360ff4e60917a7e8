"""What is done to a single image between reading and batching."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from typing import Literal

from PIL import Image, ImageOps
from timm.data import auto_augment as policies
from timm.data.transforms_factory import create_transform
from torch import Tensor
from torchvision import transforms

AugmentationName = Literal["random_resized_crop", "crop_flip", "none"]
Interpolation = Literal["bilinear", "bicubic"]
ImageTransform = Callable[[Image.Image], Tensor]


def evaluation_transform(
    image_size: int | tuple[int, int],
    *,
    interpolation: str,
    crop_fraction: float,
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> ImageTransform:
    """Make the transform for testing: resize, central crop, normalisation; see `image_transforms`.

    Returns:
        A transform of an image to [C, height, width] float32, without any draw.
    """
    transform: ImageTransform = create_transform(
        image_size, interpolation=interpolation, mean=mean, std=std, crop_pct=crop_fraction
    )
    return transform


def image_transforms(
    image_size: int,
    *,
    augmentation: AugmentationName,
    interpolation: Interpolation,
    auto_augment: str | None,
    random_erasing: float,
    crop_fraction: float,
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> tuple[ImageTransform, ImageTransform]:
    """Make the transforms for training and testing; `FolderSource` describes the arguments.

    Args:
        image_size: Height and width of the result, pixels.
        augmentation: What is done in training.
        interpolation: How images are resized.
        auto_augment: timm's description of a policy that follows the crop, or None.
        random_erasing: Probability of erasing a rectangle, 0..1.
        crop_fraction: The central part of a test image that is kept, above 0, at most 1.
        mean: Mean of each channel, for images in 0..1.
        std: Standard deviation of each channel, for images in 0..1.

    Returns:
        Two transforms of an RGB image to [3, image_size, image_size] float32. The first draws from
        the running generators of `random`, NumPy and torch.

    Raises:
        ValueError: If timm does not know the policy.
    """
    test = evaluation_transform(
        image_size, interpolation=interpolation, crop_fraction=crop_fraction, mean=mean, std=std
    )
    if augmentation == "none":
        return test, test
    try:
        crop, policy, finish = create_transform(
            image_size,
            is_training=True,
            color_jitter=0.0,
            auto_augment=auto_augment,
            interpolation=interpolation,
            mean=mean,
            std=std,
            re_prob=random_erasing,
            re_mode="pixel",
            separate=True,
        )
    except AssertionError as error:  # how timm refuses a policy
        raise ValueError(
            "auto_augment must be a policy that timm knows, such as rand-m9-mstd0.5-inc1,"
            f" got {auto_augment!r}"
        ) from error
    _allow_full_posterization(policy)
    if augmentation == "crop_flip":
        crop = transforms.Compose(
            [
                transforms.Resize(image_size, transforms.InterpolationMode(interpolation)),
                transforms.RandomCrop(image_size, padding=image_size // 8),
                transforms.RandomHorizontalFlip(),
            ]
        )
    return transforms.Compose([crop, policy, finish]), test


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
