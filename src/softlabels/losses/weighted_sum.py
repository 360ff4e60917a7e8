"""Several methods at once: their weighted sum."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import wraps
from typing import Any, TypeAlias, cast

from torch import Tensor, nn

from softlabels.inputs import Classifier, Features, Input, NormParameters, TeacherLogits
from softlabels.losses._checks import check_number
from softlabels.losses._non_target import LossOutput, SoftLabels

__all__ = ["WeightedSum", "of_teacher"]

Value: TypeAlias = "Tensor | list[Tensor]"
Shapes: TypeAlias = "Mapping[str, tuple[int, ...] | list[tuple[int, ...]]]"

_PARTS = "__"  # between a method's name and its argument


class WeightedSum(nn.Module):
    r"""A weighted sum of methods, as one method.

    .. math:: L = \sum_m w_m L_m

    Each method reads its own signals, has its own learned parts and its own memory; what two of
    them read of a teacher is computed once.

    Args:
        methods: The methods by name.
        weights: Weight of each, 0 or more; None: 1 for all. It may be changed between steps.
        teachers: For some of the names the number of the teacher, from 0, that the method reads;
            the others read as they say themselves: logits of all teachers together.

    Attributes:
        weights: As given.

    Raises:
        TypeError: A method is no module with `inputs`.
        ValueError: No method, a name that cannot be told apart, an unknown name in `weights` or
            `teachers`, or a weight below 0.

    Example:
        >>> from softlabels.losses import KDLoss, NKDLoss
        >>> both = WeightedSum({"nkd": NKDLoss(), "kd": KDLoss()}, {"nkd": 1.0, "kd": 0.5})
        >>> sorted(both.inputs)
        ['kd__logits', 'kd__teacher_logits', 'nkd__logits', 'nkd__target', 'nkd__teacher_logits']
    """

    def __init__(
        self,
        methods: Mapping[str, nn.Module],
        weights: Mapping[str, float] | None = None,
        *,
        teachers: Mapping[str, int] | None = None,
    ) -> None:
        super().__init__()
        if not methods:
            raise ValueError("a sum needs one method or more, got none")
        for name, method in methods.items():
            if not name.isidentifier() or _PARTS in f"{name}_" or hasattr(nn.ModuleDict(), name):
                raise ValueError(
                    f"the name of a method must be an identifier without {_PARTS!r}, without "
                    f"'_' at its end, and none of nn.ModuleDict's own, got {name!r}"
                )
            if not isinstance(method, nn.Module) or not hasattr(method, "inputs"):
                raise TypeError(
                    f"{name} must be a module with `inputs`, got {type(method).__name__}"
                )
        for what, given in (("weights", weights or {}), ("teachers", teachers or {})):
            unknown = sorted(set(given) - set(methods))
            if unknown:
                raise ValueError(f"{what} names {unknown}, expected {', '.join(methods)}")
        self.methods = nn.ModuleDict(methods)
        self.weights = {name: float((weights or {}).get(name, 1.0)) for name in methods}
        for name, weight in self.weights.items():
            check_number(f"the weight of {name}", weight)
        self.inputs: dict[str, Input] = {
            f"{name}{_PARTS}{argument}": of_teacher(kind, (teachers or {}).get(name))
            for name, method in methods.items()
            for argument, kind in cast("Any", method).inputs.items()
        }

    @property
    def ignore_index(self) -> int | None:
        """The class index whose samples all the methods that know labels leave out."""
        found = {
            value
            for method in self.methods.values()
            if (value := getattr(method, "ignore_index", None)) is not None
        }
        if len(found) > 1:
            raise ValueError(f"the methods differ in ignore_index: {sorted(found)}")
        return next(iter(found), None)

    def build_adapters(self, shapes: Shapes) -> nn.Module | None:
        """The learned parts of those methods that have any."""
        builders = {name: getattr(m, "build_adapters", None) for name, m in self.methods.items()}
        heads: dict[str, nn.Module] = {
            name: built
            for name, build in builders.items()
            if build is not None and (built := build(_of(name, shapes))) is not None
        }
        if not heads:
            return None
        return _SumWithMemory(heads) if any(map(_has_memory, heads.values())) else _SumHeads(heads)

    def forward(self, *, return_parts: bool = False, **values: Value) -> Tensor | LossOutput:
        """The sum, from the values of all methods: `NAME__ARGUMENT=...`."""
        parts: dict[str, Tensor] = {}
        for name, method in self.methods.items():
            own = _of(name, values)
            weight = self.weights[name]
            if return_parts and "return_parts" in inspect.signature(method.forward).parameters:
                _, of_method = method(**own, return_parts=True)
                parts.update({f"{name}/{part}": weight * v for part, v in of_method.items()})
            else:
                parts[name] = weight * method(**own)
        loss = _total(parts.values())
        return LossOutput(loss, parts) if return_parts else loss

    @property
    def soft_labels(self) -> Callable[..., SoftLabels]:
        """Gives the soft labels of the first of the methods that has any.

        Raises:
            AttributeError: None has; so the sum is a method without soft labels, as they are.
        """
        for name, method in self.methods.items():
            of_method: Callable[..., SoftLabels] | None = getattr(method, "soft_labels", None)
            if of_method is not None:
                return _from_values(name, of_method)
        raise AttributeError(f"none of {', '.join(self.methods)} has soft labels")


def _from_values(name: str, of_method: Callable[..., SoftLabels]) -> Callable[..., SoftLabels]:
    """A method's soft labels as a function of the values of all methods, and of the labels."""

    @wraps(of_method)
    def of_sum(target: Tensor, **values: Value) -> SoftLabels:
        return of_method(**{**_of(name, values), "target": target})

    return of_sum


