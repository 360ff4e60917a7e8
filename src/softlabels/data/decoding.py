"""Image files of any kind, as 8-bit RGB."""

from __future__ import annotations

import os
import stat
import struct
from typing import IO

import numpy as np
from numpy.typing import NDArray
from PIL import Image

# What Pillow's decoders raise for damaged files.
DECODING_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    struct.error,
    IndexError,
    Image.DecompressionBombError,
)


class Images:
    """Images that can be read one by one, in any process.

    Attributes:
        targets: [N] class indices.
    """

    targets: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.targets)

    def name(self, index: int) -> str:
        """What an error calls an image."""
        raise NotImplementedError

    def read(self, index: int) -> Image.Image:
        """Read an image as 8-bit RGB.

        Raises:
            Exception: One of `DECODING_ERRORS`.
        """
        raise NotImplementedError


def read_rgb(file: str | IO[bytes]) -> Image.Image:
    """Read an image file of any mode as 8-bit RGB; transparency is dropped.

    Args:
        file: Its name, or the open file.

    Raises:
        Exception: One of `DECODING_ERRORS`.
    """
    if isinstance(file, str) and not stat.S_ISREG(os.stat(file).st_mode):
        raise OSError(f"{file} is no file")  # a named pipe would wait for its writer, for ever
    with Image.open(file) as opened:
        image: Image.Image = opened
        if image.mode == "F":
            raise ValueError("an image of floating-point numbers has no known range")
        if image.mode.startswith("I"):
            # 16 bits. Pillow's own conversion would turn all above 255 into white.
            return image.convert("I").point(lambda level: level * (1 / 257)).convert("RGB")
        if image.mode == "P" and "transparency" in image.info:
            return image.convert("RGBA").convert("RGB")  # Pillow warns about the direct way
        return image.convert("RGB")
