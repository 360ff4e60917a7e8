"""A dozen images with their soft labels, for a report."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from softlabels.data import Batch, DataInfo, DataSource
from softlabels.data.mixup import MIXUP_EXTRAS, mixup_extras
from softlabels.data.randomness import permutation
from softlabels.distill.distiller import Distiller
from softlabels.distill.external_inputs import checked_inputs
from softlabels.distill.teacher_cache import TeacherCache
from softlabels.losses import Method

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
    """Soft labels and predictions for images that are the same for every method.

    They are test images; where the soft labels need what there is for training images alone, a
    teacher's stored answers, what a method remembers of an image or further images of a batch,
    they are training images. Each is labeled together with the batch that it stands in, because a
    soft label may depend on its batch.

    The distiller gives the soft labels, the network, on the same device, the predictions; so many
    images are drawn, without seed or method.
    """
    cache = distiller.teacher
    method = distiller.method
    inputs = checked_inputs(method)
    if isinstance(cache, TeacherCache) and any(kind.reads_teacher for kind in inputs.values()):
        split = "training"
        what = f"{_sentence(distiller)} These are training images: a cache has no other answers."
        chosen = permutation(0, 0, source.num_train)[:num_images].tolist()
        batches = _training_batches(source, cache, chosen, batch_size, device)
    elif distiller.extras and method is not None and method.has_soft_labels():
        split = "training"
        what = f"{_sentence(distiller)} These are training images, as the method needs them."
        batches = _as_trained(distiller, source, batch_size, device)
        first = next(batches)
        chosen = first.index[:num_images].tolist()
        batches = iter([first])
    else:
        split, what = "test", _sentence(distiller)
        chosen = permutation(0, 0, source.num_test)[:num_images].tolist()
        batches = source.test_batches(batch_size=batch_size, device=device)
    wanted, entries = set(chosen), dict[int, dict[str, Any]]()
    was_training = distiller.training
    distiller.eval()
    for batch in batches:
        rows = [row for row, index in enumerate(batch.index.tolist()) if index in wanted]
        if not rows:
            continue
        extras = {"index": batch.index, **({} if batch.draw is None else {"draw": batch.draw})}
        extras.update(batch.extras)
        soft = distiller.soft_labels(batch.images, batch.target, **extras)
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
        "what": what,
        "split": split,
        "images": [entries[index] for index in sorted(entries)],
    }


def _training_batches(
    source: DataSource,
    cache: TeacherCache,
    chosen: list[int],
    batch_size: int,
    device: torch.device,
) -> Iterator[Batch]:
    """The batches of training images that hold the chosen ones, as the cache's first draw."""
    for number in sorted({index // batch_size for index in chosen}):
        start = number * batch_size
        yield from source.train_views(
            draw=cache.draw(0),
            batch_size=batch_size,
            start=start,
            stop=start + batch_size,
            device=device,
        )


def _as_trained(
    distiller: Distiller, source: DataSource, batch_size: int, device: torch.device
) -> Iterator[Batch]:
    """Training batches with all that the method reads."""
    further = [n for n in distiller.extras if n not in ("index", "draw", *MIXUP_EXTRAS)]
    extras: dict[str, Any] = {"extras": further} if further else {}
    batches = source.train_batches(seed=0, epoch=0, batch_size=batch_size, device=device, **extras)
    if not MIXUP_EXTRAS & {*distiller.extras}:
        return batches
    return (mixup_extras(batch, alpha=1.0, seed=0, epoch=0, step=0) for batch in batches)


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
        if isinstance(maker, Method) and maker.has_soft_labels():
            return maker.caption()
    return "The label itself: all on the true class."
