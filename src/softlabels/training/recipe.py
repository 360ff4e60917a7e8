"""Reads recipes. A recipe may come from a stranger, so it is plain data and of bounded size."""

from __future__ import annotations

import difflib
import os
import stat
from importlib.resources import files
from typing import Any, ClassVar, cast

import yaml

__all__ = ["MOST_BYTES", "ConfigError", "load_recipe", "recipe_names"]

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
_RESOLVERS = {
    first: [entry for entry in entries if entry[0] in _PLAIN]
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
            _check_number(node)
        elif isinstance(node, yaml.MappingNode):
            _check_keys(node)
        return node


def _refused(problem: str, place: Any) -> yaml.YAMLError:
    """An error at the place of an event or a node."""
    return yaml.constructor.ConstructorError(None, None, problem, place.start_mark)


def _check_number(node: yaml.ScalarNode) -> None:
    if node.tag in (f"{_TAG}int", f"{_TAG}float") and len(node.value) > _LONGEST_NUMBER:
        raise _refused(f"a number of {len(node.value)} characters", node)


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
    root = files("softlabels.recipes")
    names = []
    for folder in root.iterdir():
        if folder.is_dir():
            names += [
                f"{folder.name}/{file.name.removesuffix('.yaml')}"
                for file in folder.iterdir()
                if file.name.endswith(".yaml")
            ]
    return sorted(names)


def load_recipe(name: str) -> dict[str, Any]:
    """Read a recipe: a YAML file by its path, or one of the package by its name.

    Args:
        name: The path or the name.

    Returns:
        Its settings, unchecked: texts, numbers, lists and mappings with texts as keys.

    Raises:
        ConfigError: No such recipe, or no YAML mapping of such values, or more than `MOST_BYTES`.
    """
    if os.path.lexists(name):
        text = _read_text(name)
    elif name.removesuffix(".yaml") in recipe_names():
        text = (files("softlabels.recipes") / f"{name.removesuffix('.yaml')}.yaml").read_text(
            encoding="utf-8"
        )
    else:
        near = difflib.get_close_matches(name[:_LONGEST_MESSAGE], recipe_names(), n=3, cutoff=0.3)
        raise ConfigError(
            f"no recipe {name!r:.{_LONGEST_MESSAGE}}: neither a file nor one of the package's; "
            f"near: {', '.join(near or recipe_names()) or 'none'}"
        )
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
