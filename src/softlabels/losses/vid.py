"""VID, variational information distillation: likelihood of the teacher's maps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from softlabels.inputs import Input
from softlabels.losses._checks import check_floating
from softlabels.losses._features import (
    Values,
    check_maps,
    map_inputs,
    paired_from_deepest,
    paired_maps,
    paired_shapes,
    pooled_to,
    pooled_to_each_other,
    tensors_of,
)
from softlabels.losses._method import Method, Positive, Shapes, Stages
from softlabels.losses._non_target import in_float32

__all__ = ["VIDLoss"]


def _check_variances(variances: Sequence[Tensor], pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Check those of the paired levels."""
    if not isinstance(variances, (list, tuple)):
        raise TypeError(f"variances must be a list of tensors, got {type(variances).__name__}")
    if len(variances) < len(pairs):
        raise ValueError(
            f"variances must hold one tensor for each of {len(pairs)} levels, got {len(variances)}"
        )
    for variance, (mean, _) in paired_from_deepest(variances, pairs):
        check_floating(variance, "each of variances")
        if variance.shape != mean.shape[1:2]:
            raise ValueError(
                f"variances of a level of {mean.shape[1]} channels must be [{mean.shape[1]}], "
                f"got {tuple(variance.shape)}"
            )


class VIDLoss(Method, name="vid"):
    r"""VID: minus the log-likelihood of the teacher's maps, with a learned mean and variance.

    Ahn et al., "Variational Information Distillation for Knowledge Transfer", CVPR 2019
    (arXiv 1904.05835), equation 5 without its constant, as in HobbitLong/RepDistiller and
    megvii-research/mdistiller.

    .. math:: L = \sum_l \mathrm{mean}_{b,c,x}
        \left[\frac{(t_{bcx} - \mu_{bcx})^2}{2 \sigma_c^2} + \frac{1}{2} \log \sigma_c^2\right]

    ===========  ==========================================================
    t            the teacher's map of the level
    mu           the mean that is regressed from the student's map
    sigma        standard deviation, one for each channel
    l            level
    b, c, x      sample, channel, position
    ===========  ==========================================================

    Its adapters regress each student map, pooled to the teacher's size if it is larger, to the
    teacher's width: three 1x1 convolutions without bias, ReLU between. They hold one number a
    channel besides, from which its variance comes: log(1 + exp(number)) + `min_variance`.

    Args:
        stages: Names of stages, as of `Features`; both networks are read there.
        initial_variance: What the variances begin with; above `min_variance`.
        min_variance: Added to every variance, above 0.

    Deviations: the numbers are trained; mdistiller does not give them to its optimizer. The
    softplus does not overflow.
    Distributed: mean over the samples of the process.

    Example:
        >>> import torch
        >>> teacher = torch.ones(2, 3, 4, 4)
        >>> VIDLoss()([3 * teacher], [teacher], [torch.ones(3)])
        tensor(2.)
    """

    stages: Stages = ("stages",)
    initial_variance: Positive = 5.0
    min_variance: Positive = 1e-5

    of_batch = True

    def check_settings(self) -> None:
        """The first variance is above what is added to it."""
        if self.initial_variance <= self.min_variance:
            raise ValueError(
                f"initial_variance must be above min_variance ({self.min_variance}), "
                f"got {self.initial_variance}"
            )

    @property
    def inputs(self) -> Mapping[str, Input]:
        """Maps of both networks."""
        return map_inputs(self.stages)

    def build_adapters(self, shapes: Shapes) -> nn.Module:
        """The regressors and the variances' numbers, one of each for each pair of levels."""
        widths = [(student[1], teacher[1]) for student, teacher in paired_shapes(shapes)]
        return _Regressors(widths, self.initial_variance, self.min_variance)

    def terms(
        self,
        student_maps: Sequence[Tensor],
        teacher_maps: Sequence[Tensor],
        variances: Sequence[Tensor],
    ) -> dict[str, Tensor]:
        """`"level_0"` (the shallowest) and so on, scalars.

        Args:
            student_maps: List of [B, D, H, W], shallow to deep: the regressed means, of the
                teacher's widths. Get the gradient.
            teacher_maps: List of [B, D, H, W]. Get none. Levels are paired from the deepest; the
                larger map of a pair is average-pooled to the smaller.
            variances: List of [D], above 0, paired likewise. Get the gradient.
        """
        check_maps(student_maps, teacher_maps, same_widths=True)
        pairs = paired_maps(student_maps, teacher_maps)
        _check_variances(variances, pairs)
        terms = {}
        levels = enumerate(paired_from_deepest(variances, pairs))
        for number, (variance, (mean, teacher)) in levels:
            mean, teacher = pooled_to_each_other(mean, teacher)
            variance = in_float32(variance).to(mean.dtype)
            # The mean over the channels' logarithms: all positions and samples share them.
            squares = (mean - teacher).square() / variance[:, None, None]
            terms[f"level_{number}"] = 0.5 * (squares.mean() + variance.log().mean())
        return terms


class _Regressors(nn.Module):
    """Means and variances of the teacher's maps, shallow to deep."""

    def __init__(
        self, widths: Sequence[tuple[int, int]], initial_variance: float, min_variance: float
    ) -> None:
        super().__init__()
        self.min_variance = min_variance
        self.regressors = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(student_width, teacher_width, 1, bias=False),
                nn.ReLU(),
                nn.Conv2d(teacher_width, teacher_width, 1, bias=False),
                nn.ReLU(),
                nn.Conv2d(teacher_width, teacher_width, 1, bias=False),
            )
            for student_width, teacher_width in widths
        )
        # The inverse of the softplus, in the form that does not overflow.
        rest = initial_variance - min_variance
        start = rest + math.log(-math.expm1(-rest))
        self.scales = nn.ParameterList(
            nn.Parameter(torch.full((teacher_width,), start)) for _, teacher_width in widths
        )

    def forward(self, values: Values) -> dict[str, Tensor | list[Tensor]]:
        pairs = paired_from_deepest(
            tensors_of(values, "student_maps"), tensors_of(values, "teacher_maps")
        )
        return {
            "student_maps": [
                regressor(pooled_to(student, teacher.shape[2:]))
                for regressor, (student, teacher) in zip(self.regressors, pairs, strict=True)
            ],
            "variances": [
                functional.softplus(in_float32(scale)) + self.min_variance for scale in self.scales
            ],
        }
