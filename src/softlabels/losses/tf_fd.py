"""Tf-FD, teacher-free feature distillation: from salient channels, and from deeper stages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations

import torch
from torch import Tensor
from torch.nn import functional

from softlabels.inputs import Features, Input
from softlabels.losses._features import check_maps, pooled_to_each_other, wide_maps
from softlabels.losses._method import Method, Stages, Weight

__all__ = ["TfFDLoss"]


class TfFDLoss(Method, name="tf_fd"):
    r"""Tf-FD: maps are drawn to their own salient channels, and to the maps of deeper stages.

    Li, "Self-Regulated Feature Learning via Teacher-free Feature Distillation", ECCV 2022;
    official code lilujunai/Teacher-free-Distillation.

    .. math::
        L = \alpha \sum_i \operatorname{mean} (F_i^{+} - F_i^{-})^2
        + \beta \sum_{i < j} \operatorname{mean} (F_i - F_j)^2

    ===============  =====================================================================
    symbol           here
    ===============  =====================================================================
    F_i              the map of stage i, shallow to deep
    F^+, F^-         its more and less salient half of the channels, each in order. A
                     channel's salience is its mean over batch and positions, each
                     sample's channel divided by its length
    :math:`\alpha`   `intra_weight`
    :math:`\beta`    `inter_weight`
    ===============  =====================================================================

    In the second term the larger map is average-pooled to the size of the smaller, only the
    first channels that both have are compared, and the deeper map is constant.

    Deviations: the weights are those of the published command. The training script's own
    defaults are 4e-4 and 5e-3, and it divides both terms by 3: settings of a third give that.
    The snippet beside the code weighs both terms with the intra weight: not followed. With an
    odd number of channels, which that code cannot take, the middle one in order is left out of
    the first term.

    Distributed: the order of the channels is that of the process's own batch.

    Args:
        intra_weight: Of the first term; 0 or more.
        inter_weight: Of the second term; 0 or more.
        stages: Which stages are read, shallow to deep.

    Example:
        >>> import torch
        >>> map = torch.tensor([[[[1.0]], [[3.0]]]])
        >>> TfFDLoss(intra_weight=1, inter_weight=1)([map, torch.zeros(1, 2, 1, 1)])
        tensor(9.)
    """

    intra_weight: Weight = 8e-4
    inter_weight: Weight = 5e-4
    stages: Stages = ("stages",)

    of_batch = True

    @property
    def inputs(self) -> Mapping[str, Input]:
        """The maps of these stages."""
        return {"student_maps": Features(of="student", stages=self.stages, form="map")}

    def terms(self, student_maps: Sequence[Tensor]) -> dict[str, Tensor]:
        """`"intra"` and `"inter"`, which is 0 for one map."""
        check_maps(student_maps, student_maps, ("student_maps", "student_maps"))
        for map in student_maps:
            if map.shape[1] < 2:
                raise ValueError(
                    f"each of student_maps must have two channels or more, got {tuple(map.shape)}"
                )
        maps = wide_maps(student_maps)
        intra = torch.stack([_between_halves(map) for map in maps]).sum()
        inter = torch.zeros_like(intra)
        if len(maps) > 1:
            pairs = [_to_deeper(shallow, deep.detach()) for shallow, deep in combinations(maps, 2)]
            inter = torch.stack(pairs).sum()
        return {"intra": self.intra_weight * intra, "inter": self.inter_weight * inter}


def _between_halves(map: Tensor) -> Tensor:
    """The mean squared difference of the more and the less salient half of the channels."""
    salience = functional.normalize(map.detach().flatten(2), dim=2).mean((0, 2))
    ordered = map.index_select(1, salience.argsort(descending=True))
    half = map.shape[1] // 2
    return (ordered[:, :half] - ordered[:, -half:]).square().mean()


def _to_deeper(shallow: Tensor, deep: Tensor) -> Tensor:
    """The mean squared difference of two maps, where they have the same channels and size."""
    width = min(shallow.shape[1], deep.shape[1])
    shallow, deep = pooled_to_each_other(shallow, deep)
    return (shallow[:, :width] - deep[:, :width]).square().mean()
