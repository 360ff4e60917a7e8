"""WebDataset shards: images and labels in tar files, read by their places in them."""

from __future__ import annotations

import os
import tarfile
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from torch import Tensor

from softlabels.data.decoding import Images, read_rgb
from softlabels.data.image_source import ImageSource
from softlabels.data.listing import TEST_NAMES
from softlabels.data.randomness import permutation
from softlabels.io.files import replace_file

__all__ = ["ShardImages", "ShardSource", "holds_shards"]

_IMAGES = ("jpg", "jpeg", "png", "webp", "bmp", "ppm", "tif", "tiff")
_LABEL = "cls"
_LARGEST_LABEL = 32  # bytes: a class index as text
_LONGEST_LABEL = 6  # digits: nobody has a million classes, and each gets a name
_COLUMNS = ("shard", "offset", "size", "target")
_EXPECTED = "expected WebDataset shards (.tar), with `train` or `val` in their names or folders"


@dataclass(frozen=True)
class ShardImages(Images):
    """Images in tar files, by their places.

    Args:
        shards: The tar files.
        shard: [N] int64, the tar file of each image.
        offset: [N] int64, where its bytes start there.
        size: [N] int64, how many they are.
        targets: [N] int64, class indices.
    """

    shards: tuple[str, ...]
    shard: NDArray[np.int64]
    offset: NDArray[np.int64]
    size: NDArray[np.int64]
    targets: NDArray[np.int64]

    def name(self, index: int) -> str:
        """The shard and the place of an image; see `Images`."""
        return f"{self.shards[self.shard[index]]} at byte {self.offset[index]}"

    def read(self, index: int) -> Tensor:
        """Read an image; see `Images`."""
        size = int(self.size[index])
        with open(self.shards[self.shard[index]], "rb", buffering=0) as file:
            content = os.pread(file.fileno(), size, int(self.offset[index]))
        if len(content) != size:
            raise OSError(f"the shard ends after {len(content)} of the image's {size} bytes")
        return read_rgb(content)


def holds_shards(root: Path) -> bool:
    """Whether a folder, or one of its folders for training and testing, holds tar files."""
    return root.is_dir() and any(_tar_files(root))


def _tar_files(root: Path) -> Iterator[Path]:
    folders = [root, *(f for f in sorted(root.iterdir()) if f.is_dir() and _split_of(f.name))]
    for folder in folders:
        yield from sorted(p for p in folder.glob("*.tar") if not p.name.startswith("."))


def _split_of(name: str) -> str | None:
    words = "".join(c if c.isalpha() else " " for c in name.lower()).split()
    if "train" in words or "training" in words:
        return "train"
    return "test" if any(word in TEST_NAMES for word in words) else None


def _find_shards(root: Path) -> dict[str, list[Path]]:
    if not root.is_dir():
        problem = "is a file" if root.exists() else "does not exist"
        raise ValueError(f"{root} {problem}; {_EXPECTED}")
    found: dict[str, list[Path]] = {"train": [], "test": []}
    for path in _tar_files(root):
        # The folder decides where it says something: train/shard-val-000.tar is for training.
        split = (_split_of(path.parent.name) if path.parent != root else None) or _split_of(
            path.stem
        )
        if split is None:
            raise ValueError(f"{path} is neither for training nor for testing; {_EXPECTED}")
        found[split].append(path)
    for split, shards in found.items():
        if not shards:
            raise ValueError(f"{root} has no shards for {split}ing; {_EXPECTED}")
    return found


def _index_shard(path: Path) -> list[tuple[int, int, int]]:
    """(offset, size, target) of the images of a shard, in their order."""
    places: dict[str, tuple[int, int]] = {}
    targets: dict[str, int] = {}
    try:
        # Without a stream: the contents of the members are stepped over, not read.
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if not member.isfile():
                    continue
                key, _, ending = os.path.basename(member.name).partition(".")
                key = f"{os.path.dirname(member.name)}/{key}"
                ending = ending.lower()
                if ending in _IMAGES:
                    if key in places:
                        raise ValueError(f"the sample {key!r} has two images")
                    places[key] = (member.offset_data, member.size)
                elif ending == _LABEL:
                    targets[key] = _label(tar, member)
    except (tarfile.TarError, OSError, ValueError, EOFError) as error:
        raise ValueError(f"{path} is no readable shard: {error}") from error
    without = [key for key in places if key not in targets]
    if without:
        raise ValueError(
            f"{path}: the sample {without[0]!r} has no .{_LABEL}; expected KEY.jpg (or png, webp, "
            f"...) and KEY.{_LABEL} with its class index as text"
        )
    if not places:
        raise ValueError(f"{path} holds no images ({', '.join(_IMAGES)})")
    size = path.stat().st_size
    for key, (offset, length) in places.items():
        if offset + length > size:
            raise ValueError(f"{path} is cut off: it ends within the sample {key!r}")
    return [(*place, targets[key]) for key, place in places.items()]


def _label(tar: tarfile.TarFile, member: tarfile.TarInfo) -> int:
    file = tar.extractfile(member)
    content = b"" if file is None else file.read(_LARGEST_LABEL + 1)
    text = content.decode("ascii", "replace").strip()
    if len(content) > _LARGEST_LABEL or not text.isdecimal() or len(text) > _LONGEST_LABEL:
        raise ValueError(f"{member.name!r} must hold a class index as text, got {text!r:.50}")
    return int(text)


