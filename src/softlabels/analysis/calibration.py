"""How far a network's confidence can be trusted, and what a temperature repairs of it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from scipy import optimize
from torch import Tensor
from torch.nn import functional
from torchmetrics.classification import MulticlassCalibrationError

from softlabels.data.randomness import permutation

__all__ = ["NUM_BINS", "cross_fitted", "fit_temperature", "reliability"]

NUM_BINS = 15
_LOWEST, _HIGHEST = 0.05, 20.0  # temperatures
_SMALLEST_HALF = 2  # images
_PART = 2**22  # logits that are in float64 at a time


def reliability(confidence: Tensor, correct: Tensor) -> dict[str, list[Any]]:
    """Mean confidence and accuracy in 15 equal-width bins, as in a reliability diagram.

    A bin holds its lower edge, the last one both. (torchmetrics' error of calibration has a bin
    of its own for a confidence of exactly 1.)

    Args:
        confidence: [N] largest probabilities; those that are not finite are in no bin.
        correct: [N] bool, whether that class is the true one.

    Returns:
        `confidence` and `accuracy` of each bin, 0..1 or None where it is empty, and its `count`.
    """
    finite = confidence.isfinite()
    confidence, right = confidence[finite], correct[finite].double()
    edges = torch.linspace(0, 1, NUM_BINS + 1, dtype=confidence.dtype)
    places = (torch.bucketize(confidence, edges, right=True) - 1).clamp(0, NUM_BINS - 1)
    count = torch.bincount(places, minlength=NUM_BINS)

    def means(values: Tensor) -> list[float | None]:
        sums = torch.bincount(places, weights=values.double(), minlength=NUM_BINS)
        pairs = zip(sums.tolist(), count.tolist(), strict=True)
        return [total / number if number else None for total, number in pairs]

    return {"confidence": means(confidence), "accuracy": means(right), "count": count.tolist()}


def fit_temperature(logits: Tensor, target: Tensor) -> float:
    """The temperature in 0.05..20 by which logits are divided for the smallest mean NLL.

    NLL has one minimum in it; where all images are classified rightly, it is at the lower end or
    wherever NLL is zero in float64.

    Args:
        logits: [N, C], finite.
        target: [N] class indices.
    """
    found = optimize.minimize_scalar(
        lambda log_temperature: _mean_nll(logits, target, math.exp(log_temperature)),
        bounds=(math.log(_LOWEST), math.log(_HIGHEST)),
        method="bounded",
    )
    return math.exp(found.x)


def cross_fitted(logits: Tensor, target: Tensor) -> dict[str, float] | None:
    """NLL and ECE under a temperature that was fitted on other images.

    The images are dealt into two halves in an order that is drawn once and for all (in many test
    sets the classes take turns, so that every second image is of every second class). The
    temperature of each half is used on the other one.

    Args:
        logits: [N, C].
        target: [N] class indices.

    Returns:
        `value`, the mean of both temperatures; `nll` in nats and `ece` in percent (15 bins), over
        all images. None with fewer than 4 images, or if a logit is not finite.
    """
    if len(target) < 2 * _SMALLEST_HALF or not bool(logits.isfinite().all()):
        return None
    order = permutation(0, 0, len(target))
    halves = [half.sort().values for half in (order[::2], order[1::2])]
    temperatures = [fit_temperature(logits[half], target[half]) for half in halves]
    # One process alone does this, so there is nobody to sum over.
    ece = MulticlassCalibrationError(logits.shape[1], n_bins=NUM_BINS, sync_on_compute=False)
    nll = 0.0
    for half, temperature in zip(halves, reversed(temperatures), strict=True):
        nll += _mean_nll(logits[half], target[half], temperature) * len(half)
        for rows, labels in _parts(logits[half], target[half]):
            ece.update((rows / temperature).softmax(1).float(), labels)
    return {
        "value": sum(temperatures) / 2,
        "nll": nll / len(target),
        "ece": 100 * float(ece.compute()),
    }


def _parts(logits: Tensor, target: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Some rows at a time, in float64."""
    size = max(1, _PART // logits.shape[1])
    for rows, labels in zip(logits.split(size), target.split(size), strict=True):
        yield rows.double(), labels


def _mean_nll(logits: Tensor, target: Tensor, temperature: float) -> float:
    sums = (
        float(functional.cross_entropy(rows / temperature, labels, reduction="sum"))
        for rows, labels in _parts(logits, target)
    )
    return math.fsum(sums) / len(target)
