"""What the installed distribution asks for and brings along."""

from __future__ import annotations

import re
from importlib.metadata import distribution
from importlib.resources import files
from pathlib import Path

import pytest
import yaml

import softlabels

ROOT = Path(__file__).parents[1]


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


def test_the_version_stands_in_one_place():
    assert softlabels.__version__ == distribution("softlabels").version
    for name in ("pyproject.toml", "CITATION.cff"):
        text = (ROOT / name).read_text(encoding="utf-8")
        assert not re.search(r"^version\b", text, re.MULTILINE), name


@pytest.mark.parametrize("path", sorted(ROOT.glob(".github/workflows/*.yml")), ids=lambda p: p.stem)
def test_workflows_call_verbs_that_exist(path):
    verbs = re.findall(
        r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE
    )
    for job in yaml.safe_load(path.read_text(encoding="utf-8"))["jobs"].values():
        named = re.findall(
            r"^make ([\w-]+)", "\n".join(s.get("run", "") for s in job["steps"]), re.M
        )
        named += job.get("strategy", {}).get("matrix", {}).get("verb", [])
        assert set(named) <= {*verbs}
