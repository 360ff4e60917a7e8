"""CS-KD: the prediction of another image of the same class teaches, no teacher."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor, nn

from softlabels.inputs import Input, Logits, SecondPass
from softlabels.losses._checks import check_choice, check_logits, check_temperature
from softlabels.losses._non_target import Reduction, SoftLabels
from softlabels.losses.kd import KDLoss, kd_loss

__all__ = ["CSKDLoss", "cs_kd_loss"]


def cs_kd_loss(
    logits: Tensor,
    partner_logits: Tensor,
    *,
    temperature: float = 4.0,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""CS-KD: the divergence from the prediction for another image of the same class.

    Yun et al., "Regularizing Class-wise Predictions via Self-knowledge Distillation", CVPR 2020
    (arXiv 2003.13964); official code alinlab/cs-kd.

    .. math:: L = T^2 \, KL\big(P(\cdot | x'; T) \,\|\, P(\cdot | x; T)\big)

    ======  ==============================================================
    symbol  here
    ======  ==============================================================
    x, x'   an image, and its partner: another image of the same class
    P       softmax of `logits` / T, and of `partner_logits` / T
    T       `temperature`
    ======  ==============================================================

    It is added to the task's own loss with the paper's weight lambda = 1 (3 for fine-grained
    data).

    Args:
        logits: [B, C], raw logits of the images. Gets the gradient.
        partner_logits: [B, C], raw logits of their partners. Gets none.
        temperature: T, above 0; unitless.
        reduction: `"mean"` over B, `"sum"`, or `"none"`.

    Returns:
        A scalar, or [B] for `"none"`; in nats, at least float32.

    Raises:
        TypeError: Logits of a wrong dtype.
        ValueError: A wrong shape, temperature or reduction.

    Deviations: none of the value. The published code draws half of each batch, and partners
    make up the other half, without cross-entropy: here every image of the batch has a partner
    beside it, so that its batch size of 128 is one of 64 here.

    Numerics: as `kd_loss`, of which this is a use.
    Distributed: each sample by itself, no batch statistics.

    Example:
        >>> import torch
        >>> logits = torch.tensor([[2.0, 1.0, 0.5, -1.0, 0.0]])
        >>> cs_kd_loss(logits, logits.flip(1))
        tensor(1.5795)
    """
    check_logits(logits)
    check_logits(partner_logits, "partner_logits", like=logits)
    return kd_loss(logits, partner_logits, temperature=temperature, reduction=reduction)


class CSKDLoss(nn.Module):
    """CS-KD as a module; see `cs_kd_loss` for the equation and the settings.

    Args:
        temperature: Above 0.
        reduction: `"mean"`, `"sum"` or `"none"`.
    """

    inputs: ClassVar[Mapping[str, Input]] = {
        "logits": Logits(),
        "partner_logits": SecondPass("partner", Logits(), gradient=False),
    }
    recommended_weight: ClassVar[float] = 1.0

    def __init__(self, *, temperature: float = 4.0, reduction: Reduction = "mean") -> None:
        super().__init__()
        check_temperature(temperature)
        check_choice("reduction", reduction, ("mean", "sum", "none"))
        self.temperature = temperature
        self.reduction: Reduction = reduction

    def forward(self, logits: Tensor, partner_logits: Tensor) -> Tensor:
        """Compute `cs_kd_loss` with this module's settings."""
        return cs_kd_loss(
            logits, partner_logits, temperature=self.temperature, reduction=self.reduction
        )

    def soft_labels(self, logits: Tensor, partner_logits: Tensor, target: Tensor) -> SoftLabels:
        """The softened prediction for another image of the class, split at the labels."""
        return KDLoss(temperature=self.temperature).soft_labels(logits, partner_logits, target)
