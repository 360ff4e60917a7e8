"""RKD: distances and angles between the samples of a batch are those of the teacher."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal, overload

import torch
from torch import Tensor, nn
from torch.nn import functional

from softlabels.inputs import Features, Input
from softlabels.losses._checks import check_number
from softlabels.losses._features import check_vectors, the_only, unit_vectors
from softlabels.losses._non_target import LossOutput, in_float32, reduce_parts

__all__ = ["RKDLoss", "rkd_loss"]

_LEAST = 1e-12  # squared distance below which two samples count as equal


@overload
def rkd_loss(
    student_features: Tensor,
    teacher_features: Tensor,
    *,
    distance_weight: float = 25.0,
    angle_weight: float = 50.0,
    return_parts: Literal[False] = False,
) -> Tensor: ...


@overload
def rkd_loss(
    student_features: Tensor,
    teacher_features: Tensor,
    *,
    distance_weight: float = 25.0,
    angle_weight: float = 50.0,
    return_parts: Literal[True],
) -> LossOutput: ...


def rkd_loss(
    student_features: Tensor,
    teacher_features: Tensor,
    *,
    distance_weight: float = 25.0,
    angle_weight: float = 50.0,
    return_parts: bool = False,
) -> Tensor | LossOutput:
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
        student_features: [B, D], pooled. Gets the gradient.
        teacher_features: [B, E], pooled; E may differ from D. Gets none.
        distance_weight: Of the distances; 0 or more.
        angle_weight: Of the angles; 0 or more.
        return_parts: Also return the summands, as `LossOutput(loss, parts)`: `"distance"` and
            `"angle"`, weighted.

    Returns:
        A scalar, at least float32. Both means are over all B^2 pairs and B^3 triples, those of
        a sample with itself included, which add 0; a batch of one sample gives 0.

    Raises:
        TypeError: Features of a wrong dtype, or a weight that is no number.
        ValueError: Features that are not [B, D] of one batch, or a negative weight.

    Deviations: the published code divides a difference by at least 1e-12, so that two equal
    samples give a gradient of about 1e11. Here samples closer than 1e-6 (what that code takes
    for the distance of equal ones) have no direction: their angles are 0, as there for equal
    ones, without gradient. Distances come from differences, not from inner products, which lose
    small ones.

    Numerics: computed in float32 or wider, also under autocast. Holds B^2 (D + E) numbers.
    Distributed: relations within the batch of each process.

    Example:
        >>> import torch
        >>> features = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 2.0]])
        >>> rkd_loss(features, 4.0 * features)  # scale and shift do not matter
        tensor(0.)
    """
    check_vectors(student_features, teacher_features)
    check_number("distance_weight", distance_weight)
    check_number("angle_weight", angle_weight)
    student = in_float32(student_features)
    teacher = in_float32(teacher_features.detach()).to(student.dtype)
    distances, angles = _relations(student)
    teacher_distances, teacher_angles = _relations(teacher)
    parts = {
        "distance": distance_weight * functional.smooth_l1_loss(distances, teacher_distances),
        "angle": angle_weight * functional.smooth_l1_loss(angles, teacher_angles),
    }
    output = reduce_parts(parts, "sum")
    return output if return_parts else output.loss


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


class RKDLoss(nn.Module):
    """RKD as a module, on the pooled last features; see `rkd_loss` for the equation.

    Args:
        distance_weight: Of the distances; 0 or more.
        angle_weight: Of the angles; 0 or more.
    """

    inputs: ClassVar[Mapping[str, Input]] = {
        "student_features": Features(form="pooled"),
        "teacher_features": Features(of="teacher", form="pooled"),
    }

    def __init__(self, *, distance_weight: float = 25.0, angle_weight: float = 50.0) -> None:
        super().__init__()
        check_number("distance_weight", distance_weight)
        check_number("angle_weight", angle_weight)
        self.distance_weight = distance_weight
        self.angle_weight = angle_weight

    def forward(
        self,
        student_features: Sequence[Tensor],
        teacher_features: Sequence[Tensor],
        *,
        return_parts: bool = False,
    ) -> Tensor | LossOutput:
        """Compute `rkd_loss` with this module's settings; each list holds one [B, D]."""
        output = rkd_loss(
            the_only("student_features", student_features),
            the_only("teacher_features", teacher_features),
            distance_weight=self.distance_weight,
            angle_weight=self.angle_weight,
            return_parts=True,
        )
        return output if return_parts else output.loss
