"""Measure which precision and memory format make which network's step fast: `make bench-precision`.

Forward, backward and SGD of fifteen networks on one fixed batch, one thread: float32 as it is, with
channels last, in bfloat16 under autocast, and with both; in turn in one process. The rule of
`softlabels.training.precision` should choose what is within a tenth of the fastest.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from softlabels.experiments.timing import interleaved, ratio
from softlabels.models import build_model
from softlabels.training.config import resolve
from softlabels.training.precision import with_precision
from softlabels.training.run_folder import environment

# Pixels and batch size of each.
NETWORKS = {
    "timm:resnet8_glyphs": (32, 128),
    "timm:resnet8": (32, 128),
    "timm:resnet20": (32, 64),
    "timm:resnet8x4": (32, 64),
    "timm:wrn_16_2": (32, 64),
    "timm:shufflenetv1_cifar": (32, 64),
    "timm:shufflenetv2_cifar": (32, 64),
    "timm:mobilenetv2_050_cifar": (32, 64),
    "timm:resnet18": (128, 8),
    "timm:regnetx_002": (128, 16),
    "timm:densenet121": (128, 4),
    "timm:mobilenetv3_small_100": (128, 16),
    "timm:efficientnet_lite0": (128, 8),
    "timm:convnext_atto": (128, 8),
    "timm:vit_tiny_patch16_224": (224, 4),
}
WAYS = {
    "float32": (False, False),
    "channels last": (False, True),
    "bfloat16": (True, False),
    "both": (True, True),
}


def _step(name: str, pixels: int, batch_size: int, half: bool, last: bool) -> Callable[[], None]:
    torch.manual_seed(0)
    network = build_model(name, num_classes=100).train()
    images = torch.randn(batch_size, 3, pixels, pixels)
    if last:
        network.to(memory_format=torch.channels_last)
        images = images.contiguous(memory_format=torch.channels_last)
    target = torch.randint(0, 100, (batch_size,))
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-3, momentum=0.9)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            logits = network(images)
        functional.cross_entropy(logits.float(), target).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def measured(name: str, rounds: int) -> dict[str, Any]:
    """Speed of each way over plain float32, and what the rule chooses for this network."""
    pixels, batch_size = NETWORKS[name]
    network = build_model(name, num_classes=100)
    steps = {way: _step(name, pixels, batch_size, half, last) for way, (half, last) in WAYS.items()}
    seconds = interleaved(steps, rounds=rounds)
    rule = with_precision(resolve({}), network, torch.device("cpu"))
    chosen = (rule.precision == "bf16", rule.channels_last is True)
    speeds = {way: ratio(seconds["float32"], times) for way, times in seconds.items()}
    return {
        "network": name,
        "pixels": pixels,
        "batch_size": batch_size,
        "milliseconds": 1e3 * statistics.median(seconds["float32"]),
        "speed": {
            way: {"median": speed.median, "low": speed.low, "high": speed.high}
            for way, speed in speeds.items()
        },
        "chosen": next(way for way, how in WAYS.items() if how == chosen),
    }


def main() -> None:
    """Measure all networks, and write one file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("results/precision.json"))
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--networks", nargs="*", default=[*NETWORKS], choices=[*NETWORKS])
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = {
        "command": "make bench-precision",
        "environment": environment(resolve({"threads": 1}), torch.device("cpu"), 1).dump(),
        "rounds": options.rounds,
        "networks": [measured(name, options.rounds) for name in options.networks],
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {options.output}")


if __name__ == "__main__":
    main()
