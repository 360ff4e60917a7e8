"""What a method may read: one class for each kind of tensor, plain declarations without code.

A method declares `inputs`, a mapping from each argument of its `terms` to one of these. How they
are provided is the business of `softlabels.distill`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = [
    "AuxBranches",
    "AuxLogits",
    "Classifier",
    "Features",
    "FromBatch",
    "Input",
    "Logits",
    "NormParameters",
    "PeerLogits",
    "SecondPass",
    "Target",
    "TeacherLogits",
    "Votes",
    "WeakLogits",
]


@dataclass(frozen=True)
class Input:
    """Base of all inputs: one kind of tensor that a method's `terms` may ask for."""


@dataclass(frozen=True)
class Logits(Input):
    """The student's logits, [B, C]."""


@dataclass(frozen=True)
class Target(Input):
    """The batch's labels: [B] class indices or [B, C] probabilities, never smoothed."""


@dataclass(frozen=True)
class TeacherLogits(Input):
    """The teacher's logits, [B, C], without gradient, in the student's class order.

    Attributes:
        teacher: Which of several teachers; None: all of them together, as the logarithm of their
            mean prediction.
    """

    teacher: int | None = None


@dataclass(frozen=True)
class WeakLogits(Input):
    """Logits of a linear head on a pooled feature inside the student, [B, C].

    Attributes:
        tap: Where the feature is read: `"middle"`, `"last"`, or a dotted module path.
    """

    tap: str = "middle"


@dataclass(frozen=True)
class Votes(Input):
    """The class that the student's own head predicts at every position, [B, K], no gradient.

    Attributes:
        upsample: Factor by which the last map is enlarged before voting.
        mode: How it is enlarged.
    """

    upsample: int = 1
    mode: Literal["bilinear", "bicubic"] = "bilinear"


@dataclass(frozen=True)
class AuxLogits(Input):
    """Linear heads of their own at inner places of the student: logits and votes of each in turn.

    A list of 2 tensors for each place: the head's logits of the pooled feature, [B, C], and the
    class that it predicts at every position, [B, K], without gradient.

    Attributes:
        taps: `"middle"`, `"last"`, or dotted module paths.
    """

    taps: tuple[str, ...] = ("middle",)


@dataclass(frozen=True)
class Features(Input):
    """Outputs of inner modules, a list of tensors in the order of `stages`, shallow to deep.

    Names of stages:

    * `"middle"`, `"last"`: as for the other inputs;
    * `"stage:K"`: the K-th resolution of a network with a pyramid of maps, its stem left out, or
      the K-th of four evenly spaced blocks of one without; `"stages"` stands for all of them;
    * `"block:K"`: the K-th block of the longest run of equal blocks, as in a vision transformer;
    * any other: a dotted module path.

    K counts from 0, or from the end if it is negative.

    Attributes:
        of: Which network they are read from.
        stages: Names of stages.
        form: `"raw"`: as the module returns them; `"map"`: [B, D, H, W], patch tokens on their
            grid; `"pooled"`: [B, D], the mean over positions, or the class token.
        before_activation: Read the map before the activation that ends the stage, where one does.
        teacher: Which of several teachers, for `of="teacher"`.
    """

    of: Literal["student", "teacher"] = "student"
    stages: tuple[str, ...] = ("last",)
    form: Literal["raw", "map", "pooled"] = "raw"
    before_activation: bool = False
    teacher: int = 0


@dataclass(frozen=True)
class NormParameters(Input):
    """Scale and shift of the BatchNorm that a teacher's stage comes out of, a list of [2, D].

    Row 0 is the BatchNorm's weight, row 1 its bias; one tensor for each stage, without gradient.

    Attributes:
        stages: As of `Features`.
        teacher: Which of several teachers.
    """

    stages: tuple[str, ...] = ("stages",)
    teacher: int = 0


@dataclass(frozen=True)
class Classifier(Input):
    """The teacher's last linear layer on its pooled feature: a list of weight [C, D] and bias [C].

    Without gradient, rows in the student's class order.

    Attributes:
        teacher: Which of several teachers.
    """

    teacher: int = 0


@dataclass(frozen=True)
class AuxBranches(Input):
    """Exits of the student with layers and a classifier of their own, shallow to deep.

    A list of 2 E tensors: first the logits of the E exits, [B, C] each, then their maps before
    pooling, all of the last map's shape [B, D, H, W]. All are learned with the student.

    Attributes:
        stages: Where the exits begin, as of `Features`; a place that is the last map is left out.
    """

    stages: tuple[str, ...] = ("stages",)


@dataclass(frozen=True)
class SecondPass(Input):
    """Another input from the student, from a further forward on other images of the batch.

    Learned parts are those of the same input on the batch's own images.

    Attributes:
        images: Name of the batch's extra with the images, [B, ...]: `"second_view"`, another draw
            of the augmentation; `"partner"`, another image of the same class; `"mixup"`, the
            batch's own images mixed (beside it `mixup_index`, [B], whom each image is mixed with,
            and `mixup_weight`, [B], its own share); or one that the caller provides.
        of: The input.
        gradient: Whether the forward is trained through.
    """

    images: str = "second_view"
    of: Input = Logits()
    gradient: bool = True


@dataclass(frozen=True)
class PeerLogits(Input):
    """Logits of the second network that is trained along with the student, [B, C]."""


@dataclass(frozen=True)
class FromBatch(Input):
    """An extra tensor that the caller passes with the batch, by name.

    Attributes:
        name: The keyword, as in `distiller(images, target, index=...)`.
    """

    name: str = "index"
