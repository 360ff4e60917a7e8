"""ReviewKD: each teacher level is learned from the student's level and all deeper ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal, overload

import torch
from torch import Tensor, nn
from torch.nn import functional

from softlabels.inputs import Features, Input
from softlabels.losses._checks import check_flag
from softlabels.losses._features import (
    Shapes,
    Values,
    check_maps,
    check_stages,
    paired_from_deepest,
    paired_maps,
    paired_shapes,
    pooled_to,
    sum_levels,
    tensors_of,
)
from softlabels.losses._non_target import LossOutput

__all__ = ["ReviewKDLoss", "reviewkd_loss"]

# Sides to which the maps are pooled, each with half the weight of the one before.
_SIDES = (4, 2, 1)


@overload
def reviewkd_loss(
    student_maps: Sequence[Tensor],
    teacher_maps: Sequence[Tensor],
    *,
    return_parts: Literal[False] = False,
) -> Tensor: ...


@overload
def reviewkd_loss(
    student_maps: Sequence[Tensor],
    teacher_maps: Sequence[Tensor],
    *,
    return_parts: Literal[True],
) -> LossOutput: ...


def reviewkd_loss(
    student_maps: Sequence[Tensor],
    teacher_maps: Sequence[Tensor],
    *,
    return_parts: bool = False,
) -> Tensor | LossOutput:
    r"""ReviewKD: the distance of fused student maps from the teacher's, at several scales.

    Chen et al., "Distilling Knowledge via Knowledge Review", CVPR 2021 (arXiv 2104.09044),
    hierarchical context loss (HCL); code at dvlab-research/ReviewKD, same in
    megvii-research/mdistiller. The fusion of levels is in the heads of `ReviewKDLoss`.

    .. math:: L = \sum_l \frac{\sum_{i \ge 0} 2^{-i} \mathrm{MSE}(P_i(S_l), P_i(T_l))}
        {\sum_{i \ge 0} 2^{-i}}

    =======  =======================================================================
    S, T     the student's fused map and the teacher's map
    l        level
    P        average pooling: none for i = 0, then to a side of 4, 2 and 1, of those
             that are smaller than the map; i counts the ones that are left
    MSE      mean of squares over all elements
    =======  =======================================================================

    Args:
        student_maps: List of [B, D, H, W], shallow to deep: the fused maps, of the teacher's
            widths and sizes. Get the gradient.
        teacher_maps: List of [B, D, H, W], before the activation; the last is the pooled feature
            as a map of one position. Get none. Levels are paired from the deepest.
        return_parts: Also return the summands, as `LossOutput(loss, parts)`: `"level_0"` (the
            shallowest), ...

    Returns:
        A scalar, at least float32; the published weight (1 to 8, per pair of networks) is not
        in it.

    Raises:
        TypeError: Not lists of floating-point tensors.
        ValueError: Shapes that do not fit.

    Deviations: on maps that are not square the smaller side says which scales there are. The
    warm-up over the first epochs is the trainer's.
    Numerics: float32 or wider, also under autocast.
    Distributed: each sample by itself; the BatchNorms of the heads are those of the process.

    Example:
        >>> import torch
        >>> maps = [torch.ones(2, 3, 8, 8), torch.ones(2, 4, 1, 1)]
        >>> reviewkd_loss([2 * map for map in maps], maps)
        tensor(2.)
    """
    check_maps(student_maps, teacher_maps, same_widths=True, same_sizes=True)
    pairs = paired_maps(student_maps, teacher_maps)
    output = sum_levels([_context_distance(*pair) for pair in pairs])
    return output if return_parts else output.loss


def _context_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean of the squared distances at all scales of one level."""
    # Pooling is linear: the difference is pooled once in place of both maps.
    gap = student - teacher
    total, weight, weights = gap.square().mean(), 1.0, 1.0
    for side in _SIDES:
        if side < min(gap.shape[2:]):
            weight /= 2
            weights += weight
            total = total + weight * pooled_to(gap, (side, side)).square().mean()
    return total / weights


