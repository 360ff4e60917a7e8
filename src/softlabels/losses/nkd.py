"""NKD: normalised knowledge distillation, with a teacher."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor, nn

from softlabels.losses.nontarget import (
    MixedTarget,
    Reduction,
    SoftLabels,
    check_choice,
    check_logits,
    check_number,
    check_target,
    in_float32,
    label_probabilities,
    non_target_log_softmax,
    non_target_softmax,
    reduce_batch,
)
from softlabels.losses.reads import Logits, Signal, Target, TeacherLogits

__all__ = ["NKDLoss", "nkd_loss"]


def nkd_loss(
    logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    *,
    temperature: float = 1.0,
    non_target_weight: float = 1.5,
    mixed_target: MixedTarget = "largest",
    reduction: Reduction = "mean",
) -> Tensor:
    r"""NKD: the teacher's target probability, and its normalised non-target distribution.

    Yang et al., "From Knowledge Distillation to Self-Knowledge Distillation", ICCV 2023
    (arXiv 2303.13005), equations 4-5; official code yzd-v/cls_KD, whose version of
    2023-07-17 to 2023-10-10 did not remove the target class: this follows the paper.

    .. math::
        L = -T_t \log S_t
            - \gamma \lambda^2 \sum_{i \ne t} N(T^\lambda)_i \log N(S^\lambda)_i

    ================  ==============================================================
    symbol            meaning
    ================  ==============================================================
    S, T              softmax of `logits`, `teacher_logits`, at temperature 1
    S^lambda          softmax at temperature lambda; N(.) is taken over the classes
                      that are not t, and renormalised
    lambda            `temperature` (the target term always uses 1)
    gamma             `non_target_weight`
    t                 the labelled class
    ================  ==============================================================

    It is *added* to the task's own loss (cross-entropy), with weight 1.

    Args:
        logits: [B, C], raw student logits. Gets the gradient.
        teacher_logits: [B, C], raw teacher logits. Gets none.
        target: [B] class indices, or [B, C] probabilities (mixup, cutmix).
        temperature: Above 0; unitless. The paper's runs use 1 (ImageNet) and 3 (CIFAR-100).
        non_target_weight: 0 or more.
        mixed_target: For [B, C] labels. `"largest"`: t is the class with the largest label
            (ties: the lower class), as in the published runs. `"all"`: every class with a
            positive label is a target class (target term `-sum T_i log S_i`) and leaves the
            non-target part.
        reduction: `"mean"` over B, `"sum"`, or `"none"`.

    Returns:
        A scalar, or [B] for `"none"`; in nats, at least float32.

    Raises:
        TypeError: Logits or target of a wrong dtype.
        ValueError: A wrong shape, label, setting or reduction.

    Numerics: computed in float32 or wider, also under autocast; no host synchronisation.
    Distributed: each sample by itself, no batch statistics.

    Example:
        >>> import torch
        >>> logits = torch.tensor([[2.0, 1.0, 0.5, -1.0, 0.0]])
        >>> teacher_logits = torch.tensor([[3.0, 0.0, 1.0, -2.0, 0.5]])
        >>> nkd_loss(logits, teacher_logits, torch.tensor([0]))
        tensor(2.4645)
    """
    check_logits(logits)
    check_logits(teacher_logits, "teacher_logits", like=logits)
    check_target(target, logits)
    check_number("temperature", temperature, positive=True)
    check_number("non_target_weight", non_target_weight)
    check_choice("mixed_target", mixed_target, ("largest", "all"))

    logits = in_float32(logits)
    teacher_logits = in_float32(teacher_logits.detach()).to(logits.dtype)
    labelled = label_probabilities(target, logits, mixed_target) > 0

    target_probabilities = teacher_logits.softmax(1).masked_fill(~labelled, 0.0)
    target_term = -(target_probabilities * logits.log_softmax(1)).sum(1)
    non_target_term = -(
        non_target_softmax(teacher_logits / temperature, labelled)
        * non_target_log_softmax(logits / temperature, labelled)
    ).sum(1)
    per_sample = target_term + non_target_weight * temperature**2 * non_target_term
    return reduce_batch(per_sample, reduction)


class NKDLoss(nn.Module):
    """NKD as a module; see `nkd_loss` for the equation and the settings.

    Args:
        temperature: Of the non-target term; above 0.
        non_target_weight: 0 or more.
        mixed_target: `"largest"` or `"all"`, for mixed labels.
        reduction: `"mean"`, `"sum"` or `"none"`.
    """

    reads: ClassVar[Mapping[str, Signal]] = {
        "logits": Logits(),
        "teacher_logits": TeacherLogits(),
        "target": Target(),
    }

    def __init__(
        self,
        *,
        temperature: float = 1.0,
        non_target_weight: float = 1.5,
        mixed_target: MixedTarget = "largest",
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__()
        check_number("temperature", temperature, positive=True)
        check_number("non_target_weight", non_target_weight)
        check_choice("mixed_target", mixed_target, ("largest", "all"))
        check_choice("reduction", reduction, ("mean", "sum", "none"))
        self.temperature = temperature
        self.non_target_weight = non_target_weight
        self.mixed_target: MixedTarget = mixed_target
        self.reduction: Reduction = reduction

    def forward(self, logits: Tensor, teacher_logits: Tensor, target: Tensor) -> Tensor:
        """Compute `nkd_loss` with this module's settings."""
        return nkd_loss(
            logits,
            teacher_logits,
            target,
            temperature=self.temperature,
            non_target_weight=self.non_target_weight,
            mixed_target=self.mixed_target,
            reduction=self.reduction,
        )

    def soft_labels(self, logits: Tensor, teacher_logits: Tensor, target: Tensor) -> SoftLabels:
        """The teacher's belief in the true class, and how it shares the rest among the others."""
        check_logits(teacher_logits, "teacher_logits")
        check_target(target, teacher_logits)
        teacher_logits = in_float32(teacher_logits.detach())
        labelled = label_probabilities(target, teacher_logits, self.mixed_target) > 0
        return SoftLabels(
            teacher_logits.softmax(1).masked_fill(~labelled, 0.0),
            non_target_softmax(teacher_logits / self.temperature, labelled),
        )
