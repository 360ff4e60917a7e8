"""A frozen teacher with its own normalization, input size and class map."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from softlabels.io.weights import load_weights

__all__ = ["Normalization", "Teacher", "Teachers", "ensembled"]

Normalization: TypeAlias = tuple[Sequence[float], Sequence[float]]


class Teacher(nn.Module):
    """A frozen network whose logits the student learns from.

    It runs under `torch.no_grad()`, its parameters ask for no gradient, and it stays in eval
    mode whatever is called around it. It takes the images that the student takes: one affine
    per channel and a resize turn them into its own input.

    Args:
        model: Any classifier, [B, C, H, W] -> [B, classes].
        weights: File to load into `model`, strictly: `.safetensors`, or a state dict that
            `torch.load(weights_only=True)` reads.
        normalization: (mean, std) per channel that the teacher was trained with.
        student_normalization: (mean, std) per channel that the images arrive with. Give both
            or neither; neither means that the teacher takes the student's images as they are.
        input_size: (H, W), or one number, that the images are resized to; None: as they come.
        class_map: For each class of the student, the index of the same class in the teacher's
            logits. Needed when the class counts differ.
        mode: `"eval"`, or `"train"`: batch statistics and dropout on, as the reference code of
            the NKD paper ran its teachers.

    Raises:
        ValueError: Weights of another network, one normalization without the other, a zero
            standard deviation, or a setting out of range.
    """

    scale: Tensor
    shift: Tensor
    class_index: Tensor

    def __init__(
        self,
        model: nn.Module,
        *,
        weights: str | Path | None = None,
        normalization: Normalization | None = None,
        student_normalization: Normalization | None = None,
        input_size: int | tuple[int, int] | None = None,
        class_map: Sequence[int] | None = None,
        mode: Literal["eval", "train"] = "eval",
    ) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
        if mode not in ("eval", "train"):
            raise ValueError(f"mode must be 'eval' or 'train', got {mode!r}")
        if weights is not None:
            load_weights(model, weights)
        self.model = model.requires_grad_(False)
        self.mode = mode
        self.input_size = _size(input_size)
        self.normalizes = normalization is not None
        scale, shift = _affine(normalization, student_normalization)
        self.register_buffer("scale", scale, persistent=False)
        self.register_buffer("shift", shift, persistent=False)
        self.maps_classes = class_map is not None
        index = torch.tensor([] if class_map is None else list(class_map), dtype=torch.long)
        if self.maps_classes and (index.dim() != 1 or len(index) < 2 or int(index.min()) < 0):
            raise ValueError(f"class_map must be two or more class indices, got {class_map!r:.80}")
        self.register_buffer("class_index", index, persistent=False)
        self._largest_class = int(index.max()) if self.maps_classes else 0
        self.train(mode == "train")

    @property
    def all(self) -> list[Teacher]:
        """Itself alone; as of `Teachers`."""
        return [self]

    def train(self, mode: bool = True) -> Teacher:
        """Do nothing in `"eval"` mode: a teacher does not leave it by accident."""
        super().train(mode and self.mode == "train")
        return self

    def prepared(self, images: Tensor) -> Tensor:
        """The student's images as the teacher takes them, [B, C, H, W]."""
        if self.normalizes:
            if images.shape[1] not in (self.scale.shape[0], 1) and self.scale.shape[0] != 1:
                raise ValueError(
                    f"the teacher's normalization is for {self.scale.shape[0]} channels, "
                    f"got images {tuple(images.shape)}"
                )
            scale = self.scale.to(images.dtype).view(1, -1, 1, 1)
            images = images * scale + self.shift.to(images.dtype).view(1, -1, 1, 1)
        if self.input_size is not None and tuple(images.shape[2:]) != self.input_size:
            images = functional.interpolate(
                images, self.input_size, mode="bilinear", align_corners=False, antialias=True
            )
        return images

    def forward(self, images: Tensor) -> Tensor:
        """Logits in the student's class order, without gradient.

        Args:
            images: [B, C, H, W], normalized for the student.

        Returns:
            [B, C].

        Raises:
            TypeError: The network returns no tensor.
            ValueError: It returns no [B, classes] logits, or fewer than the class map needs.
        """
        if self.mode == "eval" and any(module.training for module in self.model.modules()):
            self.model.eval()  # somebody reached past `train`
        with torch.no_grad():
            logits = self.model(self.prepared(images))
            if not isinstance(logits, Tensor):
                raise TypeError(f"the teacher must return a tensor, got {type(logits).__name__}")
            if logits.dim() != 2:
                raise ValueError(f"the teacher must return [B, C], got {tuple(logits.shape)}")
            if not self.maps_classes:
                return logits
            largest, num_classes = self._largest_class, logits.shape[1]
            if largest >= num_classes:
                raise ValueError(
                    f"class_map names class {largest}, the teacher has {num_classes} classes"
                )
            return logits.index_select(1, self.class_index)


