"""AT: the student looks where the teacher looks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal, overload

from torch import Tensor, nn
from torch.nn import functional

from softlabels.inputs import Input
from softlabels.losses._features import (
    check_maps,
    check_stages,
    map_inputs,
    paired_maps,
    pooled_to_each_other,
    sum_levels,
)
from softlabels.losses._non_target import LossOutput

__all__ = ["ATLoss", "at_loss"]


@overload
def at_loss(
    student_maps: Sequence[Tensor],
    teacher_maps: Sequence[Tensor],
    *,
    power: int = 2,
    return_parts: Literal[False] = False,
) -> Tensor: ...


@overload
def at_loss(
    student_maps: Sequence[Tensor],
    teacher_maps: Sequence[Tensor],
    *,
    power: int = 2,
    return_parts: Literal[True],
) -> LossOutput: ...


def at_loss(
    student_maps: Sequence[Tensor],
    teacher_maps: Sequence[Tensor],
    *,
    power: int = 2,
    return_parts: bool = False,
) -> Tensor | LossOutput:
    r"""AT: the squared distance of the two networks' normalized attention maps.

    Zagoruyko and Komodakis, "Paying More Attention to Attention", ICLR 2017 (arXiv 1612.03928),
    equation 2; code at szagoruyko/attention-transfer, same in megvii-research/mdistiller.

    .. math::
        Q(A) = \mathrm{vec}\Big(\frac{1}{D} \sum_c |A_c|^p\Big), \qquad
        L = \sum_j \mathrm{mean}\left[\left(\frac{Q(S_j)}{\lVert Q(S_j) \rVert_2}
            - \frac{Q(T_j)}{\lVert Q(T_j) \rVert_2}\right)^2\right]

    =======  ================================================
    S, T     the student's and the teacher's map
    A, c, D  a map, a channel of it, the number of channels
    p        `power`
    j        level
    =======  ================================================

    Args:
        student_maps: List of [B, D, H, W], shallow to deep. Get the gradient.
        teacher_maps: List of [B, E, H, W], of any width and size. Get none. Levels are paired
            from the deepest; the larger map of a pair is average-pooled to the smaller.
        power: Exponent, 1 or more.
        return_parts: Also return the summands, as `LossOutput(loss, parts)`: `"level_0"` (the
            shallowest), ...

    Returns:
        A scalar, a mean over samples and positions of a level, at least float32; the published
        weight 1000 is not in it.

    Raises:
        TypeError: Not lists of floating-point tensors, or a power that is no whole number.
        ValueError: Shapes that do not fit, or a power below 1.

    Deviations: mean of squares, as in the authors' code, where the paper has a norm. Odd powers
    are of absolute values, as in the paper; the codes have none, which differs on maps with
    negative values.
    Numerics: float32 or wider, also under autocast. A map of zeros has attention 0.
    Distributed: mean over the samples of the process.

    Example:
        >>> import torch
        >>> student = torch.tensor([[[[1.0, 0.0]]]])
        >>> at_loss([student], [student.flip(3)])
        tensor(1.)
    """
    check_maps(student_maps, teacher_maps)
    _check_power(power)
    terms = []
    for pair in paired_maps(student_maps, teacher_maps):
        student, teacher = (_attention(map, power) for map in pooled_to_each_other(*pair))
        terms.append((student - teacher).square().mean())
    output = sum_levels(terms)
    return output if return_parts else output.loss


def _attention(map: Tensor, power: int) -> Tensor:
    """[B, H W], of length 1."""
    sizes = map if power % 2 == 0 else map.abs()
    return functional.normalize(sizes.pow(power).mean(1).flatten(1))


def _check_power(power: int) -> None:
    if isinstance(power, bool) or not isinstance(power, int):
        raise TypeError(f"power must be a whole number, got {power!r}")
    if power < 1:
        raise ValueError(f"power must be 1 or more, got {power}")


class ATLoss(nn.Module):
    """AT as a module; see `at_loss` for the equation.

    Args:
        stages: Names of stages, as of `Features`; both networks are read there.
        power: Exponent, 1 or more.
    """

    recommended_weight: ClassVar[float] = 1000.0

    def __init__(self, *, stages: tuple[str, ...] = ("stages",), power: int = 2) -> None:
        super().__init__()
        _check_power(power)
        self.stages = check_stages(stages)
        self.power = power

    @property
    def inputs(self) -> Mapping[str, Input]:
        """Maps of both networks."""
        return map_inputs(self.stages)

    def forward(
        self,
        student_maps: list[Tensor],
        teacher_maps: list[Tensor],
        *,
        return_parts: bool = False,
    ) -> Tensor | LossOutput:
        """Compute `at_loss` with this module's settings."""
        output = at_loss(student_maps, teacher_maps, power=self.power, return_parts=True)
        return output if return_parts else output.loss
