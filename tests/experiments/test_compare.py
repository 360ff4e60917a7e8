"""`softlabels compare`, as its users see it."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import shutil
import statistics
from pathlib import Path

import pytest
import yaml

from softlabels.cli import main
from softlabels.experiments.comparison import Comparison, chosen_methods, planned, read_comparison
from softlabels.training.config import ConfigError

SETTINGS = {
    "data": {"source": "noise", "num_train": 64, "num_test": 40, "num_classes": 10},
    "student": {"name": "timm:resnet8_glyphs"},
    "epochs": 1,
    "batch_size": 32,
    "gallery": 2,
    "device": "cpu",
    "optimizer": {"lr": 0.02},
}


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("comparison") / "two.yaml"
    content = {
        "title": "Two ways",
        "settings": {
            **SETTINGS,
            "teacher": {"name": "timm:resnet8_glyphs", "check": "off"},
            "seed": 3,
        },
        "seeds": 2,
        "variants": {
            "plain": "ce",
            "taught": {"method": {"kind": "kd"}, "task": {"label_smoothing": 0.2}},
        },
    }
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


@pytest.fixture(scope="module")
def compared(file) -> Path:
    output = file.parent / "out"
    with contextlib.redirect_stderr(io.StringIO()) as told:
        assert main(["compare", str(file), "--output", str(output), "--jobs", "2"]) == 0
    (output / "told.txt").write_text(told.getvalue())
    return output


def content_of(folder: Path) -> dict:
    return json.loads((folder / "comparison.json").read_text())


def test_every_variant_runs_over_the_same_seeds(compared):
    content = content_of(compared)
    assert content["title"] == "Two ways"
    assert content["seeds"] == [3, 4]
    assert content["baseline"] == "plain"
    assert [v["name"] for v in content["variants"]] == ["plain", "taught"]
    for variant in content["variants"]:
        assert [run["seed"] for run in variant["runs"]] == [3, 4]
        for run in variant["runs"]:
            folder = compared / "runs" / run["folder"]
            summary = json.loads((folder / "summary.json").read_text())
            assert run["top1"] == summary["final"]["top1"]
            assert run["best_top1"] == summary["best"]["top1"]
            assert run["curve"]["top1"][-1] == run["top1"]
    differing = content["variants"][1]["settings"]
    assert differing["task.label_smoothing"] == 0.2
    assert differing["method.kind"] == "kd"
    assert not any(key.startswith(("data", "student", "optimizer")) for key in differing)
    assert {"torch", "processor", "commit"} <= content["environment"].keys()


def test_the_figures_are_those_of_the_runs(compared):
    plain, taught = content_of(compared)["variants"]
    top1 = [run["top1"] for run in taught["runs"]]
    assert taught["scores"]["top1"]["mean"] == pytest.approx(statistics.fmean(top1))
    assert taught["scores"]["top1"]["deviation"] == pytest.approx(statistics.stdev(top1))
    differences = [a["nll"] - b["nll"] for a, b in zip(taught["runs"], plain["runs"], strict=True)]
    assert taught["against_baseline"]["nll"]["differences"] == pytest.approx(differences)
    assert taught["against_baseline"]["top1"]["in_words"] == "no difference shown"  # two seeds
    assert plain["against_baseline"] == {}
    assert {"fitted_ece", "seconds_per_epoch", "peak_memory"} <= taught["scores"].keys()


def test_the_teacher_is_trained_once_and_asked_of_all(compared):
    runs = sorted(path.parent.relative_to(compared / "runs") for path in
                  (compared / "runs").glob("*/*/summary.json"))  # fmt: skip
    assert len(runs) == 4  # the teacher is the run of the first seed with cross-entropy
    plain, _ = content_of(compared)["variants"]
    for variant in content_of(compared)["variants"]:
        assert all(run["teacher_agreement"] is not None for run in variant["runs"])
    assert plain["runs"][0]["teacher_agreement"] == 100
    top1 = pytest.approx(plain["runs"][0]["top1"])
    assert content_of(compared)["teachers"] == [{"name": "timm:resnet8_glyphs", "top1": top1}]
    assert "Top-1 of what taught: timm:resnet8_glyphs " in (compared / "comparison.md").read_text()


def test_progress_counts_the_runs_that_wait_for_a_teacher_too(compared):
    told = (compared / "told.txt").read_text()
    assert told.count("all runs") == 1
    assert "4 of 4, 0:00:00 left" in told


def test_the_printed_table_fits_a_terminal(compared):
    told = (compared / "told.txt").read_text()  # 80 columns wide
    table = told[told.index("Two ways") : told.index("more columns: comparison.md")]
    assert "…" not in table
    assert "top-1 %" in table
    assert "shown" in table  # the last column


def test_runs_of_a_seed_share_all_but_the_method(compared):
    for number in range(2):
        begins = []
        for variant in content_of(compared)["variants"]:
            folder = compared / "runs" / variant["runs"][number]["folder"]
            config = yaml.safe_load((folder / "config.yaml").read_text())
            begins.append((config["seed"], config["student"], config["data"], config["optimizer"]))
        assert all(begin == begins[0] for begin in begins)


def test_tables_for_people_and_programs(compared):
    text = (compared / "comparison.md").read_text()
    assert text.startswith("# Two ways\n")
    assert "2 seeds are too few for an exact test to show anything" in text
    assert "| taught |" in text
    assert "p (exact)" not in text
    rows = list(csv.DictReader((compared / "comparison.csv").open()))
    assert [(row["variant"], row["seed"]) for row in rows[:3]] == [
        ("plain", "3"), ("plain", "4"), ("taught", "3"),
    ]  # fmt: skip
    content = content_of(compared)
    assert float(rows[2]["top1"]) == content["variants"][1]["runs"][0]["top1"]
    page = (compared / "report.html").read_text()
    assert "Two ways" in page
    assert "taught" in page


def test_what_is_complete_is_not_run_again_and_a_change_reruns_what_it_touches(
    compared, file, capsys
):
    """Another comparison with a shared folder of runs trains only what is new."""
    before = {path: path.stat().st_mtime_ns for path in compared.glob("runs/*/*/summary.json")}
    values = yaml.safe_load(file.read_text())
    values["variants"] = {"plain": "ce", "smoothed": {"task": {"label_smoothing": 0.3}}}
    values["seeds"] = 1
    other = file.with_name("other.yaml")
    other.write_text(yaml.safe_dump(values, sort_keys=False))
    output = file.parent / "other"
    arguments = ["compare", str(other), "--output", str(output), "--runs", str(compared / "runs")]
    assert main(arguments) == 0
    told = capsys.readouterr().err
    assert "complete already: plain, seed 3" in told
    assert "smoothed, seed 3: top-1 " in told  # a line for each run that ends
    after = {path: path.stat().st_mtime_ns for path in compared.glob("runs/*/*/summary.json")}
    assert before.items() <= after.items()
    assert len(after) == len(before) + 1
    mine, theirs = (content_of(folder)["variants"][0]["runs"] for folder in (output, compared))
    assert mine[0]["top1"] == theirs[0]["top1"]
    assert "One seed" in (output / "comparison.md").read_text()


def test_runs_from_elsewhere_are_taken_and_their_accelerator_is_named(compared, file, tmp_path):
    """Folders that another machine's comparison wrote count as complete here."""
    runs = tmp_path / "runs"
    shutil.copytree(compared / "runs", runs, ignore=shutil.ignore_patterns("*.safetensors"))
    for path in runs.glob("*/*/environment.json"):
        record = json.loads(path.read_text())
        path.write_text(json.dumps({**record, "device": "cuda", "accelerator": "NVIDIA H200"}))
    output = tmp_path / "out"
    assert main(["compare", str(file), "--output", str(output), "--runs", str(runs)]) == 0
    assert content_of(output)["variants"] == content_of(compared)["variants"]
    assert "device NVIDIA H200, torch" in (output / "comparison.md").read_text()
    assert "device cpu, torch" in (compared / "comparison.md").read_text()


