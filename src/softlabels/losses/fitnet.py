"""FitNet, hints: L2 between the student's regressed map and the teacher's."""

from __future__ import annotations

from torch import Tensor, nn

from softlabels.losses._features import (
    LevelAdapters,
    LevelsMethod,
    paired_shapes,
    pooled_to_each_other,
)
from softlabels.losses._method import Defaults, Shapes, Stages

__all__ = ["FitNetLoss"]


class FitNetLoss(LevelsMethod, name="fitnet"):
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
    elements; this is the form of the later comparisons, one training with both terms. Where the
    student's map is smaller, but not by half, the convolution is 1x1 and the teacher's map is
    pooled; the published code has no regressor for it.
    Distributed: each sample by itself; the BatchNorms of the adapters are those of the process.

    Example:
        >>> import torch
        >>> teacher = torch.ones(2, 3, 4, 4)
        >>> FitNetLoss()([3 * teacher], [teacher])
        tensor(4.)
    """

    stages: Stages = ("stage:1",)

    defaults = Defaults(weight=100.0)
    same_widths = True

    def build_adapters(self, shapes: Shapes) -> nn.Module:
        """The regressors, one for each pair of levels."""
        return LevelAdapters(
            nn.Sequential(_resizing(student, teacher), nn.BatchNorm2d(teacher[1]), nn.ReLU())
            for student, teacher in paired_shapes(shapes)
        )

    def level(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Of the regressed map and the teacher's; the larger is average-pooled to the smaller."""
        student, teacher = pooled_to_each_other(student, teacher)
        return (student - teacher).square().mean()


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
