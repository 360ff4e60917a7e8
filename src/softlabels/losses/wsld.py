"""WSLD, weighted soft labels: KD, weighted sample by sample by who is ahead."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from softlabels.inputs import Logits, Target, TeacherLogits
from softlabels.losses._checks import check_target
from softlabels.losses._method import Defaults, Method, Temperature
from softlabels.losses._non_target import SoftLabels, label_columns
from softlabels.losses._soft_target import (
    label_cross_entropy,
    log_softened,
    soft_target_cross_entropy,
    softened_labels,
    student_and_teacher,
)

__all__ = ["WSLDLoss"]

_EPSILON = 1e-7  # added to the teacher's loss, as in the published code


class WSLDLoss(Method, name="wsld"):
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

    The published weight alpha is not part of it (`WSLDLoss.defaults.weight`); it is *added*
    to the task's own loss (cross-entropy).

    Args:
        temperature: lambda, above 0; unitless. 4 on CIFAR-100, 2 on ImageNet.

    Deviations: the published code takes class indices alone; mixed labels enter both
    cross-entropies with all their classes.

    Example:
        >>> import torch
        >>> logits = torch.tensor([[2.0, 1.0, 0.5, -1.0, 0.0]])
        >>> teacher_logits = torch.tensor([[3.0, 0.0, 1.0, -2.0, 0.5]])
        >>> WSLDLoss()(logits, teacher_logits, torch.tensor([0]))
        tensor(22.5021)
    """

    temperature: Temperature = 4.0

    inputs: ClassVar = {"logits": Logits(), "teacher_logits": TeacherLogits(), "target": Target()}
    defaults = Defaults(weight=2.25)

    def terms(self, logits: Tensor, teacher_logits: Tensor, target: Tensor) -> dict[str, Tensor]:
        """`"soft"`.

        The gradient is of the last factor alone.
        """
        logits, teacher_logits = student_and_teacher(logits, teacher_logits)
        check_target(target, logits)
        labels = label_columns(target, logits)
        of_teacher = label_cross_entropy(teacher_logits, labels) + _EPSILON
        weight = -torch.expm1(-label_cross_entropy(logits.detach(), labels) / of_teacher)
        teacher_probs = log_softened(teacher_logits, self.temperature).exp()
        soft = soft_target_cross_entropy(logits, teacher_probs, self.temperature)
        return {"soft": self.temperature**2 * weight * soft}

    def soft_labels(self, logits: Tensor, teacher_logits: Tensor, target: Tensor) -> SoftLabels:
        """The teacher's softened prediction, as in KD: the weights are of samples, not classes."""
        return softened_labels(teacher_logits, target, self.temperature, self.ignore_index)
