"""What published recipes do to an image is what the settings give."""

import math

import pytest
import torch
from PIL import Image
from timm.data.auto_augment import RandAugment
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import RandomResizedCropAndInterpolation
from torchvision import transforms

from shared.data_files import write_images
from softlabels.data.sources.folder import FolderSource
from softlabels.data.transforms import ImageSettings, Lighting, image_transforms


def settings(**changes):
    plain = {
        "image_size": 224,
        "augmentation": "random_resized_crop",
        "interpolation": "bilinear",
        "auto_augment": None,
        "random_erasing": 0.0,
        "lighting": 0.0,
        "crop_fraction": 0.875,
        "mean": (0.0, 0.0, 0.0),
        "std": (1.0, 1.0, 1.0),
    }
    return ImageSettings(**{**plain, **changes})


def steps_of(transform) -> list:
    """The steps of a transform in their order."""
    if isinstance(transform, transforms.Compose):
        return [step for part in transform.transforms for step in steps_of(part)]
    return [transform]


def test_the_augmentation_of_the_vision_transformers():
    train, _ = image_transforms(
        settings(interpolation="bicubic", auto_augment="rand-m9-mstd0.5-inc1", random_erasing=0.25)
    )
    crop, flip, policy, _, _, erasing = steps_of(train)
    assert isinstance(crop, RandomResizedCropAndInterpolation)
    assert (crop.size, crop.scale) == ((224, 224), (0.08, 1.0))
    assert crop.ratio == pytest.approx((3 / 4, 4 / 3))
    assert crop.interpolation == transforms.InterpolationMode.BICUBIC
    assert isinstance(flip, transforms.RandomHorizontalFlip)
    assert flip.p == 0.5
    assert isinstance(policy, RandAugment)
    assert policy.num_layers == 2
    for operation in policy.ops:
        assert (operation.magnitude, operation.magnitude_std) == (9, 0.5)
        assert operation.prob == 0.5
    assert {operation.name for operation in policy.ops} >= {
        "PosterizeIncreasing",
        "ColorIncreasing",
    }
    assert isinstance(erasing, RandomErasing)
    assert (erasing.probability, erasing.per_pixel) == (0.25, True)
    assert (erasing.min_area, erasing.max_area) == pytest.approx((0.02, 1 / 3))
    assert erasing.log_aspect_ratio == pytest.approx((math.log(0.3), -math.log(0.3)))


def test_the_augmentation_of_imagenets_convolutional_networks():
    train, test = image_transforms(settings())
    crop, flip, *rest = steps_of(train)
    assert (crop.size, crop.scale) == ((224, 224), (0.08, 1.0))
    assert crop.interpolation == transforms.InterpolationMode.BILINEAR
    assert flip.p == 0.5
    jitter, *finish = rest
    assert isinstance(jitter, transforms.ColorJitter)
    assert [getattr(jitter, name) for name in ("brightness", "contrast", "saturation", "hue")] == [
        None
    ] * 4  # so it does nothing
    assert [type(step).__name__ for step in finish] == ["MaybeToTensor", "Normalize"]
    resize, center, *_ = steps_of(test)
    assert (resize.size, tuple(center.size)) == (256, (224, 224))


def test_crop_and_flip_of_small_images_has_a_border_of_4():
    _, crop, flip, *_ = steps_of(
        image_transforms(settings(image_size=32, augmentation="crop_flip"))[0]
    )
    assert (crop.size, crop.padding, crop.fill) == ((32, 32), 4, 0)
    assert flip.p == 0.5


@pytest.mark.parametrize("augmentation", ["random_resized_crop", "crop_flip"])
def test_lighting_comes_before_the_normalization(augmentation):
    """It adds a color; dividing by the channels' deviation scales that too."""
    image = Image.new("RGB", (32, 32), (100, 100, 100))
    pixels = []
    for changes in ({}, {"mean": (0.1, 0.2, 0.3), "std": (0.5, 0.25, 0.2)}):
        train, _ = image_transforms(
            settings(augmentation=augmentation, image_size=32, lighting=0.1, **changes)
        )
        torch.manual_seed(0)
        pixels.append(train(image)[:, 16, 16])
    mean, std = torch.tensor((0.1, 0.2, 0.3)), torch.tensor((0.5, 0.25, 0.2))
    torch.testing.assert_close(pixels[1], (pixels[0] - mean) / std)
    assert not torch.allclose(pixels[0], torch.tensor(100 / 255))


def test_lighting_adds_one_color_to_a_training_image_and_none_to_a_test_image(tmp_path):
    for split in ("train", "val"):
        for label in "ab":
            write_images(tmp_path / split / label, 3)
    plain, lit = (
        FolderSource(
            tmp_path, image_size=16, workers=0, lighting=lighting, augmentation="crop_flip"
        )
        for lighting in (0, 0.1)
    )

    def views(source, draw):
        return next(source.train_views(draw=(5, draw), batch_size=6, device="cpu")).images

    added = views(lit, 0) - views(plain, 0)
    assert (added.amax(dim=(2, 3)) - added.amin(dim=(2, 3))).max() < 1e-5
    assert added[:, 0, 0, 0].unique().numel() == 6  # each image has its own draw
    assert not torch.equal(added, views(lit, 1) - views(plain, 1))
    for a, b in zip(
        *(s.test_batches(batch_size=6, device="cpu") for s in (plain, lit)), strict=True
    ):
        assert torch.equal(a.images, b.images)


def test_lighting_has_the_published_directions_and_deviations():
    torch.manual_seed(0)
    light = Lighting(0.1)
    # In 0..255, where published recipes have a deviation of 25.5.
    added = torch.stack([light(torch.zeros(3, 1, 1)).flatten() for _ in range(4000)]) * 255
    vectors = torch.tensor(
        [[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]]
    )
    along = added @ vectors
    expected = 25.5 * torch.tensor([0.2175, 0.0188, 0.0045])
    torch.testing.assert_close(along.std(dim=0), expected, rtol=0.05, atol=0)
    assert (along.mean(dim=0) / expected).abs().max() < 0.05
    image = torch.rand(3, 4, 5)
    assert torch.equal(Lighting(0)(image), image)


@pytest.mark.parametrize("std", [-0.1, math.inf, math.nan])
def test_lighting_out_of_range_is_told(std):
    with pytest.raises(ValueError, match="lighting must be at least 0, got"):
        settings(lighting=std)