class _SumHeads(nn.Module):
    """The heads of several methods, each with its own values."""

    def __init__(self, heads: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.heads = nn.ModuleDict(heads)

    def forward(self, values: Mapping[str, Value]) -> dict[str, Value]:
        """What each gives, under the names of its method."""
        return {
            f"{name}{_PARTS}{argument}": value
            for name, heads in self.heads.items()
            for argument, value in heads(_of(name, values)).items()
        }


class _SumWithMemory(_SumHeads):
    """Heads of which some remember."""

    @property
    def memory_inputs(self) -> tuple[str, ...]:
        """Names of the values that `after_step` needs."""
        return tuple(
            f"{name}{_PARTS}{argument}"
            for name, heads in self.heads.items()
            if _has_memory(heads)
            for argument in cast("Any", heads).memory_inputs
        )

    def after_step(self, values: Mapping[str, Value]) -> None:
        """Hand a batch on to those that remember."""
        for name, heads in self.heads.items():
            if _has_memory(heads):
                cast("Any", heads).after_step(_of(name, values))

    def after_epoch(self) -> None:
        """Close an epoch."""
        for heads in self.heads.values():
            if _has_memory(heads):
                cast("Any", heads).after_epoch()


def of_teacher(kind: Input, number: int | None) -> Input:
    """A signal, read from one of several teachers if it is a teacher's."""
    is_teachers = isinstance(kind, TeacherLogits | NormParameters | Classifier) or (
        isinstance(kind, Features) and kind.of == "teacher"
    )
    if number is None or not is_teachers:
        return kind
    changed: Any = kind
    return cast("Input", replace(changed, teacher=number))


def _has_memory(heads: nn.Module) -> bool:
    return hasattr(heads, "after_step")


def _of(name: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a method, under its own arguments' names."""
    start = f"{name}{_PARTS}"
    return {key.removeprefix(start): v for key, v in values.items() if key.startswith(start)}


def _total(values: Iterable[Tensor]) -> Tensor:
    first, *others = values
    for value in others:
        first = first + value
    return first
