"""KD: classic knowledge distillation, with a teacher."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor, nn
from torch.nn import functional

from softlabels.losses.nontarget import (
    Reduction,
    SoftLabels,
    check_choice,
    check_logits,
    check_number,
    check_target,
    in_float32,
    label_probabilities,
    non_target_softmax,
    reduce_batch,
)
from softlabels.losses.reads import Logits, Signal, TeacherLogits

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
    check_logits(logits)
    check_logits(teacher_logits, "teacher_logits", like=logits)
    check_number("temperature", temperature, positive=True)
    logits = in_float32(logits)
    teacher_logits = in_float32(teacher_logits.detach()).to(logits.dtype)
    divergence = functional.kl_div(
        (logits / temperature).log_softmax(1),
        (teacher_logits / temperature).log_softmax(1),
        reduction="none",
        log_target=True,
    ).sum(1)
    return reduce_batch(temperature**2 * divergence, reduction)


class KDLoss(nn.Module):
    """KD as a module; see `kd_loss` for the equation and the settings.

    Args:
        temperature: Above 0.
        reduction: `"mean"`, `"sum"` or `"none"`.
    """

    reads: ClassVar[Mapping[str, Signal]] = {
        "logits": Logits(),
        "teacher_logits": TeacherLogits(),
    }

    def __init__(self, *, temperature: float = 4.0, reduction: Reduction = "mean") -> None:
        super().__init__()
        check_number("temperature", temperature, positive=True)
        check_choice("reduction", reduction, ("mean", "sum", "none"))
        self.temperature = temperature
        self.reduction: Reduction = reduction

    def forward(self, logits: Tensor, teacher_logits: Tensor) -> Tensor:
        """Compute `kd_loss` with this module's settings."""
        return kd_loss(
            logits, teacher_logits, temperature=self.temperature, reduction=self.reduction
        )

    def soft_labels(self, logits: Tensor, teacher_logits: Tensor, target: Tensor) -> SoftLabels:
        """The teacher's softened belief in the true class, and how it shares out the rest."""
        check_logits(teacher_logits, "teacher_logits")
        check_target(target, teacher_logits)
        softened = in_float32(teacher_logits.detach()) / self.temperature
        labelled = label_probabilities(target, softened) > 0
        return SoftLabels(
            softened.softmax(1).masked_fill(~labelled, 0.0),
            non_target_softmax(softened, labelled),
        )
