"""Image files of any kind, as 8-bit RGB."""

from __future__ import annotations

import io
import math
import os
import stat
import struct
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps
from simplejpeg import decode_jpeg, decode_jpeg_header, is_jpeg
from torch import Tensor

_COLORS = ("YCbCr", "RGB", "Gray")  # of JPEG files; not CMYK and its like
_HEAD = 2**17  # bytes in which the orientation stands, if anywhere

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

    def read(self, index: int) -> Tensor:
        """Read an image as 8-bit RGB, [3, H, W] uint8.

        Raises:
            Exception: One of `DECODING_ERRORS`.
        """
        raise NotImplementedError


def read_rgb(file: str | bytes) -> Tensor:
    """Read an image file of any mode as 8-bit RGB, upright; transparency is dropped.

    JPEG files of gray or color have a decoder of their own, to the same pixels as Pillow's and
    faster; Pillow reads the others.

    Args:
        file: Its name, or what it holds.

    Returns:
        [3, H, W] uint8; in memory the three channels lie side by side.

    Raises:
        Exception: One of `DECODING_ERRORS`.
    """
    if isinstance(file, str):
        if not stat.S_ISREG(os.stat(file).st_mode):
            raise OSError(f"{file} is no file")  # a named pipe would wait for its writer, for ever
        file = Path(file).read_bytes()
    pixels = _jpeg(file)
    if pixels is None:
        with Image.open(io.BytesIO(file)) as opened:
            pixels = np.array(_rgb(ImageOps.exif_transpose(opened)))
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _jpeg(file: bytes) -> NDArray[np.uint8] | None:
    """The pixels of a JPEG file, [H, W, 3]; None if Pillow is to read it, or to say why not."""
    if not is_jpeg(file):
        return None
    try:
        height, width, colors, _ = decode_jpeg_header(file)
        # A small file may hold an image too large for any memory: Pillow refuses it.
        if colors not in _COLORS or height * width > (Image.MAX_IMAGE_PIXELS or math.inf):
            return None
        pixels: NDArray[np.uint8] = decode_jpeg(file, "RGB")
    except ValueError:
        return None
    if file.find(b"Exif\0\0", 0, _HEAD) < 0:
        return pixels
    with Image.open(io.BytesIO(file)) as opened:
        turned = opened.getexif().get(ExifTags.Base.Orientation, 1)
    if turned == 1:
        return pixels
    image = Image.fromarray(pixels)
    image.getexif()[ExifTags.Base.Orientation] = turned
    return np.array(ImageOps.exif_transpose(image))


def _rgb(image: Image.Image) -> Image.Image:
    """An image of any mode as 8-bit RGB."""
    if image.mode == "F":
        raise ValueError("an image of floating-point numbers has no known range")
    if image.mode.startswith("I"):
        # 16 bits. Pillow's own conversion would turn all above 255 into white.
        return image.convert("I").point(lambda level: level * (1 / 257)).convert("RGB")
    if image.mode == "P" and "transparency" in image.info:
        return image.convert("RGBA").convert("RGB")  # Pillow warns about the direct way
    return image.convert("RGB")
