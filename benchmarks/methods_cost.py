"""Measure what each method costs over cross-entropy, and write results/methods_cost.json.

    make bench-methods              # about 10 minutes on one thread

Training steps of all methods run in turn in one process (A B C C B A ...), on one student and one
teacher, from a batch that is there already; ratios are taken within a round. Reading and
augmenting images is not in them: methods that read further images of a batch pay for these besides.
Memory is the CPU allocator's, as torch.profiler reports it: the largest sum of live allocations in
a step, to which what stays between steps is added (weights, gradients, momentum, the teacher,
what a method remembers).

For USKD and Zipf's LS the method's own part is also timed by itself, beside whole steps of
ResNet-18 at 224 pixels: a difference of two steps of ten seconds shows no percent.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn

from benchmarks.losses import check_memory_counter, extra_memory
from softlabels.data import Batch, mixup_extras
from softlabels.distill.distiller import Distiller
from softlabels.distill.trainable import Trainable
from softlabels.experiments.timing import Ratio, interleaved, ratio
from softlabels.inputs import PeerLogits
from softlabels.losses import METHODS, Method
from softlabels.models import build_model
from softlabels.training.config import resolve
from softlabels.training.run_folder import environment

Step: TypeAlias = Callable[[], tuple[Tensor, ...]]

BASELINE = "cross_entropy"
IMAGES = 50_000  # of an epoch, and of what methods remember
OWN_PART_BOUND = 0.015


@dataclass(frozen=True)
class Pair:
    """A student and its teacher, and a batch."""

    student: str
    teacher: str
    in_channels: int
    image_size: int
    num_classes: int
    batch_size: int
    kinds: tuple[str, ...]


CNN = Pair(
    "timm:resnet8x4", "timm:resnet32x4", 3, 32, 100, 32, tuple(k for k in METHODS if k != "vitkd")
)
VIT = Pair(
    "timm:vit_mini_patch4_32",
    "timm:vit_tiny_patch4_32",
    3,
    32,
    100,
    64,
    ("kd", "nkd", "uskd", "zipf_ls", "vitkd"),
)


def _network(name: str, pair: Pair) -> nn.Module:
    return build_model(
        name,
        num_classes=pair.num_classes,
        in_channels=pair.in_channels,
        image_size=(pair.image_size, pair.image_size),
    )


def _batch(pair: Pair) -> Batch:
    torch.manual_seed(0)
    shape = (pair.batch_size, pair.in_channels, pair.image_size, pair.image_size)
    batch = Batch(
        torch.randn(shape),
        torch.randint(pair.num_classes, (pair.batch_size,)),
        torch.randperm(IMAGES)[: pair.batch_size],
    )
    batch = mixup_extras(batch, alpha=0.4, seed=0, epoch=0, step=0)
    batch.extras.update(second_view=torch.randn(shape), partner=torch.randn(shape))
    return batch


def _method(kind: str) -> Method | None:
    if kind == BASELINE:
        return None
    settings = resolve({"method": {"kind": kind}, "teacher": {"name": "timm:resnet8"}})
    keeps = "num_samples" in type(settings.method).model_fields
    return METHODS[kind](**({"num_samples": IMAGES} if keeps else {}))


def _distiller(kind: str, pair: Pair, teacher: nn.Module) -> Distiller:
    torch.manual_seed(0)
    method = _method(kind)
    inputs = [] if method is None else method.inputs.values()
    needs_peer = any(isinstance(kind, PeerLogits) for kind in inputs)
    return Distiller(
        _network(pair.student, pair),
        method,
        teacher=teacher if any(kind.reads_teacher for kind in inputs) else None,
        peer=_network(pair.student, pair) if needs_peer else None,
        example_shape=(pair.in_channels, pair.image_size, pair.image_size),
    )


def _step(distiller: Distiller, batch: Batch) -> Callable[[], tuple[Tensor, ...]]:
    optimizer = torch.optim.SGD(distiller.parameters(), lr=1e-3, momentum=0.9)
    extras = {"index": batch.index, **batch.extras}

    def step() -> tuple[Tensor, ...]:
        distiller(batch.images, batch.target, **extras).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        distiller.after_step()
        return ()

    return step


def _resident(distiller: Distiller) -> int:
    """Bytes that stay between steps: what is trained (weight, momentum), and what is frozen."""
    trained = sum(2 * p.nbytes for p in distiller.parameters())
    buffers = sum(b.nbytes for b in distiller.trainable.buffers())
    teacher = distiller.teacher
    frozen = sum(p.nbytes for p in teacher.parameters()) if isinstance(teacher, nn.Module) else 0
    return trained + buffers + frozen


def costs(pair: Pair, rounds: int) -> dict[str, Any]:
    """Step times and memory of all methods on one pair."""
    teacher = _network(pair.teacher, pair)
    batch = _batch(pair)
    distillers = {kind: _distiller(kind, pair, teacher) for kind in (BASELINE, *pair.kinds)}
    steps = {kind: _step(distiller, batch) for kind, distiller in distillers.items()}
    seconds = interleaved(steps, rounds=rounds, warmup=2)
    memory = {kind: extra_memory(steps[kind]) + _resident(distillers[kind]) for kind in steps}
    per_epoch = IMAGES / pair.batch_size
    ones = [1 / per_epoch] * rounds
    of_student = sum(p.numel() for p in distillers[BASELINE].parameters())
    return {
        "student": pair.student,
        "teacher": pair.teacher,
        "image_size": pair.image_size,
        "batch_size": pair.batch_size,
        "rounds": rounds,
        "methods": {
            kind: {
                "seconds_per_epoch": asdict(ratio(seconds[kind], ones)),
                "time": asdict(ratio(seconds[kind], seconds[BASELINE])),
                "megabytes": memory[kind] / 1e6,
                "memory": memory[kind] / memory[BASELINE],
                "learned_parameters": sum(p.numel() for p in distillers[kind].parameters())
                - of_student,
                "remembered_megabytes": sum(m.num_bytes() for m in distillers[kind].memories())
                / 1e6,
                "reads_teacher": distillers[kind].teacher is not None,
            }
            for kind in steps
        },
    }


def _own_part(distiller: Distiller, images: Tensor, target: Tensor) -> Callable[[], None]:
    """The method's part of a step by itself: from features and logits to their gradients."""
    core = cast("Trainable", distiller.trainable)
    core.tap.enabled = True
    features = {k: v.detach() for k, v in _features(core, images).items()}
    with torch.no_grad():
        logits = core.student(images)
    method = distiller.method
    assert method is not None

    def run() -> None:
        own_logits = logits.detach().requires_grad_()
        leaves = {k: v.detach().requires_grad_() for k, v in features.items()}
        values: dict[str, Any] = {
            name: provider(core.student, own_logits, leaves)
            for name, provider in core.providers.items()
        }
        method(**values, target=target).backward()

    return run


