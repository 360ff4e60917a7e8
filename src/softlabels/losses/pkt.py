"""PKT, probabilistic knowledge transfer: how likely one sample is another's neighbor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from softlabels.losses._features import POOLED_INPUTS, pooled_pair, unit_vectors
from softlabels.losses._method import Defaults, Method

__all__ = ["PKTLoss"]

_EPSILON = 1e-7


def _neighbors(features: Tensor) -> Tensor:
    units = unit_vectors(features, added=_EPSILON)
    with torch.autocast(device_type=features.device.type, enabled=False):
        kernel = (units @ units.T + 1.0) / 2.0
    return kernel / kernel.sum(1, keepdim=True)


class PKTLoss(Method, name="pkt"):
    r"""PKT: how likely one sample is another's neighbor is the same as for the teacher.

    Passalis and Tefas, "Learning Deep Representations with Probabilistic Knowledge Transfer",
    ECCV 2018 (arXiv 1803.10837), equations 3-6 with the cosine kernel; code
    passalis/probabilistic_kt, with the mean of megvii-research/mdistiller.

    .. math::
        K_{ij} = \tfrac{1}{2} (\cos(x_i, x_j) + 1), \quad p_{ij} = \frac{K_{ij}}{\sum_k K_{ik}},
        \quad L = \frac{1}{B^2} \sum_{ij} p^T_{ij} \log \frac{p^T_{ij}}{p^S_{ij}}

    ==========  =====================================================================
    symbol      meaning
    ==========  =====================================================================
    x           a row of the features, of the student (S) or the teacher (T)
    K           kernel, from 0 for opposite samples to 1
    p           probability of being a neighbor; rows sum to 1
    ==========  =====================================================================

    Deviations: from the paper, as in the published code: a sample is its own neighbor too, the
    mean is over all B^2 entries, and 1e-7 is added to lengths and inside the logarithm. From
    that code, whose gradient is NaN there: a row of zeros, which has the kernel 1/2 with all
    samples, gets no gradient.
    Distributed: neighbors within the batch of each process.

    Example:
        >>> import torch
        >>> features = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
        >>> PKTLoss()([features], [features])
        tensor(0.)
    """

    inputs: ClassVar = POOLED_INPUTS
    defaults = Defaults(weight=30000.0)
    of_batch = True

    def terms(
        self, student_features: Sequence[Tensor], teacher_features: Sequence[Tensor]
    ) -> dict[str, Tensor]:
        """`"neighbors"`, a scalar."""
        student, teacher = map(_neighbors, pooled_pair(student_features, teacher_features))
        log_student = (student + _EPSILON).log()
        divergence = (teacher * ((teacher + _EPSILON).log() - log_student)).mean()
        return {"neighbors": divergence}
