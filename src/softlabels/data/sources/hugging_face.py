"""Data sets of the library `datasets`: saved folders, Parquet files, or names of its hub."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from softlabels.data.decoding import Images, read_rgb
from softlabels.data.image_source import ImageSource
from softlabels.data.listing import TEST_NAMES, check_classes_have_images, check_targets

if TYPE_CHECKING:
    from datasets import Dataset

_TRAIN = ("train",)
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_CHUNK = 1000  # rows
# What `datasets` and Arrow raise for damaged files and for columns of another type.
_ERRORS = (OSError, ValueError, LookupError, TypeError, AttributeError, NotImplementedError)
_INSTALL = "the data source 'hf' needs the library datasets: pip install 'softlabels[data]'"


def holds_hugging_face(root: Path) -> bool:
    """Whether a folder was made by `save_to_disk`, or holds Parquet files of training images."""
    return _is_saved(root) or "train" in _parquet_files(root)


@dataclass(kw_only=True, eq=False)
class HuggingFaceSource(ImageSource):
    """A data source over a data set of Hugging Face's library `datasets`.

    The path is a folder that `save_to_disk` made; or one with the Parquet files of each split, such
    as `train-00000-of-00001.parquet`, in it or in its folder `data/`; or, if there is no such
    folder, the name of a data set on the hub, OWNER/NAME. Its Arrow files are mapped into memory,
    and worker processes decode the images. Parquet is turned into Arrow files at the first start.
    The further settings are those of every `ImageSource`.

    Args:
        image_column: The column of the images; None: the only one of that kind.
        label_column: The column of the labels; None: the only one of the type `ClassLabel`, or else
            the one named `label`. Labels that are numbers or texts are sorted.
        train_split: The training images; None: `train`.
        test_split: The test images; None: the first that is there of `val`, `valid`, `validation`
            and `test`.
        cache: Folder for the Arrow files; None: that of `datasets`, which `HF_HOME` moves.

    Raises:
        ValueError: If `datasets` is not installed, the data cannot be read, a split or a column is
            not there, labels do not fit, or a setting is out of its range.
    """

    image_column: str | None = None
    label_column: str | None = None
    train_split: str | None = None
    test_split: str | None = None
    cache: str | None = None

    def _find(self) -> tuple[tuple[str, ...], _Rows, _Rows]:
        splits = _load(str(self.path), self.cache)
        train = _choose_split(splits, "train_split", self.train_split, _TRAIN)
        test = _choose_split(splits, "test_split", self.test_split, TEST_NAMES)
        image = _image_column(splits[train], self.image_column)
        label = _label_column(splits[train], self.label_column)
        self.train_split, self.test_split = train, test
        self.image_column, self.label_column = image, label
        names, train_targets, test_targets = _label(splits[train], splits[test], label)
        check_classes_have_images(names, train_targets, f"the split {train!r} of {self.path}")
        check_targets(names, test_targets, f"the split {test!r} of {self.path}")
        self._train = _Rows.of(f"{self.path} ({train})", splits[train], image, train_targets)
        held_out = _Rows.of(f"{self.path} ({test})", splits[test], image, test_targets)
        return names, self._train, held_out

    def _identity(self, index: int) -> str:
        return f"{self._train.sizes[index]}\n"


@dataclass(frozen=True)
class _Rows(Images):
    """The images of a split.

    Args:
        place: What the split is called in messages.
        rows: The column of the images alone, as files and not decoded.
        column: Its name.
        targets: [N] int64, class indices.
    """

    place: str
    rows: Dataset
    column: str
    targets: NDArray[np.int64]

    @classmethod
    def of(cls, place: str, split: Dataset, column: str, targets: NDArray[np.int64]) -> _Rows:
        """Take the images' column of a split, whatever its own type."""
        try:
            rows = split.select_columns([column])
            rows = rows.cast_column(column, _datasets().Image(decode=False))
            return cls(place, rows, column, targets)
        except _ERRORS as error:
            reason = " ".join(str(error).split())
            raise ValueError(
                f"{place}: the column {column!r} holds no images: {reason:.200}"
            ) from error

    def name(self, index: int) -> str:
        """The split and the row of an image; see `Images`."""
        return f"{self.place} row {index}"

    def read(self, index: int) -> Tensor:
        """Read an image; see `Images`."""
        file = self.rows[index][self.column]
        if file is None:
            raise OSError("the row has no image")
        return read_rgb(file["path"] if file["bytes"] is None else file["bytes"])

    @cached_property
    def sizes(self) -> list[int]:
        """The size of each image's file, bytes; 0 where it is not in the Arrow file."""
        from pyarrow import compute

        found: list[int] = []
        for table in self.rows.with_format("arrow").iter(_CHUNK):
            content = compute.struct_field(table[self.column], "bytes")
            found += compute.fill_null(compute.binary_length(content), 0).to_pylist()
        return found


