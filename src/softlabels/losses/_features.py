"""What losses on features share: pairing levels of maps, pooling, checks, directions of vectors.

Shapes: B samples, D channels, H x W positions.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import ClassVar, TypeAlias, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from softlabels.inputs import Features, Input
from softlabels.losses._checks import check_floating
from softlabels.losses._method import Method, Shapes, Stages, Value
from softlabels.losses._non_target import in_float32

__all__ = [
    "POOLED_INPUTS",
    "LevelAdapters",
    "LevelsMethod",
    "Values",
    "check_maps",
    "check_vectors",
    "map_inputs",
    "paired_from_deepest",
    "paired_maps",
    "paired_shapes",
    "pooled_pair",
    "pooled_to",
    "pooled_to_each_other",
    "tensors_of",
    "the_only",
    "unit_vectors",
    "wide_maps",
]

Values: TypeAlias = Mapping[str, Value]  # what the adapters' forward gets, by argument

Left = TypeVar("Left")
Right = TypeVar("Right")


def paired_from_deepest(
    student: Sequence[Left], teacher: Sequence[Right]
) -> list[tuple[Left, Right]]:
    """Pairs of levels, shallow to deep: the deepest of both, the ones before them, and so on.

    Shallow levels of the network that has more are left out. A level may be a map, a shape, or
    anything else.
    """
    count = min(len(student), len(teacher))
    first_student, first_teacher = len(student) - count, len(teacher) - count
    return [*zip(student[first_student:], teacher[first_teacher:], strict=True)]


def pooled_to(map: Tensor, size: Sequence[int]) -> Tensor:
    """Average-pool a map [B, D, H, W] to at most `size`; a side that is no larger stays.

    So two maps have one size after each is pooled to the size of the other.
    """
    height, width = map.shape[2:]
    wanted = (min(height, size[0]), min(width, size[1]))
    if wanted == (height, width):
        return map
    if height % wanted[0] == 0 and width % wanted[1] == 0:
        # The same as adaptive pooling, and its gradient is deterministic on every device.
        return functional.avg_pool2d(map, (height // wanted[0], width // wanted[1]))
    return functional.adaptive_avg_pool2d(map, wanted)


def pooled_to_each_other(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Both maps at the smaller size: the larger one is average-pooled."""
    return pooled_to(left, right.shape[2:]), pooled_to(right, left.shape[2:])


def paired_maps(
    student: Sequence[Tensor], teacher: Sequence[Tensor]
) -> list[tuple[Tensor, Tensor]]:
    """Pairs from the deepest, in at least float32 and one dtype; the teacher's are constant."""
    pairs = paired_from_deepest(wide_maps(student), wide_maps(teacher, constant=True))
    return [(ours, theirs.to(ours.dtype)) for ours, theirs in pairs]


def map_inputs(stages: tuple[str, ...], *, before_activation: bool = False) -> dict[str, Input]:
    """The inputs `student_maps` and `teacher_maps` at the same stages of both networks."""
    return {
        "student_maps": Features("student", stages, "map", before_activation),
        "teacher_maps": Features("teacher", stages, "map", before_activation),
    }


POOLED_INPUTS: Mapping[str, Input] = {
    "student_features": Features(form="pooled"),
    "teacher_features": Features(of="teacher", form="pooled"),
}


def tensors_of(values: Values, name: str) -> list[Tensor]:
    """The list of tensors of an argument."""
    value = values[name]
    return [value] if isinstance(value, Tensor) else list(value)


