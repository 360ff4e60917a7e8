"""Tf-KD (self): the teacher is an earlier run of the same network."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor, nn

from softlabels.inputs import Input, Logits, TeacherLogits
from softlabels.losses._checks import check_choice, check_number, check_temperature
from softlabels.losses._non_target import Reduction, SoftLabels
from softlabels.losses.kd import KDLoss, kd_loss

__all__ = ["TfKDSelfLoss", "tf_kd_self_loss"]


def tf_kd_self_loss(
    logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float = 6.0,
    multiplier: float = 50.0,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Tf-KD (self): distillation from the network's own earlier run.

    Yuan et al., "Revisiting Knowledge Distillation via Label Smoothing Regularization",
    CVPR 2020 (arXiv 1909.11723); official code yuanli2333/Teacher-free-Knowledge-Distillation,
    which this follows.

    .. math:: L = \frac{m \tau^2}{C} \, KL(T^\tau \| S^\tau)

    ==========  ==================================================================
    symbol      meaning
    ==========  ==================================================================
    S, T        softmax of `logits`, `teacher_logits` over tau; C classes
    tau         `temperature`
    m           `multiplier`
    ==========  ==================================================================

    The published objective is :math:`(1 - \alpha) \cdot` cross-entropy :math:`+ \alpha L`; alpha
    0.95 is `TfKDSelfLoss.recommended_weight`, 0.05 its `recommended_task_weight`.

    Args:
        logits: [B, C], raw student logits. Gets the gradient.
        teacher_logits: [B, C], raw logits of the same network, trained before. Gets none.
        temperature: tau, above 0; unitless. 6 for ResNet-18 on CIFAR-100.
        multiplier: m, 0 or more. 50 for ResNet-18 on CIFAR-100.
        reduction: `"mean"` over B, `"sum"`, or `"none"`.

    Returns:
        A scalar, or [B] for `"none"`; at least float32.

    Raises:
        TypeError: Logits of a wrong dtype.
        ValueError: A wrong shape, setting or reduction.

    Deviations: none from the published code, whose divergence is a mean over samples *and*
    classes, hence 1 / C; set `multiplier` to C for KD itself.
    Numerics: that of `kd_loss`.
    Distributed: each sample by itself, no batch statistics.

    Example:
        >>> import torch
        >>> logits = torch.tensor([[2.0, 1.0, 0.5, -1.0, 0.0]])
        >>> tf_kd_self_loss(logits, logits)
        tensor(0.)
    """
    check_number("multiplier", multiplier)
    divergence = kd_loss(logits, teacher_logits, temperature=temperature, reduction=reduction)
    return (multiplier / logits.shape[1]) * divergence


class TfKDSelfLoss(nn.Module):
    """Tf-KD with an earlier run as teacher, as a module; see `tf_kd_self_loss`.

    Args:
        temperature: Above 0.
        multiplier: 0 or more.
        reduction: `"mean"`, `"sum"` or `"none"`.
    """

    inputs: ClassVar[Mapping[str, Input]] = {
        "logits": Logits(),
        "teacher_logits": TeacherLogits(),
    }
    taught_by_itself: ClassVar[bool] = True
    recommended_weight: ClassVar[float] = 0.95
    recommended_task_weight: ClassVar[float] = 0.05

    def __init__(
        self,
        *,
        temperature: float = 6.0,
        multiplier: float = 50.0,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__()
        check_temperature(temperature)
        check_number("multiplier", multiplier)
        check_choice("reduction", reduction, ("mean", "sum", "none"))
        self.temperature = temperature
        self.multiplier = multiplier
        self.reduction: Reduction = reduction

    def forward(self, logits: Tensor, teacher_logits: Tensor) -> Tensor:
        """Compute `tf_kd_self_loss` with this module's settings."""
        return tf_kd_self_loss(
            logits,
            teacher_logits,
            temperature=self.temperature,
            multiplier=self.multiplier,
            reduction=self.reduction,
        )

    def soft_labels(self, logits: Tensor, teacher_logits: Tensor, target: Tensor) -> SoftLabels:
        """The teacher's softened belief in the true class, and how it shares out the rest."""
        return KDLoss(temperature=self.temperature).soft_labels(logits, teacher_logits, target)