def _fingerprint(shards: Sequence[Path]) -> str:
    """What tells shards from changed ones without reading them."""
    parts = blake2b(digest_size=16)
    for path in shards:
        status = path.stat()
        parts.update(f"{path.name}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
    return parts.hexdigest()


def _images(shards: Sequence[Path], index_file: Path) -> ShardImages:
    """The images of shards, from the index file if it is of these shards, else from themselves."""
    fingerprint = _fingerprint(shards)
    columns = _read_index(index_file, fingerprint, len(shards))
    if columns is None:
        rows = [(number, *row) for number, path in enumerate(shards) for row in _index_shard(path)]
        table = np.array(rows, dtype=np.int64).reshape(-1, len(_COLUMNS))
        columns = {n: np.ascontiguousarray(table[:, i]) for i, n in enumerate(_COLUMNS)}
        content = save(columns, metadata={"fingerprint": fingerprint})
        try:
            index_file.parent.mkdir(parents=True, exist_ok=True)
            with replace_file(index_file) as file:
                file.write(content)
        except OSError as error:
            warnings.warn(
                f"the index of the shards cannot be written ({error}): each start reads them all; "
                "`index` names a file elsewhere",
                stacklevel=3,
            )
    return ShardImages(tuple(map(str, shards)), *(columns[name] for name in _COLUMNS))


def _read_index(
    path: Path, fingerprint: str, num_shards: int
) -> dict[str, NDArray[np.int64]] | None:
    """The columns of an index file; None if it is of other shards, or damaged."""
    if not path.is_file():
        return None
    try:
        with safe_open(str(path), "numpy") as file:
            if (file.metadata() or {}).get("fingerprint") != fingerprint:
                return None
            columns = {name: file.get_tensor(name) for name in _COLUMNS}
        table = np.stack([*columns.values()])
    except (SafetensorError, OSError, ValueError):
        return None
    fits = (
        table.dtype == np.int64
        and table.ndim == 2
        and table.size > 0
        and table.min() >= 0
        and table[0].max() < num_shards
        and table[3].max() < 10**_LONGEST_LABEL
    )
    return columns if fits else None


def _class_names(root: Path, num_found: int) -> tuple[str, ...]:
    file = root / "classnames.txt"
    if not file.is_file():
        return tuple(str(number) for number in range(num_found))
    lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    names = tuple(line for line in lines if line)
    if len(names) < num_found:
        raise ValueError(
            f"{file} names {len(names)} classes, the shards have class index {num_found - 1}"
        )
    return names


@dataclass(kw_only=True, eq=False)
class ShardSource(ImageSource):
    """A data source over WebDataset shards, for data larger than the memory or a node's disk.

    The path is the folder of the shards: `*train*.tar` and `*val*.tar`, or `train/*.tar` and
    `val/*.tar`; and `classnames.txt` if the classes have names, one a line. A sample is `KEY.jpg`
    (or png, webp, ...) beside `KEY.cls`, its class index as text. The tar files are not unpacked
    and not streamed: an index of all images is made once, by reading the headers, and an image is
    one read at its place. So a step of any epoch can be read alone, on any number of processes and
    workers, and each image is read once in an epoch, by one process.

    Order: the shards are permuted, and the images are permuted within each `shuffle_shards`
    consecutive ones. Reading stays within few shards at a time, which file systems and their
    caches like; with shards that hold sorted classes, take more, up to all for a full shuffle.
    Partners (see `DataSource.train_batches`) are read from all shards.

    The further settings are those of every `ImageSource`.

    Args:
        shuffle_shards: Shards whose images are mixed.
        index: Folder of the index; None: beside the shards, if that can be written to.
    """

    shuffle_shards: int = 16
    index: str | None = None

    def _find(self) -> tuple[tuple[str, ...], ShardImages, ShardImages]:
        if self.shuffle_shards < 1:
            raise ValueError(f"shuffle_shards must be above 0, got {self.shuffle_shards}")
        root = self._root
        index_folder = root if self.index is None else Path(self.index).expanduser()
        images = {
            split: _images(shards, index_folder / f"softlabels-{split}.safetensors")
            for split, shards in _find_shards(root).items()
        }
        num_found = max(int(part.targets.max()) for part in images.values()) + 1
        class_names = _class_names(root, num_found)
        if len(class_names) < 2:
            raise ValueError(f"{root} has one class only; expected two or more")
        self._train = images["train"]
        return class_names, self._train, images["test"]

    def _identity(self, index: int) -> str:
        images = self._train
        name = os.path.basename(images.shards[images.shard[index]])
        return f"{name}\0{images.offset[index]}\0{images.size[index]}\n"

    def _order(self, seed: int, epoch: int) -> Tensor:
        """Shards permuted, then the images within blocks of them."""
        num_shards = len(self._train.shards)
        place = np.empty(num_shards, dtype=np.int64)
        place[permutation(seed, epoch, num_shards).numpy()] = np.arange(num_shards)
        block = place[self._train.shard[self._rows]] // self.shuffle_shards
        shuffled = permutation(seed, epoch, self.num_train).numpy()
        by_block = np.argsort(block[shuffled], kind="stable")
        return torch.from_numpy(shuffled[by_block])
