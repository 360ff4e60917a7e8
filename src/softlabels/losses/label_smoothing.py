"""Label smoothing: a task loss, since it smooths the task's own target."""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from softlabels.losses.nontarget import (
    Reduction,
    SoftLabels,
    check_choice,
    check_logits,
    check_number,
    check_target,
    in_float32,
    label_probabilities,
    normalized,
    reduce_batch,
)

__all__ = ["LabelSmoothingLoss", "SmoothOver", "label_smoothing_loss"]

SmoothOver: TypeAlias = Literal["all", "non_target"]


def _smoothed(labels: Tensor, smoothing: float, smooth_over: SmoothOver) -> Tensor:
    """The smoothed labels, [B, C]."""
    num_classes = labels.shape[1]
    if smooth_over == "all":
        return (1 - smoothing) * labels + smoothing / num_classes
    return (1 - smoothing) * labels + (1 - labels) * (smoothing / (num_classes - 1))


def label_smoothing_loss(
    logits: Tensor,
    target: Tensor,
    *,
    smoothing: float = 0.1,
    smooth_over: SmoothOver = "all",
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Cross-entropy on smoothed labels.

    Szegedy et al., CVPR 2016 (arXiv 1512.00567), section 7. Two conventions are in use:

    .. math::
        \text{all: } & (1 - \epsilon) V_i + \epsilon / C \\
        \text{non\_target: } & (1 - \epsilon) V_i + (1 - V_i)\, \epsilon / (C - 1)

    Args:
        logits: [B, C], raw logits. Gets the gradient.
        target: [B] class indices, or [B, C] probabilities V (mixup, cutmix).
        smoothing: epsilon, in [0, 1]; 0 is plain cross-entropy.
        smooth_over: `"all"` spreads epsilon over all classes, `"non_target"` over the wrong
            ones (the form of the Zipf's LS and Tf-KD codes).
        reduction: `"mean"` over B, `"sum"`, or `"none"`.

    Returns:
        A scalar, or [B] for `"none"`; in nats, at least float32.

    Raises:
        TypeError: Logits or target of a wrong dtype.
        ValueError: A wrong shape, label, setting or reduction.

    Numerics: computed in float32 or wider, also under autocast.
    Distributed: each sample by itself, no batch statistics.

    Example:
        >>> import torch
        >>> label_smoothing_loss(torch.zeros(1, 4), torch.tensor([2]))
        tensor(1.3863)
    """
    check_logits(logits)
    check_target(target, logits)
    check_number("smoothing", smoothing, at_most=1)
    check_choice("smooth_over", smooth_over, ("all", "non_target"))
    logits = in_float32(logits)
    smoothed = _smoothed(label_probabilities(target, logits), smoothing, smooth_over)
    return reduce_batch(-(smoothed * logits.log_softmax(1)).sum(1), reduction)


class LabelSmoothingLoss(nn.Module):
    """Label smoothing as a module, for `Distiller(task_loss=...)`; see `label_smoothing_loss`.

    Args:
        smoothing: In [0, 1].
        smooth_over: `"all"` or `"non_target"`.
        reduction: `"mean"`, `"sum"` or `"none"`.
    """

    def __init__(
        self,
        *,
        smoothing: float = 0.1,
        smooth_over: SmoothOver = "all",
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__()
        check_number("smoothing", smoothing, at_most=1)
        check_choice("smooth_over", smooth_over, ("all", "non_target"))
        check_choice("reduction", reduction, ("mean", "sum", "none"))
        self.smoothing = smoothing
        self.smooth_over: SmoothOver = smooth_over
        self.reduction: Reduction = reduction

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Compute `label_smoothing_loss` with this module's settings."""
        return label_smoothing_loss(
            logits,
            target,
            smoothing=self.smoothing,
            smooth_over=self.smooth_over,
            reduction=self.reduction,
        )

    def soft_labels(self, logits: Tensor, target: Tensor) -> SoftLabels:
        """The smoothed label: most on the true class, the rest spread evenly."""
        labels = label_probabilities(target, in_float32(logits))
        labelled = labels > 0
        smoothed = _smoothed(labels, self.smoothing, self.smooth_over)
        return SoftLabels(
            smoothed.masked_fill(~labelled, 0.0), normalized(torch.ones_like(labels), labelled)
        )
