"""iNaturalist 2021: 10,000 species, in folders or with the lists of the competition."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ValidationError

from softlabels.data.listing import (
    ImageList,
    check_classes_have_images,
    check_same_classes,
    images_below,
    list_folders,
)
from softlabels.data.sources.folder import FileSource
from softlabels.io.records import problem_of

_TRAIN: Sequence[Literal["train_mini", "train"]] = ("train_mini", "train")
_VAL = "val"


class _Image(BaseModel):
    id: int
    file_name: str


class _Annotation(BaseModel):
    image_id: int
    category_id: int


class _Category(BaseModel):
    id: int
    name: str


class _Annotations(BaseModel):
    """The parts of a list that are read; there are more."""

    images: list[_Image]
    annotations: list[_Annotation]
    categories: list[_Category]


def holds_inat21(root: Path) -> bool:
    """Whether a folder has iNat21's `train_mini/` and `val/`."""
    return (root / _TRAIN[0]).is_dir() and (root / _VAL).is_dir()


@dataclass(kw_only=True, eq=False)
class INat21Source(FileSource):
    """A data source over iNaturalist 2021.

    Below the path are `train_mini/` (or `train/`) and `val/`, each with a subfolder for each
    species; and, if they were kept, the lists `train_mini.json` (or `train.json`) and `val.json`.
    With both lists, they say which images there are and the names of the species, in the order
    of their category ids; without them the folders do, in sorted order, which is the same. Parts of
    the data may be left out. The further settings are those of every `ImageSource`.

    Args:
        train_split: The training images, `"train_mini"` (50 a species) or `"train"`; None takes the
            first of the two that is there.
    """

    image_size: int | None = 224
    train_split: Literal["train_mini", "train"] | None = None

    def _find(self) -> tuple[tuple[str, ...], ImageList, ImageList]:
        if self.train_split not in (None, *_TRAIN):
            raise ValueError(
                f"train_split must be one of {', '.join(_TRAIN)}, got {self.train_split!r}"
            )
        there = [name for name in _TRAIN if (self._root / name).is_dir()]
        self.train_split = self.train_split or (there or _TRAIN)[0]
        splits = (self.train_split, _VAL)
        lists = [self._root / f"{split}.json" for split in splits]
        missing = [file for file in lists if not file.is_file()]
        if len(missing) == 1:
            raise ValueError(f"{missing[0]} is missing; expected the lists of both splits, or none")
        if missing:
            return list_folders(self._root / splits[0], self._root / splits[1])
        (names, train), (test_names, test) = (_read_list(self._root, split) for split in splits)
        check_same_classes(names, lists[0], test_names, lists[1])
        return names, train, test


def _read_list(root: Path, split: str) -> tuple[tuple[str, ...], ImageList]:
    """The names of the species and the images of a list."""
    file = root / f"{split}.json"
    try:
        content = _Annotations.model_validate_json(file.read_bytes())
    except ValidationError as error:
        raise ValueError(
            f"{file}: {problem_of(error)}; expected images, annotations and categories"
        ) from error
    categories = sorted(content.categories, key=lambda category: category.id)
    index_of = {category.id: index for index, category in enumerate(categories)}
    names = tuple(category.name for category in categories)
    if len(index_of) < len(categories):
        raise ValueError(f"{file} has two categories with one id")

    file_names = {image.id: image.file_name for image in content.images}
    # The folders are listed once: asking for each file takes far longer on a network's disk. It
    # also keeps what a list names within the folder.
    found = {Path(path).relative_to(root).as_posix() for path in images_below(root / split)}
    samples = []
    for annotation in content.annotations:
        name = file_names.get(annotation.image_id)
        if name not in found:
            raise ValueError(
                f"{file} has a label for image {annotation.image_id} ({name}); expected the file "
                f"of each in {root / split}"
            )
        if annotation.category_id not in index_of:
            raise ValueError(
                f"{file} gives {name} the label {annotation.category_id}, which is no category"
            )
        samples.append((str(root / name), index_of[annotation.category_id]))
    images = ImageList.from_samples(samples)
    check_classes_have_images(names, images.targets, file)
    return names, images
