"""The embedded data set: 100 accented Latin letters in 319 open fonts, 32 x 32, gray.

It is rendered text, not natural images. Five letters that differ by their accent alone make a
group, so the order of the wrong classes carries information, as in CIFAR-100.
"""

from __future__ import annotations

from functools import cache
from importlib.resources import as_file, files

import numpy as np

from softlabels.data.augment import Affine, Compose, Contrast, Noise
from softlabels.data.batch import DataInfo
from softlabels.data.memory import InMemorySource, Split, channel_statistics
from softlabels.data.randomness import permutation

# Part of the data set's definition: the fonts that `num_fonts` takes and the test images are the
# same for everybody.
_FONT_ORDER_SEED = 100
_TEST_SEED = 319
_TEST_AUGMENTATION = Compose((Affine(15, (0.8, 1.2), 10, 3), Contrast(0.3, 1), Noise(0.18)))


@cache
def _load() -> tuple[Split, Split, DataInfo]:
    """Read the file that is shipped with the package and draw the test images.

    Returns:
        The training split with the fonts in their fixed random order, all 100 classes of a font
        side by side; the test split; the facts.
    """
    with as_file(files("softlabels.data") / "glyphs100.npz") as path, np.load(path) as archive:
        images, is_test = archive["images"], archive["is_test"]
        characters, groups = archive["characters"].tolist(), archive["groups"].tolist()
    train_fonts = images[~is_test]
    order = permutation(_FONT_ORDER_SEED, 0, len(train_fonts)).numpy()
    train, test = (_split(fonts) for fonts in (train_fonts[order], images[is_test]))
    mean, std = channel_statistics(train.images)
    info = DataInfo("glyphs100", tuple(characters), 1, (32, 32), mean, std, tuple(groups))
    return train, test.augmented(_TEST_AUGMENTATION, _TEST_SEED), info


def _split(fonts: np.ndarray) -> Split:
    """Bring images [fonts, classes, H, W] into a split."""
    num_fonts, num_classes, height, width = fonts.shape
    target = np.tile(np.arange(num_classes), num_fonts)
    return Split.from_arrays(fonts.reshape(-1, height, width), target)


def glyphs100(
    *,
    num_fonts: int | None = None,
    rotation: float = 15.0,
    scale: tuple[float, float] = (0.8, 1.2),
    shear: float = 10.0,
    shift: float = 3.0,
    contrast: tuple[float, float] = (0.3, 1.0),
    noise_std: float = 0.18,
) -> InMemorySource:
    """Open the embedded data set of 100 accented letters.

    The split is by font family: 239 fonts for training (23,900 images), 80 for testing (8,000). A
    training image is drawn anew in every epoch. The test images are one fixed draw with the default
    settings, the same for everybody and whatever the settings.

    Args:
        num_fonts: Train on the first fonts of a fixed random order only, 1..239; None takes all.
        rotation: Largest rotation either way, degrees.
        scale: (low, high) factor of the size.
        shear: Largest shear either way, degrees.
        shift: Largest shift either way along each axis, pixels.
        contrast: (low, high) factor of the contrast.
        noise_std: Standard deviation of the pixels' noise, for images in 0..1.

    Returns:
        The data source. Images are normalised by the mean and std of all training fonts.

    Raises:
        ValueError: If a setting is out of its range.
    """
    train, test, info = _load()
    available = len(train.target) // info.num_classes
    if num_fonts is None:
        num_fonts = available
    if not 1 <= num_fonts <= available:
        raise ValueError(f"num_fonts must be in 1..{available}, got {num_fonts}")
    count = num_fonts * info.num_classes
    augmentation = Compose(
        (Affine(rotation, scale, shear, shift), Contrast(*contrast), Noise(noise_std))
    )
    return InMemorySource(
        Split(train.images[:count], train.target[:count]), test, info, augmentation=augmentation
    )
