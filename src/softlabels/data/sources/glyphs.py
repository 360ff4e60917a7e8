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
from softlabels.data.in_memory import InMemorySource, Split, channel_statistics
from softlabels.data.randomness import permutation
from softlabels.data.split import check_shares, part_of

# Part of the data set's definition: the fonts that `num_fonts` takes and the test images are the
# same for everybody.
_FONT_ORDER_SEED = 100
_TEST_SEED = 319
_VALIDATION_SEED = 239
_TEST_AUGMENTATION = Compose((Affine(15, (0.8, 1.2), 10, 3), Contrast(0.3, 1), Noise(0.18)))


@cache
def _load() -> tuple[Split, Split, DataInfo]:
    """Read the file that is shipped with the package and draw the test images.

    The training split has the fonts in their fixed random order, all 100 classes of a font side by
    side.
    """
    with (
        as_file(files("softlabels.data.sources") / "glyphs100.npz") as path,
        np.load(path) as archive,
    ):
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


class GlyphSource(InMemorySource):
    """The embedded data set of 100 accented letters, whose unit is the font: it is split by fonts.

    There are 239 fonts for training (23,900 images), 80 for testing (8,000). A training image is
    drawn anew in every epoch. The test images are one fixed draw with the default settings, the
    same for everybody and whatever the settings. Images are normalized by the mean and std of all
    training fonts.

    Args:
        num_fonts: Train on the first fonts of a fixed random order only, 1..239; None takes all.
        rotation: Largest rotation either way, degrees.
        scale: (low, high) factor of the size.
        shear: Largest shear either way, degrees.
        shift: Largest shift either way along each axis, pixels.
        contrast: (low, high) factor of the contrast.
        noise_std: Standard deviation of the pixels' noise, for images in 0..1.

    Raises:
        ValueError: If a setting is out of its range.
    """

    def __init__(
        self,
        *,
        num_fonts: int | None = None,
        rotation: float = 15.0,
        scale: tuple[float, float] = (0.8, 1.2),
        shear: float = 10.0,
        shift: float = 3.0,
        contrast: tuple[float, float] = (0.3, 1.0),
        noise_std: float = 0.18,
    ) -> None:
        self._fonts, test, self._info = _load()
        self._num_fonts = num_fonts
        train = self._some_fonts(0, self._chosen(self._all_fonts))
        steps = (Affine(rotation, scale, shear, shift), Contrast(*contrast), Noise(noise_std))
        super().__init__(train, test, self._info, augmentation=Compose(steps))

    @property
    def _all_fonts(self) -> int:
        return len(self._fonts.target) // self._info.num_classes

    def _some_fonts(self, first: int, end: int) -> Split:
        """The fonts from one to before another."""
        rows = slice(first * self._info.num_classes, end * self._info.num_classes)
        return Split(self._fonts.images[rows], self._fonts.target[rows])

    def _chosen(self, available: int, beside: str = "") -> int:
        """How many fonts are trained on, of so many."""
        count = available if self._num_fonts is None else self._num_fonts
        if not 1 <= count <= available:
            raise ValueError(f"num_fonts must be in 1..{available}{beside}, got {count}")
        return count

    def split(
        self, *, validation: float | None = None, train_share: float | None = None
    ) -> InMemorySource:
        """Hold out the last fonts of all; see `DataSource`.

        They are one fixed draw of the test's augmentation, whatever the settings. The fonts that
        are trained on count from the front, and never reach the ones that are held out.

        Args:
            validation: Share of all 239 fonts.
            train_share: Share of the fonts that would be trained on else.

        Raises:
            ValueError: If a share is out of its range, or fewer fonts than `num_fonts` are left.
        """
        check_shares(validation, train_share)
        available, test, beside = self._all_fonts, self._test, ""
        if validation is not None:
            held_out = part_of(available, validation)
            available -= held_out
            beside = f" beside {held_out} fonts that are held out"
            fonts = self._some_fonts(available, self._all_fonts)
            test = fonts.augmented(_TEST_AUGMENTATION, _VALIDATION_SEED)
        train = self._some_fonts(0, part_of(self._chosen(available, beside), train_share))
        return InMemorySource(train, test, self._info, augmentation=self._augmentation)
