"""Tf-KD (self): KD from an earlier run of the same network."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from softlabels.inputs import Logits, TeacherLogits
from softlabels.losses._method import Defaults, Method, Temperature, Weight
from softlabels.losses._non_target import SoftLabels
from softlabels.losses._soft_target import softened_labels
from softlabels.losses.kd import kd_loss

__all__ = ["TfKDSelfLoss"]


class TfKDSelfLoss(Method, name="tf_kd_self"):
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
    0.95 is `TfKDSelfLoss.defaults.weight`, 0.05 its `task_weight`.

    Args:
        temperature: tau, above 0; unitless. 6 for ResNet-18 on CIFAR-100.
        multiplier: m, 0 or more. 50 for ResNet-18 on CIFAR-100.

    Deviations: none from the published code, whose divergence is a mean over samples *and*
    classes, hence 1 / C; set `multiplier` to C for KD itself.
    Numerics: that of `kd_loss`.

    Example:
        >>> import torch
        >>> logits = torch.tensor([[2.0, 1.0, 0.5, -1.0, 0.0]])
        >>> TfKDSelfLoss()(logits, logits)
        tensor(0.)
    """

    temperature: Temperature = 6.0
    multiplier: Weight = 50.0

    inputs: ClassVar = {"logits": Logits(), "teacher_logits": TeacherLogits()}
    defaults = Defaults(weight=0.95, task_weight=0.05, taught_by_itself=True)

    def terms(self, logits: Tensor, teacher_logits: Tensor) -> dict[str, Tensor]:
        """`"divergence"`."""
        temperature = self.temperature
        divergence = kd_loss(logits, teacher_logits, temperature=temperature, reduction="none")
        return {"divergence": (self.multiplier / logits.shape[1]) * divergence}

    def soft_labels(self, logits: Tensor, teacher_logits: Tensor, target: Tensor) -> SoftLabels:
        """The teacher's softened belief in the true class, and how it shares out the rest."""
        return softened_labels(teacher_logits, target, self.temperature)
