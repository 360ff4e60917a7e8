"""Two classes of small pictures and runs on them that take a second, for tests of the program."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from PIL import Image

SIDE = 8  # pixels


def write_pictures(root: Path, *, train: int = 4, test: int = 2) -> Path:
    """A folder of pictures that differ in brightness, so many of each of two classes."""
    generator = np.random.default_rng(0)
    for part, count in (("train", train), ("val", test)):
        for name, level in (("dark", 60), ("light", 190)):
            (root / part / name).mkdir(parents=True)
            for number in range(count):
                pixels = np.clip(generator.normal(level, 30, (SIDE, SIDE, 3)), 0, 255)
                path = root / part / name / f"{number}.png"
                Image.fromarray(pixels.astype(np.uint8)).save(path)
    return root


def train_arguments(pictures: Path, output: Path, *more: str) -> list[str]:
    """`softlabels train` on such a folder: one epoch of one step."""
    return [
        "train", "--data.path", str(pictures), "--data.image-size", str(SIDE),
        "--data.workers", "0", "--data.augmentation", "none",
        "--student.name", "timm:resnet8",
        "--epochs", "1", "--batch-size", "8", "--threads", "1", "--device", "cpu",
        "--gallery", "1", "--output", str(output), *more,
    ]  # fmt: skip


class MakesFolder:
    """Unpickling it without care makes a folder: a stand-in for any code."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def checkpoint_name(content: bytes, step: int) -> str:
    """The name under which a run takes this content as its checkpoint of a step."""
    return f"step-{step:08d}-{hashlib.blake2b(content, digest_size=8).hexdigest()}.pt"


def saved(content: Mapping[str, object]) -> bytes:
    """A torch file's bytes."""
    buffer = io.BytesIO()
    torch.save(dict(content), buffer)
    return buffer.getvalue()
