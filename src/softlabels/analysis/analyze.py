"""A look at a trained network: one pass over the test set, for a report."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from softlabels.analysis.calibration import cross_fitted, reliability
from softlabels.analysis.features import FirstFeatures, classifier_inputs
from softlabels.analysis.zipf import FITTED_RANKS, MeanSortedSoftmax, zipf_fit
from softlabels.data import DataInfo, DataSource
from softlabels.data.randomness import permutation
from softlabels.distill.teacher import Teacher, Teachers

__all__ = ["Analyzed", "analyze"]

_MOST_CONFUSIONS = 5000
_MEMORY = 2**30  # bytes

Autocast = Callable[[], AbstractContextManager[None]]


@dataclass(frozen=True)
class Analyzed:
    """What a pass over the test set shows.

    Attributes:
        content: Of analysis.json.
        predictions: Of predictions.npz, by name; the images in the order of the test set.
    """

    content: dict[str, Any]
    predictions: dict[str, np.ndarray[Any, Any]]


@dataclass(frozen=True)
class _Seen:
    """What the pass gathers; images are in the order of the test set.

    Attributes:
        answers: Of all N images `index`, `target`, `predicted` (the first class), `confidence`
            (its probability, float32) and, with a teacher, `teacher_predicted`; each [N].
        held: Of all images or a part of them `index`, `target` and `logits`, [M, C] float32.
        mean_sorted: [R], the mean sorted softmax.
        features: Of a few images, in a plane.
    """

    answers: dict[str, Tensor]
    held: dict[str, Tensor]
    mean_sorted: Tensor
    features: dict[str, Any] | None


def analyze(
    network: nn.Module,
    source: DataSource,
    *,
    batch_size: int,
    device: torch.device,
    autocast: Autocast = nullcontext,
    teacher: Teacher | Teachers | None = None,
    teacher_name: str = "",
    memory: int = _MEMORY,
) -> Analyzed:
    """Look at what a network says of all test images, in one pass and one process.

    Args:
        network: [B, C, H, W] -> [B, classes], on the device; put back into its mode afterwards.
        source: Its test set is read once.
        batch_size: Images per forward.
        device: Where the networks are.
        autocast: Context of the forwards.
        teacher: What taught it; one with other classes is not asked.
        teacher_name: What the result calls it.
        memory: Bytes of logits that are held for the temperature; of a larger test set those of a
            fixed part are.

    Returns:
        The content of both files; see docs/analysis.md. What cannot be told is None: the
        temperature of fewer than 4 images or of logits that are not finite, numbers that such
        logits give, the accuracy of a class without images, the features of a network without a
        linear classifier.

    Raises:
        ValueError: No test images.
    """
    networks = [network] if teacher is None else [network, teacher]
    modes = [each.training for each in networks]
    for each in networks:
        each.eval()
    try:
        seen = _seen(network, teacher, source, batch_size, device, autocast, memory)
    finally:
        for each, mode in zip(networks, modes, strict=True):
            each.train(mode)
    whole = ("target", "predicted", "teacher_predicted")
    predictions = {
        name: (values.int() if name in whole else values).numpy()
        for name, values in seen.answers.items()
    }
    return Analyzed(_content(seen, source.info, teacher_name), predictions)


def _seen(
    network: nn.Module,
    teacher: Teacher | Teachers | None,
    source: DataSource,
    batch_size: int,
    device: torch.device,
    autocast: Autocast,
    memory: int,
) -> _Seen:
    info = source.info
    holds = torch.zeros(source.num_test, dtype=torch.bool)
    holds[permutation(0, 0, source.num_test)[: memory // (4 * info.num_classes)]] = True
    ranked = MeanSortedSoftmax(info.num_classes, device, sync_on_compute=False)
    first = FirstFeatures(info)
    answers: list[dict[str, Tensor]] = []
    held: list[dict[str, Tensor]] = []
    shape = (info.in_channels, *info.image_size)
    with classifier_inputs(network, shape) as read, torch.inference_mode():
        for batch in source.test_batches(batch_size=batch_size, device=device):
            taught = {}
            with autocast():
                logits = network(batch.images).float()
                if teacher is not None and not answers and not _fits(teacher, batch.images, info):
                    teacher = None
                if teacher is not None:
                    taught["teacher_predicted"] = teacher(batch.images).argmax(1).cpu()
            probabilities = logits.softmax(1)
            ranked.update(probabilities)
            features = read()
            if features is not None:
                first.add(batch.index, batch.target, features)
            # The first class as the accuracy counts it, also among equal ones.
            predicted, confidence = logits.argmax(1).cpu(), probabilities.amax(1).cpu()
            of_all = {"index": batch.index, "target": batch.target.cpu()}
            answers.append({**of_all, "predicted": predicted, "confidence": confidence, **taught})
            rows = holds[batch.index % len(holds)]  # a source of one's own may count on
            part = {**of_all, "logits": logits.cpu()}
            held.append({name: values[rows] for name, values in part.items()})
    if not any(len(batch["index"]) for batch in answers):
        raise ValueError("the test set holds no images")
    return _Seen(_joined(answers), _joined(held), ranked.compute().cpu(), first.plane())


def _joined(batches: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """All batches in one, in the order of the images' index."""
    whole = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
    order = whole["index"].argsort()
    return {name: values[order] for name, values in whole.items()}


