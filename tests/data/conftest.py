import pytest
import torch

from shared.data_files import write_images
from softlabels.data import DataInfo
from softlabels.data.augment import CropFlip
from softlabels.data.in_memory import InMemorySource, Split


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory):
    """ImageNet's layout: 3 classes, 8 + 8 + 7 training images, 3 test images each."""
    root = tmp_path_factory.mktemp("images")
    for number, name in enumerate(("ant", "bee", "cow")):
        write_images(root / "train" / name, 7 if name == "cow" else 8, seed=number)
        write_images(root / "val" / name, 3, seed=10 + number)
    return root


@pytest.fixture
def memory_source():
    """26 training and 7 test images of 8 x 8, 4 classes; pixel 0 of an image names it."""

    def split(count: int) -> Split:
        images = torch.zeros(count, 1, 8, 8, dtype=torch.uint8)
        images[:, 0, 3, 4] = torch.arange(count, dtype=torch.uint8) + 100
        return Split(images, torch.arange(count) % 4)

    info = DataInfo("tiny", ("a", "b", "c", "d"), 1, (8, 8), (0.0,), (1 / 255,))
    return InMemorySource(split(26), split(7), info, augmentation=CropFlip(2))
