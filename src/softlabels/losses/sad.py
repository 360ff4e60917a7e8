"""SAD: the attention map of each stage follows that of the next, no teacher."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from softlabels.inputs import Features, Input
from softlabels.losses._features import check_maps, wide_maps

__all__ = ["SADLoss", "sad_loss"]


def sad_loss(student_maps: Sequence[Tensor]) -> Tensor:
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

    The published weight, of the whole, is 1000.

    Args:
        student_maps: List of [B, D, H, W], shallow to deep, two or more; D, H and W differ. All
            but the last get the gradient: the deeper map of each pair is constant.

    Returns:
        A scalar, without the weight, the mean over B and positions; at least float32.

    Raises:
        TypeError: A map of a wrong dtype.
        ValueError: Less than two maps, or a wrong shape.

    Deviations: Self-KD-Lib doubles the deeper map, whatever its size; here it is resized to that
    of the shallower one, which is the same for networks that halve it. In the paper the map is
    resized after the square, and the squares are summed over channels. Made for CNNs: in a vision
    transformer the residual stream carries a change of the shallower map into the deeper one, and
    the term was seen to grow in training.

    Numerics: in float32 or wider, also under autocast.
    Distributed: each sample by itself, no batch statistics.

    Example:
        >>> import torch
        >>> shallow = torch.tensor([[[[0.0, 0.0], [0.0, 1.0]]]])
        >>> sad_loss([shallow, torch.ones(1, 3, 1, 1)])
        tensor(0.0169)
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
    return torch.stack(gaps).sum()


def _attention(map: Tensor) -> Tensor:
    """[B, positions], each row sums to 1."""
    return map.square().mean(1).flatten(1).softmax(1)


class SADLoss(nn.Module):
    """SAD as a module; see `sad_loss` for the equation.

    Args:
        stages: Which stages are compared, shallow to deep.
    """

    inputs: Mapping[str, Input]
    recommended_weight: ClassVar[float] = 1000.0

    def __init__(self, *, stages: tuple[str, ...] = ("stages",)) -> None:
        super().__init__()
        self.stages = stages
        self.inputs = {"student_maps": Features(of="student", stages=stages, form="map")}

    def forward(self, student_maps: list[Tensor]) -> Tensor:
        """Compute `sad_loss`."""
        return sad_loss(student_maps)
