"""KD, knowledge distillation: divergence from the teacher's softened prediction."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from softlabels.inputs import Logits, TeacherLogits
from softlabels.losses._checks import check_choice, check_temperature
from softlabels.losses._method import Method, Temperature
from softlabels.losses._non_target import Reduction, SoftLabels, reduce_terms
from softlabels.losses._soft_target import log_softened, softened_labels, student_and_teacher

__all__ = ["KDLoss", "kd_loss"]


def kd_loss(
    logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float = 4.0,
    reduction: Reduction = "mean",
) -> Tensor:
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
    check_temperature(temperature)
    check_choice("reduction", reduction, ("mean", "sum", "none"))
    terms = {"divergence": _divergence(logits, teacher_logits, temperature)}
    return reduce_terms(terms, reduction)["divergence"]


def _divergence(logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """The equation above, [B]."""
    logits, teacher_logits = student_and_teacher(logits, teacher_logits)
    log_predicted = log_softened(logits, temperature)
    log_teacher_probs = log_softened(teacher_logits, temperature)
    # The factor and the sign lie on the teacher's side, which has no gradient to go through them.
    weights = log_teacher_probs.exp() * -(temperature**2)
    return (weights * (log_predicted - log_teacher_probs)).sum(1)


class KDLoss(Method, name="kd"):
    """KD as a method; see `kd_loss` for the equation and the settings.

    Args:
        temperature: Above 0.
    """

    temperature: Temperature = 4.0

    inputs: ClassVar = {"logits": Logits(), "teacher_logits": TeacherLogits()}

    def terms(self, logits: Tensor, teacher_logits: Tensor) -> dict[str, Tensor]:
        """`"divergence"`."""
        return {"divergence": _divergence(logits, teacher_logits, self.temperature)}

    def soft_labels(self, logits: Tensor, teacher_logits: Tensor, target: Tensor) -> SoftLabels:
        """The teacher's softened belief in the true class, and how it shares out the rest."""
        return softened_labels(teacher_logits, target, self.temperature)
