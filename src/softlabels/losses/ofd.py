"""OFD, overhaul of feature distillation: maps before activation, L2 up to a margin."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from softlabels.inputs import Input, NormParameters
from softlabels.losses._checks import check_floating
from softlabels.losses._features import (
    LevelAdapters,
    check_maps,
    map_inputs,
    paired_maps,
    paired_shapes,
    pooled_to_each_other,
)
from softlabels.losses._method import Defaults, Method, Shapes, Stages
from softlabels.losses._non_target import in_float32

__all__ = ["OFDLoss", "ofd_margins"]

# Below this share of negative values their mean is not trusted, and 3 deviations are taken.
_RARE = 0.001


def ofd_margins(norm_parameters: Sequence[Tensor]) -> list[Tensor]:
    r"""The margin of each channel: the mean of its negative values, if they are normal.

    .. math:: m = E[v \mid v < 0] = \mu - \sigma \frac{\phi(\mu/\sigma)}{\Phi(-\mu/\sigma)},
        \qquad v \sim N(\mu, \sigma^2)

    or -3 sigma where fewer than one value in a thousand is negative. A weight of 0 gives the
    limit: the bias where it is negative, else 0.

    Args:
        norm_parameters: List of [2, D]: weight (sigma is its size) and bias (mu) of a BatchNorm.

    Returns:
        List of [D], 0 or less, in at least float32, without gradient.
    """
    margins = []
    for parameters in norm_parameters:
        weight, bias = in_float32(parameters.detach())
        deviation = weight.abs()
        tiny = torch.finfo(deviation.dtype).tiny
        # Beyond 30 deviations the density is 0 in any precision.
        ratio = (bias / deviation.clamp(min=tiny)).clamp(-30.0, 30.0)
        negative = torch.special.ndtr(-ratio)
        density = (-0.5 * ratio.square()).exp() / (2 * torch.pi) ** 0.5
        mean = bias - deviation * density / negative.clamp(min=_RARE)
        margins.append(torch.where(negative > _RARE, mean, -3 * deviation))
    return margins


def _check_norms(norm_parameters: Sequence[Tensor], teacher_maps: Sequence[Tensor]) -> None:
    if not isinstance(norm_parameters, (list, tuple)):
        raise TypeError(f"norm_parameters must be a list, got {type(norm_parameters).__name__}")
    if len(norm_parameters) != len(teacher_maps):
        raise ValueError(
            f"norm_parameters must hold one tensor for each of the {len(teacher_maps)} "
            f"teacher_maps, got {len(norm_parameters)}"
        )
    for number, (parameters, map) in enumerate(zip(norm_parameters, teacher_maps, strict=True)):
        check_floating(parameters, f"norm_parameters[{number}]")
        if parameters.shape != (2, map.shape[1]):
            raise ValueError(
                f"norm_parameters[{number}] must be [2, {map.shape[1]}], a BatchNorm's weight and "
                f"bias, got {tuple(parameters.shape)}"
            )


class OFDLoss(Method, name="ofd"):
    r"""OFD: the squared distance of feature maps, where the teacher's sign asks for it.

    Heo et al., "A Comprehensive Overhaul of Feature Distillation", ICCV 2019 (arXiv 1904.01866),
    code at clovaai/overhaul-distillation; multi-level sum as there and in
    megvii-research/mdistiller.

    A positive teacher value is to be met. A negative one, or one below the channel's margin, only
    must not be exceeded, since the activation that follows hides it.

    .. math::
        L = \sum_{l=1}^{n} 2^{l-n} \frac{1}{B} \sum_{b,c,x} d(s_{bcx}, t_{bcx}, m_c), \qquad
        d(s, t, m) = \begin{cases}
            (s - t)^2 & t > 0 \\
            (s - \max(t, m))^2 & t \le 0,\; s > \max(t, m) \\
            0 & \text{else}
        \end{cases}

    ===========  ===================================================================
    s, t         values of the student's (connected) and the teacher's map
    l, n         level, from the shallowest to the deepest, and how many there are
    b, c, x, B   sample, channel, position; batch size
    m            margin of the channel, see `ofd_margins`
    ===========  ===================================================================

    Its adapters connect each student map to the teacher's width: a 1x1 convolution and a BatchNorm.

    Args:
        stages: Names of stages, as of `Features`; both networks are read there.
        pool_maps: Average-pool the larger map of a pair to the smaller; False asks for equal
            sizes.

    Deviations: the student's map is pooled too where it is the larger one (mdistiller repeats the
    teacher's values). `pool_maps=False` is clovaai's code, which has no pooling. Margins are kept
    in the maps' precision instead of float32, and are finite for a BatchNorm weight of 0. Both
    run the teacher's BatchNorm on batch statistics; here the teacher is in evaluation mode, unless
    the `Teacher`'s own mode is `"train"`.
    Distributed: mean over the samples of the process.

    Example:
        >>> import torch
        >>> student = [torch.tensor([1.0, -2.0, 0.0]).reshape(1, 3, 1, 1)]
        >>> teacher = [torch.tensor([3.0, -1.0, -9.0]).reshape(1, 3, 1, 1)]
        >>> norms = [torch.stack((torch.ones(3), torch.tensor([0.0, 0.0, -1.0])))]
        >>> OFDLoss()(student, teacher, norms)
        tensor(5.6579)
    """

    stages: Stages = ("stages",)
    pool_maps: bool = True

    defaults = Defaults(weight=1e-3)
    of_batch = True

    @property
    def inputs(self) -> Mapping[str, Input]:
        """Maps of both networks before the activation, and the teacher's BatchNorms."""
        return {
            **map_inputs(self.stages, before_activation=True),
            "norm_parameters": NormParameters(self.stages),
        }

    def build_adapters(self, shapes: Shapes) -> nn.Module:
        """The connectors, one for each pair of levels."""
        return LevelAdapters(_connector(s[1], t[1]) for s, t in paired_shapes(shapes))

    def terms(
        self,
        student_maps: Sequence[Tensor],
        teacher_maps: Sequence[Tensor],
        norm_parameters: Sequence[Tensor],
    ) -> dict[str, Tensor]:
        """`"level_0"` (the shallowest) and so on, scalars, each with its factor.

        Args:
            student_maps: List of [B, D, H, W], shallow to deep, before the activation and of the
                teacher's widths (the connectors' outputs). Get the gradient.
            teacher_maps: List of [B, D, H, W], before the activation. Get none. Levels are paired
                from the deepest.
            norm_parameters: List of [2, D], one for each of `teacher_maps`: weight and bias of the
                BatchNorm that it comes out of. Get none.
        """
        check_maps(student_maps, teacher_maps, same_widths=True, same_sizes=not self.pool_maps)
        _check_norms(norm_parameters, teacher_maps)
        pairs = paired_maps(student_maps, teacher_maps)
        margins = ofd_margins(norm_parameters)[-len(pairs) :]
        terms = {}
        for above, ((student, teacher), margin) in enumerate(zip(pairs, margins, strict=True)):
            student, teacher = pooled_to_each_other(student, teacher)
            bound = torch.maximum(teacher, margin.to(student.dtype)[:, None, None])
            gap = torch.where((teacher > 0) | (student > bound), student - bound, 0.0)
            level = gap.square().sum() / len(student)
            terms[f"level_{above}"] = level / 2 ** (len(pairs) - 1 - above)
        return terms


def _connector(student_width: int, teacher_width: int) -> nn.Module:
    """A 1x1 convolution and a BatchNorm."""
    convolution = nn.Conv2d(student_width, teacher_width, 1, bias=False)
    nn.init.kaiming_normal_(convolution.weight, mode="fan_out")
    return nn.Sequential(convolution, nn.BatchNorm2d(teacher_width))
