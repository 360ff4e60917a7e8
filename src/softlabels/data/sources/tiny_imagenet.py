"""TinyImageNet: 200 classes of 64 x 64 pixels, with validation labels in a text file."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from softlabels.data.listing import (
    ImageList,
    check_classes_have_images,
    check_same_classes,
    images_below,
    list_classes,
    list_folders,
)
from softlabels.data.sources.folder import FileSource

_ANNOTATIONS = "val_annotations.txt"


def holds_tiny_imagenet(root: Path) -> bool:
    """Whether a folder has TinyImageNet's list of classes beside a `train/` and a `val/`."""
    is_there = (root / "wnids.txt").is_file() or (root / "val" / _ANNOTATIONS).is_file()
    return is_there and (root / "train").is_dir() and (root / "val").is_dir()


@dataclass(kw_only=True, eq=False)
class TinyImageNetSource(FileSource):
    """A data source over TinyImageNet as it is unpacked.

    Below the path are `train/WNID/images/*.JPEG`, `val/images/*.JPEG` with
    `val/val_annotations.txt` (or, sorted by somebody, `val/WNID/`), and, if they were kept,
    `wnids.txt` and `words.txt`. The classes are in the sorted order of their WNIDs, which is not
    that of `wnids.txt`; they are named by `words.txt`, or else by their WNIDs. The further settings
    are those of every `ImageSource`.

    Args:
        image_size: Height and width of the images that are read, pixels. Published runs of Zipf's
            label smoothing have 32.
        crop_fraction: The central part of a test image that is kept, 0..1 of its shorter side.
    """

    image_size: int | None = 64
    crop_fraction: float | None = 1.0

    def _find(self) -> tuple[tuple[str, ...], ImageList, ImageList]:
        train, val = self._root / "train", self._root / "val"
        if (val / "images").is_dir():
            wnids, training = list_classes(train)
            test = ImageList.from_samples(_read_annotations(val, wnids))
            check_classes_have_images(wnids, test.targets, val / _ANNOTATIONS)
        else:
            wnids, training, test = list_folders(train, val)
        listed = self._root / "wnids.txt"
        if listed.is_file():
            names = tuple(sorted(listed.read_text(encoding="utf-8", errors="replace").split()))
            check_same_classes(wnids, train, names, listed)
        return _names(self._root / "words.txt", wnids), training, test


def _read_annotations(val: Path, wnids: tuple[str, ...]) -> list[tuple[str, int]]:
    """(path, class index) of each image of `val/images`, in the order of the annotations."""
    file = val / _ANNOTATIONS
    if not file.is_file():
        raise ValueError(f"{file} is missing; expected it beside images/, or {val.name}/WNID/")
    index_of = {wnid: index for index, wnid in enumerate(wnids)}
    paths = {Path(path).name: path for path in images_below(val / "images")}
    samples: list[tuple[str, int]] = []
    for number, line in enumerate(
        file.read_text(encoding="utf-8", errors="replace").splitlines(), 1
    ):
        name, wnid, *_ = (*line.split("\t"), "")
        if wnid not in index_of:
            raise ValueError(
                f"{file} line {number} has the class {wnid!r:.40}, which has no folder in train/; "
                "expected FILE, a tab and a WNID"
            )
        if name not in paths:
            raise ValueError(
                f"{file} line {number} names {name!r:.80}; expected an image in {val.name}/images "
                "that no line before it names"
            )
        samples.append((paths.pop(name), index_of[wnid]))
    if paths:
        raise ValueError(f"{file} has no line for {min(paths)!r} and {len(paths) - 1} more images")
    return samples


def _names(file: Path, wnids: tuple[str, ...]) -> tuple[str, ...]:
    """The words for each class; its WNID too where the words are those of another, or missing."""
    if not file.is_file():
        return wnids
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    words = dict(line.split("\t", 1) for line in lines if "\t" in line)
    names = [words.get(wnid, "").strip() for wnid in wnids]
    uses = Counter(names)
    return tuple(
        name if name and uses[name] == 1 else f"{name} {wnid}".strip()
        for name, wnid in zip(names, wnids, strict=True)
    )
