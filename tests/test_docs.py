"""README and docs: generated figures are up to date, code blocks run, named things exist."""

from __future__ import annotations

import ast
import pkgutil
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

from shared.small_networks import hard_labels, images_of, small_cnn, small_vit
from softlabels import losses
from softlabels.cli import main
from softlabels.distill.distiller import Distiller
from softlabels.inputs import PeerLogits, SecondPass
from softlabels.losses import METHODS
from softlabels.losses._method import setting_fields
from softlabels.training.config import resolve

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
OVERVIEW = ROOT / "docs" / "methods.md"
sys.path.insert(0, str(ROOT))


GENERATED = ["README.md", *(f"docs/tables/{page.name}" for page in ROOT.glob("docs/tables/*.md"))]


@pytest.mark.parametrize("page", sorted(GENERATED))
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
        ("docs/tables/demo.md", "demo.json", _better_uskd),
        ("docs/tables/losses.md", "losses.json", _broken_bound),
        ("docs/tables/teacher_cache.md", "teacher_cache.json", _larger_answers),
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
def test_links_lead_to_files_and_headings(page):
    for target, heading in re.findall(r"\]\((?!http)([^)#]*)#?([^)]*)\)", page.read_text()):
        linked = page.parent / target if target else page
        assert linked.exists(), target
        if heading:
            assert heading in headings(linked), f"{target}#{heading}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_names_of_the_package_exist(page):
    for name in re.findall(
        r"\bsoftlabels(?:\.[A-Za-z_]+)+(?=[`( ]|$)", page.read_text(), re.MULTILINE
    ):
        pkgutil.resolve_name(name)


def headings(page):
    """The anchors that GitHub gives to a page's headings."""
    found = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in found]


EXAMPLES = [
    # What fsdp.py shows is tested in test_fsdp.py, each part by itself.
    pytest.param(path, id=path.stem, marks=pytest.mark.slow if path.stem == "fsdp" else ())
    for path in sorted(ROOT.glob("examples/*.py"))
]


@pytest.mark.docs
@pytest.mark.parametrize("script", EXAMPLES)
def test_example_runs(script, capsys):
    runpy.run_path(str(script), run_name="__main__")
    assert "loss" in capsys.readouterr().out


def test_commands_in_the_docs_exist(capsys):
    commands = {
        command
        for page in PAGES
        for block in blocks(page, "sh")
        for command in re.findall(r"^softlabels ([\w-]+)", block, re.MULTILINE)
    }
    assert {"train", "compare", "cache-teacher", "predict"} <= commands
    for command in commands:
        assert main([command, "--help"]) == 0
        capsys.readouterr()


def blocks(page, language):
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)


def rows(text):
    """The cells of all rows of a page's tables."""
    lines = re.findall(r"^\|(.*)\|$", text, re.MULTILINE)
    return [[cell.strip() for cell in line.split("|")] for line in lines]


def page_of(kind):
    return ROOT / "docs" / "methods" / f"{kind}.md"


def summary_of(kind):
    """The two columns at the head of a method's page."""
    return dict(row for row in rows(page_of(kind).read_text()) if len(row) == 2)


def overview():
    """The cells of each method's row in the overview's tables, by kind."""
    found, heading = {}, []
    for name, *cells in rows(OVERVIEW.read_text()):
        if name == "method":
            heading = cells
        link = re.fullmatch(r"\[.+\]\(methods/(\w+)\.md\)", name)
        if link and heading[0] == "paper":  # the tables of results have other columns
            found[link[1]] = cells
    return found


def settings_of(kind):
    common = ("ignore_index", "reduction")  # which every method has
    fields = setting_fields(METHODS[kind])
    return {name: field.default for name, field in fields.items() if name not in common}


def inputs_of(method):
    """The kinds of what a method and its adapters read."""
    return [*method.inputs.values(), *method.adapter_inputs.values()]