def _datasets() -> Any:
    """The library, which is optional."""
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise ValueError(_INSTALL) from error
    return datasets


def _is_saved(root: Path) -> bool:
    return any((root / name).is_file() for name in ("dataset_dict.json", "state.json"))


def _parquet_files(root: Path) -> dict[str, list[str]]:
    """The Parquet files of each split."""
    found: dict[str, list[str]] = {}
    if not root.is_dir():
        return found
    for file in sorted([*root.glob("*.parquet"), *root.glob("data/*.parquet")]):
        split = re.split(r"[^A-Za-z]", file.stem, maxsplit=1)[0].lower()
        if split in (*_TRAIN, *TEST_NAMES):
            found.setdefault(split, []).append(str(file))
    return found


def _load(path: str, cache: str | None) -> Mapping[str, Dataset]:
    """The splits of a data set by name."""
    datasets = _datasets()
    root = Path(path).expanduser()
    try:
        if _is_saved(root):
            saved = datasets.load_from_disk(str(root))
            return dict(saved) if isinstance(saved, datasets.DatasetDict) else {"train": saved}
        if files := _parquet_files(root):
            return dict(datasets.load_dataset("parquet", data_files=files, cache_dir=cache))
        if not root.exists() and _HUB_NAME.fullmatch(path):
            return dict(datasets.load_dataset(path, cache_dir=cache))
    except (*_ERRORS, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"datasets cannot read {path}: {reason:.300}") from error
    problem = "holds no such data" if root.exists() else "does not exist"
    raise ValueError(
        f"{path} {problem}; expected a folder that save_to_disk made, or with train*.parquet and "
        "test*.parquet, or a name on the hub, OWNER/NAME"
    )


def _choose_split(
    splits: Mapping[str, Dataset], setting: str, name: str | None, usual: tuple[str, ...]
) -> str:
    found = [split for split in (usual if name is None else (name,)) if split in splits]
    if not found:
        wanted = " or ".join(usual) if name is None else repr(name)
        raise ValueError(
            f"the data set has no split {wanted}, it has {', '.join(splits)}; {setting} says which"
        )
    return found[0]


def _image_column(split: Dataset, name: str | None) -> str:
    features = split.features
    images = [n for n, feature in features.items() if isinstance(feature, _datasets().Image)]
    # As other libraries write Parquet: a file's content and its name, of no type of its own.
    files = [n for n, feature in features.items() if isinstance(feature, dict)]
    found = images or [n for n in files if {"bytes", "path"} <= features[n].keys()]
    return _choose_column(split, "image_column", name, found)


def _label_column(split: Dataset, name: str | None) -> str:
    features = split.features
    classes = [n for n, feature in features.items() if isinstance(feature, _datasets().ClassLabel)]
    return _choose_column(
        split, "label_column", name, classes or [n for n in features if n == "label"]
    )


def _choose_column(split: Dataset, setting: str, name: str | None, found: list[str]) -> str:
    columns = ", ".join(split.column_names)
    if name is not None:
        if name not in split.column_names:
            raise ValueError(f"{setting} must be one of {columns}, got {name!r}")
        return name
    if len(found) != 1:
        problem = f"could be any of {', '.join(found)}" if found else f"is none of {columns}"
        raise ValueError(f"{setting} must be given: by its type it {problem}")
    return found[0]


def _label(
    train: Dataset, test: Dataset, column: str
) -> tuple[tuple[str, ...], NDArray[np.int64], NDArray[np.int64]]:
    """The names of the classes and the class indices of both splits."""
    if column not in test.column_names:
        raise ValueError(f"the test images have no column {column!r}, the training images have")
    labels = [split.with_format("numpy")[column][:] for split in (train, test)]
    for part in labels:
        if part.ndim != 1 or part.dtype.kind not in "biuU":
            raise ValueError(
                f"{column!r} must hold a whole number or a text for each image, without gaps, got "
                f"{part.dtype} of shape {part.shape}"
            )
    names: list[str] | None = getattr(train.features[column], "names", None)
    test_names: list[str] | None = getattr(test.features[column], "names", None)
    if names != test_names:
        raise ValueError(
            f"the classes of {column!r} for training and testing differ, or their order: "
            f"{names!s:.100} and {test_names!s:.100}"
        )
    if names is not None:
        return tuple(names), labels[0].astype(np.int64), labels[1].astype(np.int64)
    values = np.unique(labels[0])
    unknown = np.setdiff1d(labels[1], values)
    if len(unknown):
        raise ValueError(f"the test images have the label {unknown[0]}, no training image has it")
    return tuple(map(str, values)), *(np.searchsorted(values, part) for part in labels)