def test_the_record_repeats_the_comparison(compared):
    again = read_comparison(str(compared / "comparison.yaml"))
    assert again.seeds == 2
    variants, _ = planned(again, compared / "runs")
    assert all(run.folder.is_complete() for variant in variants for run in variant.runs)


def plan_of(tmp_path: Path, **changes: object):
    values = {"settings": SETTINGS, "variants": {"ce": "ce", "uskd": "uskd"}, **changes}
    return planned(Comparison.model_validate(values), tmp_path)


def test_names_of_methods_mean_their_own_weights(tmp_path):
    variants, _ = plan_of(
        tmp_path,
        settings={**SETTINGS, "method": {"kind": "uskd", "weak_weight": 0.1}, "method_weight": 2.0},
        variants=chosen_methods(["ce", "uskd", "zipf_ls", "ls", "glyphs100/tf_kd"]),
    )
    by_name = {variant.name: variant.config for variant in variants}
    assert by_name["cross_entropy"].method.kind == "none"
    assert by_name["cross_entropy"].method_weight is None
    assert by_name["uskd"].method.weak_weight == 0.1  # the caller's own settings of it
    assert by_name["uskd"].method_weight == 2.0
    assert by_name["zipf_ls"].method_weight is None  # the paper's
    assert by_name["label_smoothing"].task.label_smoothing == 0.1
    assert by_name["glyphs100/tf_kd"].method.temperature == 20.0
    assert by_name["glyphs100/tf_kd"].epochs == 1  # of the base, not of the recipe
    assert all(config.teacher.name is None for config in by_name.values())


