"""Measure whole epochs on CIFAR-100 beside plain training loops: `make bench-epochs DATA=...`.

The data are written to a temporary folder as PNG files in class folders, as people have them. Each
round trains two epochs of a part of the training set in five ways, in turn, and times the second:

* plain: a PyTorch loop over torchvision's ImageFolder, transforms and DataLoader;
* timm: the same loop over timm's loader;
* softlabels as it was: from files by worker processes, float32;
* softlabels, float32: images in memory, else the same;
* softlabels: its defaults, which choose precision and memory format.

One thread computes; where files are read, one more process reads them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timm.data import ImageDataset, create_loader
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader
from torchvision import datasets, transforms

import softlabels
from softlabels.data import open_source
from softlabels.io.records import read_lines
from softlabels.losses import kd_loss
from softlabels.models import build_model
from softlabels.training.config import resolve
from softlabels.training.run_folder import environment
from softlabels.training.schemas import Timing

TEACHER = "timm:resnet56"
STUDENTS = ("timm:resnet20", "timm:resnet8x4")
BATCH_SIZE = 64
TEMPERATURE = 4.0


def write_folder(data: str, folder: Path, images: int) -> None:
    """Write CIFAR-100's first training images, and some test images, as PNG files by class."""
    plain: dict[str, Any] = {"mean": (0.0,) * 3, "std": (1.0,) * 3, "padding": 0, "flip": False}
    source = open_source("cifar100", data, **plain)
    names = source.info.class_names
    views = source.train_views(draw=(0, 0), batch_size=1000, stop=images, device="cpu")
    tests = source.test_batches(batch_size=1000, device="cpu")
    for split, batches in (("train", views), ("test", [next(iter(tests))])):
        for batch in batches:
            for image, label, number in zip(batch.images, batch.target, batch.index, strict=True):
                place = folder / split / names[label]
                place.mkdir(parents=True, exist_ok=True)
                transforms.functional.to_pil_image(image).save(place / f"{number:05}.png")


def plain_loop(
    batches: Callable[[], Iterable[tuple[Tensor, Tensor]]], student: str, teacher: bool
) -> float:
    """Seconds of the second epoch of a loop as one writes it down."""
    torch.manual_seed(0)
    network = build_model(student, num_classes=100).train()
    taught_by = build_model(TEACHER, num_classes=100).eval() if teacher else None
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    seconds = 0.0
    for _ in range(2):
        started = time.perf_counter()
        for images, target in batches():
            logits = network(images)
            loss = functional.cross_entropy(logits, target)
            if taught_by is not None:
                with torch.no_grad():
                    teacher_logits = taught_by(images)
                loss = loss + kd_loss(logits, teacher_logits, temperature=TEMPERATURE)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            loss.item()  # as a progress bar asks for
        seconds = time.perf_counter() - started
    return seconds


def torchvision_loader(folder: Path) -> Callable[[], Iterable[tuple[Tensor, Tensor]]]:
    steps = transforms.Compose(
        [
            transforms.RandomCrop(32, padding=4),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
        ]
    )
    files = datasets.ImageFolder(str(folder / "train"), steps)
    loader = DataLoader(
        files, BATCH_SIZE, shuffle=True, num_workers=1, drop_last=True, persistent_workers=True
    )
    return lambda: loader


def timm_loader(folder: Path) -> Callable[[], Iterable[tuple[Tensor, Tensor]]]:
    loader = create_loader(
        ImageDataset(str(folder / "train")),
        (3, 32, 32),
        BATCH_SIZE,
        is_training=True,
        train_crop_mode="rkrc",  # resized, then a crop
        use_prefetcher=False,
        num_workers=1,
        device=torch.device("cpu"),
    )
    return lambda: loader


def ours(folder: Path, student: str, teacher: bool, **settings: Any) -> float:
    """Seconds of the second epoch of a run of ours, without evaluations."""
    taught: dict[str, Any] = {}
    if teacher:
        taught = {"method": "kd", "teacher": {"name": TEACHER, "check": "off"}}
    with tempfile.TemporaryDirectory() as output:
        data = {"path": str(folder), "workers": 1, "image_size": 32, "augmentation": "crop_flip"}
        softlabels.train(
            {**data, **settings.pop("data", {})},
            student,
            **taught,
            epochs=2,
            eval_every=2,
            batch_size=BATCH_SIZE,
            optimizer={"lr": 0.05, "weight_decay": 5e-4},
            device="cpu",
            threads=1,
            gallery=0,
            analysis=False,
            report=False,
            progress=False,
            output=f"{output}/run",
            **settings,
        )
        return list(read_lines(Path(output) / "run" / "timings.jsonl", Timing))[-1].seconds


def measured(folder: Path, student: str, teacher: bool, images: int, rounds: int) -> dict[str, Any]:
    """Images a second of each way, and its speed over the plain loop of the same round."""
    files = {"data": {"in_memory": False}}
    still = {"precision": "no", "channels_last": False}
    ways: dict[str, Callable[[], float]] = {
        "plain": partial(plain_loop, torchvision_loader(folder), student, teacher),
        "timm": partial(plain_loop, timm_loader(folder), student, teacher),
        "softlabels as it was": partial(ours, folder, student, teacher, **files, **still),
        "softlabels, float32": partial(ours, folder, student, teacher, **still),
        "softlabels": partial(ours, folder, student, teacher),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, run in ways.items():
            seconds[name].append(run())
    trained = images // BATCH_SIZE * BATCH_SIZE
    return {
        "student": student,
        "method": "kd" if teacher else "cross_entropy",
        "teacher": TEACHER if teacher else None,
        "ways": {
            name: {
                "images_per_second": [trained / s for s in times],
                "over_plain": statistics.median(
                    plain / s for plain, s in zip(seconds["plain"], times, strict=True)
                ),
            }
            for name, times in seconds.items()
        },
    }


def main() -> None:
    """Measure all, and write one file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", help="CIFAR-100, in any form that the data source reads")
    parser.add_argument("--output", type=Path, default=Path("results/epochs.json"))
    parser.add_argument("--images", type=int, default=640, help="of an epoch")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--students", nargs="*", default=[*STUDENTS])
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_folder(options.data, folder, options.images)
        rows = [
            measured(folder, student, teacher, options.images, options.rounds)
            for student in options.students
            for teacher in (False, True)
        ]
    results = {
        "command": "make bench-epochs",
        "environment": environment(resolve({"threads": 1}), torch.device("cpu"), 1).dump(),
        "images": options.images,
        "batch_size": BATCH_SIZE,
        "rounds": options.rounds,
        "rows": rows,
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {options.output}")


if __name__ == "__main__":
    main()
