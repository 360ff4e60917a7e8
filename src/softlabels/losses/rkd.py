"""RKD, relational knowledge distillation: distances and angles between a batch's samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from softlabels.losses._features import POOLED_INPUTS, pooled_pair, unit_vectors
from softlabels.losses._method import Method, Weight

__all__ = ["RKDLoss"]

_LEAST = 1e-12  # squared distance below which two samples count as equal


def _relations(features: Tensor) -> tuple[Tensor, Tensor]:
    """Distances of all pairs [B, B], in units of their mean, and cosines of all triples."""
    differences = features.unsqueeze(0) - features.unsqueeze(1)
    own = torch.eye(len(features), dtype=torch.bool, device=features.device)
    squared = differences.square().sum(2).clamp(min=_LEAST)
    distances = squared.sqrt().masked_fill(own, 0.0)
    pairs = max(len(features) * (len(features) - 1), 1)
    # Of one sample alone the mean is 0.
    mean = (distances.sum() / pairs).clamp(min=_LEAST)
    directions = unit_vectors(differences, least=_LEAST)
    with torch.autocast(device_type=features.device.type, enabled=False):
        angles = directions @ directions.transpose(1, 2)
    return distances / mean, angles


class RKDLoss(Method, name="rkd"):
    r"""RKD: distances and angles between the samples of a batch are those of the teacher.

    Park et al., "Relational Knowledge Distillation", CVPR 2019 (arXiv 1904.05068), equations
    6-10; code lenscloth/RKD, with the weights of megvii-research/mdistiller.

    .. math::
        \psi_D(i, j) &= \tfrac{1}{\mu} \lVert x_i - x_j \rVert \qquad
        \psi_A(i, j, k) = \langle e_{ij}, e_{kj} \rangle, \quad
        e_{ij} = \frac{x_i - x_j}{\lVert x_i - x_j \rVert} \\
        L &= w_D \operatorname{mean}_{ij} h(\psi_D^S, \psi_D^T)
        + w_A \operatorname{mean}_{ijk} h(\psi_A^S, \psi_A^T)

    ==========  =====================================================================
    symbol      meaning
    ==========  =====================================================================
    x           a row of the features, of the student (S) or the teacher (T)
    mu          mean distance over the pairs of two samples
    h           smooth L1: half the square up to a difference of 1, then the size - 1/2
    w_D, w_A    `distance_weight`, `angle_weight`
    ==========  =====================================================================

    Args:
        distance_weight: Of the distances; 0 or more.
        angle_weight: Of the angles; 0 or more.

    Deviations: the published code divides a difference by at least 1e-12, so that two equal
    samples give a gradient of about 1e11. Here samples closer than 1e-6 (what that code takes
    for the distance of equal ones) have no direction: their angles are 0, as there for equal
    ones, without gradient. Distances come from differences, not from inner products, which lose
    small ones.
    Numerics: holds B^2 (D + E) numbers.
    Distributed: relations within the batch of each process.

    Example:
        >>> import torch
        >>> features = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 2.0]])
        >>> RKDLoss()([features], [4.0 * features])  # scale and shift do not matter
        tensor(0.)
    """

    distance_weight: Weight = 25.0
    angle_weight: Weight = 50.0

    inputs: ClassVar = POOLED_INPUTS
    of_batch = True

    def terms(
        self, student_features: Sequence[Tensor], teacher_features: Sequence[Tensor]
    ) -> dict[str, Tensor]:
        """`"distance"` and `"angle"`, weighted scalars."""
        student, teacher = pooled_pair(student_features, teacher_features)
        distances, angles = _relations(student)
        teacher_distances, teacher_angles = _relations(teacher)
        return {
            "distance": self.distance_weight
            * functional.smooth_l1_loss(distances, teacher_distances),
            "angle": self.angle_weight * functional.smooth_l1_loss(angles, teacher_angles),
        }
