"""Checks of arguments: shapes and dtypes always, values where they can be read without a wait."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = [
    "check_choice",
    "check_flag",
    "check_floating",
    "check_ignore_index",
    "check_logits",
    "check_number",
    "check_range",
    "check_target",
    "check_temperature",
    "check_two_labels",
    "check_unsmoothed",
    "check_values",
    "check_votes",
    "check_whole_number",
    "fully_labeled_row",
    "in_transform",
    "values_can_be_read",
]

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


def in_transform() -> bool:
    """Whether a `torch.func` transform runs."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def values_can_be_read(tensor: Tensor) -> bool:
    """Whether a check may look at the values of `tensor`; see `check_values`."""
    if torch.compiler.is_compiling() or tensor.device.type == "meta" or in_transform():
        return False
    # Subclasses, such as fake tensors, may have no values at all.
    return _values_forced or (type(tensor) is Tensor and tensor.device.type == "cpu")


def check_floating(tensor: Tensor, name: str) -> None:
    """Raise TypeError unless `tensor` is a floating-point tensor."""
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor, got {_described(tensor)}")


def check_logits(logits: Tensor, name: str = "logits", like: Tensor | None = None) -> None:
    """Check that `logits` is a floating [B, C] tensor with C >= 2, shaped as `like` if given.

    Raises:
        TypeError: Not a floating-point tensor.
        ValueError: Not [B, C] with B >= 1 and C >= 2, or of another shape than `like`.
    """
    check_floating(logits, name)
    if logits.dim() != 2 or logits.shape[0] < 1 or logits.shape[1] < 2:
        raise ValueError(
            f"{name} must be [B, C] with at least one sample and two classes, "
            f"got {tuple(logits.shape)}"
        )
    if like is not None and logits.shape != like.shape:
        raise ValueError(
            f"{name} must have the shape of logits {tuple(like.shape)}, got {tuple(logits.shape)}"
        )


def check_target(target: Tensor, logits: Tensor, ignore_index: int | None = None) -> None:
    """Check a batch's labels against its logits.

    Args:
        target: [B] class indices in [0, C), or [B, C] probabilities whose rows sum to 1.
        logits: [B, C].
        ignore_index: A class index that may stand in [B] labels besides.

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
        if values_can_be_read(target):
            known = target
            if ignore_index is not None:
                known = torch.where(target == ignore_index, 0, target)
            check_range(known, "target", num_classes)
        return
    if target.shape != logits.shape:
        raise ValueError(
            f"target must be [{batch_size}] class indices or [{batch_size}, {num_classes}] "
            f"probabilities, got {tuple(target.shape)}"
        )
    if not target.is_floating_point():
        raise TypeError(f"target [B, C] must hold floating-point probabilities, got {target.dtype}")
    if values_can_be_read(target):
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
    """Raise ValueError if a row of [B, C] labels has more than two labeled classes."""
    if target.dim() != 2 or not values_can_be_read(target):
        return
    counts = (target > 0).sum(1)
    most = int(counts.argmax())
    if int(counts[most]) > 2:
        raise ValueError(
            f"row {most} of target has {int(counts[most])} labeled classes, at most two can be "
            "used: pass unsmoothed labels (label smoothing belongs to the task loss)"
        )


def check_unsmoothed(target: Tensor) -> None:
    """Raise ValueError if a row of [B, C] labels leaves no class without a label, and C > 2."""
    row = fully_labeled_row(target)
    if row is not None and target.shape[1] > 2:
        raise ValueError(
            f"row {row} of target has a label for every class, so that there is no non-target "
            "class: pass unsmoothed labels (label smoothing belongs to the task loss)"
        )


def fully_labeled_row(target: Tensor) -> int | None:
    """The first row of [B, C] labels with a label for every class, if it may be looked for."""
    if target.dim() != 2 or not values_can_be_read(target):
        return None
    full = (target > 0).all(1)
    return int(full.int().argmax()) if bool(full.any()) else None


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
    if values_can_be_read(votes):
        check_range(votes, "votes", logits.shape[1])


def check_range(indices: Tensor, name: str, count: int) -> None:
    """Raise ValueError unless all indices lie in [0, count); it reads them."""
    low, high = (int(value) for value in indices.aminmax())
    if low < 0 or high >= count:
        raise ValueError(f"{name} must lie in [0, {count}), got values from {low} to {high}")


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
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {_described(value)}")
    low_fits = value > 0 if positive else value >= 0
    if not (low_fits and value < float("inf") and (at_most is None or value <= at_most)):
        wanted = "above 0" if positive else "0 or more"
        if at_most is not None:
            wanted += f" and at most {at_most}"
        raise ValueError(f"{name} must be finite, {wanted}, got {value}")


def check_whole_number(name: str, value: int) -> None:
    """Raise TypeError unless `value` is a whole number."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be a whole number, got {_described(value)}")


def check_temperature(value: float) -> None:
    """Raise unless `value` is a temperature: a number in (0, 1e6]."""
    check_number("temperature", value, positive=True, at_most=1e6)


def check_flag(name: str, value: bool) -> None:
    """Raise TypeError unless `value` is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {_described(value)}")


def check_ignore_index(value: int | None) -> None:
    """Raise TypeError unless `value` is a whole number or None."""
    if value is not None:
        check_whole_number("ignore_index", value)


def _described(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of {value.dtype}"
    return f"{type(value).__name__} ({value!r:.60})"
