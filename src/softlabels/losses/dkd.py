"""DKD, decoupled knowledge distillation: KD's target and non-target halves, weighted apart."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from softlabels.inputs import Logits, Target, TeacherLogits
from softlabels.losses._checks import check_target, check_unsmoothed
from softlabels.losses._method import Method, Temperature, Weight
from softlabels.losses._non_target import (
    Labels,
    MixedTarget,
    SoftLabels,
    checked_columns,
    finite_limit,
    log_total,
    softmax_parts,
)
from softlabels.losses._soft_cross_entropy import log_non_target_mass
from softlabels.losses._soft_target import softened_labels, student_and_teacher

__all__ = ["DKDLoss"]


def _split(
    logits: Tensor, labels: Labels, temperature: float
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Probabilities and their logarithms: of labeled class or not, and over the non-target ones.

    The first two are [B, 2], the others [B, C], with a probability of 0 at labeled classes,
    where the logarithm means nothing.
    """
    limit = finite_limit(logits.dtype)
    scaled = (logits / temperature).clamp(-limit, limit)
    sums, others = softmax_parts(scaled, labels)
    labeled = labels.masked(scaled.gather(1, labels.classes), -torch.inf).logsumexp(1)
    everything = log_total(scaled, labels, sums.rest).squeeze(1)
    log_labeled = (labeled - everything).clamp(min=-limit)
    log_binary = torch.stack((log_labeled, log_non_target_mass(scaled, labels)), 1)
    log_others = (scaled - sums.top - sums.scaled).clamp(-limit, limit)
    return (log_binary.exp(), log_binary), (others, log_others)


class DKDLoss(Method, name="dkd"):
    r"""DKD: classic distillation's two halves, each with a weight of its own.

    Zhao et al., "Decoupled Knowledge Distillation", CVPR 2022 (arXiv 2203.08679); official
    code megvii-research/mdistiller. Written as in Yang et al., ICCV 2023, equations 14-17.

    .. math::
        L = \lambda^2 \big( \alpha \, KL(b^T \| b^S)
            + \beta \, KL(N(T^\lambda) \| N(S^\lambda)) \big),
        \quad b = (p_t, 1 - p_t)

    =========  ==================================================================
    symbol     meaning
    =========  ==================================================================
    S, T       softmax of `logits`, `teacher_logits` over lambda; p_t its value at
               the labeled class t
    N(.)       renormalized over the classes that are not t
    lambda     `temperature`, of both terms
    alpha      `target_weight`
    beta       `non_target_weight`
    =========  ==================================================================

    It is *added* to the task's own loss (cross-entropy), with weight 1; the published runs let
    it grow to its full weight over 20 epochs (CIFAR-100) or 1 (ImageNet).

    Args:
        target_weight: alpha, 0 or more.
        non_target_weight: beta, 0 or more. Published per pair of networks: 8 for most of
            CIFAR-100, 0.5 (ResNet-34 to 18) and 2 (ResNet-50 to MobileNet) on ImageNet.
        temperature: lambda, above 0; unitless. 4 on CIFAR-100, 1 on ImageNet.
        mixed_target: For [B, C] labels. `"largest"`: t is the class with the largest label
            (ties: the lower class). `"all"`: t is the group of all classes with a positive
            label: p_t is their sum, and each leaves the non-target part.

    Deviations: the published code takes class indices alone, and the logarithm of summed
    probabilities, which is infinite where they underflow; here each logarithm is a difference
    of log-sums. With two classes the non-target term is 0, as there.

    Example:
        >>> import torch
        >>> logits = torch.tensor([[2.0, 1.0, 0.5, -1.0, 0.0]])
        >>> teacher_logits = torch.tensor([[3.0, 0.0, 1.0, -2.0, 0.5]])
        >>> DKDLoss()(logits, teacher_logits, torch.tensor([0]))
        tensor(2.3503)
    """

    target_weight: Weight = 1.0
    non_target_weight: Weight = 8.0
    temperature: Temperature = 4.0
    mixed_target: MixedTarget = "largest"

    inputs: ClassVar = {"logits": Logits(), "teacher_logits": TeacherLogits(), "target": Target()}

    def terms(self, logits: Tensor, teacher_logits: Tensor, target: Tensor) -> dict[str, Tensor]:
        """`"target"` and `"non_target"`, weighted."""
        logits, teacher_logits = student_and_teacher(logits, teacher_logits)
        check_target(target, logits)
        labels = checked_columns(target, logits, self.mixed_target)

        student = _split(logits, labels, self.temperature)
        teacher = _split(teacher_logits, labels, self.temperature)
        terms = {}
        divergences = ("target", self.target_weight, 0), ("non_target", self.non_target_weight, 1)
        for name, weight, part in divergences:
            teacher_probs, log_teacher_probs = teacher[part]
            divergence = (teacher_probs * (log_teacher_probs - student[part][1])).sum(1)
            terms[name] = weight * self.temperature**2 * divergence
        return terms

    def soft_labels(self, logits: Tensor, teacher_logits: Tensor, target: Tensor) -> SoftLabels:
        """The teacher's softened belief in the true class, and how it shares out the rest."""
        if self.mixed_target == "all":
            check_unsmoothed(target)
        settings = self.temperature, self.ignore_index, self.mixed_target
        return softened_labels(teacher_logits, target, *settings)
