"""Image files, folders and IDX files that nobody should have."""

from __future__ import annotations

import contextlib
import gzip
import io
import os
import shutil
import struct
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import event, given
from hypothesis import strategies as st
from PIL import Image

from shared.fuzzing import case, check_refusal, command, fuzz, mutated
from shared.tiny_runs import SIDE
from softlabels.data import DataSource, open_source
from softlabels.io.weights import save_weights
from softlabels.models import FileRecord, build_model, model_metadata


@contextlib.contextmanager
def new_folder() -> Iterator[Path]:
    """A folder for one case; hypothesis runs many cases in one test."""
    path = Path(tempfile.mkdtemp(prefix="fuzz-"))
    try:
        yield path
    finally:
        shutil.rmtree(path)


def picture(mode: str, size: tuple[int, int], form: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (*reversed(size), 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(buffer, form, **options)
    return buffer.getvalue()


def png_of(width: int, height: int, bits: int = 8, kind: int = 2) -> bytes:
    """A PNG whose header claims a size, with next to no data."""

    def chunk(name: bytes, content: bytes) -> bytes:
        body = name + content
        return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0)
    data = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(64))) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + data


PICTURES = [
    picture("RGB", (9, 7), "PNG"),
    picture("RGB", (9, 7), "JPEG"),
    picture("L", (9, 7), "JPEG", progressive=True),
    picture("CMYK", (9, 7), "JPEG"),
    picture("P", (9, 7), "GIF"),
    picture("RGB", (9, 7), "TIFF"),
    picture("RGB", (9, 7), "TIFF", compression="tiff_lzw"),
    picture("RGBA", (9, 7), "PNG"),
    picture("LA", (9, 7), "PNG"),
    picture("1", (9, 7), "PNG"),
    picture("I;16", (9, 7), "PNG") if "I;16" in Image.MODES else picture("I", (9, 7), "PNG"),
    picture("F", (9, 7), "TIFF"),
    picture("LAB", (9, 7), "TIFF"),
    picture("YCbCr", (9, 7), "JPEG"),
    picture("RGB", (9, 7), "BMP"),
    picture("RGB", (9, 7), "WEBP"),
    picture("RGB", (9, 7), "PPM"),
    picture("RGB", (9, 7), "ICO", sizes=[(9, 7)]),
    picture("RGB", (9, 7), "TGA"),
    picture("RGB", (9, 7), "PCX"),
    picture("RGB", (1, 1), "PNG"),
    picture("RGB", (1, 2000), "PNG"),
    picture("RGB", (2000, 1), "PNG"),
    picture("RGB", (3000, 3), "JPEG"),
]
sides = st.sampled_from([0, 1, 2, 9, 65_535, 100_000, 2**31 - 1, 2**32 - 1])
picture_bytes = st.one_of(
    st.sampled_from(PICTURES).flatmap(mutated),
    st.sampled_from(PICTURES).flatmap(mutated),
    st.sampled_from(PICTURES),
    st.builds(png_of, sides, sides, st.sampled_from([1, 8, 16, 7]), st.integers(0, 7)),
    st.binary(max_size=40),
    st.builds(lambda start, rest: start + rest, st.sampled_from(PICTURES).map(lambda p: p[:12]),
              st.binary(max_size=40)),
)  # fmt: skip
endings = st.sampled_from(["png", "jpg", "gif", "tiff", "webp", "bmp", "ppm"])


def read_all(source: DataSource) -> None:
    """Reads one epoch and the test set: finite images of the promised shape."""
    try:
        shape = (source.info.in_channels, *source.info.image_size)
        batches = [
            *source.train_batches(seed=0, epoch=0, batch_size=4, device="cpu"),
            *source.test_batches(batch_size=4, device="cpu"),
        ]
        for batch in batches:
            assert batch.images.shape[1:] == shape
            assert bool(batch.images.isfinite().all())
            assert 0 <= int(batch.target.min()) <= int(batch.target.max()) < source.info.num_classes
    finally:
        source.close()


@fuzz("image files")
@given(
    content=picture_bytes,
    ending=endings,
    bad_images=st.sampled_from(["error", "skip"]),
    augmentation=st.sampled_from(["random_resized_crop", "crop_flip", "none"]),
)
def test_image_files(trained, pictures, content, ending, bad_images, augmentation):
    with case("image files"), new_folder() as folder:
        shutil.copytree(pictures, folder / "shades")
        path = folder / "shades" / "train" / "dark" / f"odd.{ending}"
        path.write_bytes(content)
        outcome = command(["predict", str(trained), str(path), "--format", "json"])
        assert outcome.status == 0 or path.name in outcome.line
        try:
            source = open_source(
                "folder", str(folder / "shades"), image_size=SIDE, workers=0,
                bad_images=bad_images, augmentation=augmentation,
            )  # fmt: skip
            read_all(source)
        except ValueError as error:
            check_refusal(error)
            refused = str(error)
        else:
            refused = ""
        if refused:  # what cannot be trained on cannot be classified either
            assert outcome.status == 2
            assert bad_images == "error"
            assert path.name in refused