def _features(core: Trainable, images: Tensor) -> Mapping[str, Tensor]:
    with torch.no_grad():
        core.student(images)
    features = core.tap.pop()
    core.tap.enabled = False
    return features


def own_parts(rounds: int) -> dict[str, Any]:
    """USKD's and Zipf's LS's own parts over a training step of ResNet-18 at 224 pixels."""
    pair = Pair("timm:resnet18", "", 3, 224, 1000, 32, ("uskd", "zipf_ls"))
    batch = _batch(pair)
    runs: dict[str, Callable[[], object]] = {}
    for kind in (BASELINE, *pair.kinds):
        distiller = _distiller(kind, pair, nn.Identity())
        distiller.train()
        runs[kind] = _step(distiller, batch)
        if kind != BASELINE:
            runs[f"{kind}/own part"] = _own_part(distiller, batch.images, batch.target)
    seconds = interleaved(runs, rounds=rounds, warmup=1)
    baseline = seconds[BASELINE]

    def over(name: str) -> dict[str, float]:
        found: Ratio = ratio(seconds[name], baseline)
        return asdict(found)

    return {
        "student": pair.student,
        "image_size": pair.image_size,
        "batch_size": pair.batch_size,
        "rounds": rounds,
        "step_seconds": asdict(ratio(baseline, [1.0] * rounds)),
        "bound": OWN_PART_BOUND,
        "methods": {
            kind: {
                "own_part": over(f"{kind}/own part"),
                "whole_step": over(kind),
                "held": over(f"{kind}/own part")["median"] <= OWN_PART_BOUND,
            }
            for kind in pair.kinds
        },
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Run all measurements and write one file."""
    parser = argparse.ArgumentParser(description="Measure what each method costs.")
    parser.add_argument("--output", type=Path, default=Path("results/methods_cost.json"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--large-rounds", type=int, default=5, help="of steps at 224 pixels")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    check_memory_counter()
    begin = time.perf_counter()
    results: dict[str, Any] = {
        "command": "make bench-methods",
        "environment": environment(resolve({"threads": 1}), torch.device("cpu"), 1).dump(),
        "epoch_images": IMAGES,
    }
    results["environment"].pop("command", None)
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "cnn": lambda: costs(CNN, options.rounds),
        "vit": lambda: costs(VIT, options.rounds),
        "own_parts": lambda: own_parts(options.large_rounds),
    }
    for name, measure in parts.items():
        results[name] = measure()
        print(f"{time.perf_counter() - begin:5.0f} s  {name}", flush=True)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
