"""Tf-KD: a teacher that is made up from the labels, no network."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor, nn

from softlabels.inputs import Input, Logits, Target
from softlabels.losses._checks import (
    check_choice,
    check_ignore_index,
    check_logits,
    check_number,
    check_target,
    check_temperature,
)
from softlabels.losses._non_target import (
    Labels,
    Reduction,
    SoftLabels,
    in_float32,
    label_columns,
    non_target_weights,
    reduce_parts,
    spread,
)
from softlabels.losses.kd import kd_loss

__all__ = ["TfKDLoss", "tf_kd_loss"]


def tf_kd_loss(
    logits: Tensor,
    target: Tensor,
    *,
    temperature: float = 20.0,
    multiplier: float = 100.0,
    correct_probability: float = 0.99,
    ignore_index: int | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
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
    0.1 is `TfKDLoss.recommended_weight`, 0.9 its `recommended_task_weight`.

    Args:
        logits: [B, C], raw logits. Gets the gradient.
        target: [B] class indices, or [B, C] probabilities, for which u is the mean of the
            virtual teachers of the classes.
        temperature: tau, above 0; unitless. 20 for most networks, 40 for DenseNet-121.
        multiplier: m, 0 or more. 100 for ResNet-18 on CIFAR-100, 1 for others.
        correct_probability: a, in [0, 1].
        ignore_index: Samples with this class index count nothing, also in the mean over B;
            without any other sample the loss is 0. For [B] labels.
        reduction: `"mean"` over B, `"sum"`, or `"none"`.

    Returns:
        A scalar, or [B] for `"none"`; at least float32.

    Raises:
        TypeError: Logits or target of a wrong dtype.
        ValueError: A wrong shape, label, setting or reduction.

    Deviations: none from the published code, whose divergence is a mean over samples *and*
    classes (hence 1 / C), with the student not softened and no factor tau^2; the paper writes
    a sum over classes, both softened. Set `multiplier` to C for the sum.
    Numerics: log-softmax throughout, computed in float32 or wider, also under autocast.
    Distributed: each sample by itself, no batch statistics.

    Example:
        >>> import torch
        >>> logits = torch.tensor([[2.0, 1.0, 0.5, -1.0, 0.0]])
        >>> tf_kd_loss(logits, torch.tensor([0]))
        tensor(9.0033)
    """
    check_logits(logits)
    _check_settings(temperature, multiplier, correct_probability)
    check_ignore_index(ignore_index)
    check_target(target, logits, ignore_index)
    logits = in_float32(logits)
    labels = label_columns(target, logits, "all", ignore_index)
    virtual = _virtual_teacher(labels, logits, correct_probability)
    divergence = kd_loss(logits, virtual / temperature, temperature=1.0, reduction="none")
    scaled = (multiplier / logits.shape[1]) * divergence
    return reduce_parts({"virtual": scaled}, reduction, labels.kept).loss


def _virtual_teacher(labels: Labels, logits: Tensor, correct_probability: float) -> Tensor:
    """u, [B, C]."""
    elsewhere = (1 - correct_probability) / (logits.shape[1] - 1)
    label = spread(labels, labels.values, logits.detach())
    return elsewhere + (correct_probability - elsewhere) * label


def _check_settings(temperature: float, multiplier: float, correct_probability: float) -> None:
    check_temperature(temperature)
    check_number("multiplier", multiplier)
    check_number("correct_probability", correct_probability, at_most=1)


class TfKDLoss(nn.Module):
    """Tf-KD with a virtual teacher as a module; see `tf_kd_loss` for the equation.

    Args:
        temperature: Of the virtual teacher; above 0.
        multiplier: 0 or more.
        correct_probability: In [0, 1].
        ignore_index: Class index of samples that count nothing, or None.
        reduction: `"mean"`, `"sum"` or `"none"`.
    """

    inputs: ClassVar[Mapping[str, Input]] = {"logits": Logits(), "target": Target()}
    recommended_weight: ClassVar[float] = 0.1
    recommended_task_weight: ClassVar[float] = 0.9

    def __init__(
        self,
        *,
        temperature: float = 20.0,
        multiplier: float = 100.0,
        correct_probability: float = 0.99,
        ignore_index: int | None = None,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__()
        _check_settings(temperature, multiplier, correct_probability)
        check_ignore_index(ignore_index)
        check_choice("reduction", reduction, ("mean", "sum", "none"))
        self.temperature = temperature
        self.multiplier = multiplier
        self.correct_probability = correct_probability
        self.ignore_index = ignore_index
        self.reduction: Reduction = reduction

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Compute `tf_kd_loss` with this module's settings."""
        return tf_kd_loss(
            logits,
            target,
            temperature=self.temperature,
            multiplier=self.multiplier,
            correct_probability=self.correct_probability,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
        )

    def soft_labels(self, logits: Tensor, target: Tensor) -> SoftLabels:
        """The softened virtual teacher: a little more on the true class, the rest spread evenly."""
        check_logits(logits)
        check_target(target, logits, self.ignore_index)
        logits = in_float32(logits.detach())
        labels = label_columns(target, logits, "all", self.ignore_index)
        virtual = _virtual_teacher(labels, logits, self.correct_probability)
        softened = (virtual / self.temperature).softmax(1)
        return SoftLabels(
            spread(labels, softened.gather(1, labels.classes), softened),
            non_target_weights(softened, labels).normalized(),
        )
