"""KDCL: two networks learn together from the ensemble of both."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal, TypeAlias, overload

import torch
from torch import Tensor, nn

from softlabels.inputs import Input, Logits, PeerLogits, Target
from softlabels.losses._checks import (
    check_choice,
    check_logits,
    check_number,
    check_target,
    check_temperature,
)
from softlabels.losses._non_target import (
    LossOutput,
    Reduction,
    SoftLabels,
    in_float32,
    label_columns,
    label_probabilities,
    reduce_parts,
)
from softlabels.losses._soft_target import soft_target_cross_entropy
from softlabels.losses.kd import KDLoss, kd_loss

__all__ = ["KDCLEnsemble", "KDCLLoss", "kdcl_loss"]

KDCLEnsemble: TypeAlias = Literal["min_logit", "naive", "linear", "average"]
_ENSEMBLES = ("min_logit", "naive", "linear", "average")
_HALVINGS = 24  # of the range of a share; leaves what float32 can tell apart


@overload
def kdcl_loss(
    logits: Tensor,
    peer_logits: Tensor,
    target: Tensor,
    *,
    ensemble: KDCLEnsemble = "min_logit",
    temperature: float = 2.0,
    distillation_weight: float = 1.0,
    reduction: Reduction = "mean",
    return_parts: Literal[False] = False,
) -> Tensor: ...


@overload
def kdcl_loss(
    logits: Tensor,
    peer_logits: Tensor,
    target: Tensor,
    *,
    ensemble: KDCLEnsemble = "min_logit",
    temperature: float = 2.0,
    distillation_weight: float = 1.0,
    reduction: Reduction = "mean",
    return_parts: Literal[True],
) -> LossOutput: ...


def kdcl_loss(
    logits: Tensor,
    peer_logits: Tensor,
    target: Tensor,
    *,
    ensemble: KDCLEnsemble = "min_logit",
    temperature: float = 2.0,
    distillation_weight: float = 1.0,
    reduction: Reduction = "mean",
    return_parts: bool = False,
) -> Tensor | LossOutput:
    r"""KDCL: two networks learn together from the ensemble of both.

    Guo et al., "Online Knowledge Distillation via Collaborative Learning", CVPR 2020; there is
    no official code.

    .. math::
        L = w \lambda^2 \big( KL(E^\lambda \Vert S^\lambda) + KL(E^\lambda \Vert P^\lambda) \big)
        - \sum_i V_i \log P_i

    ==========  =====================================================================
    symbol      meaning
    ==========  =====================================================================
    S, P, E     softmax of the student's, the peer's and the ensemble's logits; with
                lambda: of these divided by `temperature`
    V           the labels
    w           `distillation_weight`, which the paper calls lambda
    ==========  =====================================================================

    The student's own cross-entropy is the task's, and not part of this.

    =============  ==================================================================
    `ensemble`     logits of E, for each sample
    =============  ==================================================================
    `"min_logit"`  per class the smaller of both, each first lowered by its logit of
                   the label
    `"naive"`      those of the network with the smaller cross-entropy
    `"linear"`     the convex combination with the smallest cross-entropy
    `"average"`    their mean (not of the paper)
    =============  ==================================================================

    Args:
        logits: [B, C], raw student logits. Gets the gradient.
        peer_logits: [B, C], raw logits of the network that is trained along. Gets the gradient.
        target: [B] class indices, or [B, C] probabilities (mixup, cutmix). The label of
            `"min_logit"` is the largest (ties: the lower class).
        ensemble: One of the table; without gradient.
        temperature: lambda, above 0.
        distillation_weight: w; 0 or more.
        reduction: `"mean"` over B, `"sum"`, or `"none"`.
        return_parts: Also return the summands, as `LossOutput(loss, parts)`: `"student"` and
            `"peer"` (divergences), `"peer_cross_entropy"`.

    Returns:
        A scalar, or [B] for `"none"`; in nats, at least float32.

    Raises:
        TypeError: Logits or target of a wrong dtype.
        ValueError: A wrong shape, label, setting or reduction.

    Deviations: the paper shows each network another distortion of the images, here both see the
    same ones. KDCL-General, whose shares come from errors on held-out data, is left out. Not
    confirmed with the paper's text: that `"linear"` takes a combination of its own for each
    sample, and the defaults of `temperature` and `distillation_weight`.

    Numerics: log-softmax throughout, computed in float32 or wider, also under autocast; the share
    of `"linear"` is exact to 2^-25.
    Distributed: each sample by itself, no batch statistics.

    Example:
        >>> import torch
        >>> logits = torch.tensor([[2.0, 1.0, 0.5, -1.0, 0.0]])
        >>> kdcl_loss(logits, logits, torch.tensor([0]))  # the peer's cross-entropy
        tensor(0.5744)
    """
    check_logits(logits)
    check_logits(peer_logits, "peer_logits", like=logits)
    check_target(target, logits)
    check_choice("ensemble", ensemble, _ENSEMBLES)
    check_temperature(temperature)
    check_number("distillation_weight", distillation_weight)
    logits = in_float32(logits)
    peer_logits = in_float32(peer_logits).to(logits.dtype)
    together = _ensemble(logits.detach(), peer_logits.detach(), target, ensemble)
    parts = {
        name: distillation_weight
        * kd_loss(own, together, temperature=temperature, reduction="none")
        for name, own in (("student", logits), ("peer", peer_logits))
    }
    labels = label_probabilities(target, logits)
    parts["peer_cross_entropy"] = soft_target_cross_entropy(peer_logits, labels)
    output = reduce_parts(parts, reduction)
    return output if return_parts else output.loss


def _ensemble(logits: Tensor, peer_logits: Tensor, target: Tensor, ensemble: str) -> Tensor:
    if ensemble == "average":
        return (logits + peer_logits) / 2
    if ensemble == "min_logit":
        label = label_columns(target, logits, "largest").classes
        return torch.minimum(
            logits - logits.gather(1, label), peer_logits - peer_logits.gather(1, label)
        )
    labels = label_probabilities(target, logits)
    if ensemble == "naive":
        better = soft_target_cross_entropy(peer_logits, labels) < soft_target_cross_entropy(
            logits, labels
        )
        return torch.where(better.unsqueeze(1), peer_logits, logits)
    return _least_cross_entropy(logits, peer_logits, labels)


def _least_cross_entropy(logits: Tensor, peer_logits: Tensor, labels: Tensor) -> Tensor:
    """The convex combination with the least cross-entropy, which is convex in the peer's share."""
    towards_peer = peer_logits - logits
    share = torch.full_like(logits[:, :1], 0.5)
    step = 0.25
    for _ in range(_HALVINGS):
        error = (logits + share * towards_peer).softmax(1) - labels
        slope = (error * towards_peer).sum(1, keepdim=True)
        share = torch.where(slope > 0, share - step, share + step)
        step /= 2
    return logits + share * towards_peer


