"""Which settings a search may change, and how far."""

from __future__ import annotations

import difflib
import math
import types
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Annotated, Any, TypeAlias, Union, get_args, get_origin

from pydantic import BaseModel

from softlabels.experiments.sweep_record import shown
from softlabels.training.config import (
    Config,
    ConfigError,
    resolve,
    with_method_defaults,
)
from softlabels.training.recipes import settings_of

__all__ = [
    "Choices",
    "Range",
    "Space",
    "default_space",
    "fitted_space",
    "nested",
    "read_space",
    "value_of",
    "with_values",
]

# They decide what is measured, not how well a method does.
_FIXED = ("data.path", "data.source", "data.train_share", "data.validation", "output", "seed")
_SHARES = (0.05, 0.95)  # of a method that leaves the labels the rest
_TEMPERATURES = (1.0, 10.0)
_SMOOTHING = (0.01, 0.4)
_WEIGHT_FACTOR, _OTHER_FACTOR = 10.0, 4.0
_DIGITS = 4  # of a proposed number: more are noise
_EXAMPLE = "optimizer.lr=0.05..0.5:log or task.smooth_over=all,non_target"


@dataclass(frozen=True)
class Range:
    """Numbers between two finite ends, or `whole` ones.

    With `log`, for numbers above 0, equal factors are equally likely, rather than equal distances.
    """

    low: float
    high: float
    log: bool = False
    whole: bool = False

    def __post_init__(self) -> None:
        if not -math.inf < self.low < self.high < math.inf:
            raise ValueError(f"a range goes from a number to a larger one, got {self}")
        if self.log and self.low <= 0:
            raise ValueError(f"a range with log is above 0, got {self}")
        if self.whole and not (self.low == int(self.low) and self.high == int(self.high)):
            raise ValueError(f"a range of whole numbers has whole ends, got {self}")

    def __str__(self) -> str:
        return f"{self.low:g}..{self.high:g}" + (":log" if self.log else "")

    def __contains__(self, value: object) -> bool:
        return (
            isinstance(value, int | float)
            and not isinstance(value, bool)
            and self.low <= value <= self.high
            and (not self.whole or value == int(value))
        )

    def rounded(self, value: float) -> float:
        """A number of the range with few digits, near another one."""
        if self.whole:
            return int(value)
        return min(max(float(f"{value:.{_DIGITS}g}"), self.low), self.high)


Choices: TypeAlias = tuple[bool | int | float | str | None, ...]
"""Values of a setting, without an order."""

Space: TypeAlias = Mapping[str, Range | Choices]
"""By setting, such as `method.temperature`: what may be tried."""


def default_space(config: Config) -> dict[str, Range | Choices]:
    """What is worth a search around some settings, as docs/sweep.md says: weights, temperatures.

    Raises:
        ValueError: There is nothing of that.
    """
    config = with_method_defaults(config)
    if config.method.kind == "none":
        return _space_of_task(config)
    found = {
        f"method.{name}": value
        for name, value in config.method
        if isinstance(value, int | float) and not isinstance(value, bool) and value > 0
    }
    weights = {name: value for name, value in found.items() if name.endswith("weight")}
    space: dict[str, Range | Choices] = {}
    if config.task.weight == "rest":
        space["method_weight"] = Range(*_SHARES)
    elif len(weights) < 2 and config.method_weight:
        space["method_weight"] = _around(config.method_weight, _WEIGHT_FACTOR)
    for name, value in weights.items():
        space[name] = _around(value, _WEIGHT_FACTOR)
    for name, value in found.items():
        if name.endswith("temperature"):
            usual = Range(*_TEMPERATURES, log=True)
            space[name] = usual if value in usual else _around(value, _OTHER_FACTOR)
    if not space:
        raise ValueError(
            f"nothing to search by default: {config.label} has no weight or temperature that is "
            f"above 0; give a space, --space KEY=LOW..HIGH, such as {_EXAMPLE}"
        )
    return space


def _space_of_task(config: Config) -> dict[str, Range | Choices]:
    smoothing = config.task.label_smoothing
    if smoothing:
        low, high = _SMOOTHING
        return {"task.label_smoothing": Range(min(low, smoothing), max(high, smoothing), log=True)}
    optimizer = config.optimizer
    numbers = {"optimizer.lr": optimizer.lr, "optimizer.weight_decay": optimizer.weight_decay}
    return {name: _around(value, _OTHER_FACTOR) for name, value in numbers.items() if value > 0}


def _around(value: float, factor: float) -> Range:
    # Of few digits, so that 0.1 * 10 is 1.
    low, high = (float(f"{end:.{_DIGITS}g}") for end in (value / factor, value * factor))
    return Range(low, high, log=True)


