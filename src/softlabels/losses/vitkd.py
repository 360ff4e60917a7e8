"""ViTKD: the student mimics a vision transformer's first blocks, and generates its last."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal, overload

import torch
from torch import Tensor, nn

from softlabels.inputs import Features, Input
from softlabels.losses._checks import check_number
from softlabels.losses._features import check_maps, the_only, wide_maps
from softlabels.losses._non_target import LossOutput, in_float32
from softlabels.losses.mgd import generator

__all__ = ["ViTKDHeads", "ViTKDLoss", "vitkd_loss"]


@overload
def vitkd_loss(
    student_low: Sequence[Tensor],
    generated_map: Tensor,
    mask: Tensor,
    teacher_low: Sequence[Tensor],
    teacher_high: Tensor,
    *,
    mimic_weight: float = 3e-5,
    generation_weight: float = 3e-6,
    mask_ratio: float = 0.5,
    return_parts: Literal[False] = False,
) -> Tensor: ...


@overload
def vitkd_loss(
    student_low: Sequence[Tensor],
    generated_map: Tensor,
    mask: Tensor,
    teacher_low: Sequence[Tensor],
    teacher_high: Tensor,
    *,
    mimic_weight: float = 3e-5,
    generation_weight: float = 3e-6,
    mask_ratio: float = 0.5,
    return_parts: Literal[True],
) -> LossOutput: ...


def vitkd_loss(
    student_low: Sequence[Tensor],
    generated_map: Tensor,
    mask: Tensor,
    teacher_low: Sequence[Tensor],
    teacher_high: Tensor,
    *,
    mimic_weight: float = 3e-5,
    generation_weight: float = 3e-6,
    mask_ratio: float = 0.5,
    return_parts: bool = False,
) -> Tensor | LossOutput:
    r"""ViTKD: first blocks are mimicked, the last one is generated from some of its tokens.

    Yang et al., "ViTKD: Practical Guidelines for ViT Feature Knowledge Distillation", 2022
    (arXiv 2209.02432); official code yzd-v/cls_KD.

    .. math::
        L = \frac{\alpha}{B} \sum_l \sum (f_l(S_l) - T_l)^2
        + \frac{\beta}{\lambda B} \sum M \odot (G(\tilde S) - T)^2

    ===============  =====================================================================
    symbol           here
    ===============  =====================================================================
    S_l, T_l         patch tokens of the first two blocks, on their grid
    f_l              a linear layer to the teacher's width, where the widths differ
    S, T             patch tokens of the last block
    M                `mask`, 1 at tokens that were masked
    :math:`\tilde S` the student's tokens, aligned, with one learned token where masked
    G                3x3 convolution, ReLU, 3x3 convolution on the grid
    :math:`\alpha`   `mimic_weight`
    :math:`\beta`    `generation_weight`
    :math:`\lambda`  `mask_ratio`
    ===============  =====================================================================

    f_l, M and G are in `ViTKDHeads`. Sums are over tokens and channels.

    Args:
        student_low: List of [B, D, H, W], aligned. Get the gradient.
        generated_map: [B, D, H, W], :math:`G(\tilde S)`. Gets the gradient.
        mask: [B, H, W], boolean, or 0 and 1.
        teacher_low: List of [B, D, H, W], as many. Get none.
        teacher_high: [B, D, H, W]. Gets none.
        mimic_weight: Of the first blocks; 0 or more.
        generation_weight: Of the last block; 0 or more.
        mask_ratio: Share of tokens that is masked, in (0, 1].
        return_parts: Also return the summands, as `LossOutput(loss, parts)`: `"mimic"` and
            `"generation"`, weighted.

    Returns:
        A scalar; at least float32.

    Raises:
        TypeError: A map of a wrong dtype.
        ValueError: A wrong shape or setting; maps of other widths or sizes than the teacher's.

    Deviations: none of the value. Tokens are on their grid, which need not be a square.

    Numerics: in float32 or wider, also under autocast.
    Distributed: each sample by itself, no batch statistics.

    Example:
        >>> import torch
        >>> ones, zeros = torch.ones(1, 4, 2, 2), torch.zeros(1, 4, 2, 2)
        >>> mask = torch.tensor([[[1, 0], [0, 1]]])
        >>> vitkd_loss([ones], zeros, mask, [zeros], ones, mimic_weight=1, generation_weight=1)
        tensor(32.)
    """
    _check_settings(mimic_weight, generation_weight, mask_ratio)
    if len(student_low) != len(teacher_low):
        raise ValueError(
            "student_low and teacher_low must hold as many maps, "
            f"got {len(student_low)} and {len(teacher_low)}"
        )
    low, high = ("student_low", "teacher_low"), ("generated_map", "teacher_high")
    check_maps(student_low, teacher_low, low, same_widths=True, same_sizes=True)
    check_maps([generated_map], [teacher_high], high, same_widths=True, same_sizes=True)
    batch_size = len(generated_map)
    wanted = (batch_size, *generated_map.shape[2:])
    if tuple(mask.shape) != wanted:
        raise ValueError(f"mask must be {wanted}, got {tuple(mask.shape)}")
    mimicked = [
        (student - teacher).square().sum()
        for student, teacher in zip(
            wide_maps(student_low), wide_maps(teacher_low, constant=True), strict=True
        )
    ]
    gap = in_float32(generated_map) - in_float32(teacher_high.detach())
    generated = (gap * mask.unsqueeze(1).to(gap.dtype)).square().sum()
    parts = {
        "mimic": mimic_weight / batch_size * torch.stack(mimicked).sum(),
        "generation": generation_weight / mask_ratio / batch_size * generated,
    }
    loss = parts["mimic"] + parts["generation"]
    return LossOutput(loss, parts) if return_parts else loss


def _check_settings(mimic_weight: float, generation_weight: float, mask_ratio: float) -> None:
    check_number("mimic_weight", mimic_weight)
    check_number("generation_weight", generation_weight)
    check_number("mask_ratio", mask_ratio, positive=True, at_most=1)


class ViTKDHeads(nn.Module):
    """What ViTKD learns beside the student: alignments, the mask's token and the generator.

    Args:
        low_widths: Of the student's and of the teacher's tokens, for each of the first blocks.
        high_widths: Of the student's and of the teacher's tokens of the last block.
        mask_ratio: Share of tokens that is masked.
    """

    def __init__(
        self, low_widths: Sequence[tuple[int, int]], high_widths: tuple[int, int], mask_ratio: float
    ) -> None:
        super().__init__()
        # On a map a linear layer for each token is a 1x1 convolution.
        self.align_low = nn.ModuleList(_alignment(*widths) for widths in low_widths)
        self.align_high = _alignment(*high_widths)
        self.mask_token = nn.Parameter(torch.zeros(high_widths[1]))
        self.generator = generator(high_widths[1])
        self.mask_ratio = mask_ratio

    def forward(
        self, values: Mapping[str, Tensor | list[Tensor]]
    ) -> dict[str, Tensor | list[Tensor]]:
        """Align the first blocks' maps and generate the last one, with a new mask."""
        low = zip(self.align_low, values["student_low"], strict=True)
        high = values["student_high"][0]
        noise = torch.rand(len(high), *high.shape[2:], device=high.device)
        generated, mask = self.generated(high, noise)
        return {
            "student_low": [align(map) for align, map in low],
            "student_high": [generated],
            "mask": mask,
        }

    def generated(self, student_map: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """The teacher's last map as generated, and where the student's was masked.

        Args:
            student_map: [B, D, H, W].
            noise: [B, H, W]; the tokens with the least of it are kept.

        Returns:
            [B, teacher's D, H, W], and [B, H, W] boolean.
        """
        flat = noise.flatten(1)
        rank = flat.argsort(1).argsort(1)
        num_kept = int(flat.shape[1] * (1 - self.mask_ratio))
        mask = (rank >= num_kept).view(noise.shape)
        aligned: Tensor = self.align_high(student_map)
        token = self.mask_token.to(aligned.dtype).view(1, -1, 1, 1)
        filled = torch.where(mask.unsqueeze(1), token, aligned)
        return self.generator(filled), mask


def _alignment(student_width: int, teacher_width: int) -> nn.Module:
    if student_width == teacher_width:
        return nn.Identity()
    return nn.Conv2d(student_width, teacher_width, 1)


class ViTKDLoss(nn.Module):
    """ViTKD as a module; see `vitkd_loss` for the equation and the settings.

    Args:
        mimic_weight: 0 or more.
        generation_weight: 0 or more.
        mask_ratio: In (0, 1].
    """

    inputs: ClassVar[Mapping[str, Input]] = {
        "student_low": Features(of="student", stages=("block:0", "block:1"), form="map"),
        "student_high": Features(of="student", stages=("last",), form="map"),
        "teacher_low": Features(of="teacher", stages=("block:0", "block:1"), form="map"),
        "teacher_high": Features(of="teacher", stages=("last",), form="map"),
    }
    recommended_weight: ClassVar[float] = 1.0

    def __init__(
        self,
        *,
        mimic_weight: float = 3e-5,
        generation_weight: float = 3e-6,
        mask_ratio: float = 0.5,
    ) -> None:
        super().__init__()
        _check_settings(mimic_weight, generation_weight, mask_ratio)
        self.mimic_weight = mimic_weight
        self.generation_weight = generation_weight
        self.mask_ratio = mask_ratio

    def build_adapters(self, shapes: Mapping[str, list[tuple[int, ...]]]) -> ViTKDHeads:
        """Alignments, mask token and generator, for maps of these shapes.

        Raises:
            ValueError: Student and teacher have different grids of tokens.
        """
        widths = {}
        for level in ("low", "high"):
            pairs = [*zip(shapes[f"student_{level}"], shapes[f"teacher_{level}"], strict=True)]
            for student, teacher in pairs:
                if tuple(student[2:]) != tuple(teacher[2:]):
                    raise ValueError(
                        "ViTKD needs one grid of tokens in student and teacher, got "
                        f"{_grid(student)} and {_grid(teacher)}: use networks of the same image "
                        "and patch size"
                    )
            widths[level] = [(student[1], teacher[1]) for student, teacher in pairs]
        return ViTKDHeads(widths["low"], widths["high"][0], self.mask_ratio)

    def forward(
        self,
        student_low: list[Tensor],
        student_high: list[Tensor],
        teacher_low: list[Tensor],
        teacher_high: list[Tensor],
        mask: Tensor | None = None,
        *,
        return_parts: bool = False,
    ) -> Tensor | LossOutput:
        """Compute `vitkd_loss` with this module's settings, from what the heads gave."""
        if mask is None:
            raise ValueError("mask is missing: it comes from the heads, see build_heads")
        output = vitkd_loss(
            student_low,
            the_only("student_high", student_high),
            mask,
            teacher_low,
            the_only("teacher_high", teacher_high),
            mimic_weight=self.mimic_weight,
            generation_weight=self.generation_weight,
            mask_ratio=self.mask_ratio,
            return_parts=True,
        )
        return output if return_parts else output.loss


def _grid(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape[2:]))
