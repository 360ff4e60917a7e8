"""ReviewKD, knowledge review: L2 of fused student maps from the teacher's, at several scales."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from softlabels.inputs import Features, Input
from softlabels.losses._features import (
    Values,
    check_maps,
    paired_from_deepest,
    paired_maps,
    paired_shapes,
    pooled_to,
    tensors_of,
)
from softlabels.losses._method import Count, Method, Shapes, Stages

__all__ = ["ReviewKDLoss"]

# Sides to which the maps are pooled, each with half the weight of the one before.
_SIDES = (4, 2, 1)


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


class ReviewKDLoss(Method, name="reviewkd"):
    r"""ReviewKD: the distance of fused student maps from the teacher's, at several scales.

    Chen et al., "Distilling Knowledge via Knowledge Review", CVPR 2021 (arXiv 2104.09044),
    hierarchical context loss (HCL); code at dvlab-research/ReviewKD, same in
    megvii-research/mdistiller. The fusion of levels is in the adapters, see below.

    .. math:: L = \sum_l \frac{\sum_{i \ge 0} 2^{-i} \mathrm{MSE}(P_i(S_l), P_i(T_l))}
        {\sum_{i \ge 0} 2^{-i}}

    =======  =======================================================================
    S, T     the student's fused map and the teacher's map
    l        level
    P        average pooling: none for i = 0, then to a side of 4, 2 and 1, of those
             that are smaller than the map; i counts the ones that are left
    MSE      mean of squares over all elements
    =======  =======================================================================

    The adapters fuse the student's levels, from the deepest (the pooled feature) to the shallowest,
    each with what the deeper ones handed up. With the level's map x and the deeper residual y:
    x becomes BN(conv1x1(x)); y is enlarged to the size of x (nearest); two attention maps
    a, b = sigmoid(conv1x1([x, y])) blend them to r = a x + b y, which is resized to the teacher's
    size (nearest) and handed up, and BN(conv3x3(r)) is what is compared. The deepest level has no
    y and no attention.

    Args:
        stages: Names of stages, as of `Features`; both networks are read there.
        max_width: Largest width of the fused maps; they have the width of the student's pooled
            feature where that is smaller.
        student_before_activation: Read the student's maps before their activation too; the
            published runs read them after it.

    Deviations: on maps that are not square the smaller side says which scales there are. The
    warm-up over the first epochs is the trainer's.
    Deviations of the learned parts: student and teacher may have different numbers of stages;
    they are paired from the
    deepest. Training needs two samples a process at least, since the pooled level's BatchNorm sees
    one position.
    Distributed: each sample by itself; the BatchNorms of the adapters are those of the process.

    Example:
        >>> import torch
        >>> maps = [torch.ones(2, 3, 8, 8)]
        >>> pooled = [torch.ones(2, 4)]
        >>> ReviewKDLoss()([2 * maps[0]], maps[:1], [2 * pooled[0]], pooled)
        tensor(2.)
    """

    stages: Stages = ("stages",)
    max_width: Count = 512
    student_before_activation: bool = False

    of_batch = True

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

    def terms(
        self,
        student_maps: Sequence[Tensor],
        teacher_maps: Sequence[Tensor],
        student_pooled: Sequence[Tensor],
        teacher_pooled: Sequence[Tensor],
    ) -> dict[str, Tensor]:
        """`"level_0"` (the shallowest) and so on, scalars.

        Args:
            student_maps: List of [B, D, H, W], shallow to deep: the fused maps, of the teacher's
                widths and sizes. Get the gradient.
            teacher_maps: List of [B, D, H, W], before the activation. Get none. Levels are paired
                from the deepest.
            student_pooled: List of one [B, E], the fused pooled feature. Gets the gradient.
            teacher_pooled: List of one [B, E]. Gets none.
        """
        # The pooled features are a last level, of one position.
        student_maps = _with_pooled(student_maps, student_pooled)
        teacher_maps = _with_pooled(teacher_maps, teacher_pooled)
        check_maps(student_maps, teacher_maps, same_widths=True, same_sizes=True)
        pairs = paired_maps(student_maps, teacher_maps)
        return {f"level_{level}": _context_distance(*pair) for level, pair in enumerate(pairs)}


def _pooled_width(shapes: Shapes, network: str) -> int:
    shape = shapes[f"{network}_pooled"]
    return int((shape[-1] if isinstance(shape, list) else shape)[1])


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
