"""Measure how fast larger photographs are read and augmented: `make bench-data DATA=...`.

One process on one core reads JPEG files, crops and resizes to 224 pixels, mirrors, normalizes and
collates batches, in turn by

* softlabels: with a CPU as the device;
* softlabels, as bytes: what its worker processes do, without mirroring and normalizing, which an
  accelerator does by itself;
* timm: its `create_loader`, with its augmentation for training;
* torchvision: ImageFolder with Pillow, the classic transforms, and torch's DataLoader;
* torchvision, tensors: its decoder and the second generation of its transforms, on bytes;
* decoding and resizing: the last way's two steps in a plain loop, and nothing else;
* our decoding and resizing: the same with our two steps.

Each is given no worker process, so that one core does all of the work.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, cast

import torch
from PIL import Image
from timm.data import ImageDataset, create_loader
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision import datasets, transforms
from torchvision.io import ImageReadMode, decode_jpeg, read_file
from torchvision.transforms import v2

from softlabels.data import open_source
from softlabels.data.decoding import read_rgb
from softlabels.data.extra_views import Reading
from softlabels.data.image_source import ImageSource
from softlabels.data.transforms import ImageSettings, evaluation_geometry, training_transform
from softlabels.data.workers import ImageReader, ReaderSettings
from softlabels.training.config import resolve
from softlabels.training.run_folder import environment

SIZE, BATCH_SIZE = 224, 64
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
Way = Callable[[], Iterable[object]]


def decoded(path: str) -> Tensor:
    pixels: Tensor = decode_jpeg(read_file(path), mode=ImageReadMode.RGB)
    return pixels


def ways(folder: Path) -> dict[str, Way]:
    """A pass over the photographs in each way."""
    source = open_source("folder", str(folder), image_size=SIZE, workers=0, in_memory=False)
    images = cast("ImageSource", source).images
    transform = training_transform(
        ImageSettings(image_size=SIZE, augmentation="random_resized_crop")
    )

    def ours() -> Iterable[object]:
        return source.train_batches(seed=0, epoch=0, batch_size=BATCH_SIZE, device="cpu")

    def as_bytes() -> Iterable[object]:
        reading = Reading("train")
        steps = torch.arange(len(paths)).split(BATCH_SIZE)
        reader = ImageReader(images, {"train": transform}, ReaderSettings(workers=0))
        return reader.read(([(reading, int(i)) for i in step] for step in steps), pin=False)

    timm = create_loader(
        ImageDataset(str(folder / "train")),
        (3, SIZE, SIZE),
        BATCH_SIZE,
        is_training=True,
        use_prefetcher=False,
        num_workers=0,
        persistent_workers=False,
        device=torch.device("cpu"),
    )
    classic = transforms.Compose(
        [
            transforms.RandomResizedCrop(SIZE),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )
    crop = v2.RandomResizedCrop(SIZE)
    tensors = v2.Compose(
        [
            crop,
            v2.RandomHorizontalFlip(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, STD),
        ]
    )
    of_pillow = datasets.ImageFolder(str(folder / "train"), classic)
    of_tensors = datasets.ImageFolder(str(folder / "train"), tensors, loader=decoded)
    paths = [path for path, _ in of_pillow.samples][: len(of_pillow) // BATCH_SIZE * BATCH_SIZE]
    return {
        "softlabels": ours,
        "timm": lambda: timm,
        "torchvision": lambda: DataLoader(of_pillow, BATCH_SIZE, shuffle=True, drop_last=True),
        "torchvision, tensors": lambda: DataLoader(
            of_tensors, BATCH_SIZE, shuffle=True, drop_last=True
        ),
        "softlabels, as bytes": as_bytes,
        "decoding and resizing": lambda: (crop(decoded(path)) for path in paths),
        "our decoding and resizing": lambda: (transform.geometry(read_rgb(p)) for p in paths),
    }


def differences(paths: list[Path]) -> dict[str, float]:
    """How far a photograph's pixels are from Pillow's, in levels of 255."""
    as_pillow = transforms.Compose([transforms.Resize(256), transforms.CenterCrop(SIZE)])
    geometry = evaluation_geometry(SIZE, interpolation="bilinear", crop_fraction=0.875)
    largest, mean = [], []
    for path in paths:
        with Image.open(path) as image:
            theirs = transforms.functional.pil_to_tensor(as_pillow(image.convert("RGB")))
        difference = (geometry(read_rgb(str(path))).int() - theirs.int()).abs().float()
        largest.append(difference.max().item())
        mean.append(difference.mean().item())
    return {"largest": max(largest), "mean": statistics.mean(mean)}


def main() -> None:
    """Measure all, and write one file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path, help="a folder of JPEG photographs")
    parser.add_argument("--output", type=Path, default=Path("results/reading.json"))
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    photographs = sorted(options.data.rglob("*.jpg"))
    if len(photographs) < BATCH_SIZE:
        parser.error(f"{options.data} must hold {BATCH_SIZE} .jpg files, got {len(photographs)}")
    torch.set_num_threads(1)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        for number, path in enumerate(photographs):
            for split in ("train", "val"):
                link = folder / split / f"class{number % 2}" / path.name
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(path.resolve())
        passes = ways(folder)
        seconds: dict[str, list[float]] = {name: [] for name in passes}
        for number in range(options.rounds + 1):
            for name, make in passes.items():
                started = time.perf_counter()
                for _ in make():
                    pass
                if number:  # the first round warms up
                    seconds[name].append(time.perf_counter() - started)
    images = len(photographs) // BATCH_SIZE * BATCH_SIZE
    ours = seconds["softlabels"]
    results: dict[str, Any] = {
        "command": "make bench-data",
        "environment": environment(resolve({"threads": 1}), torch.device("cpu"), 1).dump(),
        "images": images,
        "size": SIZE,
        "batch_size": BATCH_SIZE,
        "rounds": options.rounds,
        "difference_from_pillow": differences(photographs),
        "ways": {
            name: {
                "images_per_second": [images / s for s in times],
                # How often ours reads an image while this way reads one.
                "softlabels_over_this": [t / o for t, o in zip(times, ours, strict=True)],
            }
            for name, times in seconds.items()
        },
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    for name, way in results["ways"].items():
        speed = statistics.median(way["images_per_second"])
        over = statistics.median(way["softlabels_over_this"])
        print(f"{name:24} {speed:6.0f} images/s, softlabels is {over:.2f} times as fast")
    print(results["difference_from_pillow"])


if __name__ == "__main__":
    main()
