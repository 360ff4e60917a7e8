"""Evaluation of a plain network on a source's test set."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchmetrics import MeanMetric, Metric
from torchmetrics.classification import MulticlassAccuracy, MulticlassCalibrationError

from softlabels.analysis.calibration import NUM_BINS
from softlabels.analysis.zipf import MeanSortedSoftmax, zipf_fit
from softlabels.data import Batch, DataInfo

__all__ = ["Autocast", "evaluate"]

Autocast = Callable[[], AbstractContextManager[None]]


def evaluate(
    student: nn.Module,
    batches: Iterable[Batch],
    info: DataInfo,
    device: torch.device,
    autocast: Autocast = nullcontext,
) -> dict[str, float]:
    """Measure a network on unpadded shards of a test set.

    Args:
        student: [B, C, H, W] -> [B, classes]; put back into its mode afterwards.
        batches: This process' share of the test set; over all processes each sample once.
        info: Classes, and their groups if there are any.
        device: Where the metrics are kept.
        autocast: Context of the forward.

    Returns:
        `top1`, `top5`, `ece` (15 bins) and, where there are groups, `group_top1` in percent;
        `nll` in nats; `zipf_r2`, at most 1, and `zipf_exponent` of the mean sorted softmax, see
        `zipf_fit`. The same on every process.

    Raises:
        ValueError: No test images.
    """
    classes = info.num_classes
    metrics: dict[str, Metric] = {
        "top1": MulticlassAccuracy(classes, average="micro"),
        "top5": MulticlassAccuracy(classes, top_k=min(5, classes), average="micro"),
        "nll": MeanMetric(),
        "ece": MulticlassCalibrationError(classes, n_bins=NUM_BINS),
    }
    if info.groups is not None:
        metrics["group_top1"] = MulticlassAccuracy(max(info.groups) + 1, average="micro")
    metrics = {name: metric.to(device) for name, metric in metrics.items()}
    ranked = MeanSortedSoftmax(classes, device)
    groups = torch.tensor(info.groups or (), device=device)
    was_training = student.training
    student.eval()
    num_images = 0
    try:
        with torch.inference_mode():
            for batch in batches:
                with autocast():
                    logits: Tensor = student(batch.images)
                logits = logits.float()
                probabilities = logits.softmax(1)
                metrics["top1"].update(logits, batch.target)
                metrics["top5"].update(logits, batch.target)
                nll = functional.cross_entropy(logits, batch.target, reduction="none")
                metrics["nll"].update(nll)
                metrics["ece"].update(probabilities, batch.target)
                if info.groups is not None:
                    metrics["group_top1"].update(groups[logits.argmax(1)], groups[batch.target])
                ranked.update(probabilities)
                num_images += len(batch.target)
    finally:
        student.train(was_training)
    if num_images == 0 and not torch.distributed.is_initialized():
        raise ValueError("the test set holds no images")
    values = {name: float(metric.compute()) for name, metric in metrics.items()}
    fit = zipf_fit(ranked.compute())
    return {
        **{name: v if name == "nll" else 100 * v for name, v in values.items()},
        "zipf_r2": fit.r2,
        "zipf_exponent": fit.exponent,
    }
