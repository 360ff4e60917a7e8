"""Small data sets for the tests."""

import gzip
import struct
from pathlib import Path

import numpy as np
from PIL import Image


def write_images(folder: Path, count: int, *, seed: int = 0, size: tuple[int, int] = (20, 24)):
    """Write PNG files of random pixels, named 0.png, 1.png, ..."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(seed)
    for number in range(count):
        pixels = generator.integers(0, 256, (*size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")


def encode(array: np.ndarray) -> bytes:
    header = struct.pack(">BBBB", 0, 0, 8, array.ndim)
    return header + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def content() -> dict[str, bytes]:
    generator = np.random.default_rng(0)
    parts = {}
    for part, count in (("train", 12), ("t10k", 5)):
        images = generator.integers(0, 256, (count, 6, 7), dtype=np.uint8)
        images[:, 3, 3] = np.arange(count)
        parts[f"{part}-images-idx3-ubyte"] = encode(images)
        parts[f"{part}-labels-idx1-ubyte"] = encode(np.arange(count, dtype=np.uint8) % 3)
    return parts


def write_idx(folder, *, gz=False, **changes):
    folder.mkdir(exist_ok=True)
    for name, data in {**content(), **changes}.items():
        if data is not None:
            (folder / (name + ".gz" * gz)).write_bytes(gzip.compress(data) if gz else data)
    return folder
