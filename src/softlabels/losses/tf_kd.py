"""Tf-KD, teacher-free distillation: a virtual teacher that is made from the labels, no network."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from softlabels.inputs import Logits, Target
from softlabels.losses._checks import check_logits, check_target
from softlabels.losses._method import Defaults, Method, Share, Temperature, Weight
from softlabels.losses._non_target import (
    SoftLabels,
    in_float32,
    label_probabilities,
    without_ignored,
)
from softlabels.losses._soft_target import taken_apart
from softlabels.losses.kd import kd_loss

__all__ = ["TfKDLoss"]


class TfKDLoss(Method, name="tf_kd"):
    r"""Tf-KD: distillation from a virtual teacher that is nearly sure of the label.

    Yuan et al., "Revisiting Knowledge Distillation via Label Smoothing Regularization",
    CVPR 2020 (arXiv 1909.11723); official code
    yuanli2333/Teacher-free-Knowledge-Distillation, which this follows.

    .. math::
        L = \frac{m}{C} \, KL(\text{softmax}(u / \tau) \| S), \quad
        u_i = \begin{cases} a & i = t \\ (1 - a) / (C - 1) & i \ne t \end{cases}

    ==========  ==================================================================
    symbol      meaning
    ==========  ==================================================================
    S           softmax of `logits`, at temperature 1
    u           the virtual teacher; its *probabilities* are softened, not logits,
                so that it comes out almost uniform
    tau         `temperature`
    a           `correct_probability`
    m           `multiplier`
    t           the labeled class
    ==========  ==================================================================

    The published objective is :math:`(1 - \alpha) \cdot` cross-entropy :math:`+ \alpha L`; alpha
    0.1 is the default weight, 0.9 that of the task's loss.

    Deviations: none from the published code, whose divergence is a mean over samples *and*
    classes (hence 1 / C), with the student not softened and no factor tau^2; the paper writes
    a sum over classes, both softened. Set `multiplier` to C for the sum.

    Args:
        temperature: tau, of the virtual teacher, above 0; unitless. 20 for most networks, 40 for
            DenseNet-121.
        multiplier: m, 0 or more. 100 for ResNet-18 on CIFAR-100, 1 for others.
        correct_probability: a, in [0, 1].

    Example:
        >>> import torch
        >>> logits = torch.tensor([[2.0, 1.0, 0.5, -1.0, 0.0]])
        >>> TfKDLoss()(logits, torch.tensor([0]))
        tensor(9.0033)
    """

    temperature: Temperature = 20.0
    multiplier: Weight = 100.0
    correct_probability: Share = 0.99

    inputs: ClassVar = {"logits": Logits(), "target": Target()}
    defaults = Defaults(weight=0.1, task_weight=0.9)

    def terms(self, logits: Tensor, target: Tensor) -> dict[str, Tensor]:
        """`"virtual"`.

        Of mixed labels u is the mean of the virtual teachers of the classes.
        """
        virtual = self._virtual_teacher(logits, target) / self.temperature
        divergence = kd_loss(logits, virtual, temperature=1.0, reduction="none")
        return {"virtual": (self.multiplier / logits.shape[1]) * divergence}

    def soft_labels(self, logits: Tensor, target: Tensor) -> SoftLabels:
        """The softened virtual teacher: a little more on the true class, the rest spread evenly."""
        target = without_ignored(target, self.ignore_index)[0]
        target = without_ignored(target, self.ignore_index)[0]
        softened = (self._virtual_teacher(logits, target) / self.temperature).softmax(1)
        return taken_apart(softened, target)

    def _virtual_teacher(self, logits: Tensor, target: Tensor) -> Tensor:
        """u, [B, C]."""
        check_logits(logits)
        check_target(target, logits)
        logits = in_float32(logits.detach())
        elsewhere = (1 - self.correct_probability) / (logits.shape[1] - 1)
        label = label_probabilities(target, logits)
        return elsewhere + (self.correct_probability - elsewhere) * label
