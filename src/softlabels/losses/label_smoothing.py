"""Label smoothing: cross-entropy on smoothed labels, a task loss."""

from __future__ import annotations

from typing import ClassVar, Literal, TypeAlias

import torch
from torch import Tensor

from softlabels.inputs import Logits, Target
from softlabels.losses._checks import (
    check_choice,
    check_ignore_index,
    check_logits,
    check_number,
    check_target,
)
from softlabels.losses._method import Method, Share
from softlabels.losses._non_target import (
    Labels,
    Reduction,
    SoftLabels,
    finite_limit,
    in_float32,
    label_columns,
    non_target_weights,
    reduce_terms,
    spread,
    total_of,
    without_ignored,
)

__all__ = ["LabelSmoothingLoss", "SmoothOver", "label_smoothing_loss"]

SmoothOver: TypeAlias = Literal["all", "non_target"]


def _shares(
    labels: Labels, num_classes: int, smoothing: float, smooth_over: SmoothOver
) -> tuple[Tensor | float, float]:
    """The smoothed label as [B, K] at labeled classes beyond what every class gets, and that."""
    if smooth_over == "all":
        return (1 - smoothing) * labels.values, smoothing / num_classes
    spread_out = smoothing / (num_classes - 1)
    return (1 - smoothing - spread_out) * labels.values, spread_out


def label_smoothing_loss(
    logits: Tensor,
    target: Tensor,
    *,
    smoothing: float = 0.1,
    smooth_over: SmoothOver = "all",
    ignore_index: int | None = None,
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
        ignore_index: Samples with this class index count nothing, also in the mean over B;
            without any other sample the loss is 0. For [B] labels.
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
    check_ignore_index(ignore_index)
    check_number("smoothing", smoothing, at_most=1)
    check_choice("smooth_over", smooth_over, ("all", "non_target"))
    check_choice("reduction", reduction, ("mean", "sum", "none"))
    target, kept = without_ignored(target, ignore_index)
    terms = _terms(logits, target, smoothing, smooth_over)
    return reduce_terms({"loss": total_of(terms)}, reduction, kept)["loss"]


def _terms(
    logits: Tensor, target: Tensor, smoothing: float, smooth_over: SmoothOver
) -> dict[str, Tensor]:
    """The summands, [B] each."""
    check_logits(logits)
    check_target(target, logits)
    logits = in_float32(logits)
    labels = label_columns(target, logits)
    at_labeled, everywhere = _shares(labels, logits.shape[1], smoothing, smooth_over)
    log_probabilities = logits.log_softmax(1).clamp(min=-finite_limit(logits.dtype))
    terms = {"label": -(at_labeled * log_probabilities.gather(1, labels.classes)).sum(1)}
    if everywhere:
        terms["uniform"] = -everywhere * log_probabilities.sum(1)
    return terms


class LabelSmoothingLoss(Method):
    """Label smoothing as a module, for `Distiller(task_loss=...)`; see `label_smoothing_loss`.

    Args:
        smoothing: In [0, 1].
        smooth_over: `"all"` or `"non_target"`.
    """

    smoothing: Share = 0.1
    smooth_over: SmoothOver = "all"

    inputs: ClassVar = {"logits": Logits(), "target": Target()}

    def terms(self, logits: Tensor, target: Tensor) -> dict[str, Tensor]:
        """`"label"`, and `"uniform"`, what every class gets."""
        return _terms(logits, target, self.smoothing, self.smooth_over)

    def soft_labels(self, logits: Tensor, target: Tensor) -> SoftLabels:
        """The smoothed label: most on the true class, the rest spread evenly."""
        logits = in_float32(logits.detach())
        labels = label_columns(without_ignored(target, self.ignore_index)[0], logits)
        at_labeled, everywhere = _shares(labels, logits.shape[1], self.smoothing, self.smooth_over)
        return SoftLabels(
            spread(labels, at_labeled + everywhere, logits),
            non_target_weights(torch.ones_like(logits), labels),
        )
