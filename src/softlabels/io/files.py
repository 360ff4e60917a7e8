"""Files that are written whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

__all__ = ["remove_leftovers", "replace_file", "write_json", "write_text"]


@contextlib.contextmanager
def replace_file(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Open a file for writing that appears under its name when it is complete, and only then.

    The content goes to a hidden file in the same folder (only a rename within one file system is
    atomic), is forced to the disk, and renamed. After a failure the older file is as it was and
    nothing else is left; after a kill or a power cut a hidden file may be (`remove_leftovers`).

    Yields:
        The hidden file, open for writing bytes.

    Raises:
        OSError: It cannot be written; on a full disk for example.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync_folder(path.parent)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file, whole or not at all; see `replace_file`."""
    with replace_file(path) as file:
        file.write(text.encode(errors="replace"))  # the name of a file may be no Unicode


def write_json(path: str | os.PathLike[str], content: Any) -> None:
    """Write a JSON file, whole or not at all; see `replace_file`."""
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def remove_leftovers(folder: str | os.PathLike[str]) -> None:
    """Remove the hidden files that killed writers left in a folder; none may be writing there."""
    for path in Path(folder).glob(".*.part"):
        path.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Force the folder's entries to the disk: until then a rename can be lost in a power cut."""
    with contextlib.suppress(OSError):  # not every system opens folders, or syncs them
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
