"""Files from strangers, given to the whole program: one clear line, and nothing runs."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch

from shared.tiny_runs import MakesFolder, checkpoint_name, saved, train_arguments, write_pictures
from softlabels.cli import main


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("pictures") / "shades")


@pytest.fixture(scope="module")
def trained(pictures, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("runs") / "trained"
    assert main(train_arguments(pictures, output)) == 0
    return output


@pytest.fixture
def run_folder(trained, tmp_path) -> Path:
    """A copy of a run, to be changed."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


def complaint(capsys, *arguments: str) -> str:
    """The one line of a command that must end with status 2."""
    capsys.readouterr()
    assert main(arguments) == 2
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if line.startswith("softlabels ")]
    assert len(lines) == 1, error
    assert "Traceback" not in error
    return lines[0]


def runs_where_it_is_trusted(file: Path, trace: Path) -> None:
    """The attack is real."""
    assert not trace.exists()
    with file.open("rb") as content:
        torch.load(content, weights_only=False)
    assert trace.is_dir()


# --- pickles


def test_checkpoint_of_a_run_that_is_gone_on_with(capsys, pictures, run_folder, tmp_path):
    trace = tmp_path / "ran"
    folder = run_folder / "checkpoints"
    honest = next(folder.iterdir())
    content = saved({"progress": {"step": 1}, "parts": {"trained": MakesFolder(trace)}})
    honest.unlink()
    evil = folder / checkpoint_name(content, 1)
    evil.write_bytes(content)

    line = complaint(capsys, *train_arguments(pictures, run_folder))

    assert evil.name in line
    assert "mkdir" in line
    runs_where_it_is_trusted(evil, trace)


def test_an_honest_checkpoint_is_used_in_place_of_an_evil_one(capsys, pictures, run_folder):
    trace = run_folder.parent / "ran"
    content = saved({"progress": {"step": 1}, "parts": {"trained": MakesFolder(trace)}})
    evil = run_folder / "checkpoints" / checkpoint_name(content, 2)
    evil.write_bytes(content)

    assert main(train_arguments(pictures, run_folder, "--threads", "1")) == 0

    assert f"a checkpoint is left out: {evil.name}" in " ".join(capsys.readouterr().err.split())
    assert not trace.exists()


def evil_student(folder: Path, trace: Path) -> Path:
    path = folder / "evil.pt"
    path.write_bytes(saved({"state_dict": {"weight": torch.zeros(1)}, "x": MakesFolder(trace)}))
    return path


@pytest.mark.parametrize("option", ["--student.weights", "--teacher.weights"])
def test_weights_to_train_with(capsys, pictures, tmp_path, option):
    trace, output = tmp_path / "ran", tmp_path / "run"
    evil = evil_student(tmp_path, trace)
    more = ["--teacher.name", "timm:resnet8", "--method.kind", "nkd", option, str(evil)]

    line = complaint(capsys, *train_arguments(pictures, output, *more))

    assert str(evil) in line
    assert "could run code" in line
    assert not output.exists()
    runs_where_it_is_trusted(evil, trace)


@pytest.mark.parametrize("command", ["eval", "predict"])
@pytest.mark.parametrize("named_as", ["evil.pt", "student.safetensors"])
def test_student_to_measure_or_to_ask(capsys, pictures, tmp_path, command, named_as):
    trace = tmp_path / "ran"
    evil = evil_student(tmp_path, trace).rename(tmp_path / named_as)
    more = ["--path", str(pictures)] if command == "eval" else [str(pictures)]

    line = complaint(capsys, command, str(evil), *more)

    assert str(evil) in line
    runs_where_it_is_trusted(evil, trace)


# --- recipes


@pytest.mark.parametrize("part", ["student", "teacher"])
@pytest.mark.parametrize(
    ("name", "setting"),
    [("os:mkdir", "path"), ("os:system", "command"), ("subprocess:getoutput", "cmd")],
)
def test_recipe_that_names_a_command_as_its_network(
    capsys, pictures, tmp_path, part, name, setting
):
    trace = tmp_path / "ran"
    value = str(trace) if name == "os:mkdir" else f"mkdir {trace}"
    recipe = tmp_path / "recipe.yaml"
    method = {"method": "nkd"} if part == "teacher" else {}
    network = {"name": name, "settings": {setting: value}}
    recipe.write_text(json.dumps({"epochs": 1, part: network, **method}))

    arguments = train_arguments(pictures, tmp_path / "run")
    if part == "student":
        at = arguments.index("--student.name")
        del arguments[at : at + 2]
    line = complaint(capsys, "train", str(recipe), *arguments[1:])

    assert name in line
    assert not trace.exists()
    assert not (tmp_path / "run").exists()
    module, _, function = name.partition(":")
    getattr(sys.modules[module], function)(value)
    assert trace.is_dir()  # the attack is real


def test_code_of_the_working_folder_runs_for_a_network_of_ones_own_alone(
    capsys, monkeypatch, pictures, trained, tmp_path
):
    before = [*sys.path]
    monkeypatch.chdir(tmp_path)
    for name in ("tensorflow", "cupy", "sitecustomize"):  # what libraries try to import
        (tmp_path / f"{name}.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'ran')!r})\n")

    assert main(["eval", str(trained)]) == 0
    assert main(["predict", str(trained), str(pictures)]) == 0

    assert not (tmp_path / "ran").exists()
    assert sys.path == before


