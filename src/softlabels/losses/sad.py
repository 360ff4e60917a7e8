"""SAD, self-attention distillation: each stage's attention map follows the next one's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional

from softlabels.inputs import Features, Input
from softlabels.losses._features import check_maps, wide_maps
from softlabels.losses._method import Defaults, Method, Stages

__all__ = ["SADLoss"]


def _attention(map: Tensor) -> Tensor:
    """[B, positions], each row sums to 1."""
    return map.square().mean(1).flatten(1).softmax(1)


class SADLoss(Method, name="sad"):
    r"""SAD: where a stage looks is drawn to where the next stage looks.

    Hou et al., "Learning Lightweight Lane Detection CNNs by Self Attention Distillation",
    ICCV 2019 (arXiv 1908.00821); for classification winycg/Self-KD-Lib, whose values these are.

    .. math::
        L = \sum_{m=1}^{M-1} \operatorname{mean}
        \big(\Psi(A_m) - \Psi(\mathcal{B}(A_{m+1}))\big)^2

    ===================  =================================================================
    symbol               here
    ===================  =================================================================
    A_m                  the map of stage m, shallow to deep
    :math:`\mathcal{B}`  bilinear resizing to the size of stage m
    :math:`\Psi`         mean square over channels, then a softmax over all positions
    ===================  =================================================================

    Args:
        stages: Which stages are compared, shallow to deep.

    Deviations: Self-KD-Lib doubles the deeper map, whatever its size; here it is resized to that
    of the shallower one, which is the same for networks that halve it. In the paper the map is
    resized after the square, and the squares are summed over channels. Made for CNNs: in a vision
    transformer the residual stream carries a change of the shallower map into the deeper one, and
    the term was seen to grow in training.

    Example:
        >>> import torch
        >>> shallow = torch.tensor([[[[0.0, 0.0], [0.0, 1.0]]]])
        >>> SADLoss()([shallow, torch.ones(1, 3, 1, 1)])
        tensor(0.0169)
    """

    stages: Stages = ("stages",)

    defaults = Defaults(weight=1000.0)
    of_batch = True

    @property
    def inputs(self) -> Mapping[str, Input]:
        """Maps of the student."""
        return {"student_maps": Features(of="student", stages=self.stages, form="map")}

    def terms(self, student_maps: Sequence[Tensor]) -> dict[str, Tensor]:
        """`"attention"`, a scalar.

        Two maps or more are needed. All but the last get the gradient: the deeper map of each pair
        is constant.
        """
        check_maps(student_maps, student_maps, ("student_maps", "student_maps"))
        if len(student_maps) < 2:
            raise ValueError("student_maps must hold at least two maps to compare, got one")
        maps = wide_maps(student_maps)
        gaps = []
        for shallow, deep in pairwise(maps):
            size = shallow.shape[2:]
            resized = functional.interpolate(
                deep.detach(), size=size, mode="bilinear", align_corners=False
            )
            gaps.append((_attention(shallow) - _attention(resized)).square().mean())
        return {"attention": torch.stack(gaps).sum()}