def example_space(kind=None):
    """What the examples of the docs take for granted."""
    network = small_vit if kind == "vitkd" else small_cnn
    images, turned = images_of(), torch.tensor([3, 2, 1, 0])
    student, share = network(), torch.full((4,), 0.7)
    return {
        "torch": torch,
        "student": student,
        "optimizer": torch.optim.SGD(student.parameters(), lr=0.1),
        "images": images,
        "target": hard_labels(),
        "index": torch.arange(4),
        "second_view": images.flip(3),
        "partner": images[turned],
        "mixed": 0.7 * images + 0.3 * images[turned],
        "partner_index": turned,
        "share": share,
        "epochs": 2,
        "teacher": network(),
        "other_teacher": small_cnn(seed=1),
        "peer": small_cnn(seed=1),
        "new_student": small_cnn(seed=1),
        "vit": small_vit(),
        "vit_teacher": small_vit(),
    }


def test_every_method_has_a_page_and_a_row():
    assert sorted(path.stem for path in page_of("kd").parent.glob("*.md")) == sorted(METHODS)
    assert sorted(overview()) == sorted(METHODS)
    assert f"{len(METHODS)} methods" in OVERVIEW.read_text()


@pytest.mark.parametrize("kind", METHODS)
def test_a_methods_page_has_the_settings_of_the_code(kind):
    method = METHODS[kind]
    names = f"kind `{kind}`, class `{method.__name__}`"
    if hasattr(losses, f"{kind}_loss"):
        names += f", function `{kind}_loss`"
    assert summary_of(kind)["names"].startswith(names)
    stated = {}
    for cells in rows(page_of(kind).read_text()):
        if len(cells) == 3 and cells[0].startswith("`"):
            stated[cells[0].strip("`")] = ast.literal_eval(cells[1].strip("`"))
    expected = settings_of(kind)
    assert stated == expected
    assert [*stated] == [*expected]


@pytest.mark.parametrize("kind", METHODS)
def test_a_methods_page_has_the_weights_and_inputs_of_the_code(kind):
    method, summary = METHODS[kind], summary_of(kind)
    weight, task_weight = re.findall(r"`(?:method_|task.)weight` ([\w.-]+)", summary["weights"])
    assert float(weight) == method.defaults.weight
    assert task_weight == f"{method.defaults.task_weight}"
    assert ("rises over the run" in summary["weights"]) == (method.defaults.warmup == "run")
    assert method.defaults.warmup in (0, "run")  # others would have to be told
    kinds = [
        inner
        for kind in inputs_of(method())
        for inner in ((kind, kind.of) if isinstance(kind, SecondPass) else (kind,))
    ]
    named = set(re.findall(r"`([A-Z]\w+)", summary["reads"]))
    assert named == {type(kind).__name__ for kind in kinds}

    of_method, *of_task = overview()[kind][2].split(", task ")
    assert float(of_method.removesuffix(" at the end")) == method.defaults.weight
    told = of_task[0] if of_task else "1"
    assert told == "the rest" if task_weight == "rest" else float(told) == float(task_weight)


@pytest.mark.docs
@pytest.mark.parametrize("kind", METHODS)
def test_the_commands_on_a_methods_page_fit_the_settings(kind):
    (command,) = blocks(page_of(kind), "sh")
    program, verb, *arguments = shlex.split(command)
    assert (program, verb) == ("softlabels", "train")
    values = {}
    for argument in arguments:
        if argument.startswith("--"):
            *sections, name = argument.removeprefix("--").replace("-", "_").split(".")
            place = values
            for section in sections:
                place = place.setdefault(section, {})
            given = place.setdefault(name, [])
        else:
            given.append(yaml.safe_load(argument))
    resolved = resolve(_without_lists(values))
    assert resolved.method.kind == kind


def _without_lists(values):
    """Single values in place of lists of one."""
    if isinstance(values, dict):
        return {
            name: value if name == "stages" else _without_lists(value)
            for name, value in values.items()
        }
    return values[0] if len(values) == 1 else values