@pytest.mark.parametrize(
    "path", ["../../x.pt", "/etc/passwd", "recipes/../../../x", "", ".", "a/./b", "..\\x", "c:/x"]
)
def test_package_weights_stay_in_the_package(capsys, pictures, tmp_path, path):
    more = ["--method.kind", "nkd", "--teacher.name", "timm:resnet8"]
    more += ["--teacher.weights", f"package:{path}"]
    line = complaint(capsys, *train_arguments(pictures, tmp_path / "run", *more))
    assert "expected package:PATH with a path inside of softlabels" in line


def test_error_that_quotes_a_file_gives_a_terminal_no_orders(capsys, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text('"\\e]0;title\\a\\e[2J\\u202e": 1\n')
    line = complaint(capsys, "train", str(recipe))
    assert "unknown setting" in line
    assert line.isprintable()


def test_error_is_short_whatever_the_file_holds(capsys, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"{'k' * 500_000}: 1\n")
    assert len(complaint(capsys, "train", str(recipe))) < 2500
    assert len(complaint(capsys, "train", "n" * 500_000)) < 2500
    assert len(complaint(capsys, "c" * 500_000)) < 2500


# --- run folders


@pytest.mark.parametrize(
    "data",
    [
        {"path": "/dev/zero"},
        {"path": "pipe:mkdir ran"},
        {"source": "webdataset", "path": "pipe:mkdir ran"},
        {"path": "http://localhost/x"},
    ],
)
def test_data_that_a_run_folder_names_are_folders(capsys, monkeypatch, run_folder, tmp_path, data):
    monkeypatch.chdir(tmp_path)
    (run_folder / "config.yaml").write_text(json.dumps({"data": data}))
    complaint(capsys, "eval", str(run_folder))
    assert not (tmp_path / "ran").exists()


def test_a_run_that_is_gone_on_with_writes_into_its_folder_alone(
    capsys, pictures, run_folder, tmp_path
):
    """Whatever the files of the folder say of other places."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for name in ("summary.json", "environment.json", "gallery.json"):
        content = json.loads((run_folder / name).read_text())
        content |= {"folder": str(elsewhere), "output": str(elsewhere), "path": "../elsewhere/x"}
        (run_folder / name).write_text(json.dumps(content))
    before = {path for path in tmp_path.rglob("*") if run_folder not in path.parents}

    assert main(train_arguments(pictures, run_folder)) == 0

    assert {path for path in tmp_path.rglob("*") if run_folder not in path.parents} == before


def test_pictures_that_are_no_files_are_not_waited_for(capsys, trained, pictures, tmp_path):
    folder = Path(shutil.copytree(pictures, tmp_path / "shades"))
    os.mkfifo(folder / "val" / "dark" / "pipe.png")
    assert main(["predict", str(trained), str(folder / "val")]) == 0
    assert "pipe.png" not in capsys.readouterr().out
    line = complaint(capsys, "predict", str(trained), str(folder / "val" / "dark" / "pipe.png"))
    assert "pipe.png" in line


def test_class_names_of_a_file_give_a_terminal_no_orders(capsys, trained, pictures, tmp_path):
    from softlabels.io.weights import save_weights
    from softlabels.models import FileRecord, build_model, model_metadata

    record = FileRecord(
        model="resnet8", num_classes=2, in_channels=3, image_size=(8, 8), mean=(0.5,), std=(0.5,),
        class_names=("\x1b[2J", "b\n\u202e"),
    )  # fmt: skip
    file = tmp_path / "student.safetensors"
    metadata = model_metadata(record)
    save_weights(build_model("resnet8", num_classes=2), file, metadata=metadata)
    picture = str(pictures / "val" / "dark" / "0.png")
    for form in ("text", "json"):
        assert main(["predict", str(file), picture, "--format", form]) == 0
        assert "\x1b" not in capsys.readouterr().out


def test_unexpected_error_is_one_line_and_shows_where_on_request(capsys, monkeypatch, tmp_path):
    def fails(*_arguments):
        raise KeyError("odd")

    monkeypatch.setattr("softlabels.training.recipes._read_text", fails)
    assert main(["train", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("softlabels train: stopped by KeyError: 'odd' (SOFTLABELS_TRACEBACK=1")
    assert "Traceback" not in error
    monkeypatch.setenv("SOFTLABELS_TRACEBACK", "1")
    with pytest.raises(KeyError, match="odd"):
        main(["train", str(tmp_path)])


@pytest.mark.parametrize(
    "error",
    [MemoryError(), RuntimeError("CUDA out of memory."), RuntimeError("... can't allocate memory")],
)
def test_too_little_memory_is_told_in_words(capsys, monkeypatch, tmp_path, error):
    def fails(*_arguments):
        raise error

    monkeypatch.setattr("softlabels.training.recipes._read_text", fails)
    assert main(["train", str(tmp_path)]) == 1
    assert "softlabels train: not enough memory" in capsys.readouterr().err
