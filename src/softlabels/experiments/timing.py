"""Step times of several distillers, measured side by side in one run."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

__all__ = ["Ratio", "interleaved", "ratio"]

Step = Callable[[], object]


@dataclass(frozen=True)
class Ratio:
    """Time over a baseline's, pair by pair: median, lower and upper quartile of the ratios."""

    median: float
    low: float
    high: float


def interleaved(
    steps: Mapping[str, Step], *, rounds: int, warmup: int = 3, device: torch.device | None = None
) -> dict[str, list[float]]:
    """Run several steps in turn, A B C C B A ..., and time each.

    In turn, because a machine's speed drifts: only times of the same round are compared. Every
    other round runs backwards, so that none always follows the same neighbor. The rounds of the
    warmup are not timed, and the device is waited for after each step.

    Returns:
        Seconds of each step, by name, in the order of the rounds.
    """
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    gc.collect()
    gc.disable()
    try:
        for number in range(-warmup, rounds):
            order = list(steps.items())
            for name, step in order if number % 2 else reversed(order):
                started = time.perf_counter()
                step()
                if device is not None and device.type == "cuda":
                    torch.cuda.synchronize(device)
                if number >= 0:
                    seconds[name].append(time.perf_counter() - started)
    finally:
        gc.enable()
    return seconds


def ratio(seconds: Sequence[float], baseline: Sequence[float]) -> Ratio:
    """Times over a baseline's, from the same rounds."""
    ratios = [a / b for a, b in zip(seconds, baseline, strict=True)]
    low, median, high = statistics.quantiles(ratios, n=4)
    return Ratio(median, low, high)
