"""Which images a folder holds, their classes, and which of them are for testing."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torchvision.datasets.folder import is_image_file

from softlabels.data.decoding import Images, read_rgb
from softlabels.data.randomness import derive_seed
from softlabels.data.split import part_of

TEST_NAMES = ("val", "valid", "validation", "test")
_MOST_NAMES = 10  # in a message
_EXPECTED = (
    "expected a folder with one subfolder of images for each class, or such in train/ and val/"
)


@dataclass(frozen=True)
class ImageList(Images):
    """Files with their classes.

    Held in arrays, not lists, so that worker processes share their memory.

    Args:
        paths: [N] the files' names as bytes.
        targets: [N] int64, class indices.
    """

    paths: NDArray[np.bytes_]
    targets: NDArray[np.int64]

    @classmethod
    def from_samples(cls, samples: Sequence[tuple[str, int]]) -> ImageList:
        """Build a list from (path, class index) of each image."""
        paths = np.array([os.fsencode(path) for path, _ in samples], dtype=np.bytes_)
        return cls(paths, np.array([target for _, target in samples], dtype=np.int64))

    def name(self, index: int) -> str:
        """The path of an image's file; see `Images`."""
        return os.fsdecode(bytes(self.paths[index]))

    def read(self, index: int) -> Tensor:
        """Read an image; see `Images`."""
        return read_rgb(self.name(index))


def list_images(
    path: str | Path, validation_fraction: float
) -> tuple[tuple[str, ...], ImageList, ImageList]:
    """Find the images of a folder and split them.

    Args:
        path: A folder with `train/` and one of `val/`, `valid/`, `validation/` or `test/`
            (taken in this order), each with a subfolder for each class; or the subfolders of the
            classes alone. Hidden files and folders are left out.
        validation_fraction: Share of each class that is held out for testing where no folder says
            which images are, 0 < fraction < 1. Which ones depends on the files' names alone.

    Returns:
        The names of the classes, sorted as text; the training images; the test images.

    Raises:
        ValueError: If the path is no folder, or holds no images, or fewer than two classes, or
            a class without images, or other classes in the test folder; if the fraction is out of
            its range.
    """
    root = Path(path).expanduser()
    if not 0 < validation_fraction < 1:
        raise ValueError(f"validation_fraction must be between 0 and 1, got {validation_fraction}")
    if not root.is_dir():
        problem = "is a file" if root.exists() else "does not exist"
        raise ValueError(f"{root} {problem}; {_EXPECTED}")
    folders = {folder.name.lower(): folder for folder in subfolders(root)}
    test_folder = next((folders[name] for name in TEST_NAMES if name in folders), None)
    if "train" not in folders and test_folder is not None and folders.keys() <= {*TEST_NAMES}:
        raise ValueError(f"{root} has {test_folder.name}/ but no train/; {_EXPECTED}")

    train_folder = folders.get("train", root)
    if "train" in folders and test_folder is not None:
        return list_folders(train_folder, test_folder)
    class_names, images = list_classes(train_folder)
    return class_names, *_hold_out(images, train_folder, validation_fraction)


def list_folders(
    train_folder: Path, test_folder: Path
) -> tuple[tuple[str, ...], ImageList, ImageList]:
    """Find the images of a folder for training and of one for testing, as `list_images` does.

    Raises:
        ValueError: If a folder does not exist or has another shape, or the classes differ.
    """
    class_names, train = list_classes(train_folder)
    test_names, test = list_classes(test_folder)
    check_same_classes(class_names, train_folder, test_names, test_folder)
    return class_names, train, test


def check_same_classes(
    train_names: tuple[str, ...], train_place: Path, test_names: tuple[str, ...], test_place: Path
) -> None:
    """Raise unless training and testing, found at these places, have the same classes.

    Raises:
        ValueError: If they differ.
    """
    if test_names != train_names:
        differences = (
            f"only in {train_place}: {_some({*train_names} - {*test_names})}",
            f"only in {test_place}: {_some({*test_names} - {*train_names})}",
        )
        raise ValueError(f"the classes for training and testing differ; {'; '.join(differences)}")


