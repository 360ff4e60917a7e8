"""Reads recipes. A recipe may come from a stranger, so it is plain data and of bounded size."""

from __future__ import annotations

import difflib
import os
import re
import stat
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, ClassVar, cast

import yaml

__all__ = [
    "MOST_BYTES",
    "ConfigError",
    "flattened",
    "load_recipe",
    "merged",
    "parsed_text",
    "read_recipe_text",
    "recipe_names",
    "settings_of",
]

MOST_BYTES = 1 << 20
"""Size of the largest recipe."""

_MOST_VALUES = 100_000
_DEEPEST = 20
_LONGEST_NUMBER = 100  # characters; PyYAML takes seconds for a sexagesimal number of many digits
_LONGEST_MESSAGE = 300
_TAG = "tag:yaml.org,2002:"
_PLAIN = {_TAG + kind for kind in ("null", "bool", "int", "float", "str", "seq", "map")}
_CONSTRUCTORS = {
    tag: construct
    for tag, construct in yaml.SafeLoader.yaml_constructors.items()
    if tag is None or tag in _PLAIN
}
# As in YAML 1.2: `precision: no` and `check: off` are texts.
_TRUTH = re.compile(r"(?:true|True|TRUE|false|False|FALSE)$")
_RESOLVERS = {
    first: [
        (tag, _TRUTH if tag == _TAG + "bool" else pattern)
        for tag, pattern in entries
        if tag in _PLAIN
    ]
    for first, entries in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


class ConfigError(ValueError):
    """A setting that does not fit the schema; the message is one line."""


class _PlainLoader(yaml.SafeLoader):
    """YAML with texts, numbers, lists and mappings alone: no aliases, no other types.

    An alias can stand for exponentially much (`&a [*b, *b]`), and a recipe needs none.
    """

    yaml_constructors: ClassVar[dict[str | None, Any]] = _CONSTRUCTORS

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.yaml_implicit_resolvers = _RESOLVERS
        self._num_values = 0
        self._depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event: Any = cast("Any", self).peek_event()
        self._num_values += 1
        if isinstance(event, yaml.AliasEvent):
            raise _refused("aliases (*name) are not taken", event)
        if self._num_values > _MOST_VALUES:
            raise _refused(f"more than {_MOST_VALUES} values", event)
        if self._depth == _DEEPEST:
            raise _refused(f"nested deeper than {_DEEPEST}", event)
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        if isinstance(node, yaml.ScalarNode):
            is_number = node.tag in (f"{_TAG}int", f"{_TAG}float")
            if is_number and len(node.value) > _LONGEST_NUMBER:
                raise _refused(f"a number of {len(node.value)} characters", node)
        elif isinstance(node, yaml.MappingNode):
            _check_keys(node)
        return node


def _refused(problem: str, place: Any) -> yaml.YAMLError:
    """An error at the place of an event or a node."""
    return yaml.constructor.ConstructorError(None, None, problem, place.start_mark)


def _check_keys(node: yaml.MappingNode) -> None:
    seen: set[str] = set()
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode) or key.tag != f"{_TAG}str":
            got = f"{key.value!r:.40}" if isinstance(key, yaml.ScalarNode) else f"a {key.id}"
            raise _refused(f"a setting's name must be text, got {got}", key)
        if key.value in seen:
            raise _refused(f"{key.value!r:.40} stands here twice", key)
        seen.add(key.value)


def recipe_names() -> list[str]:
    """Names of the recipes in the package, without their ending."""
    root = Path(str(files("softlabels.recipes")))
    paths = (path.relative_to(root) for path in root.glob("*/*.yaml"))
    return sorted(path.with_suffix("").as_posix() for path in paths)


def load_recipe(name: str, above: tuple[str, ...] = ()) -> dict[str, Any]:
    """Read a recipe: a YAML file by its path, or one of the package by its name.

    A recipe may say `base: NAME`: another recipe, of the package or a file in the same folder.
    What the recipe says itself lies over that (`merged`).

    Args:
        name: The path or the name.
        above: Recipes that are based on it, and on each other.

    Returns:
        Its settings, unchecked: texts, numbers, lists and mappings with texts as keys.

    Raises:
        ConfigError: No such recipe, or no YAML mapping of such values, or more than `MOST_BYTES`,
            or a base that is none.
    """
    values = parsed_text(read_recipe_text(name), name)
    base = values.pop("base", None)
    if base is None:
        return values
    if not isinstance(base, str):
        raise ConfigError(f"base of {name} must be the name of a recipe, got {base!r:.80}")
    above = (*above, name)
    place = _place_of_base(name, base)
    if place in above or len(above) == _DEEPEST:
        raise ConfigError(f"recipes are based on each other: {' -> '.join((*above, place)):.300}")
    return merged(load_recipe(place, above), values)


