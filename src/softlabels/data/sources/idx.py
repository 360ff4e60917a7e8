"""MNIST and everything that comes in its file format, such as Fashion-MNIST and EMNIST."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from softlabels.data.augment import CropFlip
from softlabels.data.batch import DataInfo
from softlabels.data.in_memory import InMemorySource, Split, channel_statistics

ClassNames = Literal["auto", "digits", "fashion_mnist"]

_FASHION_MNIST = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
_UNSIGNED_BYTE = 8


def read_idx(path: str | Path, num_dimensions: int) -> NDArray[np.uint8]:
    """Read one idx file of unsigned bytes.

    Args:
        path: The file; it is unpacked first if its name ends with `.gz`.
        num_dimensions: Number of dimensions that it must have: 3 for images, 1 for labels.

    Raises:
        ValueError: If the file is damaged or holds something else; the message names it.
    """
    path = Path(path)
    content = path.read_bytes()
    if path.suffix == ".gz":
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{path} cannot be unpacked: {error}; expected gzip") from error
    expected = bytes((0, 0, _UNSIGNED_BYTE, num_dimensions))
    if content[:4] != expected:
        raise ValueError(
            f"{path} starts with the bytes {content[:4].hex(' ') or '(none)'};"
            f" expected {expected.hex(' ')}, an idx file of unsigned bytes with"
            f" {num_dimensions} dimension(s)"
        )
    header = 4 + 4 * num_dimensions
    if len(content) < header:
        raise ValueError(f"{path} has {len(content)} bytes; expected a header of {header}")
    shape = np.frombuffer(content, ">u4", count=num_dimensions, offset=4).astype(int)
    if len(content) - header != shape.prod():
        raise ValueError(
            f"{path} has {len(content) - header} bytes of data;"
            f" expected {shape.prod()} for its shape {tuple(shape.tolist())}"
        )
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


def _find(folder: Path, part: str, kind: str) -> Path | None:
    """The file of a part ("train" or "t10k") and kind ("images-idx3" or "labels-idx1"), if any."""
    plain = f"{part}-{kind}-ubyte"
    # Some archives were packed with a dot instead of the second hyphen.
    names = (plain, plain.replace("-idx", ".idx"))
    candidates = (folder / (name + end) for name in names for end in ("", ".gz"))
    return next((path for path in candidates if path.is_file()), None)


def holds_idx(root: Path) -> bool:
    """Whether a folder holds training images, such as `train-images-idx3-ubyte.gz`."""
    return _find(root, "train", "images-idx3") is not None


def _read_split(folder: Path, part: str) -> Split:
    """Read the images and labels of "train" or "t10k"."""
    paths = []
    for kind in ("images-idx3", "labels-idx1"):
        path = _find(folder, part, kind)
        if path is None:
            raise ValueError(f"{folder} has no file {part}-{kind}-ubyte, plain or .gz")
        paths.append(path)
    images, labels = read_idx(paths[0], 3), read_idx(paths[1], 1)
    if len(images) != len(labels):
        raise ValueError(
            f"{paths[1]} has {len(labels)} labels;"
            f" expected {len(images)}, as many as there are images in {paths[0]}"
        )
    if not images.size:
        raise ValueError(f"{paths[0]} has the shape {images.shape}; expected images")
    return Split.from_arrays(images, labels)


def idx(
    path: str | Path,
    *,
    class_names: ClassNames = "auto",
    padding: int = 2,
    flip: bool | None = None,
) -> InMemorySource:
    """Open a folder with the four idx files of MNIST or of a data set in its format.

    Args:
        path: The folder with `train-images-idx3-ubyte`, `train-labels-idx1-ubyte` and the two
            `t10k-` files, each plain or with `.gz`.
        class_names: `"fashion_mnist"`: the names of its ten classes. `"digits"`: 0, 1, 2 and so
            on. `"auto"`: the first if the folder's name holds the word fashion.
        padding: Training images are shifted at random by up to this much along each axis, pixels.
        flip: Whether half of the training images are mirrored; None does so for Fashion-MNIST.

    Returns:
        The data source. Images are normalized by the mean and std of the training images.

    Raises:
        ValueError: If a file is missing or damaged, or files do not fit each other.
    """
    folder = Path(path).expanduser().resolve()
    if class_names not in get_args(ClassNames):
        raise ValueError(
            f"class_names must be one of {', '.join(get_args(ClassNames))}, got {class_names!r}"
        )
    train, test = _read_split(folder, "train"), _read_split(folder, "t10k")
    if class_names == "auto":
        class_names = "fashion_mnist" if "fashion" in folder.name.lower() else "digits"
    is_fashion = class_names == "fashion_mnist"
    num_classes = int(max(train.target.max(), test.target.max())) + 1
    names = _FASHION_MNIST if is_fashion else tuple(str(i) for i in range(num_classes))
    mean, std = channel_statistics(train.images)
    height, width = train.images.shape[-2:]
    info = DataInfo(folder.name, names, 1, (height, width), mean, std)
    flip = is_fashion if flip is None else flip
    found = {"class_names": class_names, "flip": flip}
    return InMemorySource(train, test, info, augmentation=CropFlip(padding, flip), found=found)
