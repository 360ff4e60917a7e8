"""ViTKD, for vision transformers: first blocks are mimicked, the last one is generated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, ClassVar

import torch
from torch import Tensor, nn

from softlabels.inputs import Features
from softlabels.losses._features import check_maps, paired_maps, the_only
from softlabels.losses._method import Method, Range, Shapes, Weight
from softlabels.losses.mgd import alignment, generator

__all__ = ["ViTKDAdapters", "ViTKDLoss"]


class ViTKDAdapters(nn.Module):
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
        self.align_low = nn.ModuleList(alignment(*widths) for widths in low_widths)
        self.align_high = alignment(*high_widths)
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


class ViTKDLoss(Method, name="vitkd"):
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

    f_l, M and G are in `ViTKDAdapters`. Sums are over tokens and channels.

    Args:
        mimic_weight: Of the first blocks; 0 or more.
        generation_weight: Of the last block; 0 or more.
        mask_ratio: Share of tokens that is masked, in (0, 1].

    Deviations: none of the value. Tokens are on their grid, which need not be a square.

    Example:
        >>> import torch
        >>> ones, zeros = torch.ones(1, 4, 2, 2), torch.zeros(1, 4, 2, 2)
        >>> mask = torch.tensor([[[1, 0], [0, 1]]])
        >>> loss = ViTKDLoss(mimic_weight=1.0, generation_weight=1.0)
        >>> loss([ones], [zeros], [zeros], [ones], mask)
        tensor(32.)
    """

    mimic_weight: Weight = 3e-5
    generation_weight: Weight = 3e-6
    mask_ratio: Annotated[float, Range(above=0, at_most=1)] = 0.5

    inputs: ClassVar = {
        "student_low": Features(of="student", stages=("block:0", "block:1"), form="map"),
        "student_high": Features(of="student", stages=("last",), form="map"),
        "teacher_low": Features(of="teacher", stages=("block:0", "block:1"), form="map"),
        "teacher_high": Features(of="teacher", stages=("last",), form="map"),
    }
    of_batch = True

    def build_adapters(self, shapes: Shapes) -> ViTKDAdapters:
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
        return ViTKDAdapters(widths["low"], widths["high"][0], self.mask_ratio)

    def terms(
        self,
        student_low: Sequence[Tensor],
        student_high: Sequence[Tensor],
        teacher_low: Sequence[Tensor],
        teacher_high: Sequence[Tensor],
        mask: Tensor,
    ) -> dict[str, Tensor]:
        r"""`"mimic"` and `"generation"`, weighted scalars.

        Args:
            student_low: List of [B, D, H, W], aligned. Get the gradient.
            student_high: List of one [B, D, H, W], :math:`G(\tilde S)`. Gets the gradient.
            teacher_low: List of [B, D, H, W], as many. Get none.
            teacher_high: List of one [B, D, H, W]. Gets none.
            mask: [B, H, W], boolean, or 0 and 1.
        """
        generated_map = the_only("student_high", student_high)
        wanted_map = the_only("teacher_high", teacher_high)
        if len(student_low) != len(teacher_low):
            raise ValueError(
                "student_low and teacher_low must hold as many maps, "
                f"got {len(student_low)} and {len(teacher_low)}"
            )
        low, high = ("student_low", "teacher_low"), ("student_high", "teacher_high")
        check_maps(student_low, teacher_low, low, same_widths=True, same_sizes=True)
        check_maps([generated_map], [wanted_map], high, same_widths=True, same_sizes=True)
        batch_size = len(generated_map)
        wanted = (batch_size, *generated_map.shape[2:])
        if tuple(mask.shape) != wanted:
            raise ValueError(f"mask must be {wanted}, got {tuple(mask.shape)}")
        pairs = paired_maps(student_low, teacher_low)
        mimicked = [(student - teacher).square().sum() for student, teacher in pairs]
        ((ours, theirs),) = paired_maps([generated_map], [wanted_map])
        generated = ((ours - theirs) * mask.unsqueeze(1).to(ours.dtype)).square().sum()
        return {
            "mimic": self.mimic_weight / batch_size * torch.stack(mimicked).sum(),
            "generation": self.generation_weight / self.mask_ratio / batch_size * generated,
        }


def _grid(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape[2:]))
