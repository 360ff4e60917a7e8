"""The data sources by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from functools import partial
from types import MappingProxyType
from typing import NamedTuple

from torchvision.datasets import CIFAR10, CIFAR100

from softlabels.data.source import DataSource
from softlabels.data.sources.cifar import CIFAR10Source, CIFAR100Source, holds_cifar
from softlabels.data.sources.folder import FolderSource
from softlabels.data.sources.glyphs import glyphs100
from softlabels.data.sources.hugging_face import HuggingFaceSource, holds_hugging_face
from softlabels.data.sources.idx import holds_idx, idx
from softlabels.data.sources.imagenet import ImageNetSource
from softlabels.data.sources.inat21 import INat21Source, holds_inat21
from softlabels.data.sources.noise import noise
from softlabels.data.sources.tiny_imagenet import TinyImageNetSource, holds_tiny_imagenet
from softlabels.data.sources.webdataset import ShardSource, holds_shards

# The keyword-only arguments are a source's settings; a first argument `path`, if any, is its path.
SOURCES: Mapping[str, Callable[..., DataSource]] = MappingProxyType(
    {
        "glyphs100": glyphs100,
        "folder": FolderSource,
        "idx": idx,
        "webdataset": ShardSource,
        "cifar10": CIFAR10Source,
        "cifar100": CIFAR100Source,
        "tiny_imagenet": TinyImageNetSource,
        "imagenet": ImageNetSource,
        "inat21": INat21Source,
        "hf": HuggingFaceSource,
        "noise": noise,
    }
)


class FixedFacts(NamedTuple):
    """What is the same in all copies of a data set; None where it differs.

    Attributes:
        num_classes: Number of classes.
        image_size: Height and width of the images if no setting says another, pixels.
        in_channels: Channels of the images.
    """

    num_classes: int | None
    image_size: int | None
    in_channels: int | None


FIXED_FACTS: Mapping[str, FixedFacts] = MappingProxyType(
    {
        "glyphs100": FixedFacts(100, 32, 1),
        "folder": FixedFacts(None, None, 3),
        "idx": FixedFacts(None, None, 1),
        "webdataset": FixedFacts(None, None, 3),
        "cifar10": FixedFacts(10, 32, 3),
        "cifar100": FixedFacts(100, 32, 3),
        "tiny_imagenet": FixedFacts(200, 64, 3),
        "imagenet": FixedFacts(1000, 224, 3),
        "inat21": FixedFacts(10_000, 224, 3),
        "hf": FixedFacts(None, None, 3),
        "noise": FixedFacts(None, None, None),
    }
)

# What a folder holds, the most telling signs first. Without any it is a folder of images.
_SIGNS: Mapping[str, Callable[[str], bool]] = MappingProxyType(
    {
        "cifar100": partial(holds_cifar, data=CIFAR100),
        "cifar10": partial(holds_cifar, data=CIFAR10),
        "tiny_imagenet": holds_tiny_imagenet,
        "inat21": holds_inat21,
        "hf": holds_hugging_face,
        "idx": holds_idx,
        "webdataset": holds_shards,
    }
)


def kind_of(source: str | None, path: str | None) -> str:
    """Which source `open_source` opens.

    Args:
        source: Its name, or None to find out.
        path: Where the data are.

    Raises:
        ValueError: If the source is unknown, or cannot be found out.
    """
    if source is None:
        if path is None:
            return "glyphs100"
        found = [kind for kind, holds in _SIGNS.items() if holds(path)]
        if {"cifar10", "cifar100"} <= {*found}:
            raise ValueError(
                f"{path} has both CIFAR-10 and CIFAR-100; expected source to say which"
            )
        return found[0] if found else "folder"
    if source not in SOURCES:
        near = get_close_matches(source, SOURCES, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"unknown data source {source!r}, expected {', '.join(SOURCES)}{hint}")
    return source


def settings_of(source: str) -> list[str]:
    """The names of a source's settings."""
    parameters = inspect.signature(SOURCES[source]).parameters
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
    open_it = SOURCES[source]
    parameters = inspect.signature(open_it).parameters
    known = settings_of(source)
    for name in settings:
        if name not in known:
            near = get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(
                f"the data source {source!r} has no setting {name!r},"
                f" expected {', '.join(known)}{hint}"
            )
    if "path" not in parameters:
        if path is not None:
            raise ValueError(f"the data source {source!r} takes no path, got {path!r}")
        return open_it(**settings)
    if path is None:
        raise ValueError(f"the data source {source!r} needs a path, got none")
    return open_it(path, **settings)
