"""What a run's files hold is written and read by one schema."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from softlabels.io.records import read_lines
from softlabels.training.run_records import read_run
from softlabels.training.schemas import Environment, Metrics, Summary, TeacherScore

RESULTS = Path(__file__).parents[2] / "results"


def change(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    "name", ["summary.json", "environment.json", "gallery.json", "analysis.json"]
)
@pytest.mark.parametrize(
    "content", [b"", b'{"label": "x"', b"\xff\xfe", b"[1]", b"{}", b'{"a":' * 9999]
)
def test_damaged_file_is_one_line_that_names_it(
    make_run, make_gallery, make_analysis, name, content
):
    run = make_run(gallery=make_gallery(), analysis=make_analysis())
    (run / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"^{run / name}: ") as caught:
        read_run(run)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("name", "changes", "field"),
    [
        ("summary.json", {"label": 3}, "label"),
        ("summary.json", {"seed": True}, "seed"),
        ("summary.json", {"complete": 1}, "complete"),
        ("summary.json", {"final": {"top1": "high"}}, "final.top1"),
        ("summary.json", {"best": {"nll": 1.0}}, "best must have top1 and epoch"),
        ("environment.json", {"torch": 2}, "torch"),
        ("gallery.json", {"split": "all"}, "split"),
        ("gallery.json", {"class_names": [3]}, "class_names.0"),
        ("analysis.json", {"images": "many"}, "images"),
        ("analysis.json", {"groups": [0, 1]}, "expected columns of one length: class_names has 4"),
        ("analysis.json", {"zipf": None}, "zipf"),
        ("analysis.json", {"per_class": [1, 2, 3, "x"]}, "per_class.3"),
        ("analysis.json", {"confusion": [[0, 1]]}, "confusion.0.2"),
        ("analysis.json", {"confusion": [[0, 4, 1]]}, "expected 4 classes, got 4"),
        ("analysis.json", {"confusion": [[0, 1, 10**30]]}, "confusion.0.2"),
        ("analysis.json", {"features": {"class": [-1]}}, "features.class.0"),
        (
            "analysis.json",
            {"zipf": {"mean_sorted_softmax": [0.5], "exponent": 1, "r2": 1, "ranks": [1, 2]}},
            "zipf: ranks must be in 1..1",
        ),
        (
            "analysis.json",
            {"zipf": {"mean_sorted_softmax": [1.5], "exponent": 1, "r2": 1, "ranks": [1, 1]}},
            "zipf.mean_sorted_softmax.0",
        ),
        (
            "analysis.json",
            {"reliability": {"confidence": [0.5], "accuracy": [0.5], "count": [-1]}},
            "reliability.count.0",
        ),
        (
            "analysis.json",
            {"features": {"class": [0], "x": [1], "y": [], "explained": [0, 0]}},
            "features: expected columns of one length",
        ),
    ],
)
def test_wrong_value_is_an_error_that_names_file_and_field(
    make_run, make_gallery, make_analysis, name, changes, field
):
    run = make_run(gallery=make_gallery(), analysis=make_analysis())
    change(run / name, **changes)
    with pytest.raises(ValueError, match=rf"^{run / name}: {field}"):
        read_run(run)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"png": "javascript:alert(1)"}, "png"),
        ({"png": 'iVBORw0KGgo" onerror="alert(1)'}, "png"),
        ({"shape": [8]}, "shape"),
        ({"non_target": [["a", 1.0]]}, "non_target.0.0"),
        ({"prediction": [[1, None]]}, "prediction.0.1"),
    ],
)
def test_damaged_image_of_a_gallery_is_named(make_run, make_gallery, changes, field):
    with pytest.raises(ValueError, match=rf"gallery\.json: images\.0\.{field}: "):
        read_run(make_run(gallery=make_gallery(**changes)))


def test_unknown_keys_are_ignored_and_absent_ones_are_defaults(make_run):
    run = make_run()
    change(run / "summary.json", novel={"a": 1})
    record = read_run(run)
    assert record.summary.teacher is None
    assert record.summary.test_images is None
    assert record.gallery is record.analysis is None


def test_what_is_written_is_read_again(make_run, make_analysis, tmp_path):
    content = make_analysis(teacher={"name": "t", "top1": 80.0, "agreement": 75.5})
    analysis = read_run(make_run(analysis=content)).analysis
    assert analysis.zipf.mean_sorted_softmax.tolist() == [0.6, 0.2, 0.15, 0.05]
    assert math.isnan(analysis.per_class[3])
    assert math.isnan(analysis.reliability.accuracy[0])
    assert analysis.reliability.count.tolist() == [*[0] * 13, 10, 30]
    assert analysis.features.classes.tolist() == [0, 0, 2]
    assert analysis.teacher.agreement == 75.5
    analysis.write(tmp_path / "again.json")
    assert json.loads((tmp_path / "again.json").read_text()) == content


def test_numbers_of_a_run_that_went_wrong_are_no_error(make_run, make_analysis):
    zipf = {"mean_sorted_softmax": [None, 0], "exponent": None, "r2": math.nan, "ranks": [1, 2]}
    run = make_run(analysis=make_analysis(zipf=zipf, features=None, groups=None))
    assert "NaN" in (run / "analysis.json").read_text()
    analysis = read_run(run).analysis
    assert analysis.zipf.exponent is None
    assert math.isnan(analysis.zipf.mean_sorted_softmax[0])
    assert analysis.features is None


def test_a_name_that_is_no_unicode_is_written_all_the_same(make_run, tmp_path):
    summary = read_run(make_run()).summary.model_copy(update={"assumed": {"a": "b\udcff"}})
    Summary(**dict(summary)).write(tmp_path / "summary.json")
    assert Summary.read(tmp_path / "summary.json").assumed == {"a": "b?"}


def test_the_texts_of_an_environment_name_no_host(make_run):
    own = {"torch": "2.14.1", "host": "secret", "process": 1}
    environment = read_run(make_run(environment=own)).environment
    again = Environment(**{**environment.dump(), "earlier_starts": [environment, environment]})
    assert "secret" not in again.texts().values()
    assert again.texts()["torch"] == "2.14.1"
    assert again.texts()["commit"] == "null"
    assert again.texts()["earlier_starts"] == "2"


@pytest.mark.parametrize(
    "line",
    ["[" * 9999, '{"a/b": 1', '{"epoch": 0, "step": 1, "a/b": "text"}', "[1]", '{"step": 1}'],
)
def test_line_of_a_log_that_does_not_fit_is_left_out_with_a_warning(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    whole = Metrics.model_validate({"epoch": 0, "step": 1, "train/loss": 2.5})
    path.write_text(f"{json.dumps(whole.dump())}\n{line}\n")
    with pytest.warns(UserWarning, match=r"metrics\.jsonl, line 2 is unreadable and left out"):
        assert read_lines(path, Metrics) == [whole]


@pytest.mark.parametrize("content", [None, b"", b"[]", b'{"top1": 1}', b"\xff", b"[" * 9999])
def test_what_is_damaged_is_not_found(tmp_path, content):
    if content is not None:
        (tmp_path / "teacher.json").write_bytes(content)
    assert TeacherScore.found(tmp_path / "teacher.json") is None


def test_committed_results_are_readable():
    record = read_run(RESULTS / "teacher")
    assert record.summary.final["top1"] == pytest.approx(81.4375)
    assert record.environment.torch == "2.15.0"
    assert len(record.curves["eval/top1"].x) == record.summary.best["epoch"] == 12
