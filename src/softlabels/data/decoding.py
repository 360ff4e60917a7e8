"""Image files of any kind, as 8-bit RGB."""

from __future__ import annotations

import os
import stat
import struct
from typing import IO

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


def read_rgb(file: str | IO[bytes]) -> Image.Image:
    """Read an image file of any mode as 8-bit RGB.

    Args:
        file: Its name, or the open file.

    Raises:
        Exception: One of `DECODING_ERRORS`.
    """
    if isinstance(file, str) and not stat.S_ISREG(os.stat(file).st_mode):
        raise OSError(f"{file} is no file")  # a named pipe would wait for its writer, for ever
    with Image.open(file) as image:
        return _to_rgb(image)


def _to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image of any mode to 8-bit RGB; transparency is dropped."""
    if image.mode == "F":
        raise ValueError("an image of floating-point numbers has no known range")
    if image.mode.startswith("I"):
        # 16 bits. Pillow's own conversion would turn all above 255 into white.
        return image.convert("I").point(lambda level: level * (1 / 257)).convert("RGB")
    if image.mode == "P" and "transparency" in image.info:
        # Pillow warns about the direct way.
        image = image.convert("RGBA")
    return image.convert("RGB")
