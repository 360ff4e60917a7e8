"""The data sources by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from types import MappingProxyType

from softlabels.data.batch import DataSource
from softlabels.data.folder import FolderSource
from softlabels.data.glyphs import glyphs100
from softlabels.data.idx import holds_idx, idx
from softlabels.data.shards import ShardSource, holds_shards

# The keyword-only arguments are a source's settings; a first argument `path`, if any, is its path.
SOURCES: Mapping[str, Callable[..., DataSource]] = MappingProxyType(
    {"glyphs100": glyphs100, "folder": FolderSource, "idx": idx, "webdataset": ShardSource}
)


def kind_of(source: str | None, path: str | None) -> str:
    """Which source `open_source` opens.

    Args:
        source: Its name, or None to find out.
        path: Where the data are.

    Raises:
        ValueError: If the source is unknown.
    """
    if source is None:
        if path is None:
            source = "glyphs100"
        elif holds_idx(path):
            source = "idx"
        else:
            source = "webdataset" if holds_shards(path) else "folder"
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
        source: `"glyphs100"`, `"folder"`, `"idx"` or `"webdataset"`. None finds out: without a path
            it is the embedded glyphs, with one it is `"idx"` or `"webdataset"` if such files are
            there and else `"folder"`.
        path: Where the data are, for a source that reads files.
        **settings: What the source takes besides.

    Returns:
        The data source.

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
