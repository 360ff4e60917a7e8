"""ImageNet (ILSVRC 2012) in its usual folders."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from softlabels.data.listing import ImageList, list_folders, subfolders
from softlabels.data.sources.folder import FileSource

_NUM_CLASSES = 1000


@dataclass(kw_only=True, eq=False)
class ImageNetSource(FileSource):
    """A data source over ImageNet: `train/WNID/*.JPEG` and `val/WNID/*.JPEG` below the path.

    The classes are named by their WNIDs, such as n01440764, in sorted order, which is that of all
    published weights. The settings are those of every `ImageSource`.

    Raises:
        ValueError: If a folder is missing or flat, there are not exactly 1000 classes, or a setting
            is out of its range.
    """

    image_size: int | None = 224

    def _find(self) -> tuple[tuple[str, ...], ImageList, ImageList]:
        val = self._root / "val"
        if val.is_dir() and not subfolders(val):
            raise ValueError(_how_to_sort(val))
        found = list_folders(self._root / "train", val)
        if len(found[0]) != _NUM_CLASSES:
            raise ValueError(
                f"{self._root} has {len(found[0])} classes, ImageNet has {_NUM_CLASSES}; "
                "the data source 'folder' reads any number"
            )
        return found


def _how_to_sort(val: Path) -> str:
    return (
        f"{val} has no subfolders; expected {val.name}/WNID/*.JPEG. "
        f"torchvision.datasets.ImageNet({str(val.parent)!r}, 'val') sorts the images, given "
        "ILSVRC2012_img_val.tar and ILSVRC2012_devkit_t12.tar.gz there in place of this folder"
    )
