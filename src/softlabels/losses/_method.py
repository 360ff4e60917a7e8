"""What a method is: the base class of all of them. To write one, read this file first.

A method is one class in one file. Its annotated fields are its settings, `inputs` says what it
reads, and `terms` computes it:

    class PairLoss(Method):
        temperature: Temperature = 4.0

        inputs: ClassVar = {"logits": Logits(), "teacher_logits": TeacherLogits()}

        def terms(self, logits, teacher_logits):
            return {"distance": (logits - teacher_logits).square().mean(1) / self.temperature}

Everything else follows from that: the constructor and its checks, the command line's options and
help, the record of a run, the reduction over the batch, samples that are ignored.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import (
    Annotated,
    Any,
    ClassVar,
    Literal,
    NamedTuple,
    TypeAlias,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

from torch import Tensor, nn
from typing_extensions import dataclass_transform  # comes with torch

from softlabels.inputs import Input, Target
from softlabels.losses._checks import check_choice, check_flag, check_number, check_whole_number
from softlabels.losses._non_target import (
    Reduction,
    SoftLabels,
    reduce_terms,
    total_of,
    without_ignored,
)

__all__ = [
    "METHODS",
    "Count",
    "Defaults",
    "Method",
    "Positive",
    "Range",
    "SettingField",
    "Shapes",
    "Share",
    "Stages",
    "Temperature",
    "Value",
    "Weight",
    "setting_fields",
]

Value: TypeAlias = "Tensor | list[Tensor]"
Shapes: TypeAlias = "Mapping[str, Any]"  # of each value: a tuple, or a list of tuples


@dataclass(frozen=True)
class Range:
    """The numbers that a setting may have: finite, and between these bounds.

    Attributes:
        above: Lower bound, not included; None: 0 is the lower bound, included.
        at_most: Upper bound, included; None for none.
    """

    above: float | None = None
    at_most: float | None = None


Weight: TypeAlias = Annotated[float, Range()]
Positive: TypeAlias = Annotated[float, Range(above=0)]
Temperature: TypeAlias = Annotated[float, Range(above=0, at_most=1e6)]
Share: TypeAlias = Annotated[float, Range(at_most=1)]
Count: TypeAlias = Annotated[int, Range(above=0)]
Stages: TypeAlias = Annotated[tuple[str, ...], Range(above=0)]  # one or more names


class SettingField(NamedTuple):
    """One setting of a method.

    Attributes:
        annotation: Its type, with its `Range` where it has one.
        default: Its default; `inspect.Parameter.empty` where it has none.
    """

    annotation: Any
    default: Any


def setting_fields(cls: type[Method]) -> dict[str, SettingField]:
    """The settings of a method's class by name: its own first, `ignore_index`, `reduction` last."""
    hints = get_type_hints(cls, include_extras=True)
    names: dict[str, None] = {}
    for base in (*reversed(cls.__mro__[:-1]), Method):
        if issubclass(base, Method):
            for name in inspect.get_annotations(base):
                names.pop(name, None)
                names[name] = None
    empty = inspect.Parameter.empty
    return {
        name: SettingField(hints[name], inspect.getattr_static(cls, name, empty))
        for name in names
        if ClassVar not in (hints[name], get_origin(hints[name])) and not name.startswith("_")
    }


def _check_setting(name: str, value: Any, annotation: Any, bounds: Range | None = None) -> None:
    """Raise TypeError or ValueError unless a value fits the annotation of its setting."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        ranges = [extra for extra in arguments[1:] if isinstance(extra, Range)]
        _check_setting(name, value, arguments[0], ranges[0] if ranges else bounds)
    elif origin is Literal:
        check_choice(name, value, arguments)
    elif origin in (Union, UnionType):
        options = [option for option in arguments if option is not NoneType]
        if value is None and len(options) < len(arguments):
            return
        for number, option in enumerate(options, 1):
            try:
                _check_setting(name, value, option, bounds)
                return
            except (TypeError, ValueError):
                if number == len(options):
                    raise
    elif annotation is bool:
        check_flag(name, value)
    elif annotation in (int, float):
        if annotation is int:
            check_whole_number(name, value)
        if bounds is not None:
            check_number(name, value, positive=bounds.above is not None, at_most=bounds.at_most)
    elif origin is tuple:
        if not isinstance(value, tuple | list):
            raise TypeError(f"{name} must be a sequence, got {type(value).__name__}")
        if bounds is not None and not value:
            raise ValueError(f"{name} must name one or more, got none")
        for number, item in enumerate(value):
            _check_setting(f"{name}[{number}]", item, arguments[0])
    elif isinstance(annotation, type) and not isinstance(value, annotation):
        raise TypeError(f"{name} must be {annotation.__name__}, got {type(value).__name__}")


@dataclass(frozen=True)
class Defaults:
    """What a method's paper uses for what is set outside of it.

    Attributes:
        weight: Weight of the method's loss.
        task_weight: Weight of the task's loss; `"rest"`: 1 - weight.
        warmup: Epochs over which the method's weight rises; `"run"`: all.
        taught_by_itself: Whether the teacher is an earlier run of the student itself.
    """

    weight: float = 1.0
    task_weight: float | Literal["rest"] = 1.0
    warmup: float | Literal["run"] = 0.0
    taught_by_itself: bool = False


METHODS: dict[str, type[Method]] = {}
"""The package's methods by name: those whose class says `name=...`."""


