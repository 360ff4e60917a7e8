"""Networks and weights that do not fit: one line on the command line, status 2, nothing trained."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from shared.tiny_runs import train_arguments, write_pictures
from softlabels.cli import main
from softlabels.io.weights import save_weights
from softlabels.models import FileRecord, build_model, model_metadata


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """Two classes, dark and light."""
    return write_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """Weights of several networks."""
    folder = tmp_path_factory.mktemp("weights")
    network = build_model("timm:resnet8", num_classes=7)
    names = tuple(f"animal {number}" for number in range(7))
    record = FileRecord(
        model="timm:resnet8", num_classes=7, in_channels=3, image_size=(8, 8), class_names=names
    )
    save_weights(network, folder / "seven.safetensors", metadata=model_metadata(record))
    save_weights(build_model("timm:resnet20", num_classes=2), folder / "resnet20.safetensors")
    torch.save({"state_dict": network.state_dict(), "epoch": 3}, folder / "seven.pth")
    save_file({"a.b": torch.zeros(2), "a.c": torch.zeros(3)}, folder / "other.safetensors")
    (folder / "names.txt").write_text("darkness\nlight\n")
    (folder / "unknown_key.yaml").write_text("optimizer: {lr: 0.1, momentums: 0.9}\n")
    (folder / "unknown_section.yaml").write_text("teachers: {name: resnet8}\n")
    return folder


TEACH = ("--method.kind", "nkd", "--teacher.name")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--student.name", "file:FILES/seven.safetensors"], r"has 7 classes, got num_classes=2"),
        (["--student.settings", "num_classes", "7"], r"must not hold num_classes"),
        (["--student.weights", "FILES/seven.pth"], r"got \(7, 64\), expected \(2, 64\)"),
        (["--student.weights", "FILES/resnet20.safetensors"],
         r"does not fit \w+: unexpected layer1\.1\."),
        ([*TEACH, "file:FILES/seven.safetensors"], r"seven.safetensors' must give \[B, 2\], got "
         r"\(1, 7\) for one image: teacher.class_map"),
        ([*TEACH, "resnet8", "--teacher.num-classes", "7"], r"must give \[B, 2\], got \(1, 7\)"),
        ([*TEACH, "resnet8", "--teacher.class-map", "0", "1", "1"], "classes of .*, got 3"),
        ([*TEACH, "file:FILES/seven.safetensors", "--teacher.class-map", "0", "7"],
         "class_map names class 7, the teacher has 7 classes"),
        ([*TEACH, "file:FILES/seven.safetensors", "--teacher.class-map", "names"],
         "has no class 'dark', 'light' of the data; its classes are like 'animal 0'"),
        ([*TEACH, "resnet8", "--teacher.class-map", "names", "--teacher.class-names",
          "FILES/names.txt", "--teacher.num-classes", "2"],
         "has no class 'dark' of the data; near 'dark': darkness"),
        ([*TEACH, "resnet8", "--teacher.class-map", "names"], "nothing says the names"),
        ([*TEACH, "resnet8x5"], "unknown timm model 'resnet8x5'; near: resnet8x4"),
        ([*TEACH, "torchvision:resnet19"], "unknown torchvision classifier 'resnet19'; near: .*18"),
        ([*TEACH, "file:FILES"], "no such weights file: .*student.safetensors"),
        ([*TEACH, "resnet8", "--teacher.weights", "FILES/other.safetensors"],
         r"does not fit \w+: missing \S+, \S+, \S+, \S+, \S+ and \d+ more; unexpected a.b, a.c"),
        ([*TEACH, "resnet8", "--teacher.weights", "FILES/resnet20.safetensors"],
         r"unexpected (layer1\.\S+, ){4}layer1\.\S+ and \d+ more"),
        ([*TEACH, "resnet8", "--teacher.weights", "FILES/names.txt"], "not a readable torch file"),
    ],
)  # fmt: skip
def test_network_that_does_not_fit_is_one_line_before_training(
    capsys, pictures, files, tmp_path, arguments, message
):
    arguments = [argument.replace("FILES", str(files)) for argument in arguments]
    assert main(train_arguments(pictures, tmp_path / "run", *arguments)) == 2
    printed = capsys.readouterr().err
    lines = printed.splitlines()
    assert len(lines) == 1, printed
    assert re.search(message, lines[0]), lines[0]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("unknown_key", "unknown setting 'optimizer.momentums': expected momentum"),
        ("unknown_section", "unknown setting 'teachers': expected teacher"),
    ],
)
def test_recipe_with_an_unknown_key_is_one_line(capsys, files, tmp_path, recipe, message):
    recipe_file = str(files / f"{recipe}.yaml")
    assert main(["train", recipe_file, "--output", str(tmp_path / "run")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not (tmp_path / "run").exists()


def test_class_map_on_the_command_line_is_numbers_or_names(capsys, pictures, files, tmp_path):
    teacher = [*TEACH, f"file:{files}/seven.safetensors", "--teacher.class-map", "5", "2"]
    assert main(train_arguments(pictures, tmp_path / "run", *teacher)) == 0
    assert "teacher file:" in capsys.readouterr().err
    assert main(["config", "show", str(tmp_path / "run" / "config.yaml")]) == 0
    assert re.search(r"class_map:\n  - 5\n  - 2\n", capsys.readouterr().out)
