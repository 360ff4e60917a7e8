"""FitNet: the student's map, through a learned regressor, meets the teacher's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal, overload

from torch import Tensor, nn

from softlabels.inputs import Input
from softlabels.losses._features import (
    Shapes,
    Values,
    check_maps,
    check_stages,
    map_inputs,
    paired_from_deepest,
    paired_maps,
    paired_shapes,
    pooled_to_each_other,
    sum_levels,
    tensors_of,
)
from softlabels.losses._non_target import LossOutput

__all__ = ["FitNetLoss", "fitnet_loss"]


@overload
def fitnet_loss(
    student_maps: Sequence[Tensor],
    teacher_maps: Sequence[Tensor],
    *,
    return_parts: Literal[False] = False,
) -> Tensor: ...


@overload
def fitnet_loss(
    student_maps: Sequence[Tensor],
    teacher_maps: Sequence[Tensor],
    *,
    return_parts: Literal[True],
) -> LossOutput: ...


def fitnet_loss(
    student_maps: Sequence[Tensor],
    teacher_maps: Sequence[Tensor],
    *,
    return_parts: bool = False,
) -> Tensor | LossOutput:
    r"""FitNet: the mean squared distance of regressed student maps from the teacher's.

    Romero et al., "FitNets: Hints for Thin Deep Nets", ICLR 2015 (arXiv 1412.6550), equation 3,
    as in megvii-research/mdistiller and HobbitLong/RepDistiller.

    .. math:: L = \sum_l \mathrm{mean}\left[(r_l(v_l) - u_l)^2\right]

    =======  =====================================================
    u, v     the teacher's and the student's map (hint and guided)
    r        the regressor, see `FitNetLoss`
    l        level; one is published
    =======  =====================================================

    Args:
        student_maps: List of [B, D, H, W], shallow to deep: the regressed maps, of the teacher's
            widths. Get the gradient.
        teacher_maps: List of [B, D, H, W]. Get none. Levels are paired from the deepest; the
            larger map of a pair is average-pooled to the smaller.
        return_parts: Also return the summands, as `LossOutput(loss, parts)`: `"level_0"` (the
            shallowest), ...

    Returns:
        A scalar, a mean over all elements of a level, at least float32; the published weight 100
        is not in it.

    Raises:
        TypeError: Not lists of floating-point tensors.
        ValueError: Shapes that do not fit.

    Deviations: the paper trains the lower half of the student with it first, and sums over
    elements; this is the form of the later comparisons, one training with both terms.
    Numerics: float32 or wider, also under autocast.
    Distributed: each sample by itself; the BatchNorms of the heads are those of the process.

    Example:
        >>> import torch
        >>> teacher = torch.ones(2, 3, 4, 4)
        >>> fitnet_loss([3 * teacher], [teacher])
        tensor(4.)
    """
    check_maps(student_maps, teacher_maps, same_widths=True)
    terms = []
    for pair in paired_maps(student_maps, teacher_maps):
        student, teacher = pooled_to_each_other(*pair)
        terms.append((student - teacher).square().mean())
    output = sum_levels(terms)
    return output if return_parts else output.loss


class FitNetLoss(nn.Module):
    """FitNet as a module; see `fitnet_loss` for the equation.

    Its heads regress each student map to the teacher's width and size: a convolution with bias,
    BatchNorm and ReLU. The convolution goes by the sizes: 3x3 with stride 2 if the student's map
    is twice as large; transposed 4x4 with stride 2 if it is half as large; else an unpadded one
    whose kernel takes off what is too much.

    Deviations: where the student's map is smaller, but not by half, the convolution is 1x1 and
    the teacher's map is pooled; the published code has no regressor for it.

    Args:
        stages: Names of stages, as of `Features`; both networks are read there. The published
            one is the second of a network's stages.
    """

    recommended_weight: ClassVar[float] = 100.0

    def __init__(self, *, stages: tuple[str, ...] = ("stage:1",)) -> None:
        super().__init__()
        self.stages = check_stages(stages)

    @property
    def inputs(self) -> Mapping[str, Input]:
        """Maps of both networks."""
        return map_inputs(self.stages)

    def build_adapters(self, shapes: Shapes) -> nn.Module:
        """The regressors, one for each pair of levels."""
        return _Regressors(paired_shapes(shapes))

    def forward(
        self,
        student_maps: list[Tensor],
        teacher_maps: list[Tensor],
        *,
        return_parts: bool = False,
    ) -> Tensor | LossOutput:
        """Compute `fitnet_loss`."""
        output = fitnet_loss(student_maps, teacher_maps, return_parts=True)
        return output if return_parts else output.loss


class _Regressors(nn.Module):
    """Convolution, BatchNorm and ReLU for each level, shallow to deep."""

    def __init__(self, shapes: Sequence[tuple[tuple[int, ...], tuple[int, ...]]]) -> None:
        super().__init__()
        self.regressors = nn.ModuleList(
            nn.Sequential(_resizing(student, teacher), nn.BatchNorm2d(teacher[1]), nn.ReLU())
            for student, teacher in shapes
        )

    def forward(self, values: Values) -> dict[str, Tensor | list[Tensor]]:
        levels = paired_from_deepest([*self.regressors], tensors_of(values, "student_maps"))
        return {"student_maps": [regressor(map) for regressor, map in levels]}


def _resizing(student: tuple[int, ...], teacher: tuple[int, ...]) -> nn.Module:
    """A convolution from one shape [B, D, H, W] to the other's width and size."""
    widths = (student[1], teacher[1])
    ours, theirs = student[2:], teacher[2:]
    if ours == tuple(2 * side for side in theirs):
        return nn.Conv2d(*widths, 3, stride=2, padding=1)
    if theirs == tuple(2 * side for side in ours):
        return nn.ConvTranspose2d(*widths, 4, stride=2, padding=1)
    # A side that is too small already stays: the teacher's map is pooled to it.
    kernel = [max(1 + own - wanted, 1) for own, wanted in zip(ours, theirs, strict=True)]
    return nn.Conv2d(*widths, (kernel[0], kernel[1]))