def read_space(texts: Sequence[str]) -> dict[str, Range | Choices]:
    """Read a space from texts: KEY=LOW..HIGH, KEY=LOW..HIGH:log, or KEY=VALUE,VALUE,...

    Raises:
        ValueError: One is none of these, or a setting is there twice.
    """
    space: dict[str, Range | Choices] = {}
    for text in texts:
        key, equals, values = text.partition("=")
        key = key.strip().replace("-", "_")
        if not equals or not key or not values:
            raise ValueError(
                f"space: expected KEY=LOW..HIGH, KEY=LOW..HIGH:log or KEY=VALUE,VALUE, such as "
                f"{_EXAMPLE}, got {text!r:.200}"
            )
        if key in space:
            raise ValueError(f"space: {key} is there twice")
        try:
            space[key] = _range(values) if ".." in values else _choices(values)
        except ValueError as error:
            raise ValueError(f"space: {key}: {error}") from error
    return space


def _range(text: str) -> Range:
    span, colon, scale = text.partition(":")
    if colon and scale != "log":
        raise ValueError(f"expected LOW..HIGH or LOW..HIGH:log, got {text!r:.80}")
    low, _, high = span.partition("..")
    try:
        ends = float(low), float(high)
    except ValueError as error:
        raise ValueError(f"expected two numbers, LOW..HIGH, got {text!r:.80}") from error
    return Range(*ends, log=bool(colon))


def _choices(text: str) -> Choices:
    return tuple(settings_of([f"value={part.strip()}"])["value"] for part in text.split(","))


def fitted_space(config: Config, space: Space) -> dict[str, Range | Choices]:
    """Check a space against the settings, and find out which ranges are of whole numbers.

    Raises:
        ValueError: It is empty, or has a setting that there is not, that is no number or that
            decides what is measured; or values that the settings do not take.
    """
    if not space:
        raise ValueError(f"nothing to search: expected a space such as {_EXAMPLE}")
    fitted: dict[str, Range | Choices] = {}
    for key, values in space.items():
        kinds = _types_of(config, key)
        if isinstance(values, Range):
            if not kinds & {int, float}:
                raise ConfigError(f"space: {key} is no number: expected {key}=VALUE,VALUE,...")
            values = replace(values, whole=values.whole or float not in kinds)
        elif len({*map(repr, values)}) < max(2, len(values)):
            raise ConfigError(f"space: {key} needs two values or more that differ, got {values}")
        elif not all(isinstance(value, bool | int | float | str | None) for value in values):
            raise ConfigError(f"space: {key}: expected numbers, texts, true or false, got {values}")
        fitted[key] = values
        for value in (values.low, values.high) if isinstance(values, Range) else values:
            try:
                with_values(config, {key: value})
            except ConfigError as error:
                raise ConfigError(f"space: {key}={shown(value)} does not fit: {error}") from error
    return fitted


def _types_of(config: Config, key: str) -> set[Any]:
    """The types that a setting takes."""
    section: Any = config
    *sections, last = key.split(".")
    for part in sections:
        section = getattr(section, part, None)
    known = type(section).model_fields if isinstance(section, BaseModel) else {}
    if last not in known:
        near = difflib.get_close_matches(last[:80], known or type(config).model_fields, n=3)
        raise ConfigError(
            f"space: unknown setting {key!r:.200}"
            + (f": expected {', '.join(near)}" if near else "")
        )
    if key in _FIXED:
        raise ConfigError(f"space: {key} decides what is measured, it cannot be searched")
    return _types(known[last].annotation)


def _types(annotation: Any) -> set[Any]:
    """The members of a union; containers stay whole."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return _types(get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        return set().union(*map(_types, get_args(annotation)))
    return {annotation}


def value_of(config: Config, key: str) -> Any:
    """A setting's value; where it is left to the method's paper, the paper's."""
    return attrgetter(key)(with_method_defaults(config))


def with_values(config: Config, values: Mapping[str, Any]) -> Config:
    """Settings of which some, by dotted name, are changed.

    Raises:
        ConfigError: The settings do not take them.
    """
    return resolve(nested(values, config.model_dump()))


def nested(
    values: Mapping[str, Any], within: MutableMapping[str, Any] | None = None
) -> MutableMapping[str, Any]:
    """Values by dotted name, as mappings in each other: new ones, or those that there are."""
    result: MutableMapping[str, Any] = {} if within is None else within
    for key, value in values.items():
        *sections, last = key.split(".")
        place = result
        for section in sections:
            place = place.setdefault(section, {})
        place[last] = value
    return result
