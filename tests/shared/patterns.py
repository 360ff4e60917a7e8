"""Pictures of six patterns, as arrays and as files, and settings of a run of seconds on them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from softlabels.data import DataInfo
from softlabels.data.in_memory import InMemorySource, Split

CLASSES = ("bars", "columns", "checks", "plain", "ramp", "dots")
FAST = {
    "student": "timm:resnet8_glyphs",
    "epochs": 4,
    "batch_size": 32,
    "optimizer": {"lr": 0.1},
    "log_every": 2,
    "gallery": 3,
    "report": False,
    "progress": False,
}


def picture(label: int, number: int, size: int = 16) -> np.ndarray:
    """A gray picture of one of six patterns, with noise: easy to learn in seconds."""
    rows, columns = np.mgrid[0:size, 0:size]
    phase = number % 4
    pattern = (
        (rows + phase) // 2 % 2,
        (columns + phase) // 2 % 2,
        ((rows + phase) // 2 + columns // 2) % 2,
        np.full((size, size), 0.5),
        columns / size,
        ((rows + phase) % 4 == 0) & (columns % 4 == 0),
    )[label]
    noise = np.random.default_rng(1000 * label + number).normal(0, 0.15, (size, size))
    return (np.clip(pattern + noise, 0, 1) * 255).astype(np.uint8)


def split(first: int, count: int, size: int = 16) -> Split:
    labels = np.tile(np.arange(len(CLASSES)), count)
    numbers = np.repeat(np.arange(first, first + count), len(CLASSES))
    images = [picture(label, number, size) for label, number in zip(labels, numbers, strict=True)]
    return Split.from_arrays(np.stack(images), labels)


@pytest.fixture
def source() -> InMemorySource:
    info = DataInfo("patterns", CLASSES, 1, (16, 16), (0.5,), (0.35,), groups=(0, 0, 0, 1, 1, 1))
    return InMemorySource(split(0, 16), split(100, 8), info)


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same patterns as PNG files in ImageNet's layout."""
    root = tmp_path_factory.mktemp("patterns")
    for part, first, count in (("train", 0, 8), ("val", 100, 4)):
        for label, name in enumerate(CLASSES):
            (root / part / name).mkdir(parents=True)
            for number in range(first, first + count):
                Image.fromarray(picture(label, number, 32)).save(
                    root / part / name / f"{number}.png"
                )
    return root