NAMES = (
    "train", "val", "test", "Train", "a", "b", "c", "ant", "bee", "0.png", "1.png", "x.jpg",
    "..png", ".hidden", "__MACOSX", "\u00e4\u00f6", "e\u0301", "\u00e9", "\u202ex", "a b", "-x",
    "a'b", 'a"b', "<b>", "$(x)", "%s", "{}", "\\", "\n", "\x1b[2J", "\udcff", "a" * 200, "NUL",
    "~", "*", "c.png", "0.PNG", "notes.txt", "0.png.txt",
)  # fmt: skip
entries = st.tuples(
    st.lists(st.sampled_from(NAMES), min_size=1, max_size=4),
    st.sampled_from(["picture", "picture", "picture", "folder", "empty", "text", "link", "loop",
                     "broken link", "pipe", "unreadable"]),
)  # fmt: skip


def grow(root: Path, parts: list[str], kind: str, image: Path) -> None:
    """Puts something into a tree, unless something else is in the way."""
    path = root.joinpath(*parts)
    if path.exists() or path.is_symlink():
        return
    with contextlib.suppress(FileExistsError, NotADirectoryError):
        path.parent.mkdir(parents=True, exist_ok=True)
        if kind == "folder":
            path.mkdir()
        elif kind == "link":
            path.symlink_to(image)
        elif kind == "loop":
            path.symlink_to(root, target_is_directory=True)
        elif kind == "broken link":
            path.symlink_to("nowhere")
        elif kind == "pipe":
            os.mkfifo(path)
        else:
            path.write_bytes({"picture": image.read_bytes(), "text": b"text"}.get(kind, b""))
            if kind == "unreadable":
                path.chmod(0)


@st.composite
def trees(draw) -> list[tuple[list[str], str]]:
    """A layout that is nearly right, or any."""
    found = draw(st.lists(entries, max_size=10))
    if draw(st.booleans()):
        for split in draw(st.sampled_from([("train", "val"), ("train",), ("",)])):
            for name in draw(st.lists(st.sampled_from(NAMES), min_size=1, max_size=3)):
                for number in range(draw(st.integers(0, 3))):
                    found.append(([*filter(None, [split, name]), f"{number}.png"], "picture"))
    return found


@fuzz("folder layouts")
@given(tree=trees(), train=st.booleans())
def test_folder_layouts(trained, pictures, tree, train):
    image = pictures / "val" / "dark" / "0.png"
    with case("folder layouts"), new_folder() as folder:
        root = folder / "data"
        root.mkdir()
        for parts, kind in tree:
            grow(root, parts, kind, image)
        command(["eval", str(trained), "--path", str(root)])
        command(["predict", str(trained), str(root), "--format", "csv"])
        try:
            read_all(open_source(None, str(root), image_size=SIDE, workers=0))
        except ValueError as error:
            check_refusal(error)


def idx_bytes(array: np.ndarray) -> bytes:
    shape = struct.pack(f">{array.ndim}I", *array.shape)
    return bytes((0, 0, 8, array.ndim)) + shape + array.astype(np.uint8).tobytes()


IDX = {
    f"{part}-{kind}": idx_bytes(array)
    for part in ("train", "t10k")
    for kind, array in (
        ("images-idx3-ubyte", np.arange(6 * SIDE * SIDE).reshape(6, SIDE, SIDE) % 251),
        ("labels-idx1-ubyte", np.arange(6) % 3),
    )
}
damages = st.dictionaries(
    st.sampled_from(sorted(IDX)),
    st.sampled_from(["mutated", "mutated", "header", "missing", "gzip", "bad gzip", "other"]),
    max_size=2,
)


@pytest.fixture(scope="module")
def gray_student(tmp_path_factory) -> Path:
    """A student of three classes of gray pictures."""
    path = tmp_path_factory.mktemp("gray") / "student.safetensors"
    facts = {"num_classes": 3, "in_channels": 1}
    look = {"image_size": (SIDE, SIDE), "mean": (0.5,), "std": (0.5,)}
    metadata = model_metadata(FileRecord(model="resnet8", **facts, **look))
    save_weights(build_model("resnet8", **facts), path, metadata=metadata)
    return path


@fuzz("idx files")
@given(damage=damages, data=st.data())
def test_idx_files(gray_student, damage, data):
    with case("idx files"), new_folder() as folder:
        for name, content in IDX.items():
            kind = damage.get(name)
            path = folder / name
            if kind == "missing":
                continue
            if kind == "mutated":
                content = data.draw(mutated(content, 2))
            elif kind == "header":
                numbers = data.draw(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=4))
                content = content[:4] + struct.pack(f">{len(numbers)}I", *numbers) + content[16:]
            elif kind == "other":
                content = IDX[data.draw(st.sampled_from(sorted(IDX)))]
            elif kind in ("gzip", "bad gzip"):
                path = folder / f"{name}.gz"
                content = gzip.compress(content)
                if kind == "bad gzip":
                    content = data.draw(mutated(content, 2))
            path.write_bytes(content)
        outcome = command(["eval", str(gray_student), "--path", str(folder), "--source", "idx"])
        assert damage or outcome.status == 0
        try:
            source = open_source("idx", str(folder))
        except ValueError as error:
            check_refusal(error)
            assert outcome.status == 2
        else:
            event("read")
            read_all(source)
            assert torch.tensor(source.info.mean).isfinite().all()
