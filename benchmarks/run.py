"""Measure what the methods and the input pipeline cost: `make bench`, one thread.

Each figure is a ratio of steps that ran in turn in one process (A B C C B A ...), the median and
the quartiles over the rounds; single times mean little on a shared machine.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from softlabels import Distiller, KDLoss, NKDLoss, Teacher, USKDLoss, ZipfLSLoss
from softlabels.data import Batch, open_source
from softlabels.experiments.timing import Ratio, interleaved, ratio
from softlabels.losses import Method
from softlabels.models import build_model
from softlabels.training.config import resolve
from softlabels.training.run_folder import environment

ROUNDS = 30


def _as_json(value: Ratio) -> dict[str, float]:
    return {"median": value.median, "low": value.low, "high": value.high}


def training_step(
    distiller: Distiller, images: Tensor, target: Tensor, *, half: bool = False
) -> Callable[[], None]:
    """A step on one batch, with SGD; `half`: under autocast to bfloat16."""
    optimizer = torch.optim.SGD(distiller.parameters(), lr=1e-3, momentum=0.9)
    distiller.train()

    def step() -> None:
        with torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=half):
            loss = distiller(images, target).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def overhead(student: str, channels: int, rounds: int, batch_size: int) -> dict[str, Any]:
    """Step time of each method over cross-entropy's, on one fixed batch."""
    images = torch.randn(batch_size, channels, 32, 32)
    target = torch.randint(0, 100, (batch_size,))
    shape = (channels, 32, 32)
    teacher_name = "resnet14x4_glyphs" if channels == 1 else "resnet8x4"

    torch.manual_seed(0)
    # One student and one teacher for all: other places in memory alone make other step times.
    model = build_model(student, num_classes=100, in_channels=channels)
    teacher = Teacher(build_model(teacher_name, num_classes=100, in_channels=channels))

    def step(method: Method | None) -> Callable[[], None]:
        taught = isinstance(method, KDLoss | NKDLoss)
        return training_step(
            Distiller(model, method, teacher=teacher if taught else None, example_shape=shape),
            images,
            target,
        )

    plain = step(None)

    def plain_and_teacher() -> None:
        teacher(images)
        plain()

    steps = {
        "cross_entropy": plain,
        "uskd": step(USKDLoss()),
        "zipf_ls": step(ZipfLSLoss()),
        "cross_entropy + teacher": plain_and_teacher,
        "nkd": step(NKDLoss()),
        "kd": step(KDLoss()),
    }
    seconds = interleaved(steps, rounds=rounds)
    bases = {"nkd": "cross_entropy + teacher", "kd": "cross_entropy + teacher"}
    return {
        "student": student,
        "batch_size": batch_size,
        "rounds": rounds,
        "milliseconds": {n: 1e3 * statistics.median(s) for n, s in seconds.items()},
        "ratio": {
            name: {
                "over": bases.get(name, "cross_entropy"),
                **_as_json(ratio(seconds[name], seconds[bases.get(name, "cross_entropy")])),
            }
            for name in ("uskd", "zipf_ls", "nkd", "kd")
        },
    }


def pipeline(student: str, rounds: int, batch_size: int) -> dict[str, Any]:
    """Speed of training from the in-memory source over the same step on one fixed batch."""
    source = open_source("glyphs100")
    torch.manual_seed(0)
    distiller = Distiller(build_model(student, num_classes=100, in_channels=1))
    optimizer = torch.optim.SGD(distiller.parameters(), lr=1e-3, momentum=0.9)
    epochs = iter(range(1_000_000))

    def endless() -> Iterator[Batch]:
        while True:
            yield from source.train_batches(
                seed=0, epoch=next(epochs), batch_size=batch_size, device="cpu"
            )

    batches = endless()
    fixed = next(batches)

    def step(batch: Batch) -> None:
        distiller(batch.images, batch.target).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    seconds = interleaved(
        {"fixed": lambda: step(fixed), "source": lambda: step(next(batches))}, rounds=rounds
    )
    return {
        "student": student,
        "batch_size": batch_size,
        "rounds": rounds,
        "milliseconds": {n: 1e3 * statistics.median(s) for n, s in seconds.items()},
        "speed_ratio": _as_json(ratio(seconds["fixed"], seconds["source"])),
    }


def _seconds(command: list[str]) -> float:
    started = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - started


def start_up(rounds: int) -> dict[str, Any]:
    """Seconds of imports and of `softlabels --help`, as whole processes, in turn."""
    everything = "from softlabels import *"
    commands = {
        "import torch": [sys.executable, "-c", "import torch"],
        "import torch, softlabels": [sys.executable, "-c", "import torch, softlabels"],
        "import everything": [sys.executable, "-c", everything],
        "softlabels --help": [sys.executable, "-m", "softlabels", "--help"],
    }
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    for number in range(-1, rounds):
        for name, command in commands.items():
            took = _seconds(command)
            if number >= 0:
                seconds[name].append(took)
    beyond = [
        a - b for a, b in zip(seconds["import everything"], seconds["import torch"], strict=True)
    ]
    return {
        "seconds": {name: statistics.median(times) for name, times in seconds.items()},
        "import everything beyond torch": statistics.median(beyond),
    }


def main() -> None:
    """Run all measurements and write one file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("results/benchmarks.json"))
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rounds: int = options.rounds
    results = {
        "command": "make bench",
        "environment": environment(resolve({"threads": 1}), torch.device("cpu"), 1).dump(),
        "overhead": [
            overhead("resnet8_glyphs", 1, 4 * rounds, 128),
            overhead("resnet8x4", 3, 2 * rounds, 32),
        ],
        "pipeline": [
            pipeline("resnet8_glyphs", 4 * rounds, 128),
            pipeline("resnet8x4", rounds, 32),
        ],
        "start_up": start_up(max(3, rounds // 6)),
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {options.output} ({platform.processor() or platform.machine()})")


if __name__ == "__main__":
    main()
