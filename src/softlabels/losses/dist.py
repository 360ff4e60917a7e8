"""DIST: the student's predictions correlate with the teacher's, by sample and by class."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal, overload

import torch
from torch import Tensor, nn

from softlabels.inputs import Input, Logits, TeacherLogits
from softlabels.losses._checks import check_flag, check_logits, check_number, check_temperature
from softlabels.losses._non_target import LossOutput, SoftLabels
from softlabels.losses._soft_target import log_softened
from softlabels.losses.kd import KDLoss

__all__ = ["DISTLoss", "dist_loss"]

_EPSILON = 1e-8  # added to the product of norms, as in the published code


@overload
def dist_loss(
    logits: Tensor,
    teacher_logits: Tensor,
    *,
    inter_weight: float = 1.0,
    intra_weight: float = 1.0,
    temperature: float = 1.0,
    temperature_squared: bool = True,
    return_parts: Literal[False] = False,
) -> Tensor: ...


@overload
def dist_loss(
    logits: Tensor,
    teacher_logits: Tensor,
    *,
    inter_weight: float = 1.0,
    intra_weight: float = 1.0,
    temperature: float = 1.0,
    temperature_squared: bool = True,
    return_parts: Literal[True],
) -> LossOutput: ...


def dist_loss(
    logits: Tensor,
    teacher_logits: Tensor,
    *,
    inter_weight: float = 1.0,
    intra_weight: float = 1.0,
    temperature: float = 1.0,
    temperature_squared: bool = True,
    return_parts: bool = False,
) -> Tensor | LossOutput:
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

    It is *added* to the task's own loss (cross-entropy), with weight 1.

    Args:
        logits: [B, C], raw student logits. Gets the gradient.
        teacher_logits: [B, C], raw teacher logits. Gets none.
        inter_weight: beta, 0 or more.
        intra_weight: gamma, 0 or more.
        temperature: tau, above 0; unitless. 1 on ImageNet, 4 is advised for CIFAR-100.
        temperature_squared: Whether the factor tau^2 is there. The published classification
            code has it, the paper has not.
        return_parts: Also return the summands, as `LossOutput(loss, parts)`: `"inter"`,
            `"intra"`, weighted.

    Returns:
        A scalar, at least float32.

    Raises:
        TypeError: Logits of a wrong dtype.
        ValueError: A wrong shape or setting.

    Deviations: where the student's or the teacher's values of a row or column are all equal,
    as those of a column in a batch of 1, the correlation is 0 without gradient; the published
    gradient is not a number there.
    As published, a class whose probabilities vary by less than about 1e-4 over the batch counts
    as uncorrelated, because of the 1e-8.
    Numerics: computed in float32 or wider, also under autocast; no host synchronization.
    Distributed: classes are correlated over the batch of this process.

    Example:
        >>> import torch
        >>> logits = torch.tensor([[2.0, 1.0, 0.5], [0.2, 1.5, 0.7]])
        >>> dist_loss(logits, torch.tensor([[3.0, 0.0, 1.0], [0.0, 2.0, 1.0]]))
        tensor(0.0167)
    """
    check_logits(logits)
    check_logits(teacher_logits, "teacher_logits", like=logits)
    _check_settings(inter_weight, intra_weight, temperature, temperature_squared)
    student = log_softened(logits, temperature).exp()
    teacher = log_softened(teacher_logits.detach(), temperature).exp().to(student.dtype)
    factor = temperature**2 if temperature_squared else 1.0
    parts = {
        "inter": factor * inter_weight * (1 - _correlations(student, teacher, 1)).mean(),
        "intra": factor * intra_weight * (1 - _correlations(student, teacher, 0)).mean(),
    }
    loss = parts["inter"] + parts["intra"]
    return LossOutput(loss, parts) if return_parts else loss


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


def _check_settings(
    inter_weight: float, intra_weight: float, temperature: float, temperature_squared: bool
) -> None:
    check_number("inter_weight", inter_weight)
    check_number("intra_weight", intra_weight)
    check_temperature(temperature)
    check_flag("temperature_squared", temperature_squared)


class DISTLoss(nn.Module):
    """DIST as a module; see `dist_loss` for the equation and the settings.

    Args:
        inter_weight: Of the relation between classes; 0 or more.
        intra_weight: Of the relation within classes; 0 or more.
        temperature: Above 0.
        temperature_squared: Whether the loss is multiplied by its square.
    """

    inputs: ClassVar[Mapping[str, Input]] = {
        "logits": Logits(),
        "teacher_logits": TeacherLogits(),
    }

    def __init__(
        self,
        *,
        inter_weight: float = 1.0,
        intra_weight: float = 1.0,
        temperature: float = 1.0,
        temperature_squared: bool = True,
    ) -> None:
        super().__init__()
        _check_settings(inter_weight, intra_weight, temperature, temperature_squared)
        self.inter_weight = inter_weight
        self.intra_weight = intra_weight
        self.temperature = temperature
        self.temperature_squared = temperature_squared

    def forward(
        self, logits: Tensor, teacher_logits: Tensor, *, return_parts: bool = False
    ) -> Tensor | LossOutput:
        """Compute `dist_loss` with this module's settings."""
        output = dist_loss(
            logits,
            teacher_logits,
            inter_weight=self.inter_weight,
            intra_weight=self.intra_weight,
            temperature=self.temperature,
            temperature_squared=self.temperature_squared,
            return_parts=True,
        )
        return output if return_parts else output.loss

    def soft_labels(self, logits: Tensor, teacher_logits: Tensor, target: Tensor) -> SoftLabels:
        """The teacher's softened belief in the true class, and how it shares out the rest."""
        return KDLoss(temperature=self.temperature).soft_labels(logits, teacher_logits, target)
