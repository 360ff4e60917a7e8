"""A folder of images with a subfolder for each class, read by worker processes."""

from __future__ import annotations

import os
from pathlib import Path

from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from softlabels.data.batch import DataInfo
from softlabels.data.image_source import ImageSource
from softlabels.data.listing import list_images
from softlabels.data.reading import BadImages
from softlabels.data.transforms import (
    AugmentationName,
    ImageSettings,
    Interpolation,
    default_crop_fraction,
)


class FolderSource(ImageSource):
    """A data source over image files.

    See `ImageSource` for how the files are read.

    Args:
        path: The folder, with `train/` and `val/` (or `valid`, `validation`, `test`) and a
            subfolder for each class in both; or with the classes' subfolders alone.
        image_size: Height and width of the images that are read, pixels.
        workers: Number of processes that read images; 0 reads in this one.
        augmentation: `"random_resized_crop"`: a crop of random size and shape, and a mirror image
            half of the time. `"crop_flip"`: the shorter side is resized to `image_size`, then a
            random crop with a border of an eighth, and the mirror image. `"none"`: as for testing.
        interpolation: How images are resized.
        auto_augment: timm's description of a policy that follows the crop, for example
            `"rand-m9-mstd0.5-inc1"`, or None.
        random_erasing: Probability with which a rectangle is replaced by noise, 0..1.
        crop_fraction: The central part of a test image that is kept, 0..1 of its shorter side; None
            is 0.875 with `"random_resized_crop"` and 1 otherwise.
        mean: Mean of the red, green and blue channel, for images in 0..1.
        std: Standard deviation of the three channels, for images in 0..1.
        validation_fraction: Share of each class that is held out for testing if there is no folder
            of test images.
        bad_images: What to do about a file that cannot be read. `"error"`: stop. `"skip"`:
            warn once; in training read the next good image instead, in testing leave it out.
        max_bad_images: How many different files may be skipped before the run stops after all.
        max_worker_restarts: How many times worker processes that died are replaced by new ones.

    Raises:
        ValueError: If the folder is not as described, or a setting is out of its range.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        image_size: int = 224,
        workers: int = 2,
        augmentation: AugmentationName = "random_resized_crop",
        interpolation: Interpolation = "bilinear",
        auto_augment: str | None = None,
        random_erasing: float = 0.0,
        crop_fraction: float | None = None,
        mean: tuple[float, float, float] = IMAGENET_DEFAULT_MEAN,
        std: tuple[float, float, float] = IMAGENET_DEFAULT_STD,
        validation_fraction: float = 0.1,
        bad_images: BadImages = "error",
        max_bad_images: int = 100,
        max_worker_restarts: int = 3,
    ) -> None:
        if crop_fraction is None:
            crop_fraction = default_crop_fraction(augmentation)
        settings = ImageSettings(
            image_size,
            augmentation,
            interpolation,
            auto_augment,
            random_erasing,
            crop_fraction,
            tuple(mean),
            tuple(std),
        )
        class_names, self._train, test = list_images(path, validation_fraction)
        self._root = Path(path).expanduser()
        info = DataInfo(
            self._root.resolve().name,
            class_names,
            3,
            (image_size, image_size),
            settings.mean,
            settings.std,
            crop_fraction=crop_fraction,
            interpolation=interpolation,
        )
        super().__init__(
            path,
            self._train,
            test,
            info,
            settings,
            workers=workers,
            bad_images=bad_images,
            max_bad_images=max_bad_images,
            max_worker_restarts=max_worker_restarts,
        )

    def _identity(self, index: int) -> str:
        path = self._train.name(index)
        try:
            size = os.path.getsize(path)
        except OSError:  # it vanished: it will be told when it is read
            size = -1
        return f"{Path(path).relative_to(self._root).as_posix()}\0{size}\n"
