"""The algebra that all losses share: labels, the non-target softmax, Zipf weights, checks.

Shapes: B samples, C classes. A sample's *labelled* classes are those with a positive label;
the *non-target* classes are all others.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

__all__ = [
    "MixedTarget",
    "Reduction",
    "SoftLabels",
    "check_choice",
    "check_logits",
    "check_number",
    "check_target",
    "check_two_labels",
    "check_values",
    "check_votes",
    "class_mask",
    "in_float32",
    "label_probabilities",
    "non_target_log_softmax",
    "non_target_softmax",
    "normalized",
    "reduce_batch",
]

Reduction: TypeAlias = Literal["mean", "sum", "none"]
MixedTarget: TypeAlias = Literal["largest", "all"]


class SoftLabels(NamedTuple):
    """The soft labels of a batch, taken apart into a target and a non-target part.

    Attributes:
        target: [B, C], the value that each labelled class is trained towards; 0 elsewhere.
        non_target: [B, C], a distribution over the non-target classes; 0 at labelled ones.
    """

    target: Tensor
    non_target: Tensor


_values_forced = False


def check_values(always: bool) -> None:
    """Choose where the values of labels are checked, not only their shapes and dtypes.

    Value checks (class range, row sums) read the tensor, which on an accelerator waits for the
    device. By default they run on CPU tensors only, outside compiled code and transforms.

    Args:
        always: True checks values on every device; False restores the default.
    """
    global _values_forced
    _values_forced = bool(always)


def _values_can_be_read(tensor: Tensor) -> bool:
    if torch.compiler.is_compiling() or tensor.device.type == "meta":
        return False
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    # Subclasses, such as fake tensors, may have no values at all.
    return _values_forced or (type(tensor) is Tensor and tensor.device.type == "cpu")


def check_logits(logits: Tensor, name: str = "logits", like: Tensor | None = None) -> None:
    """Check that `logits` is a floating [B, C] tensor with C >= 2, shaped as `like` if given.

    Raises:
        TypeError: Not a floating-point tensor.
        ValueError: Not [B, C] with B >= 1 and C >= 2, or of another shape than `like`.
    """
    if not isinstance(logits, Tensor) or not logits.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor, got {_described(logits)}")
    if logits.dim() != 2 or logits.shape[0] < 1 or logits.shape[1] < 2:
        raise ValueError(
            f"{name} must be [B, C] with at least one sample and two classes, "
            f"got {tuple(logits.shape)}"
        )
    if like is not None and logits.shape != like.shape:
        raise ValueError(
            f"{name} must have the shape of logits {tuple(like.shape)}, got {tuple(logits.shape)}"
        )


def check_target(target: Tensor, logits: Tensor) -> None:
    """Check a batch's labels against its logits.

    Args:
        target: [B] class indices in [0, C), or [B, C] probabilities whose rows sum to 1.
        logits: [B, C].

    Raises:
        TypeError: Neither integer indices nor floating-point probabilities.
        ValueError: A wrong shape, a class out of range, or rows that are no probabilities.
    """
    if not isinstance(target, Tensor):
        raise TypeError(f"target must be a tensor, got {_described(target)}")
    batch_size, num_classes = logits.shape
    if target.dim() == 1:
        if not _holds_integers(target):
            raise TypeError(f"target [B] must hold integer class indices, got {target.dtype}")
        if target.shape[0] != batch_size:
            raise ValueError(f"target must hold {batch_size} labels, got {target.shape[0]}")
        if _values_can_be_read(target):
            low, high = (int(value) for value in target.aminmax())
            if low < 0 or high >= num_classes:
                raise ValueError(
                    f"target must lie in [0, {num_classes}), got values from {low} to {high}"
                )
        return
    if target.shape != logits.shape:
        raise ValueError(
            f"target must be [{batch_size}] class indices or [{batch_size}, {num_classes}] "
            f"probabilities, got {tuple(target.shape)}"
        )
    if not target.is_floating_point():
        raise TypeError(f"target [B, C] must hold floating-point probabilities, got {target.dtype}")
    if _values_can_be_read(target):
        _check_probabilities(target)


def _holds_integers(tensor: Tensor) -> bool:
    return not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)


def _check_probabilities(target: Tensor) -> None:
    sums = target.double().sum(1)
    tolerance = 1e-3 if target.dtype in (torch.float32, torch.float64) else 2e-2
    worst = int((sums - 1).abs().nan_to_num(torch.inf).argmax())
    if not abs(float(sums[worst]) - 1) <= tolerance:
        raise ValueError(
            f"each row of target must sum to 1, row {worst} sums to {float(sums[worst]):.6g}"
        )
    if float(target.min()) < 0:
        raise ValueError(f"target must hold no negative values, got {float(target.min()):.6g}")


def check_two_labels(target: Tensor) -> None:
    """Raise ValueError if a row of [B, C] labels has more than two labelled classes."""
    if target.dim() != 2 or not _values_can_be_read(target):
        return
    counts = (target > 0).sum(1)
    most = int(counts.argmax())
    if int(counts[most]) > 2:
        raise ValueError(
            f"row {most} of target has {int(counts[most])} labelled classes, at most two can be "
            "used: pass unsmoothed labels (label smoothing belongs to the task loss)"
        )


def check_votes(votes: Tensor, logits: Tensor) -> None:
    """Check that `votes` is [B, K] class indices.

    Raises:
        TypeError: Not an integer tensor.
        ValueError: A wrong shape, or a class out of range.
    """
    if not isinstance(votes, Tensor) or not _holds_integers(votes):
        raise TypeError(f"votes must hold integer class indices, got {_described(votes)}")
    if votes.dim() != 2 or votes.shape[0] != logits.shape[0] or votes.shape[1] < 1:
        raise ValueError(
            f"votes must be [{logits.shape[0]}, K] class indices, got {tuple(votes.shape)}"
        )
    if _values_can_be_read(votes):
        low, high = (int(value) for value in votes.aminmax())
        if low < 0 or high >= logits.shape[1]:
            raise ValueError(
                f"votes must lie in [0, {logits.shape[1]}), got values from {low} to {high}"
            )


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def check_number(
    name: str, value: float, *, positive: bool = False, at_most: float | None = None
) -> None:
    """Raise unless `value` is a finite number in the range that is asked for.

    Args:
        name: The argument's name, for the message.
        value: The number.
        positive: It must be above 0; otherwise 0 or more.
        at_most: Upper bound, included; None for no bound.

    Raises:
        TypeError: Not a number.
        ValueError: Out of range or not finite.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number, got {_described(value)}")
    low_fits = value > 0 if positive else value >= 0
    if not (low_fits and value < float("inf") and (at_most is None or value <= at_most)):
        wanted = "above 0" if positive else "0 or more"
        if at_most is not None:
            wanted += f" and at most {at_most}"
        raise ValueError(f"{name} must be finite, {wanted}, got {value}")


