"""NKD, normalized knowledge distillation: the teacher's target and normalized non-target parts."""

from __future__ import annotations

from typing import ClassVar, Literal, NamedTuple, TypeAlias

from torch import Tensor

from softlabels.inputs import Logits, Target, TeacherLogits
from softlabels.losses._checks import (
    check_choice,
    check_ignore_index,
    check_number,
    check_target,
    check_temperature,
)
from softlabels.losses._method import Method, Temperature, Weight
from softlabels.losses._non_target import (
    Labels,
    MixedTarget,
    Reduction,
    SoftLabels,
    checked_columns,
    labeled_probabilities,
    reduce_terms,
    softmax_parts,
    spread,
    total_of,
    without_ignored,
)
from softlabels.losses._soft_cross_entropy import (
    log_non_target_mass,
    soft_cross_entropy,
    soft_cross_entropy_terms,
)
from softlabels.losses._soft_target import student_and_teacher

__all__ = ["NKDLoss", "NonTargetTerm", "TargetTerm", "nkd_loss"]

TargetTerm: TypeAlias = Literal["T1", "T2", "both"]
NonTargetTerm: TypeAlias = Literal["normalized", "unnormalized"]


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
) -> Tensor:
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
    check_temperature(temperature)
    check_number("non_target_weight", non_target_weight)
    check_choice("target_term", target_term, ("T1", "T2", "both"))
    check_choice("non_target_term", non_target_term, ("normalized", "unnormalized"))
    check_choice("mixed_target", mixed_target, ("largest", "all"))
    check_choice("reduction", reduction, ("mean", "sum", "none"))
    check_ignore_index(ignore_index)
    target, kept = without_ignored(target, ignore_index)
    soft = _soft(logits, teacher_logits, target, temperature, mixed_target)
    if target_term == "T1" and non_target_term == "normalized":
        terms = {"loss": _fused(soft, temperature, non_target_weight)}
    else:
        terms = _terms(soft, temperature, non_target_weight, target_term, non_target_term)
    return reduce_terms({"loss": total_of(terms)}, reduction, kept)["loss"]


class _Soft(NamedTuple):
    """Both networks' logits, and the soft labels that the teacher's give."""

    logits: Tensor
    teacher_logits: Tensor
    labels: Labels
    target: Tensor  # [B, K], T at the labeled classes, 0 where absent
    non_target: Tensor  # [B, C], N(T) at the temperature


def _soft(
    logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    temperature: float,
    mixed_target: MixedTarget,
) -> _Soft:
    """Check the inputs, and make the soft labels."""
    logits, teacher_logits = student_and_teacher(logits, teacher_logits)
    check_target(target, logits)
    labels = checked_columns(target, logits, mixed_target)
    # One pass gives both: the non-target softmax at the temperature, and the log-sum over all
    # classes at temperature 1, which T_t needs.
    sums, others = softmax_parts(teacher_logits, labels, temperature)
    teacher_probs = labeled_probabilities(teacher_logits, labels, sums.rest)
    return _Soft(logits, teacher_logits, labels, teacher_probs, others)


def _fused(soft: _Soft, temperature: float, non_target_weight: float) -> Tensor:
    """The loss itself, [B], with its gradient in closed form."""
    weights = 1.0, non_target_weight * temperature**2
    return soft_cross_entropy(
        soft.logits, soft.labels, soft.target, soft.non_target, temperature, weights
    )


def _terms(
    soft: _Soft,
    temperature: float,
    non_target_weight: float,
    target_term: TargetTerm,
    non_target_term: NonTargetTerm,
) -> dict[str, Tensor]:
    """The summands that the settings ask for, [B] each."""
    logits, teacher_logits, labels = soft.logits, soft.teacher_logits, soft.labels
    # Both terms as NKD has them: -T_t log S_t, and the cross-entropy of the normalized rest.
    pair = soft_cross_entropy_terms(logits, labels, soft.target, soft.non_target, temperature)
    non_target = pair.non_target
    if non_target_term == "unnormalized":
        # T_i = N(T)_i M(T) and log S_i = log N(S)_i + log M(S), with M the mass of the others.
        mass = log_non_target_mass(teacher_logits, labels, temperature).exp()
        non_target = mass * (non_target - log_non_target_mass(logits, labels, temperature))
    terms: dict[str, Tensor] = {}
    if target_term != "T2":
        terms["target"] = pair.target
    if target_term != "T1":
        # The teacher's mass from the small side: 1 - T_t is 0 where T_t is nearly 1.
        mass = log_non_target_mass(teacher_logits, labels).exp()
        terms["rest"] = -mass * log_non_target_mass(logits, labels)
    terms["non_target"] = non_target_weight * temperature**2 * non_target
    return terms


class NKDLoss(Method, name="nkd"):
    """NKD as a method; see `nkd_loss` for the equation and the settings.

    Args:
        temperature: Of the non-target term; above 0.
        non_target_weight: 0 or more.
        target_term: `"T1"` (the method itself), `"T2"` or `"both"`.
        non_target_term: `"normalized"` (the method itself) or `"unnormalized"` (classic KD's).
        mixed_target: `"largest"` or `"all"`, for mixed labels.
    """

    temperature: Temperature = 1.0
    non_target_weight: Weight = 1.5
    target_term: TargetTerm = "T1"
    non_target_term: NonTargetTerm = "normalized"
    mixed_target: MixedTarget = "largest"

    inputs: ClassVar = {"logits": Logits(), "teacher_logits": TeacherLogits(), "target": Target()}

    def terms(self, logits: Tensor, teacher_logits: Tensor, target: Tensor) -> dict[str, Tensor]:
        """`"target"` (T1), `"rest"` (T2) and `"non_target"`, weighted."""
        soft = _soft(logits, teacher_logits, target, self.temperature, self.mixed_target)
        weights = self.temperature, self.non_target_weight
        return _terms(soft, *weights, self.target_term, self.non_target_term)

    def fused(self, logits: Tensor, teacher_logits: Tensor, target: Tensor) -> Tensor | None:
        """The sum of the terms; None where it is not NKD's own."""
        if self.target_term != "T1" or self.non_target_term != "normalized":
            return None
        soft = _soft(logits, teacher_logits, target, self.temperature, self.mixed_target)
        return _fused(soft, self.temperature, self.non_target_weight)

    def soft_labels(self, logits: Tensor, teacher_logits: Tensor, target: Tensor) -> SoftLabels:
        """The teacher's belief in the true class, and how it shares the rest among the others."""
        target = without_ignored(target, self.ignore_index)[0]
        soft = _soft(logits, teacher_logits, target, self.temperature, self.mixed_target)
        target_labels = spread(soft.labels, soft.target, soft.teacher_logits)
        return SoftLabels(target_labels, soft.non_target)
