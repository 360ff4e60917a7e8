"""Reads recipes. A recipe may come from a stranger, so it is plain data and of bounded size."""

from __future__ import annotations

import difflib
import os
import stat
from importlib.resources import files
from typing import Any

import yaml

__all__ = ["MOST_BYTES", "ConfigError", "load_recipe", "recipe_names"]

MOST_BYTES = 1 << 20
"""Size of the largest recipe."""

_DEEPEST = 20
_LONGEST_NUMBER = 100  # characters; PyYAML needs seconds for a sexagesimal number of many digits
_LONGEST_MESSAGE = 300
_TAG = "tag:yaml.org,2002:"
_PLAIN = ("null", "bool", "int", "float", "str", "seq", "map")


class ConfigError(ValueError):
    """A setting that does not fit the schema; the message is one line."""


class _PlainLoader(yaml.SafeLoader):
    """YAML with texts, numbers, lists and mappings alone: no aliases, no other types.

    An alias can stand for exponentially much (`&a [*b, *b]`), and a recipe needs none.
    """

    yaml_constructors = {
        tag: construct
        for tag, construct in yaml.SafeLoader.yaml_constructors.items()
        if tag is None or tag in {_TAG + kind for kind in _PLAIN}
    }
    yaml_implicit_resolvers = {
        first: [entry for entry in entries if entry[0] in {_TAG + kind for kind in _PLAIN}]
        for first, entries in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            raise yaml.composer.ComposerError(
                None, None, "aliases (*name) are not taken", event.start_mark
            )
        if self._depth == _DEEPEST:
            raise yaml.composer.ComposerError(
                None, None, f"nested deeper than {_DEEPEST}", event.start_mark
            )
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        if isinstance(node, yaml.ScalarNode):
            _check_number(node)
        elif isinstance(node, yaml.MappingNode):
            _check_keys(node)
        return node


def _check_number(node: yaml.ScalarNode) -> None:
    if node.tag in (f"{_TAG}int", f"{_TAG}float") and len(node.value) > _LONGEST_NUMBER:
        raise yaml.constructor.ConstructorError(
            None, None, f"a number of {len(node.value)} characters", node.start_mark
        )


def _check_keys(node: yaml.MappingNode) -> None:
    seen: set[str] = set()
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode) or key.tag != f"{_TAG}str":
            got = f"{key.value!r:.40}" if isinstance(key, yaml.ScalarNode) else f"a {key.id}"
            problem = f"a setting's name must be text, got {got}"
        elif key.value in seen:
            problem = f"{key.value!r:.40} stands here twice"
        else:
            seen.add(key.value)
            continue
        raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)


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
        values = yaml.load(text, _PlainLoader)  # noqa: S506  # a SafeLoader, narrowed
    except (yaml.YAMLError, ValueError, LookupError, ArithmeticError, RecursionError) as error:
        # A tag in the file (!!int '') makes PyYAML's constructors raise what Python raises.
        reason = " ".join(str(error).split())
        raise ConfigError(f"{name} is no YAML: {reason:.{_LONGEST_MESSAGE}}") from error
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
    with open(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise ConfigError(f"{name} is no file, expected a YAML file")
        content = file.read(MOST_BYTES + 1)
    if len(content) > MOST_BYTES:
        raise ConfigError(f"{name} is larger than {MOST_BYTES} bytes, which no recipe is")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{name} is no YAML: it is not in UTF-8 ({error.reason})") from error
