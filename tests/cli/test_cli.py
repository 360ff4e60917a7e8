"""The command line, as its users see it: output, one-line errors, exit status."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from softlabels.cli import main

COMMANDS = (
    "train", "cache-teacher", "eval", "analyze", "predict", "export", "demo", "compare", "sweep",
    "reproduce", "recipes", "taps", "methods", "config",
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Two classes of pictures that differ in brightness; ImageNet's layout."""
    root = tmp_path_factory.mktemp("shades")
    generator = np.random.default_rng(0)
    for part, count in (("train", 24), ("val", 8)):
        for name, level in (("dark", 60), ("light", 190)):
            (root / part / name).mkdir(parents=True)
            for number in range(count):
                pixels = np.clip(generator.normal(level, 30, (32, 32, 3)), 0, 255)
                path = root / part / name / f"{number}.png"
                Image.fromarray(pixels.astype(np.uint8)).save(path)
    return root


def small(folder: Path, output: Path, *more: str) -> list[str]:
    return [
        "train", "--data.path", str(folder), "--data.image-size", "32", "--data.workers", "0",
        "--student.name", "timm:resnet8", "--epochs", "2", "--batch-size", "16",
        "--optimizer.lr", "0.05", "--gallery", "2", "--output", str(output), *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("runs") / "trained"
    assert main(small(folder, output, "--method.kind", "uskd")) == 0
    return output


def fails(capsys, *arguments: str, status: int = 2) -> str:
    """Run a command that must fail; its one line."""
    assert main(arguments) == status
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.startswith("softlabels")]
    assert len(lines) == 1, captured.err
    assert "Traceback" not in captured.err
    return lines[0]


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_overview_lists_every_command(capsys, arguments):
    assert main(arguments) == 0
    text = capsys.readouterr().out
    assert all(f"  {command}" in text for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_each_command(capsys, command):
    assert main([command, "--help"]) == 0
    assert f"usage: softlabels {command}" in capsys.readouterr().out


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("softlabels 0.")


def test_help_shows_the_chosen_method_alone_with_the_recipes_values(capsys):
    assert main(["train", "glyphs100/uskd_cifar", "--help"]) == 0
    text = capsys.readouterr().out
    assert "--method.weak-weight" in text
    assert "(default: 0.1)" in text
    assert "--method.power" not in text


def test_help_shows_the_chosen_datas_settings_alone(capsys):
    assert main(["train", "--data.source", "cifar100", "--help"]) == 0
    text = capsys.readouterr().out
    assert "--data.flip" in text
    assert "--data.num-fonts" not in text


@pytest.mark.parametrize("command", ["train", "compare", "sweep", "cache-teacher"])
def test_help_begins_with_the_settings_that_most_runs_give(capsys, command):
    assert main([command, "--help"]) == 0
    text = capsys.readouterr().out
    first = text[: text.index("--help ")]
    for flag in ("--data", "--student", "--method", "--teacher", "--epochs", "--lr", "--output"):
        assert f" {flag}" in first
    assert "--channels-last" not in first
    assert all(len(line) <= 80 for line in first.splitlines())


def test_short_options_set_the_same_as_long_ones(capsys):
    assert main(["config", "show", "--lr", "0.3", "--student=timm:resnet8", "--method", "ols"]) == 0
    short = capsys.readouterr().out
    long = ["--optimizer.lr", "0.3", "--student.name", "timm:resnet8", "--method.kind", "ols"]
    assert main(["config", "show", *long]) == 0
    assert capsys.readouterr().out == short


@pytest.mark.parametrize("given", [["--channels-last", "{}"], ["--channels-last={}"]])
@pytest.mark.parametrize("answer", ["true", "false"])
def test_yes_and_no_are_written_as_yaml_or_python_has_them(capsys, given, answer):
    written = []
    for word in (answer, answer.title()):
        assert main(["config", "show", *(part.format(word) for part in given)]) == 0
        written.append(capsys.readouterr().out)
    assert written[0] == written[1]
    assert f"channels_last: {answer}\n" in written[0]


def test_train_writes_a_run(trained):
    summary = json.loads((trained / "summary.json").read_text())
    assert summary["method"] == "uskd"
    assert summary["final"]["top1"] > 50
    assert (trained / "report.html").is_file()


def test_eval_gives_what_the_run_recorded(capsys, trained):
    assert main(["eval", str(trained), "--format", "json"]) == 0
    measured = json.loads(capsys.readouterr().out)
    recorded = json.loads((trained / "summary.json").read_text())["final"]
    assert measured == pytest.approx(recorded, rel=1e-4)


def test_eval_of_a_file_on_named_data(capsys, trained, folder):
    file = trained / "student.safetensors"
    assert main(["eval", str(file), "--path", str(folder / "val")]) == 0
    assert "top-1" in capsys.readouterr().out


def test_predict_as_text_json_and_csv(capsys, trained, folder):
    image = str(folder / "val" / "dark" / "0.png")
    assert main(["predict", str(trained), image]) == 0
    assert capsys.readouterr().out.startswith(f"{image}: ")
    assert main(["predict", str(trained), str(folder / "val"), "--format", "json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(rows) == 16
    right = sum(row["classes"][0]["class"] in row["image"] for row in rows)
    assert right >= 8
    assert all(abs(sum(c["probability"] for c in row["classes"]) - 1) < 1e-5 for row in rows)
    assert main(["predict", str(trained), image, "--format", "csv", "--top", "1"]) == 0
    assert capsys.readouterr().out.splitlines()[0] == "image,rank,class,probability"


def test_config_show_is_a_recipe_that_trains_the_same(capsys, tmp_path):
    assert main(["config", "show", "glyphs100/nkd", "--method.temperature", "2"]) == 0
    text = capsys.readouterr().out
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    assert main(["config", "show", str(path)]) == 0
    assert capsys.readouterr().out == text
    assert "temperature: 2.0" in text


@pytest.mark.parametrize("command", ["methods", "recipes"])
def test_lists_fit_a_terminal(capsys, command):
    assert main([command]) == 0
    assert all(len(line) <= 80 for line in capsys.readouterr().out.splitlines())


def test_methods_lists_all(capsys):
    assert main(["methods"]) == 0
    text = capsys.readouterr().out
    for kind in ("none", "kd", "nkd", "uskd", "zipf_ls"):
        assert f"\n{kind}\n" in f"\n{text}"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trains"], "no such command: expected train"),
        (["train", "no_such_recipe"], "no recipe 'no_such_recipe'"),
        (["train", "--method.kind", "uksd"], "no method 'uksd'.*near: uskd"),
        (["train", "--method.kind"], "no method ''"),
        (["train", "--method.kind", "nkd"], "reads from a teacher"),
        (["train", "--epochs", "0"], "epochs: Input should be greater than or equal to 1"),
        (["train", "--epochs", "few"], "epochs"),
        (["train", "--nope", "1"], "--nope"),
        (["train", "--epoch", "1"], "'--epoch': expected --epochs"),
        (["train", "--further-methods", "nkd"], "--further-methods is set in a recipe"),
        (["train", "--lr", "-1"], "optimizer.lr: Input should be greater than 0, got -1"),
        (["train", "--precision", "fp8"], "--precision must be one of auto, no, bf16, fp16, got"),
        (["train", "--optimizer.lr"], "--optimizer.lr needs a value"),
        (["train", "--data.source", "cifar100", "--data.num-fonts", "3"], "--data.num-fonts"),
        (["train", "--data.path", "/no/such/place"], "/no/such/place does not exist"),
        (["train", "--data.source", "glyph"], "glyphs100"),
        (["train", "--student.name", "timm:resnet8x5"], "model 'resnet8x5'; near: resnet8x4"),
        (["train", "--student.name", "zoo:"], "expected a model name"),
        (["train", "--student.weights", "/no/weights.pt"], "/no/weights.pt"),
        (["train", "--optimizer.name", "sdg"], "optimizer.name must be a name"),
        (["eval", "/no/run"], "/no/run"),
        (["eval"], "missing STUDENT"),
        (["predict", "/no/run"], "expected one or more images"),
        (["predict", "/no/run", "/no/image.png"], "/no/image.png does not exist"),
        (["config", "display"], "expected `config show`"),
        (["methods", "--kind", "x"], "no method 'x'"),
        (["demo", "--epochs", "0"], "epochs: Input should be greater than or equal to 1, got 0"),
    ],
)  # fmt: skip
def test_mistake_is_one_line_and_status_2(capsys, monkeypatch, tmp_path, arguments, message):
    monkeypatch.chdir(tmp_path)
    line = fails(capsys, *arguments)
    import re

    assert re.search(message, line), line
    assert not any(tmp_path.rglob("*.safetensors"))


def test_corrupt_training_image_is_named(capsys, folder, tmp_path):
    import shutil

    copy = tmp_path / "data"
    shutil.copytree(folder, copy)
    broken = copy / "train" / "dark" / "3.png"
    broken.write_bytes(b"not an image")
    line = fails(capsys, *small(copy, tmp_path / "run"))
    assert str(broken) in line


def test_corrupt_image_to_predict_is_named(capsys, trained, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"\x89PNG broken")
    assert str(broken) in fails(capsys, "predict", str(trained), str(broken))


def test_weights_of_another_network_are_refused(capsys, trained, folder, tmp_path):
    weights = str(trained / "student.safetensors")
    arguments = small(folder, tmp_path / "run", "--student.weights", weights)
    arguments[arguments.index("timm:resnet8")] = "timm:resnet20"
    line = fails(capsys, *arguments)
    assert "student.safetensors" in line


def test_earlier_student_can_be_gone_on_with_and_taught_from(trained, folder, tmp_path):
    weights = str(trained / "student.safetensors")
    assert main(small(folder, tmp_path / "on", "--student.weights", weights)) == 0
    taught = small(folder, tmp_path / "taught", "--method.kind", "nkd")
    assert main([*taught, "--teacher.name", f"file:{weights}"]) == 0


def test_not_finite_loss_is_one_line_and_status_1(capsys, folder, tmp_path):
    arguments = small(folder, tmp_path / "run")
    arguments[arguments.index("0.05")] = "1e30"
    assert "the loss is not finite at step" in fails(capsys, *arguments, status=1)


def test_help_does_not_import_torch():
    code = (
        "import sys; from softlabels.cli import main; main(['--help']); "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def test_predict_sees_images_as_the_evaluation_did(capsys, trained, folder):
    from softlabels.data import open_source
    from softlabels.export.predict import load_student

    network, _ = load_student(trained)
    source = open_source(path=str(folder), image_size=32, workers=0)
    batch = next(source.test_batches(batch_size=16, device="cpu"))
    expected = network(batch.images).softmax(1).max(1).values.tolist()

    assert main(["predict", str(trained), str(folder / "val"), "--format", "json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    got = [row["classes"][0]["probability"] for row in rows]
    assert sorted(got) == pytest.approx(sorted(expected), abs=1e-5)


def test_eval_on_named_data_reads_them_at_the_students_size(capsys, trained, folder):
    assert main(["eval", str(trained), "--path", str(folder), "--format", "json"]) == 0
    measured = json.loads(capsys.readouterr().out)
    recorded = json.loads((trained / "summary.json").read_text())["final"]
    assert measured == pytest.approx(recorded, rel=1e-4)
