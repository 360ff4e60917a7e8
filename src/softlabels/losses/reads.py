"""What a method may read: the signals, as plain declarations without any providing code.

A method declares `reads`, a mapping from each argument of its `forward` to one of these.
How a signal is provided is `softlabels.signals`' business.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = [
    "Exits",
    "Features",
    "FromBatch",
    "Logits",
    "Signal",
    "Target",
    "TeacherLogits",
    "Votes",
    "WeakLogits",
]


@dataclass(frozen=True)
class Signal:
    """Base of all signals: one kind of tensor that a method's `forward` may ask for."""


@dataclass(frozen=True)
class Logits(Signal):
    """The student's logits, [B, C]."""


@dataclass(frozen=True)
class Target(Signal):
    """The batch's labels: [B] class indices or [B, C] probabilities, never smoothed."""


@dataclass(frozen=True)
class TeacherLogits(Signal):
    """The teacher's logits, [B, C], without gradient, in the student's class order."""


@dataclass(frozen=True)
class WeakLogits(Signal):
    """Logits of a linear head on a pooled feature inside the student, [B, C].

    Attributes:
        tap: Where the feature is read: `"middle"`, `"last"`, or a dotted module path.
    """

    tap: str = "middle"


@dataclass(frozen=True)
class Votes(Signal):
    """The class that the student's own head predicts at every position, [B, K], no gradient.

    Attributes:
        upsample: Factor by which the last map is enlarged before voting.
        mode: How it is enlarged.
    """

    upsample: int = 1
    mode: Literal["bilinear", "bicubic"] = "bilinear"


@dataclass(frozen=True)
class Exits(Signal):
    """Linear heads of their own at inner places of the student: logits and votes of each in turn.

    A list of 2 tensors for each place: the head's logits of the pooled feature, [B, C], and the
    class that it predicts at every position, [B, K], without gradient.

    Attributes:
        taps: `"middle"`, `"last"`, or dotted module paths.
    """

    taps: tuple[str, ...] = ("middle",)


@dataclass(frozen=True)
class Features(Signal):
    """Outputs of inner modules, a list of tensors in the order of `stages`.

    Attributes:
        of: Which network they are read from.
        stages: `"middle"`, `"last"`, or dotted module paths.
    """

    of: Literal["student", "teacher"] = "student"
    stages: tuple[str, ...] = ("last",)


@dataclass(frozen=True)
class FromBatch(Signal):
    """An extra tensor that the caller passes with the batch, by name.

    Attributes:
        name: The keyword, as in `distiller(images, target, index=...)`.
    """

    name: str = "index"
