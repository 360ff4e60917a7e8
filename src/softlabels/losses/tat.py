"""TaT, target-aware transformer: the teacher's positions, rebuilt from all of the student's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal, TypeAlias

import torch
from torch import Tensor, nn

from softlabels.losses._features import check_maps, map_inputs, the_only
from softlabels.losses._method import Defaults, Method, Shapes
from softlabels.losses._non_target import in_float32

__all__ = ["SoftmaxOver", "TaTAdapters", "TaTLoss"]

SoftmaxOver: TypeAlias = Literal["student", "teacher"]


class TaTAdapters(nn.Module):
    """What TaT learns beside the student: the projections to queries and values.

    Args:
        student_width: Channels of the student's map.
        teacher_width: Channels of the teacher's.
    """

    def __init__(self, student_width: int, teacher_width: int) -> None:
        super().__init__()
        self.query = _projection(student_width, teacher_width)
        self.value = _projection(student_width, teacher_width)

    def forward(self, values: Mapping[str, Tensor | list[Tensor]]) -> dict[str, list[Tensor]]:
        """Put a list of the queries and the values in the place of the student's map."""
        student_map = values["student_maps"][0]
        return {"student_maps": [self.query(student_map), self.value(student_map)]}


def _projection(student_width: int, teacher_width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(student_width, teacher_width, 3, padding=1, bias=False),
        nn.BatchNorm2d(teacher_width),
    )


class TaTLoss(Method, name="tat"):
    r"""TaT: the student's map, rearranged towards each position of the teacher's, equals it.

    Lin et al., "Knowledge Distillation via the Target-aware Transformer", CVPR 2022
    (arXiv 2205.10793); official code sihaoevery/TaT.

    .. math::
        L = \operatorname{mean}_{i,d} \Big(\sum_j w_{ij} \, \phi(S)_{jd} - T_{id}\Big)^2, \quad
        w_{ij} = \operatorname{softmax}_j \big(\gamma(S)_j \cdot T_i\big)

    ==============  =====================================================================
    symbol          here
    ==============  =====================================================================
    S, T            the student's and the teacher's last map
    i, j, d         positions of the teacher's and of the student's map; channels
    :math:`\gamma`  3x3 convolution without bias and BatchNorm, gives `query_map`
    :math:`\phi`    the same with parameters of its own, gives `value_map`
    ==============  =====================================================================

    Both are in `TaTAdapters`. The mean is over batch, positions and channels. The published
    objective is 0.1 of the task's cross-entropy and 0.2 of this loss; together with KD at
    temperature 1 it is 0.5 and 0.5 of those, and 0.1.

    Args:
        softmax_over: `"student"`: each position of the teacher shares its weight out over the
            student's, as the paper describes. `"teacher"`: as in the published code, below.

    Deviations: in the published code the softmax runs over the teacher's positions, for each
    position of the student, and the weights are applied to the student's positions as if they
    were those: `softmax_over="teacher"` computes that. The default is what the paper describes,
    and lets the two maps have different sizes. The paper's own formulas were not at hand, and
    there are no reference values: projections, weights and the missing scale in the softmax are
    those of the code, which projects nothing of the teacher. The paper's patch-group and
    anchor-point forms, for segmentation, are left out.
    Numerics: holds B H W h w weights.
    Distributed: each sample by itself; the BatchNorms of the adapters are those of the process.

    Example:
        >>> import torch
        >>> query, value = torch.zeros(1, 1, 1, 2), torch.tensor([[[[1.0, 3.0]]]])
        >>> TaTLoss()([query, value], [torch.zeros(1, 1, 2, 2)])
        tensor(4.)
    """

    softmax_over: SoftmaxOver = "student"

    inputs: ClassVar = map_inputs(("last",))
    defaults = Defaults(weight=0.2, task_weight=0.1)
    of_batch = True

    def build_adapters(self, shapes: Shapes) -> TaTAdapters:
        """The projections, for maps of these shapes."""
        return TaTAdapters(shapes["student_maps"][0][1], shapes["teacher_maps"][0][1])

    def terms(
        self, student_maps: Sequence[Tensor], teacher_maps: Sequence[Tensor]
    ) -> dict[str, Tensor]:
        r"""`"rebuilt"`, a scalar.

        Args:
            student_maps: A list of :math:`\gamma(S)` and :math:`\phi(S)`, [B, D, h, w] each, of
                `TaTAdapters`. Get the gradient.
            teacher_maps: A list of one [B, D, H, W]. Gets none.
        """
        if len(student_maps) != 2:
            raise ValueError(
                "student_maps must be the queries and the values of the adapters, see "
                f"build_adapters, got {len(student_maps)} maps"
            )
        query_map, value_map = student_maps
        teacher_map = the_only("teacher_maps", teacher_maps)
        names = ("query_map", "teacher_map")
        check_maps(
            [query_map],
            [teacher_map],
            names,
            same_widths=True,
            same_sizes=self.softmax_over == "teacher",
        )
        if query_map.shape != value_map.shape:
            raise ValueError(
                f"value_map must have the shape of query_map {tuple(query_map.shape)}, "
                f"got {tuple(value_map.shape)}"
            )
        query, value = in_float32(query_map).flatten(2), in_float32(value_map).flatten(2)
        teacher = in_float32(teacher_map.detach()).flatten(2).to(value.dtype)
        with torch.autocast(device_type=query.device.type, enabled=False):
            # [B, student's positions, teacher's positions]
            scores = query.transpose(1, 2) @ teacher
            if self.softmax_over == "student":
                rebuilt = value @ scores.softmax(1)
            else:
                rebuilt = value @ scores.softmax(2).transpose(1, 2)
        return {"rebuilt": (rebuilt - teacher).square().mean()}
