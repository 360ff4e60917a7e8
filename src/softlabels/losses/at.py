"""AT, attention transfer: L2 between the networks' spatial attention maps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

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
from softlabels.losses._method import Count, Defaults, Method, Stages

__all__ = ["ATLoss"]


def _attention(map: Tensor, power: int) -> Tensor:
    """[B, H W], of length 1."""
    sizes = map if power % 2 == 0 else map.abs()
    return functional.normalize(sizes.pow(power).mean(1).flatten(1))


class ATLoss(Method, name="at"):
    r"""AT: the squared distance of the two networks' normalized attention maps.

    Zagoruyko and Komodakis, "Paying More Attention to Attention", ICLR 2017 (arXiv 1612.03928),
    equation 2; code at szagoruyko/attention-transfer, same in megvii-research/mdistiller.

    .. math::
        Q(A) = \mathrm{vec}\Big(\frac{1}{D} \sum_c |A_c|^p\Big), \qquad
        L = \sum_j \mathrm{mean}\left[\left(\frac{Q(S_j)}{\lVert Q(S_j) \rVert_2}
            - \frac{Q(T_j)}{\lVert Q(T_j) \rVert_2}\right)^2\right]

    =======  ================================================
    S, T     the student's and the teacher's map
    A, c, D  a map, a channel of it, the number of channels
    p        `power`
    j        level
    =======  ================================================

    Args:
        stages: Names of stages, as of `Features`; both networks are read there.
        power: Exponent, 1 or more.

    Deviations: mean of squares, as in the authors' code, where the paper has a norm. Odd powers
    are of absolute values, as in the paper; the codes have none, which differs on maps with
    negative values.
    Numerics: float32 or wider, also under autocast. A map of zeros has attention 0.
    Distributed: mean over the samples of the process.

    Example:
        >>> import torch
        >>> student = torch.tensor([[[[1.0, 0.0]]]])
        >>> ATLoss()([student], [student.flip(3)])
        tensor(1.)
    """

    stages: Stages = ("stages",)
    power: Count = 2

    defaults = Defaults(weight=1000.0)
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
            student, teacher = (_attention(map, self.power) for map in pooled_to_each_other(*pair))
            terms.append((student - teacher).square().mean())
        return level_terms(terms)
