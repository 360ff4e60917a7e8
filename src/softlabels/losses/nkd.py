"""NKD: normalized knowledge distillation, with a teacher."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import ClassVar, Literal, TypeAlias, overload

import torch
from torch import Tensor, nn

from softlabels.inputs import Input, Logits, Target, TeacherLogits
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
    LossOutput,
    MixedTarget,
    NonTarget,
    Reduction,
    SoftLabels,
    checked_columns,
    in_float32,
    reduce_parts,
    softmax_parts,
    spread,
)
from softlabels.losses._soft_cross_entropy import (
    log_non_target_mass,
    soft_cross_entropy,
    soft_cross_entropy_terms,
)

__all__ = ["NKDLoss", "NonTargetTerm", "TargetTerm", "nkd_loss"]

TargetTerm: TypeAlias = Literal["T1", "T2", "both"]
NonTargetTerm: TypeAlias = Literal["normalized", "unnormalized"]

_TARGET_TERMS = ("T1", "T2", "both")
_NON_TARGET_TERMS = ("normalized", "unnormalized")


@overload
def nkd_loss(
    logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    *,
    temperature: float = 1.0,
    non_target_weight: float = 1.5,
    target_term: TargetTerm = "T1",
    non_target_term: NonTargetTerm = "normalized",
    mixed_target: MixedTarget = "largest",
    ignore_index: int | None = None,
    reduction: Reduction = "mean",
    return_parts: Literal[False] = False,
) -> Tensor: ...


@overload
def nkd_loss(
    logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    *,
    temperature: float = 1.0,
    non_target_weight: float = 1.5,
    target_term: TargetTerm = "T1",
    non_target_term: NonTargetTerm = "normalized",
    mixed_target: MixedTarget = "largest",
    ignore_index: int | None = None,
    reduction: Reduction = "mean",
    return_parts: Literal[True],
) -> LossOutput: ...


def nkd_loss(
    logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    *,
    temperature: float = 1.0,
    non_target_weight: float = 1.5,
    target_term: TargetTerm = "T1",
    non_target_term: NonTargetTerm = "normalized",
    mixed_target: MixedTarget = "largest",
    ignore_index: int | None = None,
    reduction: Reduction = "mean",
    return_parts: bool = False,
) -> Tensor | LossOutput:
    r"""NKD: the teacher's target probability, and its normalized non-target distribution.

    Yang et al., "From Knowledge Distillation to Self-Knowledge Distillation", ICCV 2023
    (arXiv 2303.13005), equations 4-5; official code yzd-v/cls_KD, whose version of
    2023-07-17 to 2023-10-10 did not remove the target class: this follows the paper.

    .. math::
        L = -T_t \log S_t
            - \gamma \lambda^2 \sum_{i \ne t} N(T^\lambda)_i \log N(S^\lambda)_i

    The paper's ablations are settings: `target_term` (table 14) and `non_target_term` (table 5).

    ================  ==============================================================
    symbol            meaning
    ================  ==============================================================
    S, T              softmax of `logits`, `teacher_logits`, at temperature 1
    S^lambda          softmax at temperature lambda; N(.) is taken over the classes
                      that are not t, and renormalized
    lambda            `temperature` (the target term always uses 1)
    gamma             `non_target_weight`
    t                 the labeled class
    ================  ==============================================================

    It is *added* to the task's own loss (cross-entropy), with weight 1.

    Args:
        logits: [B, C], raw student logits. Gets the gradient.
        teacher_logits: [B, C], raw teacher logits. Gets none.
        target: [B] class indices, or [B, C] probabilities (mixup, cutmix).
        temperature: Above 0; unitless. The paper's runs use 1 (ImageNet) and 3 (CIFAR-100).
        non_target_weight: 0 or more.
        target_term: `"T1"`: :math:`-T_t \log S_t`, NKD's own. `"T2"`:
            :math:`-(1 - T_t) \log(1 - S_t)`, the other half of DKD's target part, in its place.
            `"both"`: their sum. Always at temperature 1; T2 is 0 where no other class is left.
        non_target_term: `"normalized"`, or `"unnormalized"`: classic KD's
            :math:`-\sum_{i \ne t} T^\lambda_i \log S^\lambda_i` in its place.
        mixed_target: For [B, C] labels. `"largest"`: t is the class with the largest label
            (ties: the lower class), as in the published runs. `"all"`: every class with a
            positive label is a target class (target term `-sum T_i log S_i`) and leaves the
            non-target part.
        ignore_index: Samples with this class index count nothing, also in the mean over B;
            without any other sample the loss is 0. For [B] labels.
        reduction: `"mean"` over B, `"sum"`, or `"none"`.
        return_parts: Also return the summands, as `LossOutput(loss, parts)`: `"target"` (T1),
            `"rest"` (T2), `"non_target"`, weighted.

    Returns:
        A scalar, or [B] for `"none"`; in nats, at least float32.

    Raises:
        TypeError: Logits or target of a wrong dtype.
        ValueError: A wrong shape, label, setting or reduction; with `mixed_target="all"`, a
            label for every one of more than two classes.

    Numerics: computed in float32 or wider, also under autocast; no host synchronization.
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
    _check_settings(temperature, non_target_weight, target_term, non_target_term, mixed_target)
    check_ignore_index(ignore_index)
    check_target(target, logits, ignore_index)

    logits = in_float32(logits)
    teacher_logits = in_float32(teacher_logits.detach()).to(logits.dtype)
    labels = checked_columns(target, logits, mixed_target, ignore_index)
    teacher_probs, others = _of_teacher(teacher_logits, labels, temperature)
    weights = 1.0, non_target_weight * temperature**2
    if not return_parts and target_term == "T1" and non_target_term == "normalized":
        total = soft_cross_entropy(logits, labels, teacher_probs, others, temperature, weights)
        return reduce_parts({"total": total}, reduction, labels.kept).loss
    terms = soft_cross_entropy_terms(logits, labels, teacher_probs, others, temperature)
    non_target = terms.non_target
    if non_target_term == "unnormalized":
        mass = log_non_target_mass(teacher_logits, labels, temperature).exp()
        non_target = mass * (non_target - log_non_target_mass(logits, labels, temperature))
    parts: dict[str, Tensor] = {}
    if target_term != "T2":
        parts["target"] = terms.target
    if target_term != "T1":
        # The teacher's mass from the small side: 1 - T_t is 0 where T_t is nearly 1.
        mass = log_non_target_mass(teacher_logits, labels).exp()
        parts["rest"] = -mass * log_non_target_mass(logits, labels)
    parts["non_target"] = weights[1] * non_target
    output = reduce_parts(parts, reduction, labels.kept)
    return output if return_parts else output.loss


