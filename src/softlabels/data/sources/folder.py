"""A folder of images with a subfolder for each class, read by worker processes."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from softlabels.data.image_source import ImageSource
from softlabels.data.listing import ImageList, list_images


class FileSource(ImageSource):
    """An `ImageSource` whose images are files below its path."""

    def _identity(self, index: int) -> str:
        path = self._found.name(index)
        try:
            size = os.path.getsize(path)
        except OSError:  # it vanished: it will be told when it is read
            size = -1
        return f"{Path(path).relative_to(self._root).as_posix()}\0{size}\n"


@dataclass(kw_only=True, eq=False)
class FolderSource(FileSource):
    """A data source over a folder of image files.

    The path is a folder with `train/` and `val/` (or `valid`, `validation`, `test`) and a subfolder
    for each class in both; or with the classes' subfolders alone. The further settings are those of
    every `ImageSource`.

    Args:
        validation_fraction: Share of each class that is held out for testing if there is no folder
            of test images.
    """

    validation_fraction: float = 0.1

    def _find(self) -> tuple[tuple[str, ...], ImageList, ImageList]:
        return list_images(self.path, self.validation_fraction)
