"""Label smoothing: a task loss, since it smooths the task's own target."""

from __future__ import annotations

from typing import Literal, TypeAlias, overload

import torch
from torch import Tensor, nn

from softlabels.losses._checks import (
    check_choice,
    check_ignore_index,
    check_logits,
    check_number,
    check_target,
)
from softlabels.losses._non_target import (
    Labels,
    LossOutput,
    Reduction,
    SoftLabels,
    finite_limit,
    in_float32,
    label_columns,
    non_target_weights,
    reduce_parts,
    spread,
)

__all__ = ["LabelSmoothingLoss", "SmoothOver", "label_smoothing_loss"]

SmoothOver: TypeAlias = Literal["all", "non_target"]


def _shares(
    labels: Labels, num_classes: int, smoothing: float, smooth_over: SmoothOver
) -> tuple[Tensor, float]:
    """The smoothed label as [B, K] at labeled classes beyond what every class gets, and that."""
    if smooth_over == "all":
        return (1 - smoothing) * labels.values, smoothing / num_classes
    spread_out = smoothing / (num_classes - 1)
    return (1 - smoothing - spread_out) * labels.values, spread_out


@overload
def label_smoothing_loss(
    logits: Tensor,
    target: Tensor,
    *,
    smoothing: float = 0.1,
    smooth_over: SmoothOver = "all",
    ignore_index: int | None = None,
    reduction: Reduction = "mean",
    return_parts: Literal[False] = False,
) -> Tensor: ...


@overload
def label_smoothing_loss(
    logits: Tensor,
    target: Tensor,
    *,
    smoothing: float = 0.1,
    smooth_over: SmoothOver = "all",
    ignore_index: int | None = None,
    reduction: Reduction = "mean",
    return_parts: Literal[True],
) -> LossOutput: ...


def label_smoothing_loss(
    logits: Tensor,
    target: Tensor,
    *,
    smoothing: float = 0.1,
    smooth_over: SmoothOver = "all",
    ignore_index: int | None = None,
    reduction: Reduction = "mean",
    return_parts: bool = False,
) -> Tensor | LossOutput:
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
        return_parts: Also return the summands, as `LossOutput(loss, parts)`: `"label"`, and
            `"uniform"`, what every class gets.

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
    check_ignore_index(ignore_index)
    check_target(target, logits, ignore_index)
    check_number("smoothing", smoothing, at_most=1)
    check_choice("smooth_over", smooth_over, ("all", "non_target"))
    logits = in_float32(logits)
    labels = label_columns(target, logits, "all", ignore_index)
    at_labeled, everywhere = _shares(labels, logits.shape[1], smoothing, smooth_over)
    limit = finite_limit(logits.dtype)
    log_probabilities = logits.log_softmax(1).clamp(min=-limit)
    parts = {"label": -(at_labeled * log_probabilities.gather(1, labels.classes)).sum(1)}
    if everywhere:
        parts["uniform"] = -everywhere * log_probabilities.sum(1)
    output = reduce_parts(parts, reduction, labels.kept)
    return output if return_parts else output.loss


class LabelSmoothingLoss(nn.Module):
    """Label smoothing as a module, for `Distiller(task_loss=...)`; see `label_smoothing_loss`.

    Args:
        smoothing: In [0, 1].
        smooth_over: `"all"` or `"non_target"`.
        ignore_index: Class index of samples that count nothing, or None.
        reduction: `"mean"`, `"sum"` or `"none"`.
    """

    def __init__(
        self,
        *,
        smoothing: float = 0.1,
        smooth_over: SmoothOver = "all",
        ignore_index: int | None = None,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__()
        check_number("smoothing", smoothing, at_most=1)
        check_choice("smooth_over", smooth_over, ("all", "non_target"))
        check_ignore_index(ignore_index)
        check_choice("reduction", reduction, ("mean", "sum", "none"))
        self.ignore_index = ignore_index
        self.smoothing = smoothing
        self.smooth_over: SmoothOver = smooth_over
        self.reduction: Reduction = reduction

    def forward(
        self, logits: Tensor, target: Tensor, *, return_parts: bool = False
    ) -> Tensor | LossOutput:
        """Compute `label_smoothing_loss` with this module's settings."""
        output = label_smoothing_loss(
            logits,
            target,
            smoothing=self.smoothing,
            smooth_over=self.smooth_over,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            return_parts=True,
        )
        return output if return_parts else output.loss

    def soft_labels(self, logits: Tensor, target: Tensor) -> SoftLabels:
        """The smoothed label: most on the true class, the rest spread evenly."""
        logits = in_float32(logits.detach())
        labels = label_columns(target, logits, "all", self.ignore_index)
        at_labeled, everywhere = _shares(labels, logits.shape[1], self.smoothing, self.smooth_over)
        return SoftLabels(
            spread(labels, at_labeled + everywhere, logits),
            non_target_weights(torch.ones_like(logits), labels).normalized(),
        )