def test_glyphs_have_a_teacher_that_ships(tmp_path):
    settings = {**SETTINGS, "data": {"source": "glyphs100"}}
    variants, plan = plan_of(tmp_path, settings=settings, variants={"ce": "ce", "nkd": "nkd"})
    assert variants[1].config.teacher.weights.endswith("teacher.safetensors")
    assert variants[0].config.teacher.name is None
    assert len(plan.rounds) == 1


def test_a_method_that_teaches_itself_learns_from_the_baselines_run_of_its_seed(tmp_path):
    variants, plan = plan_of(tmp_path, variants={"ce": "ce", "itself": "tf_kd_self"})
    plain, itself = variants
    for before, run in zip(plain.runs, itself.runs, strict=True):
        assert run.config.seed == before.config.seed
        assert run.config.teacher.name == "timm:resnet8_glyphs"
        assert run.config.teacher.weights == str(before.folder.student)
    assert [len(runs) for runs in plan.rounds] == [3, 3]


def test_a_teachers_recipe_learns_from_the_same_data(tmp_path):
    teacher = {"name": "timm:resnet14x4_glyphs", "recipe": "glyphs100/teacher"}
    _, plan = plan_of(
        tmp_path, settings={**SETTINGS, "teacher": teacher}, variants={"ce": "ce", "kd": "kd"}
    )
    first, second = plan.rounds
    (trained,) = (run for run in first if run.name == "teacher")
    assert trained.config.epochs == 12
    assert trained.config.data.source == "noise"
    assert all(run.config.teacher.weights == str(trained.folder.student) for run in second)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "ce,zipf"], "no method 'zipf'"),
        (["--methods", "ce,uskd,ce"], "'cross_entropy' is compared twice"),
        (["--methods", "ce,,uskd"], "commas between them"),
        (["--methods", "ce,nkd"], "nkd: method 'nkd' reads from a teacher: give teacher.name"),
        (["--methods", "tf_kd_self,ce"], "its teacher is the baseline's run"),
        (["--methods", "ce,vitkd", "--teacher", "timm:resnet8_glyphs"], "vitkd"),
        (["--methods", "ce", "--seeds", "0"], "seeds"),
        (["--methods", "ce", "--no-such", "1"], "no-such"),
    ],
)
def test_what_does_not_fit_is_one_line_before_training(arguments, message, tmp_path, capsys):
    settings = ["--data.source", "noise", "--data.num-train", "64", "--data.num-test", "40",
                "--student", "timm:resnet8_glyphs", "--device", "cpu"]  # fmt: skip
    assert main(["compare", *arguments, *settings, "--output", str(tmp_path / "out")]) == 2
    told = capsys.readouterr().err.strip().splitlines()
    assert len(told) == 1
    assert message in told[0]
    assert not list(tmp_path.rglob("summary.json"))


def test_a_damaged_comparison_is_told(tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text("variants: {ce: ce}\nseds: 3\n")
    with pytest.raises(ConfigError, match="seds"):
        read_comparison(str(path))
    path.write_text("epochs: 3\n")
    assert read_comparison(str(path)) is None
    assert read_comparison("glyphs100/uskd") is None
