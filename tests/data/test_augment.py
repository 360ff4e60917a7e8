import math

import pytest
import torch

from softlabels.data.augment import Affine, Compose, Contrast, CropFlip, Noise

INDEX = torch.arange(40)
IMAGES = torch.rand(40, 2, 9, 11, generator=torch.Generator().manual_seed(0))
EVERY = Compose((Affine(), Contrast(), Noise(), CropFlip(2)))


def still(**changes) -> Affine:
    return Affine(**{"rotation": 0, "scale": (1, 1), "shear": 0, "shift": 0, **changes})


@pytest.mark.parametrize("augmentation", [*EVERY.steps, EVERY], ids=lambda x: type(x).__name__)
def test_draws_belong_to_sample_and_key_and_not_to_the_batch(augmentation):
    before = IMAGES.clone()
    result = augmentation(IMAGES, INDEX, 1, 2)
    assert torch.equal(before, IMAGES)
    assert result.shape == IMAGES.shape
    assert result.min() >= 0
    assert result.max() <= 1
    some = torch.tensor([33, 4, 17])
    assert torch.equal(augmentation(IMAGES[some], INDEX[some], 1, 2), result[some])
    assert not torch.equal(augmentation(IMAGES, INDEX, 1, 3), result)
    same = IMAGES[:1].expand(40, -1, -1, -1)
    assert len(torch.unique(augmentation(same, INDEX, 1, 2), dim=0)) > 20


def test_affine_without_any_change_keeps_the_pixels():
    torch.testing.assert_close(still()(IMAGES, INDEX, 0), IMAGES, rtol=0, atol=1e-5)


def moments(image: torch.Tensor) -> tuple[float, float, float, float, float]:
    """Center (x, y) relative to the middle, and spread (xx, yy, xy), of an image [H, W]."""
    height, width = image.shape
    weight = image.double() / image.sum()
    y = (torch.arange(height) - (height - 1) / 2).double()[:, None]
    x = (torch.arange(width) - (width - 1) / 2).double()
    cx, cy = (weight * x).sum().item(), (weight * y).sum().item()
    xx = (weight * (x - cx).square()).sum().item()
    yy = (weight * (y - cy).square()).sum().item()
    return cx, cy, xx, yy, (weight * (x - cx) * (y - cy)).sum().item()


def blob(height: int = 48, width: int = 64) -> torch.Tensor:
    """A round spot of 4 pixels in the middle of 100 equal images that are not square."""
    y = torch.arange(height)[:, None] - (height - 1) / 2
    x = torch.arange(width) - (width - 1) / 2
    return torch.exp(-(x.square() + y.square()) / 32).expand(100, 1, -1, -1)


def test_shift_moves_by_up_to_its_pixels_along_both_axes():
    images = still(shift=3)(blob(), torch.arange(100), 0)
    centers = torch.tensor([moments(image[0])[:2] for image in images])
    assert centers.abs().max() <= 3.01
    assert (centers.max(dim=0).values > 2.5).all()
    assert (centers.min(dim=0).values < -2.5).all()


def test_scale_changes_the_size_by_its_factors():
    images = still(scale=(0.8, 1.25))(blob(), torch.arange(100), 0)
    factors = torch.tensor([math.sqrt(moments(image[0])[2] / 16) for image in images])
    assert factors.min().item() == pytest.approx(0.8, abs=0.03)
    assert factors.max().item() == pytest.approx(1.25, abs=0.03)


def bar(horizontal: bool) -> torch.Tensor:
    image = torch.zeros(41, 61)
    if horizontal:
        image[19:22, 15:46] = 1
    else:
        image[5:36, 29:32] = 1
    return image.expand(100, 1, -1, -1)


@pytest.mark.parametrize("horizontal", [True, False])
def test_rotation_turns_by_up_to_its_degrees(horizontal):
    images = still(rotation=20)(bar(horizontal), torch.arange(100), 0)
    angles = []
    for image in images:
        _, _, xx, yy, xy = moments(image[0])
        angles.append(math.degrees(0.5 * math.atan2(2 * xy, abs(xx - yy))))
    assert max(angles) == pytest.approx(20, abs=1.5)
    assert min(angles) == pytest.approx(-20, abs=1.5)


