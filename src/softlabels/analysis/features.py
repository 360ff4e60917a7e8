"""What a network's classifier reads, as points in a plane."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from softlabels.data import DataInfo
from softlabels.taps import Layout

__all__ = ["FirstFeatures", "classifier_inputs", "principal_plane"]

_MOST_CLASSES = 10
_MOST_IMAGES = 400
_WHAT = "first two principal components of the classifier's input"


@contextmanager
def classifier_inputs(
    network: nn.Module, shape: tuple[int, int, int]
) -> Iterator[Callable[[], Tensor | None]]:
    """Look at what goes into the linear layer that makes a network's logits.

    Args:
        network: [B, C, H, W] -> [B, classes].
        shape: (C, H, W) of the images.

    Yields:
        A function that gives the last forward's [B, D], or None where no such layer is found or
        its input is no vector for each image.
    """
    seen: list[Any] = []

    def record(module: nn.Module, args: tuple[Any, ...]) -> None:
        seen[:] = args[:1]

    def last() -> Tensor | None:
        vectors = bool(seen) and isinstance(seen[0], Tensor) and seen[0].dim() == 2
        return seen[0] if vectors else None

    try:
        layer = Layout(network, shape).classifier()
    except ValueError:  # a network that ends otherwise has no such picture
        yield last
        return
    handle = layer.register_forward_pre_hook(record)
    try:
        yield last
    finally:
        handle.remove()


class FirstFeatures:
    """Features of a few images that are the same for every network.

    They are of the classes in the first two groups, or of the first classes, at most 10; of each
    class as many of its first images as make at most 400 in all.

    Args:
        info: Of the data.
    """

    def __init__(self, info: DataInfo) -> None:
        first: Sequence[int] = range(info.num_classes)
        if info.groups is not None:
            wanted = sorted({*info.groups})[:2]
            first = [label for label, group in enumerate(info.groups) if group in wanted]
        self._classes = first[:_MOST_CLASSES]
        self._most = _MOST_IMAGES // len(self._classes)
        self._held: dict[int, tuple[Tensor, Tensor]] = {}

    def add(self, index: Tensor, target: Tensor, features: Tensor) -> None:
        """Take what is wanted of a batch: index of the images [B], target [B], features [B, D]."""
        for label in self._classes:
            rows = (target == label).nonzero().flatten()
            if not len(rows):
                continue
            numbers, vectors = index[rows.cpu()], features[rows].double().cpu()
            if label in self._held:
                numbers = torch.cat([self._held[label][0], numbers])
                vectors = torch.cat([self._held[label][1], vectors])
            order = numbers.argsort()[: self._most]
            self._held[label] = numbers[order], vectors[order]

    def plane(self) -> dict[str, Any] | None:
        """Their places in the plane, in the order of the test set; None as `principal_plane`."""
        if not self._held:
            return None
        labels = torch.cat([torch.full_like(held[0], c) for c, held in self._held.items()])
        numbers, vectors = (torch.cat(parts) for parts in zip(*self._held.values(), strict=True))
        order = numbers.argsort()
        found = principal_plane(vectors[order])
        if found is None:
            return None
        places, explained = found
        return {
            "what": _WHAT,
            "class": labels[order].tolist(),
            "x": places[:, 0].tolist(),
            "y": places[:, 1].tolist(),
            "explained": explained.tolist(),
        }


def principal_plane(features: Tensor) -> tuple[Tensor, Tensor] | None:
    """The first two principal components of features, and their shares of the variance.

    A component's sign is that which makes its largest weight positive, so that the same features
    give the same picture.

    Args:
        features: [N, D].

    Returns:
        [N, 2] and [2], zeros where there is no second one. None where the features are not
        finite, or all the same.
    """
    if not bool(features.isfinite().all()):
        return None
    centered = features.double() - features.double().mean(0)
    if not bool(centered.any()):
        return None
    left, sizes, right = torch.linalg.svd(centered, full_matrices=False)
    signs = right.gather(1, right.abs().argmax(1, keepdim=True)).sign().flatten()
    places = (left * sizes * signs)[:, :2]
    explained = (sizes.square() / sizes.square().sum())[:2]
    missing = 2 - len(explained)
    return functional.pad(places, (0, missing)), functional.pad(explained, (0, missing))
