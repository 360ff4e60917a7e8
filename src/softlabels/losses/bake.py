"""BAKE, batch knowledge ensembling: images learn the predictions of their batch's neighbors."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from softlabels.inputs import Features, Logits
from softlabels.losses._checks import check_logits, check_number, check_temperature
from softlabels.losses._features import check_vectors, the_only
from softlabels.losses._method import Method, Share, Temperature
from softlabels.losses._non_target import SoftLabels, in_float32
from softlabels.losses._soft_target import log_softened, taken_apart

__all__ = ["BAKELoss", "bake_targets"]


def bake_targets(
    logits: Tensor, features: Tensor, *, temperature: float = 4.0, omega: float = 0.5
) -> Tensor:
    r"""BAKE's soft labels: predictions spread over the batch along its affinities, no gradient.

    Ge et al., "Self-distillation with Batch Knowledge Ensembling Improves ImageNet
    Classification", 2021 (arXiv 2104.13298); official code yxgeee/BAKE.

    .. math:: Q = (1 - \omega) (I - \omega A)^{-1} P, \quad
        A_{ij} \propto \exp(\hat f_i \cdot \hat f_j) \text{ for } i \ne j, \; A_{ii} = 0

    with P the softmax of the logits / T, :math:`\hat f` the features at unit length, and rows of
    A that sum to 1. Q is the limit of spreading :math:`Q \leftarrow \omega A Q + (1 - \omega) P`
    over and over.

    Args:
        logits: [B, C], raw logits.
        features: [B, D], pooled features; a row of zeros is as near to all others.
        temperature: T, above 0; unitless.
        omega: Share that comes from the neighbors, in [0, 1).

    Returns:
        [B, C], each row sums to 1; at least float32. A sample without neighbors, in a batch of
        one, keeps its own prediction.

    Raises:
        TypeError: Logits or features of a wrong dtype.
        ValueError: A wrong shape or setting.

    Example:
        >>> import torch
        >>> logits = torch.tensor([[0.0, 0.0], [4.0, -4.0]])
        >>> bake_targets(logits, torch.eye(2), temperature=1.0)
        tensor([[0.6666, 0.3334],
                [0.8331, 0.1669]])
    """
    check_logits(logits)
    check_vectors(features, logits, ("features", "logits"))
    check_temperature(temperature)
    _check_omega(omega)
    predicted = log_softened(logits.detach(), temperature).exp()
    features = in_float32(features.detach()).to(predicted.dtype)
    with torch.autocast(device_type=logits.device.type, enabled=False):
        # A: a softmax over the other samples' cosines, so that its rows sum to 1.
        unit = functional.normalize(features, dim=1)
        own = torch.eye(len(logits), dtype=torch.bool, device=logits.device)
        # Not -inf: the only entry of a batch of one would be NaN.
        cosines = (unit @ unit.T).masked_fill(own, torch.finfo(features.dtype).min)
        # I - omega A, whose rows are dominated by the diagonal: it cannot be singular.
        spreading = own.to(features.dtype) - omega * cosines.softmax(1)
        # Q as the solution of a linear system: no inverse is made, nor is the host waited for.
        ensembled: Tensor = torch.linalg.solve_ex(spreading, (1 - omega) * predicted)[0]
    return ensembled


def _check_omega(omega: float) -> None:
    check_number("omega", omega)
    if omega >= 1:
        raise ValueError(f"omega must be below 1, got {omega}")


class BAKELoss(Method, name="bake"):
    r"""BAKE: the divergence from the predictions of the batch, ensembled by similarity.

    Ge et al., 2021 (arXiv 2104.13298); official code yxgeee/BAKE.

    .. math:: L = T^2 \, KL(Q \| P)

    with Q from `bake_targets`, constant, and P the softmax of the logits / T. It is added to the
    task's own loss with weight 1.

    Deviations: from yxgeee/BAKE none of the value. winycg/Self-KD-Lib softens Q a second time,
    and megvii-research/zipfls cuts off the gradient: neither is followed. The published data
    loader brings further images of each image's class into the batch; here the batch is taken as
    it comes, so that its sampler has to do that. On ImageNet that code also joins the batches of
    all processes before it ensembles.

    Numerics: Q from a linear system, without inverse.
    Distributed: neighbors are those of the process's own batch.

    Args:
        temperature: T, above 0; unitless.
        omega: Share that comes from the neighbors, in [0, 1); the paper's is 0.5, and 0.9 on
            TinyImageNet.

    Example:
        >>> import torch
        >>> logits = torch.tensor([[0.0, 0.0], [4.0, -4.0]])
        >>> BAKELoss(temperature=1.0)(logits, [torch.eye(2)])
        tensor(0.4705)
    """

    temperature: Temperature = 4.0
    omega: Share = 0.5

    inputs: ClassVar = {
        "logits": Logits(),
        "features": Features(stages=("last",), form="pooled"),
    }

    def check_settings(self) -> None:
        """Raise ValueError for an omega of 1."""
        _check_omega(self.omega)

    def terms(self, logits: Tensor, features: list[Tensor]) -> dict[str, Tensor]:
        """`"divergence"`."""
        ensembled = self._targets(logits, features)
        # Finite also where a probability is 0, whose logarithm takes no part.
        gap = ensembled.clamp(min=torch.finfo(ensembled.dtype).tiny).log()
        gap = gap - log_softened(logits, self.temperature)
        return {"divergence": self.temperature**2 * (ensembled * gap).sum(1)}

    def soft_labels(self, logits: Tensor, features: list[Tensor], target: Tensor) -> SoftLabels:
        """The ensembled predictions of the batch, split at the labels."""
        return taken_apart(self._targets(logits, features), target)

    def _targets(self, logits: Tensor, features: list[Tensor]) -> Tensor:
        feature = the_only("features", features)
        return bake_targets(logits, feature, temperature=self.temperature, omega=self.omega)