def test_shear_leans_vertical_lines_and_leaves_horizontal_ones():
    leaning = still(shear=20)(bar(False), torch.arange(100), 0)
    angles = []
    for image in leaning:
        _, _, _, yy, xy = moments(image[0])
        angles.append(math.degrees(math.atan2(xy, yy)))
    assert max(angles) == pytest.approx(20, abs=1.5)
    assert min(angles) == pytest.approx(-20, abs=1.5)
    for image in still(shear=20)(bar(True), torch.arange(100), 0):
        assert abs(moments(image[0])[4]) < 0.5


def test_rotation_and_shear_together_keep_areas():
    images = still(rotation=30, shear=30)(blob(), torch.arange(100), 0)
    for image in images:
        _, _, xx, yy, xy = moments(image[0])
        assert math.sqrt(xx * yy - xy**2) == pytest.approx(16, rel=0.03)


def test_pixels_in_between_are_interpolated():
    ramp = (torch.arange(32) / 32).expand(50, 1, 32, 32)
    steps = still(shift=3)(ramp, torch.arange(50), 0)[..., 4:28].diff(dim=3)
    torch.testing.assert_close(steps[:, :, 8:24], torch.full((50, 1, 16, 23), 1 / 32))


def test_what_comes_from_outside_is_black():
    images = still(scale=(0.5, 0.5))(torch.ones(3, 1, 16, 16), INDEX[:3], 0)
    assert images[:, :, 0].abs().max() == 0
    assert images[:, :, 8, 8].min() == 1


def test_contrast_scales_the_distance_from_the_mean():
    images = 0.4 + 0.2 * IMAGES
    result = Contrast(0.5, 1.5)(images, INDEX, 0)
    mean = images.mean(dim=(1, 2, 3), keepdim=True)
    ratio = (result - mean) / (images - mean)
    factor = ratio.flatten(1).median(dim=1).values
    assert factor.min().item() == pytest.approx(0.5, abs=0.08)
    assert factor.max().item() == pytest.approx(1.5, abs=0.08)
    torch.testing.assert_close(result, mean + factor[:, None, None, None] * (images - mean))


def test_noise_has_its_standard_deviation_and_is_independent():
    images = torch.full((40, 2, 32, 32), 0.5)
    noise = Noise(0.1)(images, INDEX, 0) - images
    assert noise.std().item() == pytest.approx(0.1, rel=0.02)
    assert noise.mean().item() == pytest.approx(0, abs=0.002)
    pairs = torch.stack((noise[:, 0].flatten(), noise[:, 1].flatten()))
    assert abs(torch.corrcoef(pairs)[0, 1]) < 0.02


def test_crops_are_exact_pieces_of_the_bordered_image_and_all_occur():
    source = torch.arange(1, 26).float().view(1, 1, 5, 5) / 25
    bordered = torch.zeros(7, 7)
    bordered[1:6, 1:6] = source[0, 0]
    pieces = {
        (flip, dy, dx): piece.flip(1) if flip else piece
        for flip in (False, True)
        for dy in range(3)
        for dx in range(3)
        for piece in [bordered[dy : dy + 5, dx : dx + 5]]
    }
    for flip, expected in ((True, 18), (False, 9)):
        crops = CropFlip(1, flip)(source.expand(400, -1, -1, -1), torch.arange(400), 0)
        seen = {
            name for crop in crops for name, piece in pieces.items() if torch.equal(crop[0], piece)
        }
        matched = sum(any(torch.equal(c[0], p) for p in pieces.values()) for c in crops)
        assert matched == 400
        assert len(seen) == expected


def test_composed_steps_of_one_class_draw_differently():
    images = torch.full((4, 1, 16, 16), 0.5)
    once = Noise(0.05)(images, INDEX[:4], 0, 0) - images
    twice = Compose((Noise(0.05), Noise(0.05)))(images, INDEX[:4], 0) - images
    assert twice.std() / once.std() == pytest.approx(math.sqrt(2), rel=0.1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Affine(scale=(1.2, 0.8)), r"scale must be \(low, high\) .* got \(1\.2, 0\.8\)"),
        (lambda: Affine(scale=(0, 1)), "scale must be"),
        (lambda: Affine(shear=90), r"shear must be in \[0, 90\) degrees, got 90"),
        (lambda: Affine(rotation=-1), "rotation must be at least 0, got -1"),
        (lambda: Affine(shift=math.nan), "shift must be at least 0, got nan"),
        (lambda: Contrast(1, 0.5), r"contrast must be .* got \(1, 0\.5\)"),
        (lambda: Noise(-0.1), r"std must be at least 0, got -0\.1"),
        (lambda: CropFlip(-1), "padding must be at least 0, got -1"),
    ],
)
def test_settings_out_of_range_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
