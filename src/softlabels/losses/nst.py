"""NST, neuron selectivity transfer: discrepancy of the networks' channels, as points."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from softlabels.inputs import Input
from softlabels.losses._features import (
    check_maps,
    level_terms,
    map_inputs,
    paired_maps,
    pooled_to_each_other,
)
from softlabels.losses._method import Defaults, Method, Stages

__all__ = ["NSTLoss"]


def _mean_kernel(left: Tensor, right: Tensor) -> Tensor:
    """Mean of the squared products of all pairs of rows of [B, D, N] and [B, E, N]."""
    with torch.autocast(device_type=left.device.type, enabled=False):
        return torch.bmm(left, right.transpose(1, 2)).square().mean()


class NSTLoss(Method, name="nst"):
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

    Numerics: float32 or wider, also under autocast. A channel of zeros stays zeros.
    Distributed: mean over the samples of the process.

    Example:
        >>> import torch
        >>> student = torch.tensor([[[[1.0, 0.0]]]])
        >>> NSTLoss()([student], [student.flip(3)])
        tensor(2.)
    """

    stages: Stages = ("stages",)

    defaults = Defaults(weight=50.0)
    of_batch = True

    @property
    def inputs(self) -> Mapping[str, Input]:
        """Maps of both networks."""
        return map_inputs(self.stages)

    def terms(
        self, student_maps: Sequence[Tensor], teacher_maps: Sequence[Tensor]
    ) -> dict[str, Tensor]:
        """`"level_0"` (the shallowest) and so on, scalars.

        Args:
            student_maps: List of [B, D, H, W], shallow to deep. Get the gradient.
            teacher_maps: List of [B, E, H, W], of any width and size. Get none. Levels are paired
                from the deepest; the larger map of a pair is average-pooled to the smaller.
        """
        check_maps(student_maps, teacher_maps)
        terms = []
        for pair in paired_maps(student_maps, teacher_maps):
            student, teacher = (
                functional.normalize(map.flatten(2), dim=2) for map in pooled_to_each_other(*pair)
            )
            own = _mean_kernel(teacher, teacher) + _mean_kernel(student, student)
            terms.append(own - 2 * _mean_kernel(student, teacher))
        return level_terms(terms)
