"""What losses on pooled features share: checks, and directions of vectors.

Shapes: B samples, D features.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["check_vectors", "the_only", "unit_vectors"]


def check_vectors(
    student: Tensor,
    teacher: Tensor,
    names: tuple[str, str] = ("student_features", "teacher_features"),
    *,
    same_widths: bool = False,
) -> None:
    """Check the pooled features of one batch.

    Args:
        student: Floating [B, D].
        teacher: Floating [B, E].
        names: What the two arguments are called, for the messages.
        same_widths: E must be D.

    Raises:
        TypeError: Not floating-point tensors.
        ValueError: Not [B, D], empty, or of two batches.
    """
    for name, features in zip(names, (student, teacher), strict=True):
        if not isinstance(features, Tensor) or not features.is_floating_point():
            is_tensor = isinstance(features, Tensor)
            kind = f"a tensor of {features.dtype}" if is_tensor else type(features).__name__
            raise TypeError(f"{name} must be a floating-point tensor, got {kind}")
        if features.dim() != 2 or min(features.shape) < 1:
            raise ValueError(f"{name} must be [B, D] and not empty, got {tuple(features.shape)}")
    if student.shape[0] != teacher.shape[0] or (same_widths and student.shape != teacher.shape):
        wanted = "have one shape" if same_widths else "be of one batch"
        raise ValueError(
            f"{names[0]} and {names[1]} must {wanted}, got {tuple(student.shape)} and "
            f"{tuple(teacher.shape)}"
        )


def the_only(name: str, features: Tensor | Sequence[Tensor]) -> Tensor:
    """The one tensor of a list, as a signal of a single stage gives.

    Raises:
        ValueError: Another number of tensors.
    """
    if not isinstance(features, (list, tuple)) or len(features) != 1:
        got = f"{len(features)}" if isinstance(features, (list, tuple)) else type(features).__name__
        raise ValueError(f"{name} must be a list of one tensor, got {got}")
    found: Tensor = features[0]
    return found


def unit_vectors(vectors: Tensor, *, least: float = 0.0, added: float = 0.0) -> Tensor:
    """Vectors divided by their length; those that have none become 0, and get no gradient.

    A vector of length 0 has no direction: the derivative of the usual quotient there is the
    reciprocal of whatever keeps it from dividing by 0, which drowns that of all other samples.

    Args:
        vectors: [..., D], float32 or float64.
        least: Squared length up to which a vector counts as 0.
        added: Is added to each length.
    """
    squared = vectors.square().sum(-1, keepdim=True)
    none = squared <= least
    # Replaced before the root, whose derivative at 0 is infinite.
    lengths = squared.masked_fill(none, 1.0).sqrt()
    return torch.where(none, 0.0, vectors / (lengths + added))