def flattened(values: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """Settings of sections by dotted names, as on the command line."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            found |= flattened(value, f"{before}{key}.")
        else:
            found[f"{before}{key}"] = value
    return found


def merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Lay settings over others.

    Mappings are merged, all else is replaced; `null` takes a setting back to its default. A method
    of another kind, or data of another source, replace the whole section, because their settings
    are others. Another method over a paper's row is not that row: without words of its own it has
    neither its figures nor its assumptions.
    """
    result = dict(base)
    kinds = [_kind(values.get("method")) or "none" for values in (base, over)]
    is_row = "row" in (base.get("paper") or {})
    if is_row and "method" in over and "paper" not in over and kinds[0] != kinds[1]:
        del result["paper"]
        result.pop("assumed", None)
    for key, value in over.items():
        before = result.get(key)
        if key == "method" and _kind(value) not in (None, _kind(before)):
            result[key] = value
        elif key == "data" and _differ(before, value, "source"):
            result[key] = merged({}, value)
        elif isinstance(before, Mapping) and isinstance(value, Mapping):
            result[key] = merged(before, value)
        elif value is None:
            result.pop(key, None)
        else:
            result[key] = value
    return result


def settings_of(texts: Sequence[str]) -> dict[str, Any]:
    """Settings from texts such as `optimizer.lr=0.1`.

    Raises:
        ConfigError: A text without `=`, or a value that is no YAML.
    """
    result: dict[str, Any] = {}
    for text in texts:
        path, equals, value = text.partition("=")
        keys = path.split(".")
        if not equals or not all(keys):
            raise ConfigError(f"expected KEY=VALUE, such as epochs=10, got {text!r:.200}")
        place = result
        for key in keys[:-1]:
            place = place.setdefault(key, {})
            if not isinstance(place, dict):
                raise ConfigError(f"{path:.200} is set twice")
        # A null stays: it takes a recipe's setting back to its default.
        place[keys[-1]] = parsed_text(f"value: {value}", f"the value of {path:.200}")["value"]
    return result


def _differ(before: object, after: object, key: str) -> bool:
    """Whether two sections name different things."""
    names = [part.get(key) if isinstance(part, Mapping) else None for part in (before, after)]
    return None not in names and names[0] != names[1]


def _kind(method: object) -> object:
    return method.get("kind") if isinstance(method, Mapping) else method


def _place_of_base(name: str, base: str) -> str:
    """The name of a recipe's base: one of the package's, or a file beside the recipe."""
    if base.removesuffix(".yaml") in recipe_names():
        return base.removesuffix(".yaml")
    beside = os.path.join(os.path.dirname(name), base)
    if os.path.lexists(name) and base == os.path.basename(base) and os.path.lexists(beside):
        return beside
    raise ConfigError(
        f"{name} is based on {base!r:.200}, which is neither one of the package's recipes nor a "
        f"file in the same folder; near: {_near(base)}"
    )


def _near(name: str) -> str:
    names = recipe_names()
    near = difflib.get_close_matches(name[:_LONGEST_MESSAGE], names, n=3, cutoff=0.3)
    return ", ".join(near or names[:5]) or "none"


def read_recipe_text(name: str) -> str:
    """The text of a recipe, comments included.

    Raises:
        ConfigError: No such recipe, or more than `MOST_BYTES`.
    """
    if os.path.lexists(name):
        return _read_text(name)
    if name.removesuffix(".yaml") in recipe_names():
        file = files("softlabels.recipes") / f"{name.removesuffix('.yaml')}.yaml"
        return file.read_text(encoding="utf-8")
    raise ConfigError(
        f"no recipe {name!r:.{_LONGEST_MESSAGE}}: neither a file nor one of the package's; "
        f"near: {_near(name)}"
    )


def parsed_text(text: str, name: str) -> dict[str, Any]:
    """The mapping that a YAML text holds.

    Args:
        text: The text.
        name: What an error calls it.

    Raises:
        ConfigError: No YAML mapping of texts, numbers, lists and mappings.
    """
    try:
        values = yaml.load(text, _PlainLoader)  # a SafeLoader, narrowed
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{name} is no YAML: {reason:.{_LONGEST_MESSAGE}}") from error
    except (ValueError, LookupError, ArithmeticError) as error:  # `!!int ''`, `!!bool x`
        raise ConfigError(
            f"{name} is no YAML: a value does not fit its tag: {error!s:.{_LONGEST_MESSAGE}}"
        ) from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{name} must hold a mapping of settings, got {type(values).__name__}")
    return values


def _read_text(name: str) -> str:
    """The text of a regular file of bounded size."""
    try:
        # Without O_NONBLOCK a named pipe would wait for its writer, for ever.
        descriptor = os.open(name, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    except OSError as error:
        raise ConfigError(f"{name} cannot be read: {error.strerror}") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ConfigError(f"{name} is no file, expected a YAML file")
    with open(descriptor, "rb") as file:
        content = file.read(MOST_BYTES + 1)
    if len(content) > MOST_BYTES:
        raise ConfigError(f"{name} is larger than {MOST_BYTES} bytes, which no recipe is")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{name} is no YAML: it is not in UTF-8 ({error.reason})") from error
