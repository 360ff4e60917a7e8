"""README and docs: generated figures are up to date, code blocks run, named things exist."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from softlabels.cli import main

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
sys.path.insert(0, str(ROOT))


@pytest.mark.parametrize(
    "page",
    ["README.md", "docs/results.md", "docs/speed.md", "docs/teacher_cache.md", "docs/reproduce.md"],
)
def test_generated_figures_equal_the_results_files(page):
    from benchmarks.render import rendered

    text = (ROOT / page).read_text()
    assert ":begin -->" in text
    assert rendered(text) == text, "run `make docs`"


def _better_uskd(content):
    content["results"]["uskd"]["top1"] += 1


def _broken_bound(content):
    content["bounds"][0]["held"] = not content["bounds"][0]["held"]


def _larger_answers(content):
    content["sizes"][0]["bytes_per_view"] += 1


@pytest.mark.parametrize(
    ("page", "file", "change"),
    [
        ("README.md", "demo.json", _better_uskd),
        ("docs/speed.md", "losses.json", _broken_bound),
        ("docs/teacher_cache.md", "teacher_cache.json", _larger_answers),
    ],
)
def test_a_changed_result_changes_the_page(page, file, change, monkeypatch):
    from benchmarks import render

    read = render._read

    def other(name):
        content = read(name)
        if name == file:
            change(content)
        return content

    monkeypatch.setattr(render, "_read", other)
    text = (ROOT / page).read_text()
    assert render.rendered(text) != text


def test_readme_code_runs():
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(blocks) == 2

    def network(width):
        return nn.Sequential(
            nn.Conv2d(3, width, 3, 2, 1), nn.ReLU(), nn.Conv2d(width, width, 3, 2, 1), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 5),
        )  # fmt: skip

    images, target = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 3])
    space = {"torch": torch, "student": network(8), "teacher_model": network(16)}
    before = [p.detach().clone() for p in space["student"].parameters()]
    space["loader"] = [(images, target)]
    for block in blocks:
        exec(block, space)
    assert any(
        not torch.equal(a, b) for a, b in zip(before, space["student"].parameters(), strict=True)
    )
    assert space["distiller"](images, target).loss.isfinite()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_to_files_exist(page):
    for target in re.findall(r"\]\((?!http|#)([^)#]+)\)", page.read_text()):
        assert (page.parent / target).exists(), target


EXAMPLES = [
    # What fsdp.py shows is tested in test_fsdp.py, each part by itself.
    pytest.param(path, id=path.stem, marks=pytest.mark.slow if path.stem == "fsdp" else ())
    for path in sorted(ROOT.glob("examples/*.py"))
]


@pytest.mark.parametrize("script", EXAMPLES)
def test_example_runs(script, capsys):
    runpy.run_path(str(script), run_name="__main__")
    assert "loss" in capsys.readouterr().out


def test_commands_in_the_readme_exist(capsys):
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    commands = set(re.findall(r"^softlabels ([\w-]+)", "\n".join(blocks), re.MULTILINE))
    assert {"demo", "train", "cache-teacher", "eval", "predict", "methods"} <= commands
    for command in commands:
        assert main([command, "--help"]) == 0
        capsys.readouterr()