@pytest.mark.docs
@pytest.mark.parametrize("kind", METHODS)
def test_the_code_on_a_methods_page_runs_at_the_cost_that_is_told(kind):
    (code,) = blocks(page_of(kind), "python")
    space = example_space(kind)
    counts = {"student": 0, "teacher": 0}
    for name in counts:

        def counted(*_, name=name):
            counts[name] += 1

        space[name].register_forward_pre_hook(counted)
    building, call, running = re.split(r"^(.*\bdistiller\()", code, maxsplit=1, flags=re.MULTILINE)
    exec(building, space)
    counts.update(student=0, teacher=0)
    exec(call + running, space)

    distiller, method = space["distiller"], METHODS[kind]
    assert type(distiller.method) is method
    assert all(p.grad is not None for p in distiller.parameters() if p.requires_grad)
    weight, task_weight = method.defaults.weight, method.defaults.task_weight
    assert distiller.method_weight == weight
    rest = 1 - weight if task_weight == "rest" else task_weight
    assert distiller.task_weight == pytest.approx(rest)

    _, _, _, forwards, beside, _ = overview()[kind]
    number, _, other = forwards.partition(" + ")
    assert counts["student"] == int(number[0])
    assert counts["teacher"] == int(other in ("T", "R"))
    assert (other == "P") == any(isinstance(s, PeerLogits) for s in inputs_of(method()))
    learned = sum(p.numel() for p in distiller.trainable.parameters()) > sum(
        p.numel() for p in distiller.student.parameters()
    )
    assert ("memory" in beside) == bool(distiller.memories())
    assert (beside == "-" or beside.startswith("memory")) == (not learned)


@pytest.mark.parametrize("kind", METHODS)
def test_the_overview_says_which_networks_a_method_takes(kind):
    needs = overview()[kind][-1]
    inputs = inputs_of(METHODS[kind]())
    settings = {"num_samples": 10} if "num_samples" in settings_of(kind) else {}

    def build(student, teacher):
        Distiller(
            student(),
            METHODS[kind](**settings),
            teacher=teacher() if any(kind.reads_teacher for kind in inputs) else None,
            peer=small_vit() if any(isinstance(s, PeerLogits) for s in inputs) else None,
            example_shape=(3, 16, 16),
        )

    takes = {"any": "cv", "teacher: CNN": "cv", "teacher: with BatchNorm": "c", "ViT": "v"}[needs]
    for letter, network in (("c", small_cnn), ("v", small_vit)):
        if letter in takes:
            build(small_vit if needs != "ViT" else network, network)
        else:
            with pytest.raises(ValueError, match=r"BatchNorm|blocks"):
                build(network, network)


@pytest.mark.docs
@pytest.mark.parametrize("name", ["own_loop", "combining", "inputs", "own_method"])
def test_the_code_of_how_to_pages_runs(name):
    page = ROOT / "docs" / f"{name}.md"
    codes = blocks(page, "python")
    assert codes
    for code in codes:
        space = example_space()
        exec(compile(code, name, "exec", dont_inherit=True), space)
        assert isinstance(space.get("distiller", space.get("second")), Distiller)


def test_the_recipes_of_how_to_pages_fit_the_settings():
    recipes = blocks(ROOT / "docs" / "combining.md", "yaml")
    assert recipes
    for recipe in recipes:
        assert resolve(yaml.safe_load(recipe)).method.kind in METHODS


def test_the_page_of_inputs_lists_every_input():
    from softlabels import inputs as inputs

    text = (ROOT / "docs" / "inputs.md").read_text()
    listed = {match for cells in rows(text) for match in re.findall(r"^`(\w+)\(", cells[0])}
    bases = {
        "Input",
        "NetworkInput",
        "StudentInput",
        "TeacherInput",
        "BatchInput",
        "Provider",
        "Value",
    }
    assert listed == {*inputs.__all__} - bases
