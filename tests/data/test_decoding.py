"""Image files of any kind are read as Pillow reads them, upright."""

import io
import itertools
from importlib.resources import files

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torchvision import transforms
from torchvision.transforms.functional import pil_to_tensor

from softlabels.data import open_source
from softlabels.data.decoding import DECODING_ERRORS, read_rgb
from softlabels.data.transforms import evaluation_geometry
from softlabels.io.weights import load_weights
from softlabels.models import build_model

ORIENTATION = 0x0112
GEOMETRY = evaluation_geometry(32, interpolation="bilinear", crop_fraction=1.0)
OF_PILLOW = transforms.Compose([transforms.Resize(32), transforms.CenterCrop(32)])


def photograph(mode: str = "RGB", size: tuple[int, int] = (61, 45)) -> Image.Image:
    """Smooth colors, as JPEG files hold them well."""
    x, y = np.meshgrid(np.linspace(0, 1, size[0]), np.linspace(0, 1, size[1]))
    pixels = np.stack((x, y, (x + y) / 2), axis=2) * 255
    return Image.fromarray(pixels.astype(np.uint8)).convert(mode)


def encoded(image: Image.Image, kind: str, **settings) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **settings)
    return file.getvalue()


def by_pillow(content: bytes) -> torch.Tensor:
    with Image.open(io.BytesIO(content)) as image:
        return pil_to_tensor(ImageOps.exif_transpose(image).convert("RGB"))


@pytest.mark.parametrize("settings", [{}, {"progressive": True}, {"subsampling": 0}])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_jpeg_files_have_the_pixels_of_pillow(mode, settings, tmp_path):
    content = encoded(photograph(mode), "JPEG", **settings)
    (tmp_path / "a.jpg").write_bytes(content)
    for read in (read_rgb(content), read_rgb(str(tmp_path / "a.jpg"))):
        assert (read.dtype, read.shape) == (torch.uint8, (3, 45, 61))
        assert (read.int() - by_pillow(content).int()).abs().max() <= 1


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_upright(kind, orientation):
    image = photograph()
    exif = image.getexif()
    exif[ORIENTATION] = orientation
    content = encoded(image, kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))
    read = read_rgb(content)
    assert read.shape == ((3, 45, 61) if orientation <= 4 else (3, 61, 45))
    assert (read.int() - by_pillow(content).int()).abs().max() <= 1


@pytest.mark.parametrize(
    ("kind", "mode"),
    [
        *itertools.product(["PNG", "TIFF"], ["RGB", "RGBA", "L", "LA", "P", "1"]),
        *itertools.product(["GIF"], ["P", "L"]),
        *itertools.product(["WEBP"], ["RGB", "RGBA"]),
        ("TIFF", "CMYK"),
        ("BMP", "RGB"),
        ("PPM", "RGB"),
    ],
)
def test_other_files_are_read_by_pillow(kind, mode):
    image = photograph("RGB").convert(mode)
    lossless = {"lossless": True} if kind == "WEBP" else {}
    content = encoded(image, kind, **lossless)
    assert torch.equal(read_rgb(content), by_pillow(content))


def test_16_bits_become_8():
    levels = np.array([[0, 257 * 100, 65535]], dtype=np.uint16)
    read = read_rgb(encoded(Image.fromarray(levels), "PNG"))
    assert read[:, 0].tolist() == [[0, 100, 255]] * 3


@pytest.mark.parametrize("share", [0.01, 0.3, 0.9])
def test_a_jpeg_file_that_ends_early_is_an_error(share):
    content = encoded(photograph(size=(200, 200)), "JPEG")
    with pytest.raises(DECODING_ERRORS):
        read_rgb(content[: int(len(content) * share)])


def test_a_small_file_of_a_huge_image_is_refused(monkeypatch):
    content = encoded(photograph(), "JPEG")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(Image.DecompressionBombError):
        read_rgb(content)


def test_damage_within_a_jpeg_file_is_what_pillow_makes_of_it():
    content = bytearray(encoded(photograph(size=(200, 200)), "JPEG"))
    middle = content.index(b"\xff\xda") + 200
    for place in range(middle, middle + 400, 40):
        content[place] ^= 0x55
    try:
        expected = by_pillow(bytes(content))
    except DECODING_ERRORS:
        with pytest.raises(DECODING_ERRORS):
            read_rgb(bytes(content))
    else:
        assert torch.equal(read_rgb(bytes(content)), expected)


def test_a_trained_network_is_as_accurate_as_on_images_read_by_pillow():
    """Within a tenth of a point: read from JPEG files, resized and cropped by both."""
    glyphs = open_source("glyphs100")
    teacher = build_model("timm:resnet14x4_glyphs", num_classes=100, in_channels=1)
    load_weights(teacher, str(files("softlabels") / "recipes/glyphs100/teacher.safetensors"))
    teacher.eval()
    (mean,), (std,) = glyphs.info.mean, glyphs.info.std
    batch = next(iter(glyphs.test_batches(batch_size=2000, device="cpu")))
    ours, theirs = [], []
    for image in batch.images:
        levels = image[0].mul(std).add(mean).mul(255).round().byte()
        large = Image.fromarray(levels.numpy()).resize((72, 72))
        content = encoded(large.convert("RGB"), "JPEG", quality=95)
        ours.append(GEOMETRY(read_rgb(content))[:1])
        with Image.open(io.BytesIO(content)) as opened:
            theirs.append(pil_to_tensor(OF_PILLOW(opened.convert("RGB")))[:1])
    correct = []
    for pixels in (ours, theirs):
        with torch.inference_mode():
            logits = teacher((torch.stack(pixels).float() / 255 - mean) / std)
        correct.append((logits.argmax(1) == batch.target).sum().item())
    assert correct[1] > 1400  # it reads them
    assert abs(correct[0] - correct[1]) <= 2