class KDCLLoss(nn.Module):
    """KDCL as a module; see `kdcl_loss` for the equation and the settings.

    Args:
        ensemble: `"min_logit"`, `"naive"`, `"linear"` or `"average"`.
        temperature: Above 0.
        distillation_weight: Of both divergences; 0 or more.
        reduction: `"mean"`, `"sum"` or `"none"`.
    """

    inputs: ClassVar[Mapping[str, Input]] = {
        "logits": Logits(),
        "peer_logits": PeerLogits(),
        "target": Target(),
    }

    def __init__(
        self,
        *,
        ensemble: KDCLEnsemble = "min_logit",
        temperature: float = 2.0,
        distillation_weight: float = 1.0,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__()
        check_choice("ensemble", ensemble, _ENSEMBLES)
        check_temperature(temperature)
        check_number("distillation_weight", distillation_weight)
        check_choice("reduction", reduction, ("mean", "sum", "none"))
        self.ensemble: KDCLEnsemble = ensemble
        self.temperature = temperature
        self.distillation_weight = distillation_weight
        self.reduction: Reduction = reduction

    def forward(
        self, logits: Tensor, peer_logits: Tensor, target: Tensor, *, return_parts: bool = False
    ) -> Tensor | LossOutput:
        """Compute `kdcl_loss` with this module's settings."""
        output = kdcl_loss(
            logits,
            peer_logits,
            target,
            ensemble=self.ensemble,
            temperature=self.temperature,
            distillation_weight=self.distillation_weight,
            reduction=self.reduction,
            return_parts=True,
        )
        return output if return_parts else output.loss

    def soft_labels(self, logits: Tensor, peer_logits: Tensor, target: Tensor) -> SoftLabels:
        """The ensemble's softened belief in the true class, and how it shares out the rest."""
        check_logits(logits)
        check_logits(peer_logits, "peer_logits", like=logits)
        check_target(target, logits)
        both = in_float32(logits.detach()), in_float32(peer_logits.detach())
        together = _ensemble(*both, target, self.ensemble)
        return KDLoss(temperature=self.temperature).soft_labels(logits, together, target)
