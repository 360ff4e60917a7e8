"""Several methods at once: their weighted sum, one loss of named terms."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, cast

from torch import Tensor, nn

from softlabels.inputs import Input
from softlabels.losses._checks import check_number
from softlabels.losses._memory_bank import MemoryBank
from softlabels.losses._method import Method, Shapes, Value
from softlabels.losses._non_target import SoftLabels, total_of

__all__ = ["WeightedSum", "of_teacher"]

_APART = "__"  # between a method's name and its argument


class WeightedSum(Method):
    r"""A weighted sum of methods, as one method.

    .. math:: L = \sum_m w_m L_m

    Each method has its own inputs, its own adapters and its own memory; what two of them read of a
    teacher is computed once. Each reduces itself; the terms are named `METHOD/TERM`.

    Args:
        methods: The methods by name.
        weights: Weight of each, 0 or more; None: 1 for all. It may be changed between steps.
        teachers: For some of the names the number of the teacher, from 0, that the method reads;
            the others read as they say themselves: logits of all teachers together.

    Attributes:
        weights: As given.

    Raises:
        TypeError: A method is no `Method`.
        ValueError: No method, a name that cannot be told apart, an unknown name in `weights` or
            `teachers`, a weight below 0, or methods that differ in `ignore_index`.

    Example:
        >>> from softlabels.losses import KDLoss, NKDLoss
        >>> both = WeightedSum({"nkd": NKDLoss(), "kd": KDLoss()}, {"nkd": 1.0, "kd": 0.5})
        >>> sorted(both.inputs)
        ['kd__logits', 'kd__teacher_logits', 'nkd__logits', 'nkd__target', 'nkd__teacher_logits']
    """

    def __init__(
        self,
        methods: Mapping[str, Method],
        weights: Mapping[str, float] | None = None,
        *,
        teachers: Mapping[str, int] | None = None,
    ) -> None:
        super().__init__()
        if not methods:
            raise ValueError("a sum needs one method or more, got none")
        for name, method in methods.items():
            if not name.isidentifier() or _APART in f"{name}_" or hasattr(nn.ModuleDict(), name):
                raise ValueError(
                    f"the name of a method must be an identifier without {_APART!r}, without "
                    f"'_' at its end, and none of nn.ModuleDict's own, got {name!r}"
                )
            if not isinstance(method, Method):
                raise TypeError(
                    f"{name} must be a softlabels.losses.Method, got {type(method).__name__}"
                )
        for what, given in (("weights", weights or {}), ("teachers", teachers or {})):
            unknown = sorted(set(given) - set(methods))
            if unknown:
                raise ValueError(f"{what} names {unknown}, expected {', '.join(methods)}")
        ignored = {m.ignore_index for m in methods.values() if m.ignore_index is not None}
        if len(ignored) > 1:
            raise ValueError(f"the methods differ in ignore_index: {sorted(ignored)}")
        # For the task's loss beside it; each method leaves its samples out by itself.
        self.ignore_index = next(iter(ignored), None)
        self.methods = nn.ModuleDict(methods)
        self.weights = {name: float((weights or {}).get(name, 1.0)) for name in methods}
        for name, weight in self.weights.items():
            check_number(f"the weight of {name}", weight)
        self.teachers = dict(teachers or {})

    def members(self) -> dict[str, Method]:
        """The methods by name."""
        return {name: cast("Method", method) for name, method in self.methods.items()}

    @property
    def inputs(self) -> Mapping[str, Input]:
        """The inputs of all methods, `METHOD__ARGUMENT`."""
        return self._read(lambda method: method.inputs)

    @property
    def adapter_inputs(self) -> Mapping[str, Input]:  # type: ignore[override]  # of its methods
        """What the adapters of all methods read besides."""
        return self._read(lambda method: method.adapter_inputs)

    def _read(self, of: Callable[[Method], Mapping[str, Input]]) -> Mapping[str, Input]:
        return {
            f"{name}{_APART}{argument}": of_teacher(kind, self.teachers.get(name))
            for name, method in self.members().items()
            for argument, kind in of(method).items()
        }

    def settings(self) -> dict[str, Any]:
        """What it was made from."""
        return {"methods": self.members(), "weights": self.weights, "teachers": self.teachers}

    def has_adapters(self) -> bool:
        """Whether one of the methods may have any."""
        return any(method.has_adapters() for method in self.members().values())

    def build_adapters(self, shapes: Shapes) -> nn.Module | None:
        """The adapters of those methods that have any."""
        adapters: dict[str, nn.Module] = {
            name: built
            for name, method in self.members().items()
            if (built := method.build_adapters(_of(name, shapes))) is not None
        }
        if not adapters:
            return None
        has_memory = any(hasattr(built, "after_step") for built in adapters.values())
        return _AdaptersWithMemory(adapters) if has_memory else _Adapters(adapters)

    def unknown_inputs(self) -> list[str]:
        """Those of `inputs` that its method's terms do not take."""
        return [
            f"{name}{_APART}{argument}"
            for name, method in self.members().items()
            for argument in method.unknown_inputs()
        ]

    def arguments_of(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Those of the values that the methods are called with."""
        return {
            f"{name}{_APART}{argument}": value
            for name, method in self.members().items()
            for argument, value in method.arguments_of(_of(name, values)).items()
        }

    def reduced(self, *args: Any, **inputs: Any) -> dict[str, Tensor]:
        """The terms of all methods, from their inputs by name: `METHOD__ARGUMENT=...`."""
        self._check_named(args)
        return {
            f"{name}/{term}": self.weights[name] * value
            for name, method in self.members().items()
            for term, value in method.reduced(**_of(name, inputs)).items()
        }

    def forward(self, *args: Any, **inputs: Any) -> Tensor:
        """The sum, from the inputs of all methods by name: `METHOD__ARGUMENT=...`."""
        self._check_named(args)
        return total_of(
            {
                name: self.weights[name] * method(**_of(name, inputs))
                for name, method in self.members().items()
            }
        )

    @staticmethod
    def _check_named(args: tuple[Any, ...]) -> None:
        if args:
            raise TypeError(
                f"a sum takes its inputs by name, METHOD{_APART}ARGUMENT=..., got {len(args)} "
                "positional ones"
            )

    def _with_soft_labels(self) -> dict[str, Method]:
        return {n: method for n, method in self.members().items() if method.has_soft_labels()}

    def has_soft_labels(self) -> bool:
        """Whether one of the methods has any."""
        return bool(self._with_soft_labels())

    def caption(self) -> str:
        """That of the first of the methods that has soft labels."""
        return next((method.caption() for method in self._with_soft_labels().values()), "")

    def soft_labels(self, target: Tensor, **values: Value) -> SoftLabels | None:
        """The soft labels of the first of the methods that has any, from all values by name."""
        for name, method in self._with_soft_labels().items():
            return method.soft_labels(**{**_of(name, values), "target": target})
        return None


class _Adapters(nn.Module):
    """The adapters of several methods, each with its own values."""

    def __init__(self, adapters: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.adapters = nn.ModuleDict(adapters)

    def forward(self, values: Mapping[str, Value]) -> dict[str, Value]:
        """What each gives, under the names of its method."""
        return {
            f"{name}{_APART}{argument}": value
            for name, adapters in self.adapters.items()
            for argument, value in adapters(_of(name, values)).items()
        }


class _AdaptersWithMemory(_Adapters):
    """Adapters of which some remember; itself no bank, since the others are none."""

    def _banks(self) -> dict[str, MemoryBank]:
        banks = {n: bank for n, bank in self.adapters.items() if hasattr(bank, "after_step")}
        return cast("dict[str, MemoryBank]", banks)

    @property
    def memory_inputs(self) -> tuple[str, ...]:
        """Names of the values that `after_step` needs."""
        return tuple(
            f"{name}{_APART}{argument}"
            for name, bank in self._banks().items()
            for argument in bank.memory_inputs
        )

    def after_step(self, values: Mapping[str, Value]) -> None:
        """Hand a batch on to those that remember."""
        for name, bank in self._banks().items():
            bank.after_step(_of(name, values))

    def after_epoch(self) -> None:
        """Close an epoch."""
        for bank in self._banks().values():
            bank.after_epoch()


def of_teacher(kind: Input, number: int | None) -> Input:
    """An input, read from one of several teachers if it is a teacher's."""
    if number is None or not kind.reads_teacher:
        return kind
    changed: Any = kind
    return cast("Input", replace(changed, teacher=number))


def _of(name: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a method, under its own arguments' names."""
    start = f"{name}{_APART}"
    return {key.removeprefix(start): v for key, v in values.items() if key.startswith(start)}
