"""CIFAR-10 and CIFAR-100: torchvision's files, the hub's Parquet files, or folders of images."""

from __future__ import annotations

from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from torchvision.datasets import CIFAR10, CIFAR100

from softlabels.data.augment import CropFlip
from softlabels.data.batch import DataInfo
from softlabels.data.image_source import ImageSource
from softlabels.data.in_memory import InMemorySource, Split, channel_statistics
from softlabels.data.loading import CannotLoadError, load_images
from softlabels.data.sources.folder import FolderSource
from softlabels.data.sources.hugging_face import HuggingFaceSource, holds_hugging_face

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
_CIFAR10 = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)  # fmt: skip
_SIDE = 32  # pixels
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


def _in_order(split: Split) -> Split:
    """The images in an order of their own, so that the form in which they came changes nothing."""
    pairs = zip(split.images.numpy(), split.target.tolist(), strict=True)
    digests = [
        blake2b(bytes(image) + bytes([label]), digest_size=8).digest() for image, label in pairs
    ]
    return split.some(torch.tensor(sorted(range(len(digests)), key=digests.__getitem__)))


def _published_names(data: type[CIFAR10]) -> tuple[str, ...]:
    """The names of the classes, in the order of the published labels, which is the alphabet's."""
    return tuple(sorted(_GROUPS)) if data is CIFAR100 else _CIFAR10


def _read_files(root: Path, data: type[CIFAR10]) -> tuple[tuple[str, ...], list[Split]]:
    """Names of the classes and both splits, from Parquet files or from class folders.

    Raises:
        ValueError: There are neither, or other columns, classes or sizes of images in them.
    """
    settings: dict[str, Any] = {"image_size": _SIDE, "workers": 0, "in_memory": False}
    source: ImageSource
    if holds_hugging_face(root):
        column = "fine_label" if data is CIFAR100 else "label"
        source = HuggingFaceSource(root, label_column=column, **settings)
    else:
        source = FolderSource(root, **settings)
    names, published = source.info.class_names, _published_names(data)
    if names == tuple(map(str, range(len(published)))):
        names = tuple(published[int(number)] for number in names)
    if {*names} != {*published} or len(names) != len(published):
        other = sorted({*names} ^ {*published})[0]
        raise ValueError(
            f"{root} has {len(names)} classes, which are not the {len(published)} of "
            f"{data.__name__}: {other!r:.80} is in one of them alone"
        )
    label = torch.tensor([published.index(name) for name in names])
    splits = []
    for title, images in source.images.items():
        try:
            split = load_images(images, None, (_SIDE, _SIDE), title=f"{title} images")
        except CannotLoadError as error:
            raise ValueError(f"{root} is no {data.__name__}: {error}") from error
        splits.append(Split(split.images, label[split.target]))
    return published, splits


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
        path: The folder that has that of the archive in it, or that folder itself; or one with
            Parquet files (`train*.parquet`, `test*.parquet`) in the columns of the public copies;
            or one with `train/` and `test/` (or `val/`), both with a folder for each class.
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
        if holds_hugging_face(root) or (root / "train").is_dir():
            names, splits = _read_files(root, self._data)
        else:
            parts = _read(root, self._data)
            names = tuple(parts[0].classes)
            splits = [Split.from_arrays(part.data, np.array(part.targets)) for part in parts]
        train, test = map(_in_order, splits)
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
