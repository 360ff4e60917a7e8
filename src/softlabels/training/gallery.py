"""A dozen test images with their soft labels, for a report."""

from __future__ import annotations

import base64
import inspect
import io
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from softlabels.data import DataInfo, DataSource
from softlabels.data.randomness import permutation
from softlabels.distiller import Distiller

__all__ = ["make_gallery"]

_NUM_NON_TARGET = 6
_NUM_PREDICTED = 3


def make_gallery(
    distiller: Distiller,
    network: nn.Module,
    source: DataSource,
    *,
    num_images: int,
    batch_size: int,
    device: torch.device,
) -> dict[str, Any]:
    """Soft labels and predictions for test images that are the same for every method.

    Each image is labelled together with the test batch that it stands in, because a soft label
    may depend on its batch.

    Args:
        distiller: Gives the soft labels.
        network: Gives the predictions.
        source: Its test set is read once.
        num_images: How many, drawn without seed or method.
        batch_size: Of the test batches.
        device: Where the networks are.
    """
    chosen = set(permutation(0, 0, source.num_test)[:num_images].tolist())
    entries: dict[int, dict[str, Any]] = {}
    was_training = distiller.training
    distiller.eval()
    for batch in source.test_batches(batch_size=batch_size, device=device):
        rows = [row for row, index in enumerate(batch.index.tolist()) if index in chosen]
        if not rows:
            continue
        soft = distiller.soft_labels(batch.images, batch.target, index=batch.index)
        with torch.inference_mode():
            predicted = network(batch.images[rows]).float().softmax(1)
        for row, probabilities in zip(rows, predicted, strict=True):
            target = int(batch.target[row])
            entries[int(batch.index[row])] = {
                "index": int(batch.index[row]),
                "target": target,
                **_picture(batch.images[row], source.info),
                "target_value": float(soft.target[row, target]),
                "non_target": _largest(soft.non_target[row], _NUM_NON_TARGET),
                "prediction": _largest(probabilities, _NUM_PREDICTED),
            }
    distiller.train(was_training)
    return {
        "class_names": list(source.info.class_names),
        "what": _sentence(distiller),
        "images": [entries[index] for index in sorted(entries)],
    }


def _largest(probabilities: Tensor, number: int) -> list[list[float]]:
    values, classes = probabilities.topk(min(number, len(probabilities)))
    pairs = zip(classes.tolist(), values.tolist(), strict=True)
    return [[label, value] for label, value in pairs if value > 0]


def _picture(image: Tensor, info: DataInfo) -> dict[str, Any]:
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (info.mean, info.std))
    pixels = ((image.cpu() * std + mean) * 255).round().clamp(0, 255).byte()
    array: np.ndarray[Any, Any] = pixels.permute(1, 2, 0).numpy()
    array = array[:, :, 0] if array.shape[2] == 1 else array
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, format="PNG")
    return {"shape": list(array.shape), "png": base64.b64encode(buffer.getvalue()).decode()}


def _sentence(distiller: Distiller) -> str:
    """What the soft labels are, in the words of whoever makes them."""
    for maker in (distiller.method, distiller.task_loss):
        makes = getattr(maker, "soft_labels", None)
        if makes is not None:
            return (inspect.getdoc(makes) or "").partition("\n")[0]
    return "The label itself: all on the true class."