def _check_settings(
    temperature: float,
    non_target_weight: float,
    target_term: str,
    non_target_term: str,
    mixed_target: str,
) -> None:
    check_temperature(temperature)
    check_number("non_target_weight", non_target_weight)
    check_choice("target_term", target_term, _TARGET_TERMS)
    check_choice("non_target_term", non_target_term, _NON_TARGET_TERMS)
    check_choice("mixed_target", mixed_target, ("largest", "all"))


def _of_teacher(
    teacher_logits: Tensor, labels: Labels, temperature: float
) -> tuple[Tensor, NonTarget]:
    """T at the labeled classes, [B, K], 0 where absent; and N(T) at the temperature."""
    sums, others = softmax_parts(teacher_logits, labels, temperature)
    teacher_probs = (teacher_logits.gather(1, labels.classes) - sums.everything).exp()
    return torch.where(labels.present(), teacher_probs, 0.0), others


class NKDLoss(nn.Module):
    """NKD as a module; see `nkd_loss` for the equation and the settings.

    Args:
        temperature: Of the non-target term; above 0.
        non_target_weight: 0 or more.
        target_term: `"T1"` (the method itself), `"T2"` or `"both"`.
        non_target_term: `"normalized"` (the method itself) or `"unnormalized"` (classic KD's).
        mixed_target: `"largest"` or `"all"`, for mixed labels.
        ignore_index: Class index of samples that count nothing, or None.
        reduction: `"mean"`, `"sum"` or `"none"`.
    """

    inputs: ClassVar[Mapping[str, Input]] = {
        "logits": Logits(),
        "teacher_logits": TeacherLogits(),
        "target": Target(),
    }

    def __init__(
        self,
        *,
        temperature: float = 1.0,
        non_target_weight: float = 1.5,
        target_term: TargetTerm = "T1",
        non_target_term: NonTargetTerm = "normalized",
        mixed_target: MixedTarget = "largest",
        ignore_index: int | None = None,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__()
        _check_settings(temperature, non_target_weight, target_term, non_target_term, mixed_target)
        check_ignore_index(ignore_index)
        check_choice("reduction", reduction, ("mean", "sum", "none"))
        self.temperature = temperature
        self.non_target_weight = non_target_weight
        self.target_term: TargetTerm = target_term
        self.non_target_term: NonTargetTerm = non_target_term
        self.mixed_target: MixedTarget = mixed_target
        self.ignore_index = ignore_index
        self.reduction: Reduction = reduction

    def forward(
        self,
        logits: Tensor,
        teacher_logits: Tensor,
        target: Tensor,
        *,
        return_parts: bool = False,
    ) -> Tensor | LossOutput:
        """Compute `nkd_loss` with this module's settings."""
        compute = partial(
            nkd_loss,
            logits,
            teacher_logits,
            target,
            temperature=self.temperature,
            non_target_weight=self.non_target_weight,
            target_term=self.target_term,
            non_target_term=self.non_target_term,
            mixed_target=self.mixed_target,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
        )
        return compute(return_parts=True) if return_parts else compute()

    def soft_labels(self, logits: Tensor, teacher_logits: Tensor, target: Tensor) -> SoftLabels:
        """The teacher's belief in the true class, and how it shares the rest among the others."""
        check_logits(teacher_logits, "teacher_logits")
        check_target(target, teacher_logits, self.ignore_index)
        teacher_logits = in_float32(teacher_logits.detach())
        labels = checked_columns(target, teacher_logits, self.mixed_target, self.ignore_index)
        teacher_probs, others = _of_teacher(teacher_logits, labels, self.temperature)
        return SoftLabels(spread(labels, teacher_probs, teacher_logits), others.normalized())
