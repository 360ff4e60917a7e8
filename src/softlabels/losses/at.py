"""AT, attention transfer: L2 between the networks' spatial attention maps."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from softlabels.losses._features import LevelsMethod, pooled_to_each_other
from softlabels.losses._method import Count, Defaults, Stages

__all__ = ["ATLoss", "attention"]


def attention(map: Tensor, power: int = 2) -> Tensor:
    """[B, H W], of length 1."""
    sizes = map if power % 2 == 0 else map.abs()
    return functional.normalize(sizes.pow(power).mean(1).flatten(1))


class ATLoss(LevelsMethod, name="at"):
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
    Numerics: A map of zeros has attention 0.
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

    def level(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Of the attention of both; the larger map is average-pooled to the smaller."""
        student, teacher = (
            attention(map, self.power) for map in pooled_to_each_other(student, teacher)
        )
        return (student - teacher).square().mean()