def _described(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of {value.dtype}"
    return f"{type(value).__name__} ({value!r:.60})"


def in_float32(tensor: Tensor) -> Tensor:
    """Return `tensor` in at least float32; float64 stays, half precision is widened."""
    if tensor.dtype in (torch.float32, torch.float64):
        return tensor
    return tensor.float()


def label_probabilities(
    target: Tensor, logits: Tensor, mixed_target: MixedTarget = "all"
) -> Tensor:
    """Labels as [B, C] probabilities in the dtype of `logits`.

    Args:
        target: [B] class indices or [B, C] probabilities.
        logits: [B, C], gives shape and dtype.
        mixed_target: `"largest"` keeps one class per sample, the one with the largest label
            (ties: the lower class), with a label of 1; `"all"` keeps the labels.
    """
    if target.dim() == 2 and mixed_target == "largest":
        target = target.argmax(1)
    if target.dim() == 1:
        return class_mask(target, logits.shape[1]).to(logits.dtype)
    return target.to(logits.dtype)


def class_mask(classes: Tensor, num_classes: int) -> Tensor:
    """[B] class indices as a [B, C] boolean mask with one True per row."""
    return classes.unsqueeze(1) == torch.arange(num_classes, device=classes.device)


def non_target_log_softmax(logits: Tensor, labelled: Tensor) -> Tensor:
    """Log-softmax over the non-target classes; 0 at labelled ones.

    The same as removing the labelled entries, with a fixed shape. The fill value is finite, so
    that a row whose every class is labelled gives zeros and zero gradient, not NaN.

    Args:
        logits: [B, C].
        labelled: [B, C], boolean.
    """
    lowest = torch.finfo(logits.dtype).min
    log_probabilities = logits.masked_fill(labelled, lowest).log_softmax(1)
    return log_probabilities.masked_fill(labelled, 0.0)


def non_target_softmax(logits: Tensor, labelled: Tensor) -> Tensor:
    """Softmax over the non-target classes; 0 at labelled ones. Shapes as its logarithm's."""
    lowest = torch.finfo(logits.dtype).min
    return logits.masked_fill(labelled, lowest).softmax(1).masked_fill(labelled, 0.0)


def normalized(weights: Tensor, labelled: Tensor) -> Tensor:
    """Scale non-negative weights to sum to 1 over the non-target classes; 0 at labelled ones.

    Args:
        weights: [B, C], non-negative.
        labelled: [B, C], boolean.
    """
    kept = weights.masked_fill(labelled, 0.0)
    return kept / kept.sum(1, keepdim=True).clamp(min=torch.finfo(kept.dtype).tiny)


def reduce_batch(per_sample: Tensor, reduction: Reduction) -> Tensor:
    """Reduce [B] per-sample losses: `"mean"` and `"sum"` over B, `"none"` keeps [B].

    Raises:
        ValueError: An unknown reduction.
    """
    check_choice("reduction", reduction, ("mean", "sum", "none"))
    if reduction == "mean":
        return per_sample.mean()
    return per_sample.sum() if reduction == "sum" else per_sample