def _fits(teacher: Teacher | Teachers, images: Tensor, info: DataInfo) -> bool:
    """Whether a teacher's classes are those of the data: some methods read its features alone."""
    every = teacher.all if isinstance(teacher, Teachers) else [teacher]
    return all(each(images[:1]).shape[1] == info.num_classes for each in every)


def _content(seen: _Seen, info: DataInfo, teacher_name: str) -> dict[str, Any]:
    target, predicted = seen.answers["target"], seen.answers["predicted"]
    correct = predicted == target
    temperature: dict[str, Any] | None = cross_fitted(seen.held["logits"], seen.held["target"])
    if temperature is not None and len(seen.held["index"]) < len(target):
        temperature["fitted_on"] = len(seen.held["index"])
    teacher, taught = None, seen.answers.get("teacher_predicted")
    if taught is not None:
        top1, agreement = _percent(taught == target), _percent(taught == predicted)
        teacher = {"name": teacher_name, "top1": top1, "agreement": agreement}
    return {
        "images": len(target),
        "class_names": list(info.class_names),
        "groups": None if info.groups is None else list(info.groups),
        "temperature": temperature,
        "zipf": _zipf(seen.mean_sorted),
        "reliability": reliability(seen.answers["confidence"], correct),
        "per_class": [_percent(correct[target == label]) for label in range(info.num_classes)],
        "confusion": _confusion(target, predicted, info.num_classes),
        "teacher": teacher,
        "features": seen.features,
    }


def _percent(correct: Tensor) -> float | None:
    return 100 * int(correct.sum()) / len(correct) if len(correct) else None


def _zipf(mean_sorted: Tensor) -> dict[str, Any]:
    fit = zipf_fit(mean_sorted)
    return {
        "mean_sorted_softmax": [_finite(p) for p in mean_sorted.tolist()],
        "exponent": _finite(fit.exponent),
        "r2": _finite(fit.r2),
        "ranks": [1, min(len(mean_sorted), FITTED_RANKS)],
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _confusion(target: Tensor, predicted: Tensor, num_classes: int) -> list[list[int]]:
    """[true, predicted, count] of the wrong answers, the most frequent first."""
    wrong = predicted != target
    pairs, counts = torch.unique(target[wrong] * num_classes + predicted[wrong], return_counts=True)
    order = counts.argsort(descending=True, stable=True)[:_MOST_CONFUSIONS]
    return [
        [pair // num_classes, pair % num_classes, count]
        for pair, count in zip(pairs[order].tolist(), counts[order].tolist(), strict=True)
    ]
