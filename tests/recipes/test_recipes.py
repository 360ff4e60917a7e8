"""Every recipe of the package: its words, its settings, and a run of it shrunk to seconds."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from functools import cache

import pytest

from softlabels.cli import main
from softlabels.experiments.reproduce import recipes_of, tables
from softlabels.losses import METHODS
from softlabels.models import build_model
from softlabels.training.config import Config, load_recipe, recipe_names, resolve
from softlabels.training.recipes import read_recipe_text

ROWS = [name for table in tables() if table != "glyphs100" for name in recipes_of(table)]
GLYPHS = recipes_of("glyphs100")
# Rows that were published with another budget than their baselines, each with what differs.
OWN_BUDGET = {
    "table1/resnet34_resnet18_dkd": {"batch_size", "optimizer"},
    "table1/resnet50_mobilenet_dkd": {"batch_size", "optimizer"},
    "table1/resnet50_mobilenet_ofd": {"batch_size", "optimizer"},
    "self_kd_lib/resnet18_mixskd": {"student", "epochs", "batch_size"},
}
# Networks for small images, one recipe for each kind of run; all others are in the slow tests.
QUICK = [
    "table1/resnet32x4_resnet8x4_nkd",
    "table1/vgg13_vgg8_kd",
    "table1/mobilenetv2",
    "table2/cifar100_resnet18_uskd",
    "table2/cifar100_resnet18_label_smoothing",
    "zipf_tiny_imagenet/resnet18_zipf_ls",
    "glyphs100/crd",  # remembers images
    "glyphs100/reviewkd",  # maps of all stages
    "glyphs100/ban",  # two generations
    "glyphs100/mixskd",  # exits, and images that are mixed besides the batch
    "glyphs100/kdcl",  # a second network
    "glyphs100/vitkd",  # patch tokens of two transformers
]


@cache
def config_of(name: str) -> Config:
    return resolve(load_recipe(name))


def comments(name: str) -> str:
    lines = read_recipe_text(name).splitlines()
    return "\n".join(line for line in lines if line.startswith("#"))


def test_every_table_of_both_papers_has_recipes():
    numbers = (1, 2, 3, 4, 5, 6, 8, 9, 10, 11, 12, 14, 15)  # 7 and 13 are of detection
    zipf = ("cifar100", "imagenet", "inat21", "table1", "tiny_imagenet")
    assert tables() == [
        "dist_kd", "glyphs100", "mgd", "self_kd_lib", *(f"table{n}" for n in numbers), "tf_nkd",
        "vitkd", *(f"zipf_{n}" for n in zipf),
    ]  # fmt: skip
    assert len(ROWS) == 205


def test_every_method_has_a_recipe_on_the_embedded_data():
    kinds = {name: config_of(f"glyphs100/{name}").method.kind for name in METHODS}
    assert kinds == {name: name for name in METHODS}
    plain = config_of("glyphs100/cross_entropy")
    for name in METHODS:
        config = config_of(f"glyphs100/{name}")
        base = config_of("glyphs100/vit_cross_entropy") if name == "vitkd" else plain
        for part in ("data", "student", "epochs", "batch_size", "optimizer", "schedule", "mix"):
            assert getattr(config, part) == getattr(base, part), f"{name}: {part}"


@pytest.mark.parametrize("name", GLYPHS)
def test_a_recipe_on_the_embedded_data_opens_with_its_command(name):
    lines = comments(name).splitlines()
    assert "glyphs100" in lines[0]
    assert lines[1].startswith(f"#   softlabels train {name}")
    teacher = config_of(name).teacher
    if teacher.recipe is not None:
        trained = config_of(teacher.recipe).student
        assert (trained.name, trained.settings) == (teacher.name, teacher.settings)
        assert f"train {teacher.recipe} first" in lines[0]


@pytest.mark.parametrize("name", ROWS)
def test_a_recipe_opens_with_its_table_its_figure_its_command_and_its_hardware(name):
    text, paper = comments(name), config_of(name).paper
    first = text.splitlines()[0]
    assert first.startswith(f"# {paper.table}, {paper.row}: ")
    figures = [float(figure) for figure in re.findall(r"[-+]?\d+\.\d\d", first.split(": ", 1)[1])]
    published = [paper.top1, paper.top1_std, paper.top5, paper.gain]
    if paper.top1 is None and paper.gain is None:
        assert first.endswith("no figure is known.")
    else:
        assert figures == [figure for figure in published if figure is not None]
    command = re.search(rf"softlabels train {name} --data.path [A-Z0-9_]+", text)
    assert command, text
    assert f"Meant for {paper.hardware}." in text
    processes = re.search(r"--nproc_per_node (\d+)", text)
    count = re.match(r"\d+", paper.hardware)
    assert count, paper.hardware
    assert int(processes[1] if processes else 1) == int(count[0])


@pytest.mark.parametrize("name", ROWS)
def test_a_recipe_says_what_it_compares_with_and_who_teaches(name):
    config = config_of(name)
    paper, teacher = config.paper, config.teacher
    if paper.baseline is None:
        assert config.method.kind == "none"
    else:
        baseline = config_of(paper.baseline)
        assert baseline.method.kind == "none"
        assert config.label != baseline.label
        # What the row changes is the labels: network, data and budget are the baseline's.
        parts = ("data", "student", "epochs", "batch_size", "optimizer", "schedule")
        differing = {part for part in parts if getattr(config, part) != getattr(baseline, part)}
        assert differing == OWN_BUDGET.get(name, set())
        unmixed = {"mixup", "cutmix", "probability", "switch_probability"}
        assert config.mix.model_dump(include=unmixed) == baseline.mix.model_dump(include=unmixed)
    if teacher.name is not None:
        assert teacher.pretrained or teacher.recipe is not None
        if teacher.recipe is not None:
            trained = config_of(teacher.recipe)
            assert trained.student.name == teacher.name
            assert trained.data == config.data
            assert f"softlabels reproduce {name.replace('/', ' --rows ')}" in comments(name)


@pytest.mark.parametrize("name", ROWS)
def test_batches_divide_over_the_processes_that_a_recipe_is_meant_for(name):
    config = config_of(name)
    count, images = re.findall(r"\d+", f"{config.paper.hardware} {config.batch_size}")[:2]
    assert int(count) * int(images) == config.batch_size


def test_what_is_assumed_names_settings_that_exist():
    for name in recipe_names():
        config = config_of(name)
        for key, reason in config.assumed.items():
            place: object = config
            for part in key.split("."):
                place = getattr(place, part)
            assert len(reason) > 20


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("table1/vgg13_vgg8_kd", {"lr": 0.05, "epochs": 240, "batch_size": 64, "decay": 5e-4}),
        ("table1/vgg13_mobilenetv2_nkd", {"lr": 0.01, "epochs": 240, "decay": 5e-4}),
        ("table1/resnet50_mobilenet_nkd", {"lr": 0.1, "epochs": 100, "max_grad_norm": 5.0}),
        ("table2/mobilenet_uskd", {"lr": 0.1, "epochs": 100, "max_grad_norm": None}),
        ("table3/mobilenetv2_uskd", {"lr": 0.045, "epochs": 300, "decay": 4e-5}),
        ("table3/shufflenetv2_uskd", {"lr": 0.5, "epochs": 300, "decay": 4e-5, "batch_size": 1024}),
        ("table4/regnetx_uskd", {"lr": 0.8, "epochs": 100, "decay": 5e-5, "precise_bn": 8192}),
        ("table4/deit_tiny_uskd", {"lr": 1e-3, "epochs": 300, "decay": 0.05, "max_grad_norm": 5.0}),
        ("table11/deit_base_nkd", {"ema_decay": 0.99996, "epochs": 300, "batch_size": 1024}),
        ("zipf_cifar100/densenet121_zipf_ls", {"lr": 0.1, "epochs": 200, "decay": 1e-4}),
        ("zipf_imagenet/resnet50_zipf_ls", {"lr": 0.1, "epochs": 100, "batch_size": 256}),
        ("table1/resnet50_mobilenet_dkd", {"lr": 0.2, "batch_size": 512, "epochs": 100}),
        ("table1/resnet34_resnet18_dkd", {"method_warmup_epochs": 1, "method_weight": None}),
        ("table1/vgg13_vgg8_dkd", {"lr": 0.05, "batch_size": 64, "method_warmup_epochs": 20}),
        ("table1/resnet50_mobilenet_ofd", {"lr": 0.05, "batch_size": 128, "method_weight": 1e-4}),
        ("table1/resnet50_mobilenet_reviewkd", {"lr": 0.1, "epochs": 100, "method_weight": 8.0}),
        ("dist_kd/resnet34_resnet18", {"lr": 0.1, "epochs": 100, "batch_size": 256, "decay": 1e-4}),
        ("self_kd_lib/resnet18_dks", {"lr": 0.1, "epochs": 200, "decay": 5e-4, "batch_size": 128}),
        ("tf_nkd/shufflenetv2", {"lr": 0.5, "epochs": 300, "decay": 4e-5, "batch_size": 1024}),
        ("vitkd/deit_base_vitkd_nkd", {"ema_decay": 0.99996, "epochs": 300, "batch_size": 1024}),
    ],
)  # fmt: skip
def test_published_settings_reach_the_rows_through_their_bases(name, values):
    config = config_of(name)
    ours = {"lr": config.optimizer.lr, "decay": config.optimizer.weight_decay, **dict(config)}
    assert {key: ours[key] for key in values} == values


def test_two_ways_to_the_same_row_are_the_same_run():
    from softlabels.training.run_folder import fixed_settings

    for one, other in (
        ("table2/resnet18_uskd", "table15/t1"),
        ("table1/resnet34_resnet18_nkd", "table14/t1"),
        ("table1/resnet34_resnet18_nkd", "table5/nkd"),
        ("table2/mobilenet_uskd", "table6/mobilenet_both"),
        ("table4/regnetx_uskd", "table9/regnetx_both"),
        ("table6/regnetx_target", "table12/regnetx_squared"),
        ("table2/cifar100_resnet18", "table10/resnet18"),
        ("table1/resnet18", "dist_kd/resnet18"),
        ("zipf_table1/resnet18", "zipf_tiny_imagenet/resnet18"),
    ):
        assert fixed_settings(config_of(one)) == fixed_settings(config_of(other))


@pytest.mark.parametrize("name", QUICK)
def test_a_recipe_runs_shrunk(name, capsys):
    assert_runs_shrunk(name, capsys)


@pytest.mark.smoke
@pytest.mark.slow
@pytest.mark.parametrize("name", [*ROWS, *GLYPHS])
def test_every_recipe_runs_shrunk(name, capsys):
    assert_runs_shrunk(name, capsys)


def assert_runs_shrunk(name, capsys) -> None:
    assert main(["train", name, "--smoke", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    found = re.search(r"the exported student is within (\S+) of the trained one", out)
    assert found, out
    assert math.isclose(float(found[1]), 0, abs_tol=1e-3)


def test_a_shrunk_run_keeps_the_network_the_loss_and_the_size(tmp_path, capsys):
    output = tmp_path / "run"
    name = "table1/resnet32x4_resnet8x4_nkd"
    assert main(["train", name, "--smoke", "--output", str(output), "--device", "cpu"]) == 0
    shrunk, full = resolve(load_recipe(str(output / "config.yaml"))), config_of(name)
    assert shrunk.student == full.student
    assert shrunk.teacher.name == full.teacher.name
    assert shrunk.method == full.method
    assert shrunk.optimizer == full.optimizer
    assert shrunk.schedule.decay_epochs == (150 / 240, 180 / 240, 210 / 240)
    assert shrunk.data.source == "noise"
    assert shrunk.data.num_classes == 100
    assert shrunk.data.image_size == 32
    ours = build_model(f"file:{output / 'student.safetensors'}", num_classes=100)
    assert sum(p.numel() for p in ours.parameters()) > 1_000_000
    assert (output / "export" / "safetensors" / "MODEL_CARD.md").is_file()


@pytest.mark.slow
@pytest.mark.distributed
def test_a_shrunk_run_takes_several_processes(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += ["-m", "softlabels", "train", "table2/cifar100_resnet18_uskd", "--smoke"]
    command += [
        "--student.name",
        "timm:resnet8",
        "--device",
        "cpu",
        "--output",
        str(tmp_path / "r"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("smoke: two steps") == 1
    assert resolve(load_recipe(str(tmp_path / "r" / "config.yaml"))).batch_size == 8
