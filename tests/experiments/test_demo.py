"""The demo, small: four real runs in processes of their own, the table, the report."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from softlabels.cli import main
from softlabels.export.predict import evaluate_file, load_student
from softlabels.io.weights import read_metadata

ROOT = Path(__file__).parents[2]
QUICK = ["--epochs", "1", "--fonts", "4", "--steps", "3"]
RUNS = ("cross_entropy", "zipf_ls", "uskd", "nkd")


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("demo")
    assert main(["demo", "--output", str(output), *QUICK]) == 0
    return output


def test_demo_trains_four_runs_and_compares_what_they_measured(demo):
    content = json.loads((demo / "demo.json").read_text())
    assert tuple(content["results"]) == RUNS
    for name, values in content["results"].items():
        summary = json.loads((demo / name / "summary.json").read_text())
        assert values["top1"] == summary["final"]["top1"]
        assert values["group_top1"] == summary["final"]["group_top1"]
        low, median, high = (values[f"step_time_ratio{part}"] for part in ("_low", "", "_high"))
        assert 0 < low <= median <= high
    assert content["results"]["cross_entropy"]["step_time_ratio"] == 1


def test_runs_have_equal_data_steps_and_initial_weights(demo):
    configs = {}
    for name in RUNS:
        lines = (demo / name / "config.yaml").read_text()
        for section in ("data", "student", "optimizer", "schedule"):
            block = re.search(rf"^{section}:\n((?:  .*\n)+)", lines, re.MULTILINE)
            assert block is not None
            configs.setdefault(section, set()).add(block[1])
        configs.setdefault("seed", set()).add(re.search(r"^seed: (.*)$", lines, re.MULTILINE)[1])
    assert all(len(values) == 1 for values in configs.values()), configs


def test_report_shows_every_run_and_stands_alone(demo):
    text = (demo / "report.html").read_text()
    for name in RUNS:
        assert name in text
    assert "step time / cross-entropy" in re.sub("<.*?>", "", text)
    assert not re.search(r"""(src|href)=["']?https?://""", text)
    top1 = json.loads((demo / "demo.json").read_text())["results"]["uskd"]["top1"]
    assert f"{top1:.1f}" in text


def test_second_start_trains_nothing_again(demo, capfd):
    before = (demo / "uskd" / "metrics.jsonl").stat().st_mtime_ns
    assert main(["demo", "--output", str(demo), *QUICK]) == 0
    assert (demo / "uskd" / "metrics.jsonl").stat().st_mtime_ns == before
    assert "complete already: cross_entropy, zipf_ls, uskd, nkd" in capfd.readouterr().err


def test_folders_that_cannot_be_used_are_refused_before_training(tmp_path, demo, capsys):
    (tmp_path / "uskd").mkdir()
    (tmp_path / "uskd" / "notes.txt").write_text("mine")
    assert main(["demo", "--output", str(tmp_path), *QUICK]) == 2
    assert "is no run folder" in capsys.readouterr().err
    assert main(["demo", "--output", str(demo), "--epochs", "2", "--fonts", "4"]) == 2
    assert "holds another run: epochs: 1 there, 2 here" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["uskd"]


def test_failing_run_is_reported_with_its_last_line(tmp_path, monkeypatch, capsys):
    from softlabels.experiments import demo as module

    monkeypatch.setattr(module, "_arguments", lambda *_: ("glyphs100/none",))
    assert main(["demo", "--output", str(tmp_path), "--jobs", "1", *QUICK]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert "ended with status 2: softlabels train: no recipe 'glyphs100/none'" in error


def test_shipped_teacher_reaches_its_recorded_accuracy():
    weights = ROOT / "src/softlabels/recipes/glyphs100/teacher.safetensors"
    recorded = json.loads((ROOT / "results/teacher/summary.json").read_text())
    measured = evaluate_file(weights, source="glyphs100")
    # The same weights and images; another CPU may round a few of 8,000 predictions otherwise.
    assert measured["top1"] == pytest.approx(recorded["final"]["top1"], abs=0.1)
    assert measured["nll"] == pytest.approx(recorded["final"]["nll"], abs=1e-3)


def test_shipped_teacher_says_what_it_is():
    weights = ROOT / "src/softlabels/recipes/glyphs100/teacher.safetensors"
    network, record = load_student(weights)
    assert record.model == "timm:resnet14x4_glyphs"
    assert record.class_names is not None
    assert len(record.class_names) == 100
    assert read_metadata(weights)
    assert weights.stat().st_size < 4e6
    assert not network.training
