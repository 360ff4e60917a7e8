"""CS-KD, class-wise self-distillation: KD from another image of the same class."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from softlabels.inputs import Logits, SecondPass
from softlabels.losses._checks import check_logits
from softlabels.losses._method import Method, Temperature
from softlabels.losses._non_target import SoftLabels
from softlabels.losses._soft_target import softened_labels
from softlabels.losses.kd import kd_loss

__all__ = ["CSKDLoss"]


class CSKDLoss(Method, name="cs_kd"):
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
        temperature: T, above 0; unitless.

    Deviations: none of the value. The published code draws half of each batch, and partners
    make up the other half, without cross-entropy: here every image of the batch has a partner
    beside it, so that its batch size of 128 is one of 64 here.
    Numerics: as `kd_loss`, of which this is a use.

    Example:
        >>> import torch
        >>> logits = torch.tensor([[2.0, 1.0, 0.5, -1.0, 0.0]])
        >>> CSKDLoss()(logits, logits.flip(1))
        tensor(1.5795)
    """

    temperature: Temperature = 4.0

    inputs: ClassVar = {
        "logits": Logits(),
        "partner_logits": SecondPass("partner", Logits(), gradient=False),
    }

    def terms(self, logits: Tensor, partner_logits: Tensor) -> dict[str, Tensor]:
        """`"divergence"`."""
        check_logits(logits)
        check_logits(partner_logits, "partner_logits", like=logits)
        temperature = self.temperature
        divergence = kd_loss(logits, partner_logits, temperature=temperature, reduction="none")
        return {"divergence": divergence}

    def soft_labels(self, logits: Tensor, partner_logits: Tensor, target: Tensor) -> SoftLabels:
        """The softened prediction for another image of the class, split at the labels."""
        return softened_labels(partner_logits, target, self.temperature)
