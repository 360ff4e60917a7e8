"""WSLD: soft labels that are weighted sample by sample, with a teacher."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from softlabels.inputs import Input, Logits, Target, TeacherLogits
from softlabels.losses._checks import (
    check_choice,
    check_ignore_index,
    check_logits,
    check_target,
    check_temperature,
)
from softlabels.losses._non_target import (
    Labels,
    Reduction,
    SoftLabels,
    in_float32,
    label_columns,
    reduce_parts,
)
from softlabels.losses._soft_target import log_softened, soft_target_cross_entropy
from softlabels.losses.kd import KDLoss

__all__ = ["WSLDLoss", "wsld_loss"]

_EPSILON = 1e-7  # added to the teacher's loss, as in the published code


def wsld_loss(
    logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    *,
    temperature: float = 4.0,
    ignore_index: int | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""WSLD: distillation that counts less where the student is already ahead of its teacher.

    Zhou et al., "Rethinking Soft Labels for Knowledge Distillation: A Bias-Variance Tradeoff
    Perspective", ICLR 2021 (arXiv 2102.00650); official code
    bellymonster/Weighted-Soft-Label-Distillation.

    .. math::
        L = \lambda^2 \Big( 1 - \exp\big( -\frac{\ell_S}{\ell_T + 10^{-7}} \big) \Big)
            \Big( -\sum_i T^\lambda_i \log S^\lambda_i \Big)

    ==============  =============================================================
    symbol          meaning
    ==============  =============================================================
    S, T            softmax of `logits`, `teacher_logits`; over lambda if so marked
    lambda          `temperature`
    l_S, l_T        cross-entropy of the labels with S, with T, at temperature 1;
                    constant for the gradient
    ==============  =============================================================

    The published weight alpha is not part of it (`WSLDLoss.recommended_weight`); it is *added*
    to the task's own loss (cross-entropy).

    Args:
        logits: [B, C], raw student logits. Gets the gradient, of the last factor alone.
        teacher_logits: [B, C], raw teacher logits. Gets none.
        target: [B] class indices, or [B, C] probabilities.
        temperature: lambda, above 0; unitless. 4 on CIFAR-100, 2 on ImageNet.
        ignore_index: Samples with this class index count nothing, also in the mean over B;
            without any other sample the loss is 0. For [B] labels.
        reduction: `"mean"` over B, `"sum"`, or `"none"`.

    Returns:
        A scalar, or [B] for `"none"`; in nats, at least float32.

    Raises:
        TypeError: Logits or target of a wrong dtype.
        ValueError: A wrong shape, label, temperature or reduction.

    Deviations: the published code takes class indices alone; mixed labels enter both
    cross-entropies with all their classes.
    Numerics: log-softmax throughout, computed in float32 or wider, also under autocast.
    Distributed: each sample by itself, no batch statistics.

    Example:
        >>> import torch
        >>> logits = torch.tensor([[2.0, 1.0, 0.5, -1.0, 0.0]])
        >>> teacher_logits = torch.tensor([[3.0, 0.0, 1.0, -2.0, 0.5]])
        >>> wsld_loss(logits, teacher_logits, torch.tensor([0]))
        tensor(22.5021)
    """
    check_logits(logits)
    check_logits(teacher_logits, "teacher_logits", like=logits)
    check_temperature(temperature)
    check_ignore_index(ignore_index)
    check_target(target, logits, ignore_index)
    logits = in_float32(logits)
    teacher_logits = in_float32(teacher_logits.detach()).to(logits.dtype)
    labels = label_columns(target, logits, "all", ignore_index)
    of_teacher = _cross_entropy(teacher_logits, labels) + _EPSILON
    weight = -torch.expm1(-_cross_entropy(logits.detach(), labels) / of_teacher)
    teacher_probs = log_softened(teacher_logits, temperature).exp()
    soft = soft_target_cross_entropy(logits, teacher_probs, temperature)
    return reduce_parts({"soft": temperature**2 * weight * soft}, reduction, labels.kept).loss


def _cross_entropy(logits: Tensor, labels: Labels) -> Tensor:
    """Of the labels with the prediction, [B]."""
    return -(labels.values * log_softened(logits).gather(1, labels.classes)).sum(1)


class WSLDLoss(nn.Module):
    """WSLD as a module; see `wsld_loss` for the equation and the settings.

    Args:
        temperature: Above 0.
        ignore_index: Class index of samples that count nothing, or None.
        reduction: `"mean"`, `"sum"` or `"none"`.
    """

    inputs: ClassVar[Mapping[str, Input]] = {
        "logits": Logits(),
        "teacher_logits": TeacherLogits(),
        "target": Target(),
    }
    recommended_weight: ClassVar[float] = 2.25

    def __init__(
        self,
        *,
        temperature: float = 4.0,
        ignore_index: int | None = None,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__()
        check_temperature(temperature)
        check_ignore_index(ignore_index)
        check_choice("reduction", reduction, ("mean", "sum", "none"))
        self.temperature = temperature
        self.ignore_index = ignore_index
        self.reduction: Reduction = reduction

    def forward(self, logits: Tensor, teacher_logits: Tensor, target: Tensor) -> Tensor:
        """Compute `wsld_loss` with this module's settings."""
        return wsld_loss(
            logits,
            teacher_logits,
            target,
            temperature=self.temperature,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
        )

    def soft_labels(self, logits: Tensor, teacher_logits: Tensor, target: Tensor) -> SoftLabels:
        """The teacher's softened prediction, as in KD: the weights are of samples, not classes."""
        if target.dim() == 1 and self.ignore_index is not None:
            target = torch.where(target == self.ignore_index, 0, target)
        return KDLoss(temperature=self.temperature).soft_labels(logits, teacher_logits, target)
