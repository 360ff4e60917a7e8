"""What published recipes do to an image is what the settings give."""

import math
import random

import pytest
import torch
from timm.data.auto_augment import RandAugment
from timm.data.random_erasing import RandomErasing
from torch.nn import functional as F
from torchvision import transforms
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

from shared.data_files import write_images
from softlabels.data.sources.folder import FolderSource
from softlabels.data.transforms import (
    ImageSettings,
    ImageTransform,
    Lighting,
    RandomResizedCrop,
    evaluation_geometry,
    training_transform,
)


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


def photograph(height: int = 40, width: int = 60) -> torch.Tensor:
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8)


def test_the_augmentation_of_the_vision_transformers():
    train = training_transform(
        settings(interpolation="bicubic", auto_augment="rand-m9-mstd0.5-inc1", random_erasing=0.25)
    )
    assert train.geometry == RandomResizedCrop(224, "bicubic")
    (policy,) = train.policy.transforms
    assert isinstance(policy, RandAugment)
    assert policy.num_layers == 2
    for operation in policy.ops:
        assert (operation.magnitude, operation.magnitude_std) == (9, 0.5)
        assert operation.prob == 0.5
    assert {operation.name for operation in policy.ops} >= {
        "PosterizeIncreasing",
        "ColorIncreasing",
    }
    _, erasing = train.finish.transforms
    assert isinstance(erasing, RandomErasing)
    assert (erasing.probability, erasing.per_pixel) == (0.25, True)
    assert (erasing.min_area, erasing.max_area) == pytest.approx((0.02, 1 / 3))
    assert erasing.log_aspect_ratio == pytest.approx((math.log(0.3), -math.log(0.3)))


def test_the_augmentation_of_imagenets_convolutional_networks():
    train = training_transform(settings())
    assert train == ImageTransform(RandomResizedCrop(224, "bilinear"))
    resize, center = settings().evaluation_geometry().transforms
    assert (resize.size, tuple(center.size)) == (256, (224, 224))


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(40, 60), (64, 48), (300, 200)])
def test_images_are_resized_as_pillow_does(interpolation, size):
    image = F.avg_pool2d(photograph(2 * size[0], 2 * size[1]).float(), 2).byte()
    geometry = evaluation_geometry(32, interpolation=interpolation, crop_fraction=0.875)
    mode = transforms.InterpolationMode(interpolation)
    of_pillow = transforms.Compose([transforms.Resize(36, mode), transforms.CenterCrop(32)])
    expected = pil_to_tensor(of_pillow(to_pil_image(image)))
    assert geometry(image).dtype == torch.uint8
    assert (geometry(image).int() - expected.int()).abs().max() <= 1


def test_a_random_crop_is_a_part_of_the_image_of_the_published_area_and_shape():
    # Each pixel says where it is, so the crop can be read from its result.
    rows, columns = torch.arange(200), torch.arange(250)
    image = torch.stack(
        (rows[:, None].expand(200, 250), columns.expand(200, 250), torch.zeros(200, 250))
    ).byte()
    crop, areas, shapes = RandomResizedCrop(20, "bilinear"), [], []
    for _ in range(300):
        down, right, _ = crop(image).float().unbind()
        height, width = ((x.max() - x.min()) * 20 / 19 for x in (down, right))
        areas.append(float(height * width / (200 * 250)))
        shapes.append(float(width / height))
    assert 0.05 < min(areas) < 0.15
    assert 0.9 < max(areas) < 1.05
    assert 0.4 < sum(areas) / len(areas) < 0.54  # uniform, but for what does not fit
    assert 0.7 < min(shapes) < 0.85
    assert 1.2 < max(shapes) < 1.42


def test_crop_and_flip_of_small_images_has_a_border_of_4():
    crops = training_transform(settings(image_size=32, augmentation="crop_flip"))
    white = torch.full((3, 32, 32), 255, dtype=torch.uint8)
    borders = [(crops(white, number)[:, :, 0] == 0).sum().item() for number in range(300)]
    assert max(borders) == 32 * 32 - 28 * 28
    assert min(borders) == 0


def test_draws_belong_to_their_key_and_leave_every_generator_as_it_was():
    plain = training_transform(settings(image_size=16))
    policy = training_transform(settings(image_size=16, auto_augment="rand-m9-mstd0.5-inc1"))
    image = photograph()
    for transform in (plain, policy):
        torch.manual_seed(0)
        random.seed(0)
        first = transform(image, 1, 2, "augment")
        assert (random.random(), torch.rand(()).item()) == (
            pytest.approx(0.8444218515250481),
            pytest.approx(0.49625658988952637),
        )
        assert torch.equal(first, transform(image, 1, 2, "augment"))
        assert not torch.equal(first, transform(image, 1, 3, "augment"))


@pytest.mark.parametrize("augmentation", ["random_resized_crop", "crop_flip"])
def test_lighting_comes_before_the_normalization(augmentation):
    """It adds a color; dividing by the channels' deviation scales that too."""
    image = torch.full((3, 32, 32), 100, dtype=torch.uint8)
    pixels = []
    for changes in ({}, {"mean": (0.1, 0.2, 0.3), "std": (0.5, 0.25, 0.2)}):
        train = training_transform(
            settings(augmentation=augmentation, image_size=32, lighting=0.1, **changes)
        )
        pixels.append(train(image, 0)[:, 16, 16])
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
