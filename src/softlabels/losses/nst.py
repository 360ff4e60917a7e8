"""NST, neuron selectivity transfer: discrepancy of the networks' channels, as points."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from softlabels.losses._features import LevelsMethod, pooled_to_each_other
from softlabels.losses._method import Defaults, Stages

__all__ = ["NSTLoss"]


def _mean_kernel(left: Tensor, right: Tensor) -> Tensor:
    """Mean of the squared products of all pairs of rows of [B, D, N] and [B, E, N]."""
    with torch.autocast(device_type=left.device.type, enabled=False):
        return torch.bmm(left, right.transpose(1, 2)).square().mean()


class NSTLoss(LevelsMethod, name="nst"):
    r"""NST: the maximum mean discrepancy of the two networks' channels, as points.

    Huang and Wang, "Like What You Like: Knowledge Distill via Neuron Selectivity Transfer", 2017
    (arXiv 1707.01219), equation 6 with the polynomial kernel (d = 2, c = 0), as in
    HobbitLong/RepDistiller and megvii-research/mdistiller.

    .. math::
        L = \sum_l \mathrm{mean}_{b}\left[
            \mathrm{mean}_{i,i'}\, k(t_i, t_{i'}) + \mathrm{mean}_{j,j'}\, k(s_j, s_{j'})
            - 2\, \mathrm{mean}_{i,j}\, k(t_i, s_j)\right], \qquad k(x, y) = (x^\top y)^2

    =======  ===================================================================
    t, s     a channel of the teacher's and of the student's map of a sample, as
             a vector over positions of length 1
    i, j     number of the channel
    l, b     level, sample
    =======  ===================================================================

    Args:
        stages: Names of stages, as of `Features`; both networks are read there.

    Numerics: A channel of zeros stays zeros.
    Distributed: mean over the samples of the process.

    Example:
        >>> import torch
        >>> student = torch.tensor([[[[1.0, 0.0]]]])
        >>> NSTLoss()([student], [student.flip(3)])
        tensor(2.)
    """

    stages: Stages = ("stages",)

    defaults = Defaults(weight=50.0)

    def level(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Of the channels of both; the larger map is average-pooled to the smaller."""
        student, teacher = (
            functional.normalize(map.flatten(2), dim=2)
            for map in pooled_to_each_other(student, teacher)
        )
        own = _mean_kernel(teacher, teacher) + _mean_kernel(student, student)
        return own - 2 * _mean_kernel(student, teacher)