def _no_fused(_: Method, **inputs: Any) -> Tensor | None:
    return None


def _no_soft_labels(_: Method, **inputs: Any) -> SoftLabels | None:
    return None


@dataclass_transform(kw_only_default=True)
class _Settings(nn.Module):
    """A module whose annotated fields are its settings, given by keyword and checked."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        fields = setting_fields(type(self))  # type: ignore[arg-type]  # only methods are made
        name = type(self).__name__
        unknown = sorted(settings.keys() - fields.keys())
        if unknown:
            raise TypeError(f"{name} has no setting {unknown[0]!r}, it has {', '.join(fields)}")
        for key, field in fields.items():
            value = settings.get(key, field.default)
            if value is inspect.Parameter.empty:
                raise TypeError(f"{name} needs {key}, which has no default")
            _check_setting(key, value, field.annotation)
            setattr(self, key, tuple(value) if isinstance(value, list) else value)


class Method(_Settings):
    """Base of the methods: losses that say what they read.

    A subclass has `inputs` (a class attribute, or a property where settings decide) and `terms`,
    and its settings as annotated fields with defaults; the text of each in the class's docstring,
    under `Args:`, is its help. The constructor takes them by keyword. A call takes the inputs in
    the order of the arguments of `terms`, or by name.

    What methods have in common is not said again in the text of each. They compute in float32 or
    wider, also under autocast, and treat each sample by itself, without batch statistics. Logits
    are raw, [B, C]; those of a teacher get no gradient. `target` holds [B] class indices, or
    [B, C] probabilities (mixup, cutmix). Maps are lists of [B, D, H, W], shallow to deep; pooled
    features are lists of one [B, D]; a teacher's D may be another. The loss is added to the task's
    own, both with their published weights (`defaults`).

    Args:
        ignore_index: Class index of samples that count nothing, or None.
        reduction: `"mean"`, `"sum"` or `"none"`, over the samples of a batch.

    Attributes:
        adapter_inputs: What the adapters read besides.
        defaults: What its paper uses for its weight, and the like.
        of_batch: Whether a term is one number of the whole batch, not one of each sample.
        terms: The method: named, weighted summands of the loss with their gradient, each [B], or
            a scalar if `of_batch`. An argument that is no input comes from the adapters;
            `**values` takes all there are. A keyword-only argument `kept` gets which samples
            count, [B], or None for all: for
            methods with means over the batch.
        fused: The sum of the terms, [B], with a gradient in closed form; None where these
            settings have none.
        soft_labels: The soft labels of a batch, without gradient, or None for a method that has
            none. It gets `terms`' arguments and `target`; its docstring is the gallery's caption.

    Raises:
        TypeError: An unknown setting, or one of a wrong type.
        ValueError: A setting out of its range; `ignore_index` or a reduction that makes no sense.
    """

    ignore_index: int | None = None
    reduction: Reduction = "mean"

    adapter_inputs: ClassVar[Mapping[str, Input]] = {}
    defaults: ClassVar[Defaults] = Defaults()
    of_batch: ClassVar[bool] = False
    terms: ClassVar[Callable[..., Mapping[str, Tensor]]]
    fused: ClassVar[Callable[..., Tensor | None]] = _no_fused
    soft_labels: ClassVar[Callable[..., SoftLabels | None]] = _no_soft_labels

    _arguments: ClassVar[tuple[str, ...]] = ()
    _required: ClassVar[tuple[str, ...]] = ()
    _takes_kept: ClassVar[bool] = False
    _takes_any: ClassVar[bool] = False

    @property
    def inputs(self) -> Mapping[str, Input]:
        """What `terms` is called with, by argument; a class attribute or a property."""
        return {}

    def __init_subclass__(cls, *, name: str | None = None, **others: Any) -> None:
        super().__init_subclass__(**others)
        if "terms" in vars(cls):
            parameters = [*inspect.signature(cls.terms).parameters.values()][1:]
            cls._takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
            parameters = [p for p in parameters if p.kind is not p.VAR_KEYWORD]
            named = [p for p in parameters if p.name != "kept"]
            cls._arguments = tuple(p.name for p in named)
            cls._required = tuple(p.name for p in named if p.default is p.empty)
            cls._takes_kept = len(named) < len(parameters)
        if name is not None:
            METHODS[name] = cls

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.check_settings()
        if self.of_batch and self.reduction != "mean":
            raise ValueError(
                f"{type(self).__name__} is one number of a whole batch: reduction must be 'mean', "
                f"got {self.reduction!r}"
            )
        if self.ignore_index is not None and (self.of_batch or not self._reads_labels()):
            why = "is one number of a whole batch" if self.of_batch else "reads no labels"
            raise ValueError(
                f"{type(self).__name__} {why}: it cannot leave samples out, ignore_index must be "
                f"None, got {self.ignore_index}"
            )

    def _reads_labels(self) -> bool:
        return any(isinstance(kind, Target) for kind in self.inputs.values())

    @classmethod
    def can_ignore(cls) -> bool:
        """Whether the method, as it is by default, may leave samples out (`ignore_index`)."""
        return not cls.of_batch and cls()._reads_labels()

    def check_settings(self) -> None:
        """Raise ValueError where settings do not fit each other; for subclasses."""

    def settings(self) -> dict[str, Any]:
        """The settings by name, as the constructor takes them."""
        return {name: getattr(self, name) for name in setting_fields(type(self))}

    def has_soft_labels(self) -> bool:
        """Whether `soft_labels` may give any."""
        return type(self).soft_labels is not Method.soft_labels

    def caption(self) -> str:
        """What the soft labels are, in a line; empty where there are none."""
        text = inspect.getdoc(self.soft_labels) if self.has_soft_labels() else None
        return (text or "").partition("\n")[0]

    def has_adapters(self) -> bool:
        """Whether `build_adapters` may give any, so that shapes are worth finding out."""
        return type(self).build_adapters is not Method.build_adapters

    def build_adapters(self, shapes: Shapes) -> nn.Module | None:
        """The learned parts and the memory of the method, or None.

        They are trained, wrapped, averaged and stored beside the student. Their forward takes a
        dictionary of values (`inputs` and `adapter_inputs` by name) and returns those that it
        replaces or adds; `terms` gets those that it names.

        Args:
            shapes: Shape of each of these values, for a batch of 2; a list of them for a list.
        """
        return None

    def argument_names(self) -> tuple[str, ...]:
        """The names of what `terms` is called with, in their order."""
        return self._arguments

    def unknown_inputs(self) -> list[str]:
        """Those of `inputs` that `terms` does not take."""
        if self._takes_any:
            return []
        return [name for name in self.inputs if name not in self._arguments]

    def arguments_of(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Those of the values that `terms` is called with."""
        if self._takes_any:
            return dict(values)
        return {name: values[name] for name in self._arguments if name in values}

    def reduced(self, *args: Any, **inputs: Any) -> dict[str, Tensor]:
        """The terms over the batch, each reduced as the loss is; they add up to it."""
        bound, kept = self._bound(args, inputs)
        return reduce_terms(self.terms(**bound), self.reduction, kept)

    def forward(self, *args: Any, **inputs: Any) -> Tensor:
        """The loss: a scalar, or [B] for `reduction="none"`; in float32 at least.

        Args:
            *args: The inputs, in the order of the arguments of `terms`.
            **inputs: The same by name.

        Raises:
            TypeError: A missing or an unknown input, or one of a wrong dtype.
            ValueError: An input of a wrong shape, or labels out of range.
        """
        bound, kept = self._bound(args, inputs)
        total = self.fused(**bound)
        terms = self.terms(**bound) if total is None else {"loss": total}
        return reduce_terms({"loss": total_of(terms)}, self.reduction, kept)["loss"]

    def _bound(
        self, args: tuple[Any, ...], inputs: dict[str, Any]
    ) -> tuple[dict[str, Any], Tensor | None]:
        """The inputs by name, with ignored labels made harmless, and which samples count."""
        name = type(self).__name__
        if len(args) > len(self._arguments):
            raise TypeError(
                f"{name} takes {', '.join(self._arguments)}, got {len(args)} positional inputs"
            )
        bound = dict(zip(self._arguments, args, strict=False))
        for key, value in inputs.items():
            if key in bound or not (self._takes_any or key in self._arguments):
                problem = "got twice" if key in bound else "unknown"
                raise TypeError(f"{name} takes {', '.join(self._arguments)}; {key!r} is {problem}")
            bound[key] = value
        for key in self._required:
            if key not in bound:
                from_adapters = key not in self.inputs
                source = ": it comes from the module that build_adapters returns"
                raise TypeError(f"{name}: {key} is missing{source if from_adapters else ''}")
        kept = None
        if "target" in bound:
            bound["target"], kept = without_ignored(bound["target"], self.ignore_index)
        if self._takes_kept:
            bound["kept"] = kept
        return bound, kept
