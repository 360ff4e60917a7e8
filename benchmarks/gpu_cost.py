"""Measure what the main methods cost on an accelerator, and write results/gpu_cost.json.

    make bench-gpu                  # a minute on one GPU

Training steps of a student at 224 pixels and 1,000 classes, in mixed precision (bfloat16), the
batch on the device already: cross-entropy, the methods, and cross-entropy beside a teacher's
forward, in turn in one process (A B C C B A ...), on one student; ratios are taken within a round.
Memory is the most that the allocator held during a step.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.run import training_step
from softlabels import Distiller, KDLoss, NKDLoss, Teacher, USKDLoss, ZipfLSLoss
from softlabels.experiments.timing import interleaved, ratio
from softlabels.models import build_model
from softlabels.training.config import resolve
from softlabels.training.run_folder import environment

SHAPE = (3, 224, 224)
NUM_CLASSES = 1000
BASELINE = "cross_entropy"
WITH_TEACHER = "cross_entropy + teacher"


@dataclass(frozen=True)
class Pair:
    """A student and its teacher, and the images of a step."""

    student: str
    teacher: str
    batch_size: int


PAIRS = (
    Pair("timm:resnet18", "timm:resnet34", 256),
    Pair("timm:deit_tiny_patch16_224", "timm:deit3_small_patch16_224", 256),
)


def _network(name: str, device: torch.device) -> nn.Module:
    model = build_model(name, num_classes=NUM_CLASSES, in_channels=3, image_size=SHAPE[1:])
    return model.to(device).to(memory_format=torch.channels_last)


def _steps(
    pair: Pair, device: torch.device
) -> tuple[Mapping[str, Callable[[], object]], Mapping[str, str]]:
    """A training step for each method by name, and the name of what each is compared with."""
    torch.manual_seed(0)
    images = torch.randn(pair.batch_size, *SHAPE, device=device)
    images = images.contiguous(memory_format=torch.channels_last)
    target = torch.randint(NUM_CLASSES, (pair.batch_size,), device=device)
    # One student and one teacher for all: other places in memory alone make other step times.
    model, teacher = _network(pair.student, device), Teacher(_network(pair.teacher, device))
    steps: dict[str, Callable[[], object]] = {}
    methods = {
        BASELINE: None,
        "uskd": USKDLoss(),
        "zipf_ls": ZipfLSLoss(),
        "kd": KDLoss(),
        "nkd": NKDLoss(),
    }
    taught = ("kd", "nkd")
    for name, method in methods.items():
        distiller = Distiller(
            model, method, teacher=teacher if name in taught else None, example_shape=SHAPE
        ).to(device)
        steps[name] = training_step(distiller, images, target, half=True)

    def beside_teacher() -> None:
        with torch.autocast(device.type, dtype=torch.bfloat16):
            teacher(images)
        steps[BASELINE]()

    bases = {name: WITH_TEACHER if name in taught else BASELINE for name in methods}
    return {**steps, WITH_TEACHER: beside_teacher}, bases


def _megabytes(step: Callable[[], object], device: torch.device) -> float:
    torch.cuda.reset_peak_memory_stats(device)
    step()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) / 1e6


def costs(pair: Pair, rounds: int, device: torch.device) -> dict[str, Any]:
    """Step times and memory of the methods on one pair."""
    steps, bases = _steps(pair, device)
    seconds = interleaved(steps, rounds=rounds, warmup=5, device=device)
    megabytes = {name: _megabytes(step, device) for name, step in steps.items()}
    return {
        **asdict(pair),
        "rounds": rounds,
        "milliseconds": {n: 1e3 * statistics.median(s) for n, s in seconds.items()},
        "megabytes": megabytes,
        "ratio": {
            name: {
                "over": base,
                **asdict(ratio(seconds[name], seconds[base])),
                "memory": megabytes[name] / megabytes[base],
            }
            for name, base in bases.items()
            if name != base
        },
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Run all measurements and write one file."""
    parser = argparse.ArgumentParser(description="Measure what methods cost on an accelerator.")
    parser.add_argument("--output", type=Path, default=Path("results/gpu_cost.json"))
    parser.add_argument("--rounds", type=int, default=40)
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error("needs a CUDA device, and torch finds none")
    device = torch.device("cuda", torch.cuda.current_device())
    results: dict[str, Any] = {
        "command": "make bench-gpu",
        "environment": environment(resolve({}), device, 1).dump(),
        "precision": "bf16",
        "pairs": [costs(pair, options.rounds, device) for pair in PAIRS],
    }
    results["environment"].pop("command", None)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
