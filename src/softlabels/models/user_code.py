"""Networks and methods of the user's own, named as `package.module:name`.

The name may stand in a recipe from a stranger. So not every function that can be imported is
called: `os:system` would be one, too.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import sys
import sysconfig
import typing
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from softlabels.losses import Method

__all__ = ["MODEL_NAMES", "import_builder", "import_method"]

MODEL_NAMES = "timm:NAME, torchvision:NAME, file:PATH or package.module:function"
"""The forms of a model's name."""

_NEAR = 5


def import_builder(module_name: str, function_name: str) -> Callable[..., nn.Module]:
    """Import what builds a network, and make sure that this is what it does, without calling it.

    Modules are looked for where Python looks, and last in the working folder.

    Args:
        module_name: Dotted name of a module, outside of the standard library.
        function_name: A class of it that derives from `nn.Module`; or a function that is defined
            in this very module, and, if the module belongs to an installed package, says by its
            return annotation that it returns an `nn.Module`.

    Raises:
        ModuleNotFoundError: The module exists, and imports another one that does not.
        ValueError: There is no such module, or nothing in it of this name that builds a network.
    """
    name = f"{module_name}:{function_name}"
    module, value = _named(module_name, function_name, "model")
    if inspect.isclass(value) and issubclass(value, nn.Module):
        return value
    if not inspect.isfunction(value):
        raise ValueError(
            f"{name!r} is neither a function nor a class that derives from nn.Module, but "
            f"{value!r:.80}: it is not called"
        )
    if value.__module__ != module.__name__:
        raise ValueError(
            f"{name!r} is a function of another module: it is not called; name it as "
            f"{value.__module__}:{value.__name__}"
        )
    if _is_installed(module) and not _says_that_it_returns_a_network(value):
        raise ValueError(
            f"{name!r} belongs to an installed package, and does not say by its return annotation "
            "that it returns an nn.Module: it is not called. Name a function of your own around it"
        )
    builder: Callable[..., nn.Module] = value
    return builder


def import_method(name: str) -> type[Method]:
    """Import a class of losses of the user's own.

    Args:
        name: `package.module:Class`; the class derives from `softlabels.losses.Method`.

    Raises:
        ModuleNotFoundError: The module exists, and imports another one that does not.
        ValueError: There is no such module, or no such method in it.
    """
    module_name, _, class_name = name.partition(":")
    _, value = _named(module_name, class_name, "method")
    if not (inspect.isclass(value) and issubclass(value, Method)):
        raise ValueError(
            f"{name!r:.200} is no method, but {value!r:.80}: a method is a class that derives from "
            "softlabels.losses.Method"
        )
    if not hasattr(value, "terms"):
        raise ValueError(f"{name!r:.200} has no `terms`, the function that computes a method")
    return value


def _named(module_name: str, name: str, what: str) -> tuple[ModuleType, Any]:
    """A module of the user's, and what stands in it under a name."""
    full = f"{module_name}:{name}"
    parts = module_name.split(".")
    if not all(part.isidentifier() for part in (*parts, name)):
        raise ValueError(f"expected a {what} name like package.module:name, got {full!r:.200}")
    if parts[0] in {*sys.stdlib_module_names, *sys.builtin_module_names} or "__main__" in parts:
        raise ValueError(
            f"{full!r:.200} is of Python's own library, which has no {what}s; expected a module "
            "of yours"
        )
    module = _imported(module_name)
    value = getattr(module, name, None)
    if not callable(value):
        callables = [key for key, other in vars(module).items() if callable(other)]
        near = difflib.get_close_matches(name, callables, n=_NEAR)
        hint = f"; near: {', '.join(near)}" if near else ""
        raise ValueError(f"unknown function or class of module {module_name!r}: {name!r}{hint}")
    return module, value


def _imported(name: str) -> ModuleType:
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)  # last, so that nothing of the working folder hides a package
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        # A module that exists but lacks one of its own imports is not a wrong name.
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise
        raise ValueError(
            f"expected a model name like {MODEL_NAMES}, or package.module:Class for a "
            f"method; there is no kind and no importable module {name!r:.200}"
        ) from error


def _is_installed(module: ModuleType) -> bool:
    """Whether a module lies where packages are installed, so that it is not the user's own."""
    origin = getattr(module, "__file__", None)
    if origin is None:
        return True
    folder = Path(origin).resolve()
    roots = {sysconfig.get_path(key) for key in ("stdlib", "platstdlib", "purelib", "platlib")}
    return bool({"site-packages", "dist-packages"} & {*folder.parts}) or any(
        folder.is_relative_to(Path(root).resolve()) for root in roots if root
    )


def _says_that_it_returns_a_network(function: Callable[..., object]) -> bool:
    try:
        returned = typing.get_type_hints(function).get("return")
    except (NameError, TypeError, AttributeError, SyntaxError):  # names that only a checker knows
        return False
    return inspect.isclass(returned) and issubclass(returned, nn.Module)
