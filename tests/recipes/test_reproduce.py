"""`softlabels reproduce` and `softlabels recipes`, as their users see them."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import pytest

from softlabels.cli import main
from softlabels.training.recipes import ConfigError, settings_of

CHANGES = [
    "data.source=noise", "data.mean=null", "data.std=null", "data.num_train=64",
    "data.num_test=40", "epochs=1", "batch_size=32", "gallery=0", "report=false", "device=cpu",
    "teacher.check=off", "student.name=timm:resnet8_glyphs", "optimizer.lr=0.02",
]  # fmt: skip


def arguments(output: Path, *more: str) -> list[str]:
    return [
        "reproduce", "table1", "--output", str(output), "--threads", "1",
        "--change", *CHANGES[:2], "--change", *CHANGES[2:], *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def reproduced(tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("reproduced")
    row = ["--rows", "resnet32x4_resnet8x4_nkd", "--seeds", "2"]
    teacher = "teacher.name=timm:resnet8_glyphs"
    assert main(arguments(output, teacher, *row)) == 0
    return output


def test_a_row_runs_with_its_baseline_and_its_teacher(reproduced):
    content = json.loads((reproduced / "table1.json").read_text())
    (row,) = content["rows"]
    assert row["recipe"] == "table1/resnet32x4_resnet8x4_nkd"
    assert row["paper"]["top1"] == 76.35
    assert row["published_gain"] == pytest.approx(76.35 - 72.50)
    assert len(row["top1"]) == len(row["gains"]) == 2
    assert row["difference"] == pytest.approx(statistics.fmean(row["top1"]) - 76.35)
    assert content["changed_settings"]["data"]["source"] == "noise"
    assert content["smoke"] is False
    assert {"torch", "commit", "processor", "processes"} <= content["environment"].keys()

    folders = {path.parent for path in (reproduced / "runs").glob("*/*/summary.json")}
    kinds = sorted(f"{path.parent.name.rpartition('-')[0]} {path.name}" for path in folders)
    assert kinds == [
        "resnet8_glyphs-cross_entropy seed-0",  # also the teacher: here it is the same run
        "resnet8_glyphs-cross_entropy seed-1",
        "resnet8_glyphs-nkd seed-0",
        "resnet8_glyphs-nkd seed-1",
    ]
    for seed, top1 in enumerate(row["top1"]):
        (nkd,) = (path for path in folders if path.match(f"*-nkd-*/seed-{seed}"))
        assert json.loads((nkd / "summary.json").read_text())["final"]["top1"] == top1
        teacher = (nkd / "config.yaml").read_text().split("teacher:")[1]
        assert "cross_entropy" in teacher.split("weights: ")[1].splitlines()[0]


def test_the_table_is_markdown_too(reproduced):
    text = (reproduced / "table1.md").read_text()
    assert "| table1/resnet32x4_resnet8x4_nkd | 76.35 |" in text
    assert "+3.85" in text  # the paper's gain
    assert "±" in text
    assert "assumes method.temperature: not published for these pairs" in text
    assert "2 seeds" in text
    assert "Changed from the recipes:" in text
    assert "data.num_train=64" in text


def test_what_is_complete_is_not_run_again(reproduced, capsys):
    before = {path: path.stat().st_mtime_ns for path in reproduced.glob("runs/*/*/summary.json")}
    row = ["--rows", "resnet32x4_resnet8x4_nkd", "--seeds", "2"]
    assert main(arguments(reproduced, "teacher.name=timm:resnet8_glyphs", *row)) == 0
    after = {path: path.stat().st_mtime_ns for path in reproduced.glob("runs/*/*/summary.json")}
    assert before == after
    assert "complete already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["reproduce", "table7"], "no table 'table7': expected one of"),
        (["reproduce", "shared"], "no table 'shared'"),
        (["reproduce", "table1", "--rows", "vgg"], "no row 'vgg': expected some of mobilenet"),
        (
            ["reproduce", "table1", "--seeds", "0"],
            "seeds: Input should be greater than or equal to 1, got 0",
        ),
        (["reproduce", "table1", "--change", "epochs"], "expected KEY=VALUE"),
        (["reproduce", "table1", "--change", "epoks=3"], "unknown setting 'epoks'"),
        (["recipes", "--table", "tabel1"], "no table 'tabel1'"),
        (["recipes", "--method", "nkdd"], "no recipe with method 'nkdd'"),
        (["recipes", "--data", "cifar1000"], "no recipe with data 'cifar1000'"),
        (["recipes", "show", "table1/vgg"], "no recipe 'table1/vgg'"),
    ],
)
def test_what_does_not_fit_is_one_line(more, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(more) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert len(captured.err.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_a_run_that_fails_ends_the_command_with_its_reason(tmp_path, capsys):
    row = ["--rows", "resnet8x4", "--data.path", str(tmp_path / "nowhere")]
    assert main(["reproduce", "table1", "--output", str(tmp_path / "out"), *row]) == 1
    err = capsys.readouterr().err
    assert "the run table1/resnet8x4 0 ended with status 2: softlabels train:" in err
    assert "nowhere" in err
    assert "Traceback" not in err


def test_recipes_are_listed_by_data_method_and_table(capsys):
    assert main(["recipes", "--data", "cifar100", "--method", "nkd", "--table", "table1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert "table1/vgg13_vgg8_nkd" in lines[-1]
    assert "VGG13 -> VGG8, NKD: 74.86 %" in lines[-1]


def test_a_shown_recipe_is_a_recipe(capsys, tmp_path):
    assert main(["recipes", "show", "table1/vgg13_vgg8_nkd"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("# NKD and USKD (ICCV 2023), table 1, VGG13 -> VGG8, NKD: top-1 74.86")
    file = tmp_path / "copy.yaml"
    file.write_text(shown)
    assert main(["config", "show", "table1/vgg13_vgg8_nkd"]) == 0
    expected = capsys.readouterr().out
    assert main(["config", "show", str(file)]) == 0
    assert capsys.readouterr().out == expected


def test_settings_are_read_from_texts():
    given = ["a.b=1", "a.c=[x, 2]", "d=null", "e=x=y"]
    assert settings_of(given) == {"a": {"b": 1, "c": ["x", 2]}, "d": None, "e": "x=y"}
    for texts in (["a"], ["=1"], ["a..b=1"], ["a={b: *c}"], ["a=1", "a.b=2"]):
        with pytest.raises(ConfigError):
            settings_of(texts)