class Teachers(nn.Module):
    """Several teachers of one student.

    Args:
        teachers: One or more; plain modules are wrapped in a `Teacher`.

    Raises:
        TypeError: One of them is no module.
        ValueError: There is none.
    """

    teachers: nn.ModuleList

    def __init__(self, teachers: Sequence[nn.Module]) -> None:
        super().__init__()
        if not teachers:
            raise ValueError("teachers must be one or more, got none")
        self.teachers = nn.ModuleList(
            each if isinstance(each, Teacher) else Teacher(each) for each in teachers
        )

    @property
    def all(self) -> list[Teacher]:
        """The teachers, in their order."""
        return [cast("Teacher", teacher) for teacher in self.teachers]

    def forward(self, images: Tensor) -> Tensor:
        """What all teachers together say, [B, C]; see `ensembled`."""
        return ensembled([teacher(images) for teacher in self.teachers])


def ensembled(logits: Sequence[Tensor]) -> Tensor:
    """The logarithm of the mean prediction, [B, C]; the logits themselves if there is one.

    Args:
        logits: [B, C] of each teacher.

    Raises:
        ValueError: They differ in their classes.
    """
    if len(logits) == 1:
        return logits[0]
    widths = [each.shape[1] for each in logits]
    if len(set(widths)) > 1:
        raise ValueError(
            f"teachers must have the same classes, got {widths}: pass "
            "Teacher(model, class_map=[...]) with the student's classes for each"
        )
    # At least float32; what is wider stays.
    wide = [each.to(torch.promote_types(each.dtype, torch.float32)) for each in logits]
    predictions = torch.stack([each.log_softmax(1) for each in wide])
    return predictions.logsumexp(0) - math.log(len(logits))


def _size(size: int | tuple[int, int] | None) -> tuple[int, int] | None:
    if size is None:
        return None
    height, width = (size, size) if isinstance(size, int) else size
    if height < 1 or width < 1:
        raise ValueError(f"input_size must be positive, got {size}")
    return height, width


def _affine(
    normalization: Normalization | None, student: Normalization | None
) -> tuple[Tensor, Tensor]:
    """Scale and shift from the student's normalized values to the teacher's."""
    if normalization is None and student is None:
        return torch.ones(1), torch.zeros(1)
    if normalization is None or student is None:
        missing = "normalization" if normalization is None else "student_normalization"
        raise ValueError(
            f"{missing} is missing: images are converted from the student's normalization to the "
            "teacher's, which needs both"
        )
    mean, std, student_mean, student_std = (
        torch.tensor([float(value) for value in values]) for values in (*normalization, *student)
    )
    for values in (std, student_std):
        if not bool((values > 0).all()):
            raise ValueError(f"standard deviations must be above 0, got {values.tolist()}")
    sizes = {len(values) for values in (mean, std, student_mean, student_std)} - {1}
    if len(sizes) > 1:
        raise ValueError(f"normalizations must agree in their channels, got {sorted(sizes)}")
    scale, shift = student_std / std, (student_mean - mean) / std
    channels = max(len(scale), len(shift))
    return scale.expand(channels).clone(), shift.expand(channels).clone()
