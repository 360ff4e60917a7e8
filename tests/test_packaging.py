"""What the installed distribution asks for and brings along."""

from __future__ import annotations

import re
from importlib.metadata import distribution
from importlib.resources import files

import pytest


def test_the_core_needs_torch_alone():
    requirements = distribution("softlabels").requires or []
    core = [line for line in requirements if "extra ==" not in line]
    assert [re.match(r"[\w-]+", line)[0] for line in core] == ["torch"]


def test_the_trainer_is_an_extra():
    requirements = distribution("softlabels").requires or []
    extra = {re.match(r"[\w-]+", r)[0] for r in requirements if re.search(r"extra == .train", r)}
    assert {"timm", "accelerate", "torchmetrics", "pydantic", "tyro", "safetensors"} <= extra


@pytest.mark.parametrize(
    "name",
    [
        "py.typed",
        "data/sources/glyphs100.npz",
        "recipes/glyphs100/teacher.safetensors",
        "recipes/glyphs100/uskd.yaml",
        "recipes/table1/vgg13_vgg8_nkd.yaml",
        "report/page.html.j2",
        "export/model_card.md.j2",
    ],
)
def test_package_files_are_there(name):
    assert (files("softlabels") / name).is_file()


def test_command_is_installed():
    commands = {point.name: point.value for point in distribution("softlabels").entry_points}
    assert commands == {"softlabels": "softlabels.cli:main"}
