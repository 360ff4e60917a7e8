"""The arithmetic of a run on ImageNet-1k: formulas, no measurements; see docs/contributing.

What is assumed stands in one place below; what was measured is passed in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from timm import create_model
from torch.utils.flop_counter import FlopCounterMode

from softlabels.distill.answers import bytes_per_view

IMAGES = 1_281_167  # ImageNet-1k's training set
CLASSES = 1000
PIXELS = 224
JPEG_BYTES = 115_000  # ILSVRC2012_img_train.tar, 147.9 GB, over its images
PER_GPU = 128  # images of a GPU's share of a step
CHECKPOINT_SPEED = 500e6  # bytes per second that a checkpoint is written with

# Training speed of one GPU, images per second: an assumption, to be replaced by one's own.
ASSUMED_SPEED = {
    "resnet18": 3000,
    "resnet50": 1200,
    "vit_small_patch16_224": 1200,
    "vit_base_patch16_224": 450,
}
TEACHERS = {
    "resnet18": "resnet34",
    "resnet50": "regnety_160",
    "vit_small_patch16_224": "vit_base_patch16_224",
}
CLUSTERS = {"8 GPUs, one node": (1, 8), "64 GPUs, 8 nodes": (8, 8)}


@dataclass(frozen=True)
class Network:
    """Parameters, and multiply-adds of one image's forward."""

    parameters: int
    multiply_adds: int


@cache
def network(name: str) -> Network:
    """Counted on timm's network itself, without any memory for its weights."""
    with torch.device("meta"):
        model = create_model(name).eval()
        image = torch.empty(1, 3, PIXELS, PIXELS)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(image)
    return Network(sum(p.numel() for p in model.parameters()), counter.get_total_flops() // 2)


def _table(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(heading)} |", f"| --- |{' ---: |' * (len(heading) - 1)}"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def _short(name: str) -> str:
    return name.removesuffix("_patch16_224")


def images_and_bytes(decoded_per_core: float) -> str:
    """What storage, processors and buses must deliver."""
    rows = []
    for where, (nodes, per_node) in CLUSTERS.items():
        for name, speed in ASSUMED_SPEED.items():
            total = speed * nodes * per_node
            of_node = speed * per_node
            rows.append(
                [
                    where,
                    _short(name),
                    f"{total:,}",
                    f"{total * JPEG_BYTES / 1e9:.2f}",
                    f"{of_node * JPEG_BYTES / 1e9:.2f}",
                    f"{of_node / decoded_per_core:.0f}",
                    f"{of_node * 3 * PIXELS * PIXELS * 4 / 1e9:.1f}",
                    f"{IMAGES / total / 60:.1f}",
                ]
            )
    heading = [
        "where", "student", "images/s", "storage GB/s", "GB/s a node", "cores a node",
        "to the GPUs GB/s a node", "epoch min",
    ]  # fmt: skip
    return _table(heading, rows)


def network_bytes() -> str:
    """What an all-reduce of the gradients moves."""
    rows = []
    for where, (nodes, per_node) in CLUSTERS.items():
        count = nodes * per_node
        for name, speed in ASSUMED_SPEED.items():
            size = 4 * network(name).parameters
            step = 2 * (count - 1) / count * size
            steps = speed / PER_GPU
            rows.append(
                [
                    where,
                    _short(name),
                    f"{network(name).parameters / 1e6:.2f}",
                    f"{step / 1e6:.0f}",
                    f"{steps:.1f}",
                    f"{step * steps / 1e9:.2f}",
                    f"{8 * step * steps / 1e9:.1f}" if nodes > 1 else "0",
                ]
            )
    heading = [
        "where", "student", "parameters M", "MB a step and GPU", "steps/s", "GB/s a GPU",
        "Gbit/s a node's link",
    ]  # fmt: skip
    return _table(heading, rows)


def memory() -> str:
    """Bytes of the state that each GPU holds, and of a checkpoint."""
    rows = []
    for name in ASSUMED_SPEED:
        size = 4 * network(name).parameters / 1e6
        sgd, adamw = 2 * size, 3 * size
        rows.append(
            [
                _short(name),
                f"{size:.0f}",
                f"{3 * size:.0f}",
                f"{4 * size:.0f}",
                f"{sgd:.0f}",
                f"{adamw + size:.0f}",
                f"{1e6 * (adamw + size) / CHECKPOINT_SPEED:.1f}",
            ]
        )
    heading = [
        "student", "weights MB", "SGD: a GPU holds MB", "AdamW: a GPU holds MB",
        "SGD: checkpoint MB", "AdamW and EMA: checkpoint MB", "its write s",
    ]  # fmt: skip
    return _table(heading, rows)


def teachers() -> str:
    """What a teacher's forward costs beside the student's training step."""
    rows = []
    for student, teacher in TEACHERS.items():
        own, other = network(student).multiply_adds, network(teacher).multiply_adds
        rows.append(
            [
                _short(student),
                _short(teacher),
                f"{own / 1e9:.2f}",
                f"{other / 1e9:.2f}",
                f"{other / (3 * own):.2f}",
            ]
        )
    heading = [
        "student", "teacher", "student's forward G", "teacher's forward G", "teacher / student step"
    ]  # fmt: skip
    return _table(heading, rows)


def caches() -> str:
    """Sizes of a teacher cache."""
    rows = []
    for top in (5, 10, 20, 50, 1000):
        view = bytes_per_view(CLASSES, top)
        rows.append(
            [
                str(top),
                f"{view:,}",
                f"{view:,}",
                f"{IMAGES * view / 1e9:.2f}",
                f"{10 * IMAGES * view / 1e9:.1f}",
                f"{100 * IMAGES * view / 1e9:.0f}",
            ]
        )
    heading = [
        "kept logits k", "bytes a view", "MB per million images and draw", "ImageNet, 1 draw GB",
        "10 draws GB", "100 draws GB",
    ]  # fmt: skip
    return _table(heading, rows)


def sections(decoded_per_core: float) -> Mapping[str, str]:
    """The tables of the page by name."""
    return {
        "plan-images": images_and_bytes(decoded_per_core),
        "plan-network": network_bytes(),
        "plan-memory": memory(),
        "plan-teachers": teachers(),
        "plan-caches": caches(),
    }
