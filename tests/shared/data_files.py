"""Small data sets for the tests."""

import gzip
import hashlib
import io
import json
import pickle
import struct
import tarfile
from functools import cache
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


@cache
def png(level: int, size: int = 8) -> bytes:
    """A file of a gray image, brighter to the right, whose darkest level is given."""
    ramp = np.tile(np.arange(size, dtype=np.uint8) + level, (size, 1))
    file = io.BytesIO()
    Image.fromarray(ramp).convert("RGB").save(file, "PNG")
    return file.getvalue()


def write_file(path: Path, content: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


# The files of each data set below are as published but for their number and content. There are 14
# training and 6 test images of 2 classes, if not said otherwise; the darkest level of an image,
# which `levels` finds, is its index, plus 100 in testing.

TINY_WORDS = "n01443537\tgoldfish, Carassius auratus\nn01629819\tEuropean fire salamander\n"
TINY_WNIDS = ("n01443537", "n01629819")


def write_tiny_imagenet(root: Path) -> Path:
    for index in range(14):
        wnid = TINY_WNIDS[index // 7]
        write_file(root / f"train/{wnid}/images/{wnid}_{index % 7}.JPEG", png(index))
        write_file(root / f"train/{wnid}/{wnid}_boxes.txt", "x\t0\t0\t1\t1\n")
    lines = []
    for index in range(6):
        write_file(root / f"val/images/val_{index}.JPEG", png(100 + index))
        lines.append(f"val_{index}.JPEG\t{TINY_WNIDS[index % 2]}\t0\t0\t7\t7\n")
    write_file(root / "val/val_annotations.txt", "".join(lines))
    write_file(root / "test/images/test_0.JPEG", png(0))
    # Neither of the two is sorted as the folders are, and there are words for other WNIDs.
    write_file(root / "wnids.txt", "\n".join(reversed(TINY_WNIDS)) + "\n")
    write_file(root / "words.txt", "n00001740\tentity\n" + TINY_WORDS)
    return root


def write_imagenet(root: Path, num_classes: int = 1000) -> Path:
    """One image of each class in both splits."""
    for index in range(num_classes):
        wnid = f"n{index:08}"
        write_file(root / f"train/{wnid}/{wnid}_1.JPEG", png(index % 100))
        write_file(root / f"val/{wnid}/ILSVRC2012_val_{index:08}.JPEG", png(100 + index % 100))
    return root


SPECIES = ("Lumbricus terrestris", "Sabella spallanzanii")


def species_folder(index: int) -> str:
    return f"0000{index}_Animalia_Annelida_{SPECIES[index].replace(' ', '_')}"


def write_inat21(root: Path, *, lists: bool = True, train: str = "train_mini") -> Path:
    for split, count, first in ((train, 14, 0), ("val", 6, 100)):
        images, annotations = [], []
        for index in range(count):
            label = index // (count // 2)
            name = f"{split}/{species_folder(label)}/{index:08}.jpg"
            write_file(root / name, png(first + index))
            images.append({"id": 50 + index, "file_name": name, "width": 8, "rights_holder": "x"})
            annotations.append({"id": index, "image_id": 50 + index, "category_id": label})
        categories = [
            {"id": index, "name": name, "image_dir_name": species_folder(index)}
            for index, name in enumerate(SPECIES)
        ]
        content = {"images": images, "annotations": annotations, "categories": categories[::-1]}
        if lists:
            write_file(root / f"{split}.json", json.dumps({"info": {"year": 2021}, **content}))
    return root


def write_shards(root: Path) -> Path:
    root.mkdir()
    for split, count, first in (("train", 14, 0), ("val", 6, 100)):
        with tarfile.open(root / f"{split}-0.tar", "w") as tar:
            for index in range(count):
                for ending, content in (("png", png(first + index)), ("cls", b"%d" % (index % 2))):
                    member = tarfile.TarInfo(f"{index}.{ending}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return root


def cifar_pickles(
    label_key: str, names_key: str, names: list[str], counts: tuple[int, int] = (14, 6)
) -> dict[str, bytes]:
    """The content of a training file, a test file and the file of the names."""

    def part(count: int, first: int) -> dict:
        data = np.full((count, 3 * 32 * 32), 255, dtype=np.uint8)
        data[:, 0] = np.arange(count) + first
        data[:, 1] = 0  # for the mean to be another
        return {"data": data, label_key: [index % len(names) for index in range(count)]}

    content = {
        "train": part(counts[0], 1),
        "test": part(counts[1], 101),
        "meta": {names_key: names},
    }
    return {name: pickle.dumps(value, protocol=2) for name, value in content.items()}


def write_cifar(
    root: Path, data: type, patch, names: list[str], counts: tuple[int, int] = (14, 6)
) -> Path:
    """Write the files of a data set of torchvision, and have it expect their digests."""
    contents = cifar_pickles(
        "fine_labels" if "fine" in data.meta["key"] else "labels", data.meta["key"], names, counts
    )
    folder = root / data.base_folder
    train, test, meta = data.train_list[0][0], data.test_list[0][0], data.meta["filename"]
    digests = {}
    for name, content in zip((train, test, meta), contents.values(), strict=True):
        write_file(folder / name, content)
        digests[name] = hashlib.md5(content).hexdigest()
    patch.setattr(data, "train_list", [[train, digests[train]]])
    patch.setattr(data, "test_list", [[test, digests[test]]])
    patch.setattr(data, "meta", {**data.meta, "md5": digests[meta]})
    return root


def hugging_face_splits(**columns):
    """A `DatasetDict` of images and class labels, or of other columns made by (level, label)."""
    import datasets

    if not columns:
        columns = {
            "image": (lambda level, _: {"bytes": png(level), "path": None}, datasets.Image()),
            "label": (lambda _, label: label, datasets.ClassLabel(names=["ant", "bee"])),
        }
    features = datasets.Features({name: feature for name, (_, feature) in columns.items()})

    def split(count: int, first: int):
        return datasets.Dataset.from_dict(
            {n: [make(first + i, i % 2) for i in range(count)] for n, (make, _) in columns.items()},
            features=features,
        )

    return datasets.DatasetDict(train=split(14, 0), test=split(6, 100))


def levels(batches) -> dict[int, int]:
    """The darkest level of each image by its index, where images were neither cut nor scaled."""
    return {
        int(index): int((image.amin() * 255).round())
        for batch in batches
        for index, image in zip(batch.index, batch.images, strict=True)
    }
