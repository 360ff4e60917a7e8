"""The data sources by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import NamedTuple

from torchvision.datasets import CIFAR10, CIFAR100

from softlabels.data.source import DataSource
from softlabels.data.sources.cifar import CIFAR10Source, CIFAR100Source, holds_cifar
from softlabels.data.sources.folder import FolderSource
from softlabels.data.sources.glyphs import GlyphSource
from softlabels.data.sources.hugging_face import HuggingFaceSource, holds_hugging_face
from softlabels.data.sources.idx import holds_idx, idx
from softlabels.data.sources.imagenet import ImageNetSource
from softlabels.data.sources.inat21 import INat21Source, holds_inat21
from softlabels.data.sources.noise import noise
from softlabels.data.sources.tiny_imagenet import TinyImageNetSource, holds_tiny_imagenet
from softlabels.data.sources.webdataset import ShardSource, holds_shards


class Kind(NamedTuple):
    """A data source, and what is the same in all copies of its data; None where it differs.

    Attributes:
        open: Opens it. Its keyword-only arguments are its settings; a first argument `path`, if
            any, is its path.
        num_classes: Number of classes.
        image_size: Height and width of the images if no setting says another, pixels.
        in_channels: Channels of the images.
        holds: Whether a folder unmistakably holds it.
    """

    open: Callable[..., DataSource]
    num_classes: int | None
    image_size: int | None
    in_channels: int | None
    holds: Callable[[Path], bool] | None = None


# By what a folder holds, the most telling signs first. Without any it is a folder of images.
SOURCES = {
    "glyphs100": Kind(GlyphSource, 100, 32, 1),
    "cifar100": Kind(CIFAR100Source, 100, 32, 3, partial(holds_cifar, data=CIFAR100)),
    "cifar10": Kind(CIFAR10Source, 10, 32, 3, partial(holds_cifar, data=CIFAR10)),
    "tiny_imagenet": Kind(TinyImageNetSource, 200, 64, 3, holds_tiny_imagenet),
    "inat21": Kind(INat21Source, 10_000, 224, 3, holds_inat21),
    "hf": Kind(HuggingFaceSource, None, None, 3, holds_hugging_face),
    "idx": Kind(idx, None, None, 1, holds_idx),
    "webdataset": Kind(ShardSource, None, None, 3, holds_shards),
    "imagenet": Kind(ImageNetSource, 1000, 224, 3),
    "folder": Kind(FolderSource, None, None, 3),
    "noise": Kind(noise, None, None, None),
}


def kind_of(source: str | None, path: str | None) -> str:
    """Which source `open_source` opens.

    Raises:
        ValueError: The source is unknown, or cannot be found out.
    """
    if source is None:
        if path is None:
            return "glyphs100"
        root = Path(path).expanduser()
        found = [name for name, kind in SOURCES.items() if kind.holds and kind.holds(root)]
        if {"cifar10", "cifar100"} <= {*found}:
            raise ValueError(
                f"{path} has both CIFAR-10 and CIFAR-100; expected source to say which"
            )
        return found[0] if found else "folder"
    if source not in SOURCES:
        raise ValueError(f"unknown data source {source!r}, {_expected(source, [*SOURCES])}")
    return source


def _expected(name: str, known: list[str]) -> str:
    near = get_close_matches(name, known, n=1)
    return f"expected {', '.join(known)}" + (f"; did you mean {near[0]!r}?" if near else "")


def settings_of(source: str) -> list[str]:
    """The names of a source's settings."""
    parameters = inspect.signature(SOURCES[source].open).parameters
    return [name for name, p in parameters.items() if p.kind is p.KEYWORD_ONLY]


def open_source(
    source: str | None = None, path: str | None = None, **settings: object
) -> DataSource:
    """Open a data source.

    Args:
        source: A name in `SOURCES`. None finds out: without a path it is the embedded glyphs, with
            one what the folder unmistakably holds, and else `"folder"`. ImageNet is read as any
            `"folder"` then.
        path: Where the data are, for a source that reads files.
        **settings: What the source takes besides.

    Returns:
        The data source; its `split` holds out a part of the training set.

    Raises:
        ValueError: If the source is unknown, a setting is not one of its own, or a path is missing
            or too much; and whatever the source finds wrong.
    """
    source = kind_of(source, path)
    open_it = SOURCES[source].open
    parameters = inspect.signature(open_it).parameters
    known = settings_of(source)
    for name in settings:
        if name not in known:
            raise ValueError(
                f"the data source {source!r} has no setting {name!r}, {_expected(name, known)}"
            )
    if "path" not in parameters:
        if path is not None:
            raise ValueError(f"the data source {source!r} takes no path, got {path!r}")
        return open_it(**settings)
    if path is None:
        raise ValueError(f"the data source {source!r} needs a path, got none")
    return open_it(path, **settings)