def check_targets(names: tuple[str, ...], targets: NDArray[np.int64], place: Path | str) -> None:
    """Raise unless every class index, [N], is one of the classes; `place` is what lists the images.

    Raises:
        ValueError: If one is not.
    """
    wrong = targets[(targets < 0) | (targets >= len(names))]
    if len(wrong):
        raise ValueError(f"{place} has the label {wrong[0]}; expected one of 0..{len(names) - 1}")


def check_classes_have_images(
    names: tuple[str, ...], targets: NDArray[np.int64], place: Path | str
) -> None:
    """Raise unless there are two classes or more, and an image of each; see `check_targets`.

    Raises:
        ValueError: If there is one class or none, a class index is none of them, or a class has
            no image.
    """
    if len(names) < 2:
        raise ValueError(f"{place} has {len(names)} class(es), {_some(names)}; expected 2 or more")
    check_targets(names, targets, place)
    empty = np.flatnonzero(np.bincount(targets, minlength=len(names)) == 0)
    if len(empty):
        raise ValueError(f"{place} has no image of {_some(names[index] for index in empty)}")


def _some(names: Iterable[str]) -> str:
    """The first few names, sorted, and how many more there are."""
    ordered = sorted(names)
    rest = len(ordered) - _MOST_NAMES
    return f"{ordered[:_MOST_NAMES]}" + (f" and {rest} more" if rest > 0 else "")


def subfolders(folder: Path) -> list[Path]:
    """The visible subfolders of a folder, sorted by name."""
    hidden = (".", "__MACOSX")
    return sorted(x for x in folder.iterdir() if x.is_dir() and not x.name.startswith(hidden))


def _is_visible_image(path: str) -> bool:
    return is_image_file(path) and not os.path.basename(path).startswith(".")


def images_below(folder: Path) -> list[str]:
    """The visible images of a folder and its subfolders, each folder sorted by name.

    A folder is entered once: links that lead back into it would lead round for ever.

    Raises:
        ValueError: If it does not exist.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder; expected images in it")
    entered = {_identity(folder)}
    found: list[tuple[str, list[str]]] = []
    for root, subfolders, names in os.walk(folder, followlinks=True):
        new = []
        for name in sorted(subfolders):
            identity = _identity(os.path.join(root, name))
            if identity not in entered:
                entered.add(identity)
                new.append(name)
        subfolders[:] = new
        found.append((root, sorted(names)))
    paths = (os.path.join(root, name) for root, names in sorted(found) for name in names)
    return [path for path in paths if _is_visible_image(path)]


def _identity(folder: str | Path) -> tuple[int, int]:
    """What a folder has in common with all links to it."""
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def list_classes(folder: Path) -> tuple[tuple[str, ...], ImageList]:
    """List a folder that has a subfolder of images for each class.

    Returns:
        The names of the classes, sorted as text; the images.

    Raises:
        ValueError: If it does not exist, or has another shape, fewer than two classes, or a class
            without images.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder; {_EXPECTED}")
    names = tuple(subfolder.name for subfolder in subfolders(folder))
    if not names:
        raise ValueError(f"{folder} has no subfolders; {_EXPECTED}")
    images = ImageList.from_samples(
        [(path, index) for index, name in enumerate(names) for path in images_below(folder / name)]
    )
    if not len(images):
        raise ValueError(f"{folder} holds no images in its {len(names)} subfolders; {_EXPECTED}")
    check_classes_have_images(names, images.targets, folder)
    return names, images


def _hold_out(images: ImageList, folder: Path, fraction: float) -> tuple[ImageList, ImageList]:
    """Split off a share of every class, by a hash of the files' names."""
    paths = [Path(images.name(row)).relative_to(folder) for row in range(len(images))]
    hashes = np.array([derive_seed("held out", path.as_posix()) for path in paths])
    by_class = np.lexsort((hashes, images.targets))
    held_out = np.zeros(len(images), dtype=bool)
    for members in np.split(by_class, np.cumsum(np.bincount(images.targets))[:-1]):
        # At least one, but never the last image of a class.
        held_out[members[: min(part_of(len(members), fraction), len(members) - 1)]] = True
    if not held_out.any():
        raise ValueError(f"{folder} has one image a class; none can be held out for testing")
    train, test = (
        ImageList(images.paths[rows], images.targets[rows]) for rows in (~held_out, held_out)
    )
    return train, test
