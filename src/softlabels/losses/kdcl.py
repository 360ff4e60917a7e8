"""KDCL, distillation via collaborative learning: two networks learn from their ensemble."""

from __future__ import annotations

from typing import ClassVar, Literal, TypeAlias

import torch
from torch import Tensor

from softlabels.inputs import Logits, PeerLogits, Target
from softlabels.losses._checks import check_logits, check_target
from softlabels.losses._method import Method, Temperature, Weight
from softlabels.losses._non_target import (
    SoftLabels,
    in_float32,
    label_probabilities,
    largest_label,
    without_ignored,
)
from softlabels.losses._soft_target import soft_target_cross_entropy, softened_labels
from softlabels.losses.kd import kd_loss

__all__ = ["KDCLEnsemble", "KDCLLoss"]

KDCLEnsemble: TypeAlias = Literal["min_logit", "naive", "linear", "average"]
_HALVINGS = 24  # of the range of a share; leaves what float32 can tell apart


class KDCLLoss(Method, name="kdcl"):
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

    Deviations: the paper shows each network another distortion of the images, here both see the
    same ones. KDCL-General, whose shares come from errors on held-out data, is left out. Not
    confirmed with the paper's text: that `"linear"` takes a combination of its own for each
    sample, and the defaults of `temperature` and `distillation_weight`.

    Numerics: the share of `"linear"` is exact to 2^-25.

    Args:
        ensemble: One of the table; without gradient.
        temperature: lambda, above 0.
        distillation_weight: w, of both divergences; 0 or more.

    Example:
        >>> import torch
        >>> logits = torch.tensor([[2.0, 1.0, 0.5, -1.0, 0.0]])
        >>> KDCLLoss()(logits, logits, torch.tensor([0]))  # the peer's cross-entropy
        tensor(0.5744)
    """

    ensemble: KDCLEnsemble = "min_logit"
    temperature: Temperature = 2.0
    distillation_weight: Weight = 1.0

    inputs: ClassVar = {"logits": Logits(), "peer_logits": PeerLogits(), "target": Target()}

    def terms(self, logits: Tensor, peer_logits: Tensor, target: Tensor) -> dict[str, Tensor]:
        """`"student"` and `"peer"` (divergences), `"peer_cross_entropy"`.

        Both networks get a gradient. The label of `"min_logit"` is the largest (ties: the lower).
        """
        check_logits(logits)
        check_logits(peer_logits, "peer_logits", like=logits)
        check_target(target, logits)
        logits = in_float32(logits)
        peer_logits = in_float32(peer_logits).to(logits.dtype)
        ensemble = _ensemble(logits.detach(), peer_logits.detach(), target, self.ensemble)
        terms = {
            name: self.distillation_weight
            * kd_loss(own, ensemble, temperature=self.temperature, reduction="none")
            for name, own in (("student", logits), ("peer", peer_logits))
        }
        labels = label_probabilities(target, logits)
        terms["peer_cross_entropy"] = soft_target_cross_entropy(peer_logits, labels)
        return terms

    def soft_labels(self, logits: Tensor, peer_logits: Tensor, target: Tensor) -> SoftLabels:
        """The ensemble's softened belief in the true class, and how it shares out the rest."""
        check_logits(logits)
        check_logits(peer_logits, "peer_logits", like=logits)
        target = without_ignored(target, self.ignore_index)[0]
        check_target(target, logits)
        both = in_float32(logits.detach()), in_float32(peer_logits.detach())
        ensemble = _ensemble(*both, target, self.ensemble)
        return softened_labels(ensemble, target, self.temperature)


def _ensemble(
    logits: Tensor, peer_logits: Tensor, target: Tensor, ensemble: KDCLEnsemble
) -> Tensor:
    """The logits of E, [B, C], as the table of `KDCLLoss` says."""
    if ensemble == "average":
        return (logits + peer_logits) / 2
    if ensemble == "min_logit":
        label = largest_label(target).unsqueeze(1)
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
    # Bisection: the slope of the cross-entropy says on which side of a share its minimum lies.
    towards_peer = peer_logits - logits
    share = torch.full_like(logits[:, :1], 0.5)
    step = 0.25
    for _ in range(_HALVINGS):
        error = (logits + share * towards_peer).softmax(1) - labels
        slope = (error * towards_peer).sum(1, keepdim=True)
        share = torch.where(slope > 0, share - step, share + step)
        step /= 2
    return logits + share * towards_peer
