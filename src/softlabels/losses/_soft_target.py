"""What the methods share that learn from one whole soft label, [B, C], not taken apart."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from softlabels.losses._checks import check_logits, check_target
from softlabels.losses._non_target import (
    Labels,
    MixedTarget,
    SoftLabels,
    finite_limit,
    in_float32,
    label_columns,
    non_target_weights,
    softmax_parts,
    spread,
    without_ignored,
)

__all__ = [
    "label_cross_entropy",
    "log_softened",
    "soft_target_cross_entropy",
    "softened_labels",
    "student_and_teacher",
    "taken_apart",
]


def log_softened(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-softmax at a temperature, at least float32, finite for all finite logits."""
    logits = in_float32(logits)
    if temperature < 1:  # shifted first, so that a small temperature overflows none
        logits = logits - logits.detach().amax(1, keepdim=True)
    if temperature != 1:
        logits = logits / temperature
    lowest = -finite_limit(logits.dtype)
    # As clamp(min=lowest), whose gradient is three operations.
    return functional.threshold(logits.log_softmax(1), lowest, lowest)


def student_and_teacher(logits: Tensor, teacher_logits: Tensor) -> tuple[Tensor, Tensor]:
    """Checked logits of both, [B, C], in at least float32 and one dtype; the teacher constant."""
    check_logits(logits)
    check_logits(teacher_logits, "teacher_logits", like=logits)
    logits = in_float32(logits)
    return logits, in_float32(teacher_logits.detach()).to(logits.dtype)


def soft_target_cross_entropy(
    logits: Tensor, soft_target: Tensor, temperature: float = 1.0
) -> Tensor:
    """Cross-entropy of the softened prediction with a soft label, [B], in nats.

    Args:
        logits: [B, C], raw; gets the gradient.
        soft_target: [B, C], non-negative; gets none. A row of zeros gives 0.
        temperature: Of the prediction.
    """
    log_probabilities = log_softened(logits, temperature)
    soft_target = soft_target.detach().to(log_probabilities.dtype)
    return -(soft_target * log_probabilities).sum(1)


def label_cross_entropy(logits: Tensor, labels: Labels) -> Tensor:
    """Cross-entropy of the labels with the prediction, [B]."""
    return -labels.weighted_sum(log_softened(logits).gather(1, labels.classes))


def softened_labels(
    teacher_logits: Tensor,
    target: Tensor,
    temperature: float,
    ignore_index: int | None = None,
    mixed_target: MixedTarget = "all",
) -> SoftLabels:
    """The softmax of logits [B, C] at a temperature as `taken_apart` gives it, to full precision.

    The small side is not blotted out where the labeled class is nearly certain.
    """
    check_logits(teacher_logits, "teacher_logits")
    target = without_ignored(target, ignore_index)[0]
    check_target(target, teacher_logits)
    log_probs = log_softened(teacher_logits.detach(), temperature)
    labels = label_columns(target, log_probs, mixed_target)
    return SoftLabels(
        spread(labels, log_probs.gather(1, labels.classes).exp(), log_probs),
        softmax_parts(log_probs, labels)[1],
    )


def taken_apart(soft_target: Tensor, target: Tensor) -> SoftLabels:
    """A soft label [B, C] as what it gives to the labeled classes, and how it shares the rest."""
    check_target(target, soft_target)
    soft_target = in_float32(soft_target.detach())
    labels = label_columns(target, soft_target)
    return SoftLabels(
        spread(labels, soft_target.gather(1, labels.classes), soft_target),
        non_target_weights(soft_target, labels),
    )