def paired_shapes(shapes: Shapes) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Shapes of `student_maps` and `teacher_maps`, paired from the deepest.

    Raises:
        ValueError: A shape that is not [B, D, H, W].
    """
    lists: list[list[tuple[int, ...]]] = []
    for name in ("student_maps", "teacher_maps"):
        found = shapes[name]
        levels = list(found) if isinstance(found, list) else [found]
        for shape in levels:
            if len(shape) != 4:
                raise ValueError(f"{name} must be [B, D, H, W], got {tuple(shape)}")
        lists.append([tuple(shape) for shape in levels])
    return paired_from_deepest(*lists)


def wide_maps(maps: Sequence[Tensor], *, constant: bool = False) -> list[Tensor]:
    """Each map in at least float32; without gradient if they are `constant`."""
    return [in_float32(map.detach() if constant else map) for map in maps]


def check_maps(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    names: tuple[str, str] = ("student_maps", "teacher_maps"),
    *,
    same_widths: bool = False,
    same_sizes: bool = False,
) -> None:
    """Check two lists of feature maps of one batch; they may differ in length.

    Args:
        student: List of floating [B, D, H, W], shallow to deep.
        teacher: As for the student, of the same B.
        names: What the two arguments are called, for the messages.
        same_widths: Levels that are paired from the deepest must have the same D.
        same_sizes: They must have the same H and W.

    Raises:
        TypeError: Not a list of floating-point tensors.
        ValueError: An empty list, a map that is not [B, D, H, W], or maps that do not fit.
    """
    for name, maps in zip(names, (student, teacher), strict=True):
        _check_list(name, maps)
    for name, maps in zip(names, (student, teacher), strict=True):
        for map in maps:
            if map.shape[0] != student[0].shape[0]:
                raise ValueError(
                    f"{names[0]} and {names[1]} must be of one batch, got {len(student[0])} "
                    f"samples in {names[0]}[0] and {len(map)} in one of {name}"
                )
    for ours, theirs in paired_from_deepest(student, teacher):
        for what, wanted, sides in (
            ("number of channels", same_widths, slice(1, 2)),
            ("height and width", same_sizes, slice(2, 4)),
        ):
            if wanted and ours.shape[sides] != theirs.shape[sides]:
                raise ValueError(
                    f"paired maps of {names[0]} and {names[1]} must have the same {what}, got "
                    f"{tuple(ours.shape)} and {tuple(theirs.shape)}"
                )


def _check_list(name: str, maps: Sequence[Tensor]) -> None:
    if not isinstance(maps, (list, tuple)):
        raise TypeError(f"{name} must be a list of feature maps, got {type(maps).__name__}")
    if not maps:
        raise ValueError(f"{name} must hold at least one feature map, got none")
    for number, map in enumerate(maps):
        check_floating(map, f"{name}[{number}]")
        if map.dim() != 4 or min(map.shape) < 1:
            raise ValueError(
                f"{name}[{number}] must be [B, D, H, W] and not empty, got {tuple(map.shape)}"
            )


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
        check_floating(features, name)
        if features.dim() != 2 or min(features.shape) < 1:
            raise ValueError(f"{name} must be [B, D] and not empty, got {tuple(features.shape)}")
    if student.shape[0] != teacher.shape[0] or (same_widths and student.shape != teacher.shape):
        wanted = "have one shape" if same_widths else "be of one batch"
        raise ValueError(
            f"{names[0]} and {names[1]} must {wanted}, got {tuple(student.shape)} and "
            f"{tuple(teacher.shape)}"
        )


def the_only(name: str, features: Tensor | Sequence[Tensor]) -> Tensor:
    """The one tensor of a list, as an input of a single stage gives.

    Raises:
        ValueError: Another number of tensors.
    """
    if not isinstance(features, (list, tuple)) or len(features) != 1:
        got = f"{len(features)}" if isinstance(features, (list, tuple)) else type(features).__name__
        raise ValueError(f"{name} must be a list of one tensor, got {got}")
    found: Tensor = features[0]
    return found


def pooled_pair(
    student_features: Sequence[Tensor], teacher_features: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """The one pooled feature of each network, of `POOLED_INPUTS`.

    Returns:
        [B, D] and [B, E], in at least float32 and one dtype; the teacher's without gradient.

    Raises:
        TypeError: Not floating-point tensors.
        ValueError: Another number of tensors, not [B, D], empty, or of two batches.
    """
    student = the_only("student_features", student_features)
    teacher = the_only("teacher_features", teacher_features)
    check_vectors(student, teacher)
    student = in_float32(student)
    return student, in_float32(teacher.detach()).to(student.dtype)


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


class LevelsMethod(Method):
    """Base of methods that compare the maps of both networks, each level by itself.

    A subclass has a default for `stages`, and `level`.

    Attributes:
        same_widths: Whether the maps of a level must have the same number of channels.
    """

    stages: Stages

    of_batch = True
    same_widths: ClassVar[bool] = False

    @property
    def inputs(self) -> Mapping[str, Input]:
        """Maps of both networks."""
        return map_inputs(self.stages)

    def terms(
        self, student_maps: Sequence[Tensor], teacher_maps: Sequence[Tensor]
    ) -> dict[str, Tensor]:
        """`"level_0"` (the shallowest) and so on, scalars.

        Args:
            student_maps: List of [B, D, H, W], shallow to deep; with adapters what they make of
                them. Get the gradient.
            teacher_maps: List of [B, E, H, W], of any size. Get none. Levels are paired from the
                deepest.
        """
        check_maps(student_maps, teacher_maps, same_widths=self.same_widths)
        pairs = paired_maps(student_maps, teacher_maps)
        return {f"level_{number}": self.level(*pair) for number, pair in enumerate(pairs)}

    def level(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The term of one level, a scalar, of [B, D, H, W] and [B, E, H, W] in one dtype."""
        raise NotImplementedError


class LevelAdapters(nn.Module):
    """A module for each level, shallow to deep, whose outputs replace the student's maps.

    Args:
        levels: The modules.
        name: What the argument with the maps is called.
    """

    def __init__(self, levels: Iterable[nn.Module], name: str = "student_maps") -> None:
        super().__init__()
        self.levels = nn.ModuleList(levels)
        self.name = name

    def forward(self, values: Values) -> dict[str, Value]:
        """The maps paired with the modules from the deepest."""
        pairs = paired_from_deepest([*self.levels], tensors_of(values, self.name))
        return {self.name: [module(map) for module, map in pairs]}
