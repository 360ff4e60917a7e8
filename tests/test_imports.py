"""What is imported: light at the core, and no method by name where every method is served."""

from __future__ import annotations

import ast
import importlib
import json
import pkgutil
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import softlabels
from softlabels.losses import METHODS

ROOT = Path(softlabels.__file__).parent

# The core needs torch alone; these come with the extra `softlabels[train]`.
EXTRAS = {
    "PIL",
    "accelerate",
    "datasets",
    "huggingface_hub",
    "jinja2",
    "matplotlib",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "pyarrow",
    "pydantic",
    "rich",
    "safetensors",
    "tensorboard",
    "timm",
    "torchmetrics",
    "torchvision",
    "tyro",
    "yaml",
}

# The parts that provide for every method, and so may name none.
NAMELESS = (
    "inputs",
    "taps",
    "distill",
    "data",
    "training.build",
    "training.engine",
    "training.epoch_weights",
    "training.task",
    "training.trainer",
    "training.validate",
)


# Which packages are loaded


def loaded_after(statements: str) -> set[str]:
    """Top-level packages that a fresh interpreter has loaded after `statements`."""
    code = f"{statements}\nimport json, sys\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    return {name.partition(".")[0] for name in json.loads(done.stdout.splitlines()[-1])}


def test_the_package_alone_loads_neither_an_extra_nor_torch():
    assert not loaded_after("import softlabels") & {*EXTRAS, "torch", "numpy"}


def test_everything_public_loads_without_an_extra():
    loaded = loaded_after("from softlabels import *\nDistiller, nkd_loss, Teacher")

    assert "torch" in loaded
    assert not loaded & EXTRAS


def test_the_check_of_loaded_packages_can_fail():
    assert loaded_after("import softlabels\nimport pydantic") & EXTRAS == {"pydantic"}


def test_a_step_with_a_teacher_runs_where_no_extra_is_installed():
    blocked = sorted({*EXTRAS, "numpy"})
    code = f"""
import sys
sys.modules.update(dict.fromkeys({blocked}))  # None: importing it is an error
import torch
from torch import nn
from softlabels import Distiller, NKDLoss, Teacher
def network():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)
    )
distiller = Distiller(network(), NKDLoss(), teacher=Teacher(network()))
distiller(torch.randn(2, 3, 8, 8), torch.tensor([0, 4])).loss.backward()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)

    assert done.returncode == 0, done.stderr


# Modules and names


@pytest.mark.parametrize(
    "name",
    [
        info.name
        for info in pkgutil.walk_packages([str(ROOT)], "softlabels.")
        if not info.name.endswith("__main__")  # it starts the command
    ],
)
def test_every_module_can_be_imported(name):
    assert importlib.import_module(name).__name__ == name


def test_every_file_is_in_a_package():
    for path in ROOT.rglob("*.py"):
        assert (path.parent / "__init__.py").is_file(), path


def test_every_public_name_is_there():
    for name in softlabels.__all__:
        assert getattr(softlabels, name) is not None
        assert name in dir(softlabels)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'softlabels' has no attribute 'kl_loss'"):
        softlabels.kl_loss  # noqa: B018  # reading it is the test


# Names of methods


def words_of(source: str) -> Iterator[str]:
    """Every identifier and every string of a source, without docstrings and comments."""
    tree = ast.parse(source)
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, documented) and node.body and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            if id(node) not in docstrings:
                yield node.value
            continue
        for name in ("id", "attr", "arg", "name", "asname", "module"):
            value = getattr(node, name, None)
            if isinstance(value, str):
                yield value


# Keys that are words, too: only their modules, functions and classes count.
WORDS = {"at", "dist"}


def named_methods(source: str) -> list[str]:
    """Keys and class names of the method table that a source names; `_` and `.` part words."""
    keys = [rf"(?:losses\.{k}|{k}_loss)" if k in WORDS else k for k in METHODS]
    either = "|".join(
        [*(method.__name__ for method in METHODS.values()), *sorted(keys, key=len)[::-1]]
    )
    pattern = re.compile(rf"(?<![a-z0-9])({either})(?![a-z0-9])", re.IGNORECASE)
    return [match.group(1) for word in words_of(source) for match in pattern.finditer(word)]


@pytest.mark.parametrize("part", NAMELESS)
def test_what_serves_every_method_names_none(part):
    path = ROOT.joinpath(*part.split("."))
    files = (
        [path.with_suffix(".py")] if path.with_suffix(".py").is_file() else [*path.rglob("*.py")]
    )

    assert files
    for file in files:
        assert named_methods(file.read_text(encoding="utf-8")) == [], file


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("from softlabels.losses import USKDLoss", ["USKDLoss"]),
        ("from softlabels.losses.nkd import anything", ["nkd"]),
        ("from softlabels.losses import anything as zipf_ls", ["zipf_ls"]),
        ("if kind == 'kd': pass", ["kd"]),
        ("value = f'with {x} for NKD'", ["NKD"]),
        ("kd_weight = 1", ["kd"]),
        ("self.kd = 1", ["kd"]),
        ("def uskd_step(): pass", ["uskd"]),
        ("call(zipf_ls=1)", ["zipf_ls"]),
        ("def f(x, nkd): pass", ["nkd"]),
        ("class KDLoss: pass", ["KDLoss"]),
        ("from softlabels.losses.at import anything", ["losses.at"]),
        ("losses.dist_loss(x), DISTLoss()", ["dist_loss", "DISTLoss"]),
        ("raise ValueError('look at it')\nimport torch.distributed as dist", []),
        ("'''NKD in a docstring.'''\n# and KD in a comment\nx = 'desk' + 'mkdir' + akd1", []),
    ],
)
def test_a_named_method_is_found(source, found):
    assert named_methods(source) == found
