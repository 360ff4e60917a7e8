"""DIST, distillation from a stronger teacher: correlation of predictions."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from softlabels.inputs import Logits, TeacherLogits
from softlabels.losses._method import Method, Temperature, Weight
from softlabels.losses._non_target import SoftLabels
from softlabels.losses._soft_target import log_softened, softened_labels, student_and_teacher

__all__ = ["DISTLoss"]

_EPSILON = 1e-8  # added to the product of norms, as in the published code


def _correlations(student: Tensor, teacher: Tensor, dim: int) -> Tensor:
    """Pearson's correlation along a dimension."""
    student = student - student.mean(dim, keepdim=True)
    teacher = teacher - teacher.mean(dim, keepdim=True)
    squares = student.square().sum(dim), teacher.square().sum(dim)
    defined = (squares[0] > 0) & (squares[1] > 0)
    # The gradient of a root at 0 is infinite: it is not taken there.
    roots = [torch.where(defined, square, 1.0).sqrt() for square in squares]
    found = (student * teacher).sum(dim) / (roots[0] * roots[1] + _EPSILON)
    return torch.where(defined, found, 0.0)


class DISTLoss(Method, name="dist"):
    r"""DIST: one minus the correlation of the predictions, within samples and within classes.

    Huang et al., "Knowledge Distillation from A Stronger Teacher", NeurIPS 2022
    (arXiv 2205.10536); official code hunto/DIST_KD, whose classification runs are in
    hunto/image_classification_sota.

    .. math::
        L = \tau^2 \Big( \frac{\beta}{B} \sum_b \big( 1 - \rho(S_{b,:}, T_{b,:}) \big)
            + \frac{\gamma}{C} \sum_c \big( 1 - \rho(S_{:,c}, T_{:,c}) \big) \Big)

    ==========  ==================================================================
    symbol      meaning
    ==========  ==================================================================
    S, T        softmax of `logits`, `teacher_logits` over tau, [B, C]
    rho         Pearson's correlation; 1e-8 is added to the product of the norms
    beta        `inter_weight`: of the relation between classes, in each sample
    gamma       `intra_weight`: of the relation within each class, over the batch
    tau         `temperature`
    ==========  ==================================================================

    Args:
        inter_weight: Of the relation between classes; 0 or more.
        intra_weight: Of the relation within classes; 0 or more.
        temperature: tau, above 0; unitless. 1 on ImageNet, 4 is advised for CIFAR-100.
        temperature_squared: Whether the factor tau^2 is there. The published classification
            code has it, the paper has not.

    Deviations: where the student's or the teacher's values of a row or column are all equal,
    as those of a column in a batch of 1, the correlation is 0 without gradient; the published
    gradient is not a number there.
    As published, a class whose probabilities vary by less than about 1e-4 over the batch counts
    as uncorrelated, because of the 1e-8.
    Distributed: classes are correlated over the batch of this process.

    Example:
        >>> import torch
        >>> logits = torch.tensor([[2.0, 1.0, 0.5], [0.2, 1.5, 0.7]])
        >>> DISTLoss()(logits, torch.tensor([[3.0, 0.0, 1.0], [0.0, 2.0, 1.0]]))
        tensor(0.0167)
    """

    inter_weight: Weight = 1.0
    intra_weight: Weight = 1.0
    temperature: Temperature = 1.0
    temperature_squared: bool = True

    inputs: ClassVar = {"logits": Logits(), "teacher_logits": TeacherLogits()}
    of_batch = True

    def terms(self, logits: Tensor, teacher_logits: Tensor) -> dict[str, Tensor]:
        """`"inter"` and `"intra"`, weighted scalars."""
        student, teacher = (
            log_softened(of_one, self.temperature).exp()
            for of_one in student_and_teacher(logits, teacher_logits)
        )
        factor = self.temperature**2 if self.temperature_squared else 1.0
        return {
            "inter": factor * self.inter_weight * (1 - _correlations(student, teacher, 1)).mean(),
            "intra": factor * self.intra_weight * (1 - _correlations(student, teacher, 0)).mean(),
        }

    def soft_labels(self, logits: Tensor, teacher_logits: Tensor, target: Tensor) -> SoftLabels:
        """The teacher's softened belief in the true class, and how it shares out the rest."""
        return softened_labels(teacher_logits, target, self.temperature)
