"""FitNet, hints: L2 between the student's regressed map and the teacher's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from softlabels.inputs import Input
from softlabels.losses._features import (
    Values,
    check_maps,
    level_terms,
    map_inputs,
    paired_from_deepest,
    paired_maps,
    paired_shapes,
    pooled_to_each_other,
    tensors_of,
)
from softlabels.losses._method import Defaults, Method, Shapes, Stages

__all__ = ["FitNetLoss"]


class FitNetLoss(Method, name="fitnet"):
    r"""FitNet: the mean squared distance of regressed student maps from the teacher's.

    Romero et al., "FitNets: Hints for Thin Deep Nets", ICLR 2015 (arXiv 1412.6550), equation 3,
    as in megvii-research/mdistiller and HobbitLong/RepDistiller.

    .. math:: L = \sum_l \mathrm{mean}\left[(r_l(v_l) - u_l)^2\right]

    =======  =====================================================
    u, v     the teacher's and the student's map (hint and guided)
    r        the regressor, see `FitNetLoss`
    l        level; one is published
    =======  =====================================================

    Its adapters regress each student map to the teacher's width and size: a convolution with bias,
    BatchNorm and ReLU. The convolution goes by the sizes: 3x3 with stride 2 if the student's map
    is twice as large; transposed 4x4 with stride 2 if it is half as large; else an unpadded one
    whose kernel takes off what is too much.

    Args:
        stages: Names of stages, as of `Features`; both networks are read there. The published
            one is the second of a network's stages.

    Deviations: the paper trains the lower half of the student with it first, and sums over
    elements; this is the form of the later comparisons, one training with both terms.
    Deviations of the learned parts: where the student's map is smaller, but not by half, the
    convolution is 1x1 and
    the teacher's map is pooled; the published code has no regressor for it.
    Numerics: float32 or wider, also under autocast.
    Distributed: each sample by itself; the BatchNorms of the adapters are those of the process.

    Example:
        >>> import torch
        >>> teacher = torch.ones(2, 3, 4, 4)
        >>> FitNetLoss()([3 * teacher], [teacher])
        tensor(4.)
    """

    stages: Stages = ("stage:1",)

    defaults = Defaults(weight=100.0)
    of_batch = True

    @property
    def inputs(self) -> Mapping[str, Input]:
        """Maps of both networks."""
        return map_inputs(self.stages)

    def build_adapters(self, shapes: Shapes) -> nn.Module:
        """The regressors, one for each pair of levels."""
        return _Regressors(paired_shapes(shapes))

    def terms(
        self, student_maps: Sequence[Tensor], teacher_maps: Sequence[Tensor]
    ) -> dict[str, Tensor]:
        """`"level_0"` (the shallowest) and so on, scalars.

        Args:
            student_maps: List of [B, D, H, W], shallow to deep: the regressed maps,
            of the teacher's
                widths. Get the gradient.
            teacher_maps: List of [B, D, H, W]. Get none. Levels are paired from the deepest; the
                larger map of a pair is average-pooled to the smaller.
        """
        check_maps(student_maps, teacher_maps, same_widths=True)
        terms = []
        for pair in paired_maps(student_maps, teacher_maps):
            student, teacher = pooled_to_each_other(*pair)
            terms.append((student - teacher).square().mean())
        return level_terms(terms)


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
