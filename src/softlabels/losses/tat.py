"""TaT: each position of the teacher's map is rebuilt from all positions of the student's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal, TypeAlias

import torch
from torch import Tensor, nn

from softlabels.inputs import Features, Input
from softlabels.losses._checks import check_choice
from softlabels.losses._features import check_maps, the_only
from softlabels.losses._non_target import in_float32

__all__ = ["SoftmaxOver", "TaTHeads", "TaTLoss", "tat_loss"]

SoftmaxOver: TypeAlias = Literal["student", "teacher"]


def tat_loss(
    query_map: Tensor,
    value_map: Tensor,
    teacher_map: Tensor,
    *,
    softmax_over: SoftmaxOver = "student",
) -> Tensor:
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

    Both are in `TaTHeads`. The mean is over batch, positions and channels. The published
    objective is 0.1 of the task's cross-entropy and 0.2 of this loss; together with KD at
    temperature 1 it is 0.5 and 0.5 of those, and 0.1.

    Args:
        query_map: [B, D, h, w], :math:`\gamma(S)`. Gets the gradient.
        value_map: [B, D, h, w], :math:`\phi(S)`. Gets the gradient.
        teacher_map: [B, D, H, W]. Gets none.
        softmax_over: `"student"`: each position of the teacher shares its weight out over the
            student's, as the paper describes. `"teacher"`: as in the published code, below.

    Returns:
        A scalar, without the weight; at least float32.

    Raises:
        TypeError: A map of a wrong dtype.
        ValueError: A wrong shape, maps of different widths, an unknown `softmax_over`, or maps
            of different sizes for `"teacher"`.

    Deviations: in the published code the softmax runs over the teacher's positions, for each
    position of the student, and the weights are applied to the student's positions as if they
    were those: `softmax_over="teacher"` computes that. The default is what the paper describes,
    and lets the two maps have different sizes. The paper's own formulas were not at hand, and
    there are no reference values: projections, weights and the missing scale in the softmax are
    those of the code, which projects nothing of the teacher. The paper's patch-group and
    anchor-point forms, for segmentation, are left out.

    Numerics: in float32 or wider, also under autocast. Holds B H W h w weights.
    Distributed: each sample by itself; the BatchNorms of the heads are those of the process.

    Example:
        >>> import torch
        >>> query, value = torch.zeros(1, 1, 1, 2), torch.tensor([[[[1.0, 3.0]]]])
        >>> tat_loss(query, value, torch.zeros(1, 1, 2, 2))
        tensor(4.)
    """
    check_choice("softmax_over", softmax_over, ("student", "teacher"))
    names = ("query_map", "teacher_map")
    check_maps(
        [query_map],
        [teacher_map],
        names,
        same_widths=True,
        same_sizes=softmax_over == "teacher",
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
        if softmax_over == "student":
            rebuilt = value @ scores.softmax(1)
        else:
            rebuilt = value @ scores.softmax(2).transpose(1, 2)
    return (rebuilt - teacher).square().mean()


class TaTHeads(nn.Module):
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


class TaTLoss(nn.Module):
    """TaT as a module; see `tat_loss` for the equation and the settings.

    Args:
        softmax_over: `"student"` (the paper's) or `"teacher"` (the published code's).
    """

    inputs: ClassVar[Mapping[str, Input]] = {
        "student_maps": Features(of="student", stages=("last",), form="map"),
        "teacher_maps": Features(of="teacher", stages=("last",), form="map"),
    }
    recommended_weight: ClassVar[float] = 0.2
    recommended_task_weight: ClassVar[float] = 0.1

    def __init__(self, *, softmax_over: SoftmaxOver = "student") -> None:
        super().__init__()
        check_choice("softmax_over", softmax_over, ("student", "teacher"))
        self.softmax_over: SoftmaxOver = softmax_over

    def build_adapters(self, shapes: Mapping[str, list[tuple[int, ...]]]) -> TaTHeads:
        """The projections, for maps of these shapes."""
        return TaTHeads(shapes["student_maps"][0][1], shapes["teacher_maps"][0][1])

    def forward(self, student_maps: list[Tensor], teacher_maps: list[Tensor]) -> Tensor:
        """Compute `tat_loss`; `student_maps` are the queries and the values of the heads."""
        if len(student_maps) != 2:
            raise ValueError(
                "student_maps must be the queries and the values of the heads, see build_heads, "
                f"got {len(student_maps)} maps"
            )
        query_map, value_map = student_maps
        teacher_map = the_only("teacher_maps", teacher_maps)
        return tat_loss(query_map, value_map, teacher_map, softmax_over=self.softmax_over)
