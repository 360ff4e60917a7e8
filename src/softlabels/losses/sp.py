"""SP, similarity-preserving distillation: similarities between a batch's samples."""

from __future__ import annotations

import torch
from torch import Tensor

from softlabels.losses._features import LevelsMethod, unit_vectors
from softlabels.losses._method import Defaults, Stages

__all__ = ["SPLoss"]


def _similarities(maps: Tensor) -> Tensor:
    rows = maps.flatten(1)
    with torch.autocast(device_type=rows.device.type, enabled=False):
        return unit_vectors(rows @ rows.T)


class SPLoss(LevelsMethod, name="sp"):
    r"""SP: samples that are similar for the teacher are similar for the student.

    Tung and Mori, "Similarity-Preserving Knowledge Distillation", ICCV 2019 (arXiv 1907.09682),
    equations 1-4; there is no official code, written as in megvii-research/mdistiller and
    HobbitLong/RepDistiller.

    .. math::
        \tilde G = Q Q^\top, \quad G_i = \tilde G_i / \lVert \tilde G_i \rVert_2, \quad
        L = \sum_l \frac{1}{B^2} \lVert G^{T,l} - G^{S,l} \rVert_F^2

    ==========  =====================================================================
    symbol      meaning
    ==========  =====================================================================
    Q           the maps of a level, one flattened row for each sample
    G           similarities of a sample with all of the batch, a row of unit length
    l           pairs of levels
    ==========  =====================================================================

    Args:
        stages: Where maps are read in both networks, as of `Features`; the published codes take
            the last one alone.

    Deviations: a sample whose map is 0 everywhere has no direction, and its row is 0 as in the
    published codes; here it gets no gradient of that row, where theirs is divided by 1e-12.
    Distributed: similarities within the batch of each process.

    Example:
        >>> import torch
        >>> maps = torch.tensor([1.0, 0.0, 0.0, 1.0]).reshape(2, 1, 1, 2)
        >>> SPLoss()([maps], [torch.ones(2, 3, 4, 4)])  # (1, 0) against (1, 1) / sqrt(2)
        tensor(0.2929)
    """

    stages: Stages = ("last",)

    defaults = Defaults(weight=3000.0)

    def level(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Of the similarities of both, [B, B], whatever the sizes of the maps."""
        return (_similarities(student) - _similarities(teacher)).square().mean()
