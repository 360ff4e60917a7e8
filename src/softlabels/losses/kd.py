"""KD: classic knowledge distillation, with a teacher."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal, overload

from torch import Tensor, nn

from softlabels.inputs import Input, Logits, TeacherLogits
from softlabels.losses._checks import (
    check_choice,
    check_logits,
    check_target,
    check_temperature,
)
from softlabels.losses._non_target import (
    LossOutput,
    Reduction,
    SoftLabels,
    label_columns,
    reduce_parts,
    softmax_parts,
    spread,
)
from softlabels.losses._soft_target import log_softened

__all__ = ["KDLoss", "kd_loss"]


@overload
def kd_loss(
    logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float = 4.0,
    reduction: Reduction = "mean",
    return_parts: Literal[False] = False,
) -> Tensor: ...


@overload
def kd_loss(
    logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float = 4.0,
    reduction: Reduction = "mean",
    return_parts: Literal[True],
) -> LossOutput: ...


def kd_loss(
    logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float = 4.0,
    reduction: Reduction = "mean",
    return_parts: bool = False,
) -> Tensor | LossOutput:
    r"""KD: the divergence of the student's softened prediction from the teacher's.

    Hinton et al., "Distilling the Knowledge in a Neural Network", 2015 (arXiv 1503.02531);
    written as in Yang et al., ICCV 2023 (arXiv 2303.13005), equations 2-3, in KL form: the
    cross-entropy form has the same gradient.

    .. math:: L = \lambda^2 \sum_i T^\lambda_i (\log T^\lambda_i - \log S^\lambda_i)

    Args:
        logits: [B, C], raw student logits (S). Gets the gradient.
        teacher_logits: [B, C], raw teacher logits (T). Gets none.
        temperature: lambda, above 0; unitless.
        reduction: `"mean"` over B, `"sum"`, or `"none"`.
        return_parts: Also return the summands, as `LossOutput(loss, parts)`: `"divergence"`.

    Returns:
        A scalar, or [B] for `"none"`; in nats, at least float32.

    Raises:
        TypeError: Logits of a wrong dtype.
        ValueError: A wrong shape, temperature or reduction.

    Numerics: log-softmax throughout, computed in float32 or wider, also under autocast.
    Distributed: each sample by itself, no batch statistics.

    Example:
        >>> import torch
        >>> logits = torch.tensor([[2.0, 1.0, 0.5, -1.0, 0.0]])
        >>> kd_loss(logits, logits)
        tensor(0.)
    """
    check_logits(logits)
    check_logits(teacher_logits, "teacher_logits", like=logits)
    check_temperature(temperature)
    log_predicted = log_softened(logits, temperature)
    teacher_logits = teacher_logits.detach().to(log_predicted.dtype)
    log_teacher_probs = log_softened(teacher_logits, temperature)
    divergence = (log_teacher_probs.exp() * (log_teacher_probs - log_predicted)).sum(1)
    output = reduce_parts({"divergence": temperature**2 * divergence}, reduction)
    return output if return_parts else output.loss


class KDLoss(nn.Module):
    """KD as a module; see `kd_loss` for the equation and the settings.

    Args:
        temperature: Above 0.
        reduction: `"mean"`, `"sum"` or `"none"`.
    """

    inputs: ClassVar[Mapping[str, Input]] = {
        "logits": Logits(),
        "teacher_logits": TeacherLogits(),
    }

    def __init__(self, *, temperature: float = 4.0, reduction: Reduction = "mean") -> None:
        super().__init__()
        check_temperature(temperature)
        check_choice("reduction", reduction, ("mean", "sum", "none"))
        self.temperature = temperature
        self.reduction: Reduction = reduction

    def forward(
        self, logits: Tensor, teacher_logits: Tensor, *, return_parts: bool = False
    ) -> Tensor | LossOutput:
        """Compute `kd_loss` with this module's settings."""
        output = kd_loss(
            logits,
            teacher_logits,
            temperature=self.temperature,
            reduction=self.reduction,
            return_parts=True,
        )
        return output if return_parts else output.loss

    def soft_labels(self, logits: Tensor, teacher_logits: Tensor, target: Tensor) -> SoftLabels:
        """The teacher's softened belief in the true class, and how it shares out the rest."""
        check_logits(teacher_logits, "teacher_logits")
        check_target(target, teacher_logits)
        teacher_probs = log_softened(teacher_logits.detach(), self.temperature)
        labels = label_columns(target, teacher_probs)
        return SoftLabels(
            spread(labels, teacher_probs.gather(1, labels.classes).exp(), teacher_probs),
            softmax_parts(teacher_probs, labels)[1].normalized(),
        )
