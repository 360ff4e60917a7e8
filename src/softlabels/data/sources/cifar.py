"""CIFAR-10 and CIFAR-100, from torchvision's files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from filelock import FileLock
from torchvision.datasets import CIFAR10, CIFAR100

from softlabels.data.augment import CropFlip
from softlabels.data.batch import DataInfo
from softlabels.data.in_memory import InMemorySource, Split, channel_statistics

# The 20 superclasses, each with its five classes.
_SUPERCLASSES = """
beaver dolphin otter seal whale
aquarium_fish flatfish ray shark trout
orchid poppy rose sunflower tulip
bottle bowl can cup plate
apple mushroom orange pear sweet_pepper
clock keyboard lamp telephone television
bed chair couch table wardrobe
bee beetle butterfly caterpillar cockroach
bear leopard lion tiger wolf
bridge castle house road skyscraper
cloud forest mountain plain sea
camel cattle chimpanzee elephant kangaroo
fox porcupine possum raccoon skunk
crab lobster snail spider worm
baby boy girl man woman
crocodile dinosaur lizard snake turtle
hamster mouse rabbit shrew squirrel
maple_tree oak_tree palm_tree pine_tree willow_tree
bicycle bus motorcycle pickup_truck train
lawn_mower rocket streetcar tank tractor
"""
_GROUPS = {
    name: group
    for group, names in enumerate(_SUPERCLASSES.strip().splitlines())
    for name in names.split()
}


def holds_cifar(root: Path, data: type[CIFAR10]) -> bool:
    """Whether a folder is, or has, that of a data set, by the name that the archive gives to it."""
    folder: Path = _root(root, data) / data.base_folder
    return folder.is_dir()


def _root(path: str | Path, data: type[CIFAR10]) -> Path:
    """The folder that has the data set's own in it, whichever of the two the path is."""
    folder = Path(path).expanduser()
    return folder.parent if folder.name == data.base_folder else folder


def _download(root: Path, data: type[CIFAR10]) -> None:
    """Fetch the files unless they are there; of processes that start together, one does."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / f".{data.filename}.lock"):
            data(root, train=False, download=True)
    except (RuntimeError, OSError) as error:
        raise ValueError(f"{data.filename} cannot be downloaded to {root}: {error}") from error


def _read(root: Path, data: type[CIFAR10]) -> tuple[CIFAR10, CIFAR10]:
    """Both splits. The files are pickles: torchvision compares their digests before it reads."""
    try:
        return data(root, train=True), data(root, train=False)
    except (RuntimeError, OSError) as error:
        files = [data.meta["filename"], *(name for name, _ in data.train_list + data.test_list)]
        raise ValueError(
            f"{root / data.base_folder} is no {data.__name__} in Python's format: expected the "
            f"files {', '.join(files)} of {data.filename}, with their published digests; "
            "download=True fetches them"
        ) from error


class _CIFARSource(InMemorySource):
    """A CIFAR data set in memory.

    Args:
        path: The folder that has that of the archive in it, or that folder itself.
        mean: Mean of the red, green and blue channel, for images in 0..1; None: of the training
            images.
        std: Standard deviation of the three channels, likewise.
        padding: Training images are shifted at random by up to this much along each axis, pixels.
        flip: Whether half of the training images are mirrored.
        download: Whether to fetch the files if they are not there.

    Raises:
        ValueError: If files are missing or not the published ones, or cannot be downloaded; or a
            setting is out of its range.
    """

    _data: type[CIFAR10]

    def __init__(
        self,
        path: str | Path,
        *,
        mean: tuple[float, float, float] | None = None,
        std: tuple[float, float, float] | None = None,
        padding: int = 4,
        flip: bool = True,
        download: bool = False,
    ) -> None:
        root = _root(path, self._data)
        if download:
            _download(root, self._data)
        parts = _read(root, self._data)
        train, test = (Split.from_arrays(part.data, np.array(part.targets)) for part in parts)
        names = tuple(parts[0].classes)
        own_mean, own_std = channel_statistics(train.images)
        groups = tuple(_GROUPS[name] for name in names if name in _GROUPS)
        info = DataInfo(
            self._data.__name__.lower(),
            names,
            3,
            (32, 32),
            own_mean if mean is None else tuple(mean),
            own_std if std is None else tuple(std),
            groups if len(groups) == len(names) else None,
        )
        found = {"mean": info.mean, "std": info.std}
        super().__init__(train, test, info, augmentation=CropFlip(padding, flip), found=found)


class CIFAR10Source(_CIFARSource):
    """CIFAR-10: 50,000 training and 10,000 test images of 10 classes, 32 x 32."""

    _data = CIFAR10


class CIFAR100Source(_CIFARSource):
    """CIFAR-100: 50,000 training and 10,000 test images of 100 classes, 32 x 32.

    Its 20 superclasses are the groups of similar classes.
    """

    _data = CIFAR100
