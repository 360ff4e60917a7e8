"""BAKE: each image learns from the predictions of its neighbors in the batch, no teacher."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from softlabels.inputs import Features, Input, Logits
from softlabels.losses._checks import check_choice, check_logits, check_number, check_temperature
from softlabels.losses._features import check_vectors, the_only
from softlabels.losses._non_target import Reduction, SoftLabels, in_float32, reduce_parts
from softlabels.losses._soft_target import log_softened, taken_apart

__all__ = ["BAKELoss", "bake_loss", "bake_targets"]


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
    _check(logits, features, temperature, omega)
    predicted = log_softened(logits.detach(), temperature).exp()
    features = in_float32(features.detach()).to(predicted.dtype)
    with torch.autocast(device_type=logits.device.type, enabled=False):
        unit = functional.normalize(features, dim=1)
        own = torch.eye(len(logits), dtype=torch.bool, device=logits.device)
        # Not -inf: the only entry of a batch of one would be NaN.
        cosines = (unit @ unit.T).masked_fill(own, torch.finfo(features.dtype).min)
        spreading = own.to(features.dtype) - omega * cosines.softmax(1)
        # The rows of it are dominated by the diagonal: it cannot be singular.
        ensembled: Tensor = torch.linalg.solve_ex(spreading, (1 - omega) * predicted)[0]
    return ensembled


def bake_loss(
    logits: Tensor,
    features: Tensor,
    *,
    temperature: float = 4.0,
    omega: float = 0.5,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""BAKE: the divergence from the predictions of the batch, ensembled by similarity.

    Ge et al., 2021 (arXiv 2104.13298); official code yxgeee/BAKE.

    .. math:: L = T^2 \, KL(Q \| P)

    with Q from `bake_targets`, constant, and P the softmax of the logits / T. It is added to the
    task's own loss with weight 1.

    Args:
        logits: [B, C], raw logits. Gets the gradient.
        features: [B, D], pooled features. Gets none.
        temperature: T, above 0; unitless.
        omega: Share that comes from the neighbors, in [0, 1); the paper's is 0.5, and 0.9 on
            TinyImageNet.
        reduction: `"mean"` over B, `"sum"`, or `"none"`.

    Returns:
        A scalar, or [B] for `"none"`; in nats, at least float32.

    Raises:
        TypeError: Logits or features of a wrong dtype.
        ValueError: A wrong shape, setting or reduction.

    Deviations: from yxgeee/BAKE none of the value. winycg/Self-KD-Lib softens Q a second time,
    and megvii-research/zipfls cuts off the gradient: neither is followed. The published data
    loader brings further images of each image's class into the batch; here the batch is taken as
    it comes, so that its sampler has to do that. On ImageNet that code also joins the batches of
    all processes before it ensembles.

    Numerics: in float32 or wider, also under autocast. Q from a linear system, without inverse.
    Distributed: neighbors are those of the process's own batch.

    Example:
        >>> import torch
        >>> logits = torch.tensor([[0.0, 0.0], [4.0, -4.0]])
        >>> bake_loss(logits, torch.eye(2), temperature=1.0)
        tensor(0.4705)
    """
    ensembled = bake_targets(logits, features, temperature=temperature, omega=omega)
    # Finite also where a probability is 0, whose logarithm takes no part.
    gap = ensembled.clamp(min=torch.finfo(ensembled.dtype).tiny).log()
    gap = gap - log_softened(logits, temperature)
    divergence = temperature**2 * (ensembled * gap).sum(1)
    return reduce_parts({"divergence": divergence}, reduction).loss


def _check(logits: Tensor, features: Tensor, temperature: float, omega: float) -> None:
    check_logits(logits)
    check_vectors(features, logits, ("features", "logits"))
    _check_settings(temperature, omega)


def _check_settings(temperature: float, omega: float) -> None:
    check_temperature(temperature)
    check_number("omega", omega)
    if omega >= 1:
        raise ValueError(f"omega must be below 1, got {omega}")


class BAKELoss(nn.Module):
    """BAKE as a module; see `bake_loss` for the equation and the settings.

    Args:
        temperature: Above 0.
        omega: In [0, 1).
        reduction: `"mean"`, `"sum"` or `"none"`.
    """

    inputs: ClassVar[Mapping[str, Input]] = {
        "logits": Logits(),
        "features": Features(stages=("last",), form="pooled"),
    }
    recommended_weight: ClassVar[float] = 1.0

    def __init__(
        self, *, temperature: float = 4.0, omega: float = 0.5, reduction: Reduction = "mean"
    ) -> None:
        super().__init__()
        _check_settings(temperature, omega)
        check_choice("reduction", reduction, ("mean", "sum", "none"))
        self.temperature = temperature
        self.omega = omega
        self.reduction: Reduction = reduction

    def forward(self, logits: Tensor, features: list[Tensor]) -> Tensor:
        """Compute `bake_loss` with this module's settings; features are a list of one."""
        return bake_loss(
            logits,
            the_only("features", features),
            temperature=self.temperature,
            omega=self.omega,
            reduction=self.reduction,
        )

    def soft_labels(self, logits: Tensor, features: list[Tensor], target: Tensor) -> SoftLabels:
        """The ensembled predictions of the batch, split at the labels."""
        feature = the_only("features", features)
        ensembled = bake_targets(logits, feature, temperature=self.temperature, omega=self.omega)
        return taken_apart(ensembled, target)