class ReviewKDLoss(nn.Module):
    """ReviewKD as a module; see `reviewkd_loss` for the distance.

    Its heads fuse the student's levels, from the deepest (the pooled feature) to the shallowest,
    each with what the deeper ones handed up. With the level's map x and the deeper residual y:
    x becomes BN(conv1x1(x)); y is enlarged to the size of x (nearest); two attention maps
    a, b = sigmoid(conv1x1([x, y])) blend them to r = a x + b y, which is resized to the teacher's
    size (nearest) and handed up, and BN(conv3x3(r)) is what is compared. The deepest level has no
    y and no attention.

    Deviations: student and teacher may have different numbers of stages; they are paired from the
    deepest. Training needs two samples a process at least, since the pooled level's BatchNorm sees
    one position.

    Args:
        stages: Names of stages, as of `Features`; both networks are read there.
        max_width: Largest width of the fused maps; they have the width of the student's pooled
            feature where that is smaller.
        student_before_activation: Read the student's maps before their activation too; the
            published runs read them after it.
    """

    recommended_weight: ClassVar[float] = 1.0

    def __init__(
        self,
        *,
        stages: tuple[str, ...] = ("stages",),
        max_width: int = 512,
        student_before_activation: bool = False,
    ) -> None:
        super().__init__()
        if isinstance(max_width, bool) or not isinstance(max_width, int):
            raise TypeError(f"max_width must be a whole number, got {max_width!r}")
        if max_width < 1:
            raise ValueError(f"max_width must be 1 or more, got {max_width}")
        check_flag("student_before_activation", student_before_activation)
        self.stages = check_stages(stages)
        self.max_width = max_width
        self.student_before_activation = student_before_activation

    @property
    def inputs(self) -> Mapping[str, Input]:
        """Maps of the stages and the pooled feature, of both networks."""
        before = self.student_before_activation
        return {
            "student_maps": Features("student", self.stages, "map", before),
            "teacher_maps": Features("teacher", self.stages, "map", before_activation=True),
            "student_pooled": Features("student", ("last",), "pooled"),
            "teacher_pooled": Features("teacher", ("last",), "pooled"),
        }

    def build_adapters(self, shapes: Shapes) -> nn.Module:
        """The fusing blocks, one for each pair of levels and one for the pooled feature."""
        widths = [(student[1], teacher[1]) for student, teacher in paired_shapes(shapes)]
        pooled = (_pooled_width(shapes, "student"), _pooled_width(shapes, "teacher"))
        return _Review([*widths, pooled], min(self.max_width, pooled[0]))

    def forward(
        self,
        student_maps: list[Tensor],
        teacher_maps: list[Tensor],
        student_pooled: list[Tensor],
        teacher_pooled: list[Tensor],
        *,
        return_parts: bool = False,
    ) -> Tensor | LossOutput:
        """Compute `reviewkd_loss` of the maps, and of the pooled features as a last level."""
        output = reviewkd_loss(
            _with_pooled(student_maps, student_pooled),
            _with_pooled(teacher_maps, teacher_pooled),
            return_parts=True,
        )
        return output if return_parts else output.loss


def _pooled_width(shapes: Shapes, network: str) -> int:
    shape = shapes[f"{network}_pooled"]
    return (shape[-1] if isinstance(shape, list) else shape)[1]


def _with_pooled(maps: Sequence[Tensor], pooled: Sequence[Tensor]) -> list[Tensor]:
    """The maps and, as a last one of a single position, the pooled feature [B, D]."""
    return [*maps, pooled[-1][:, :, None, None]]


class _Review(nn.Module):
    """Fuses the levels from the deepest to the shallowest; replaces the student's features."""

    def __init__(self, widths: Sequence[tuple[int, int]], width: int) -> None:
        super().__init__()
        deepest = len(widths) - 1
        self.blocks = nn.ModuleList(
            _FusingBlock(student_width, width, teacher_width, fuses=number < deepest)
            for number, (student_width, teacher_width) in enumerate(widths)
        )

    def forward(self, values: Values) -> dict[str, Tensor | list[Tensor]]:
        student, teacher = (
            _with_pooled(
                tensors_of(values, f"{network}_maps"), tensors_of(values, f"{network}_pooled")
            )
            for network in ("student", "teacher")
        )
        pairs = paired_from_deepest(student, teacher)
        fused: list[Tensor] = []
        residual: Tensor | None = None
        for block, (own, wanted) in zip(reversed(self.blocks), reversed(pairs), strict=True):
            output, residual = block(own, residual, wanted.shape[2:])
            fused.insert(0, output)
        return {"student_maps": fused[:-1], "student_pooled": [fused[-1].flatten(1)]}


class _FusingBlock(nn.Module):
    """Blends a level with what the deeper ones handed up; see `ReviewKDLoss`."""

    def __init__(self, student_width: int, width: int, teacher_width: int, *, fuses: bool) -> None:
        super().__init__()
        narrow = nn.Conv2d(student_width, width, 1, bias=False)
        widen = nn.Conv2d(width, teacher_width, 3, padding=1, bias=False)
        for convolution in (narrow, widen):
            nn.init.kaiming_uniform_(convolution.weight, a=1)
        self.narrow = nn.Sequential(narrow, nn.BatchNorm2d(width))
        self.widen = nn.Sequential(widen, nn.BatchNorm2d(teacher_width))
        self.attention = nn.Conv2d(2 * width, 2, 1) if fuses else None

    def forward(
        self, own: Tensor, residual: Tensor | None, size: torch.Size
    ) -> tuple[Tensor, Tensor]:
        """The map to compare, and the residual that is handed up, both of the wanted size."""
        fused: Tensor = self.narrow(own)
        if self.attention is not None and residual is not None:
            residual = _resized(residual, fused.shape[2:])
            shares = self.attention(torch.cat((fused, residual), 1)).sigmoid()
            fused = fused * shares[:, :1] + residual * shares[:, 1:]
        fused = _resized(fused, size)
        return self.widen(fused), fused


def _resized(map: Tensor, size: torch.Size) -> Tensor:
    return map if map.shape[2:] == size else functional.interpolate(map, size, mode="nearest")
