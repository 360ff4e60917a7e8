"""Damaged and unusual run folders."""

from __future__ import annotations

import json

import pytest

from softlabels.training.run_records import read_run


def change_summary(run, **changes):
    path = run / "summary.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_folder_without_summary_is_an_error_that_names_it(tmp_path):
    with pytest.raises(ValueError, match=rf"{tmp_path} has no summary\.json"):
        read_run(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"label": "x"', r"summary\.json is damaged: "),
        (b"\xff\xfe", r"summary\.json is damaged: "),
        (b"[1]", r"summary\.json holds a list, expected a JSON object"),
        (b"{}", r"summary\.json: 'label' is nothing, expected str"),
    ],
)
def test_damaged_summary_is_an_error_that_names_it(make_run, content, message):
    run = make_run()
    (run / "summary.json").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_run(run)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"label": 3}, "'label' is 3, expected str"),
        ({"seed": True}, "'seed' is True, expected int"),
        ({"epochs": None}, "'epochs' is None, expected int"),
        ({"seconds": "long"}, "'seconds' is 'long', expected a number"),
        ({"complete": 1}, "'complete' is 1, expected bool"),
        ({"final": {"top1": "high"}}, "'final', 'top1' is 'high', expected a number"),
    ],
)
def test_wrong_value_in_the_summary_is_named(make_run, changes, message):
    run = make_run()
    change_summary(run, **changes)
    with pytest.raises(ValueError, match=rf"summary\.json: {message}"):
        read_run(run)


def test_unknown_keys_are_ignored(make_run):
    run = make_run()
    change_summary(run, novel={"a": 1}, final={"top1": 5, "novel": [1], "ece": None})
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 3, "step": 9, "novel": "x", "a/b": "text", "a/c": null}\n{}\n')
    record = read_run(run)
    assert record.final == {"top1": 5.0}
    assert not {"a/b", "a/c", "novel"} & set(record.curves)


def test_curves_use_epochs_for_scores_and_steps_for_losses(make_run):
    record = read_run(make_run())
    assert record.curves["eval/top1"].x.tolist() == [1, 2]
    assert record.curves["eval/top1"].y.tolist() == [60.237, 61.237]
    assert record.curves["train/task"].x.tolist() == list(range(8))


def test_later_line_of_a_resumed_run_counts(make_run):
    steps = [(0, 9.0), (1, 8.0), (2, 7.0), (1, 6.0), (2, 5.0)]
    lines = [json.dumps({"epoch": 0, "step": s, "train/task": y}) for s, y in steps]
    curve = read_run(make_run(metrics="\n".join(lines))).curves["train/task"]
    assert curve.x.tolist() == [0, 1, 2]
    assert curve.y.tolist() == [9, 6, 5]


def test_values_that_are_not_finite_are_left_out(make_run):
    lines = ['{"step": 0, "train/task": NaN, "train/method": Infinity}']
    lines += ['{"step": 1, "train/task": 2.5, "train/method": NaN}']
    curves = read_run(make_run(metrics="\n".join(lines))).curves
    assert curves["train/task"].x.tolist() == [1]
    assert "train/method" not in curves


def test_class_without_a_name_gets_its_number(make_run, make_gallery):
    record = read_run(make_run(gallery=make_gallery(["ant"], prediction=[[0, 1.0]])))
    image = record.gallery.images[0]
    assert image.true_class == "ant"
    assert image.non_target[0] == ("class 2", 0.5)
    assert image.is_right


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"png": "javascript:alert(1)"}, "'png' is 'javascript:alert.*', expected a PNG file"),
        ({"png": "iVBORw0KGgo="}, "'png' is a picture of another size"),
        ({"shape": [8, 9]}, r"'png' is a picture of another size than 'shape', \[8, 9\]"),
        ({"shape": [8, 10**12]}, r"'shape' is \[8, 1000000000000\]"),
        ({"shape": [True, 8]}, r"'shape' is \[True, 8\]"),
        ({"non_target": [[True, 1.0]]}, r"'non_target' holds \[True, 1.0\]"),
        ({"target_value": 10**400}, "'target_value' has hundreds of digits"),
        ({"index": 2**70}, "'index' has 71 bits, expected 64"),
        ({"png": 'x" onerror="alert(1)'}, "'png' is 'x"),
        ({"png": "aGVsbG8="}, "'png' is 'aGVsbG8=', expected a PNG file in base64"),
        ({"shape": [8]}, r"'shape' is \[8\], expected \[height, width, ...\]"),
        ({"non_target": [["a", 1.0]]}, r"'non_target' holds \['a', 1.0\], expected \[class, numb"),
        ({"prediction": [[1, None]]}, "'prediction' is None, expected a number"),
        ({"target": "ant"}, "'target' is 'ant', expected int"),
        ({"target_value": None}, "'target_value' is None, expected a number"),
    ],
)
def test_damaged_gallery_is_an_error_that_names_it(make_run, make_gallery, changes, message):
    run = make_run(gallery=make_gallery(**changes))
    with pytest.raises(ValueError, match=rf"gallery\.json: {message}"):
        read_run(run)


def test_the_environment_names_no_host_and_counts_earlier_starts(make_run):
    environment = {"torch": "2.14.1", "host": "secret", "process": 1, "earlier_starts": [{}, {}]}
    record = read_run(make_run(environment=environment))
    assert record.environment == {"torch": "2.14.1", "earlier_starts": "2"}


@pytest.mark.parametrize("name", ["summary.json", "environment.json", "gallery.json"])
def test_file_nested_too_deeply_is_an_error_that_names_it(make_run, make_gallery, name):
    run = make_run(gallery=make_gallery(), environment={"torch": "2"})
    (run / name).write_text('{"label": ' + "[" * 100_000 + "]" * 100_000 + "}")
    with pytest.raises(ValueError, match=f"{name} is damaged: it is nested too deeply"):
        read_run(run)


def test_huge_file_is_an_error_that_names_it(make_run, monkeypatch):
    run = make_run()
    monkeypatch.setattr("softlabels.io.fields.MOST_BYTES", 1 << 20)
    (run / "metrics.jsonl").write_bytes(b" " * ((1 << 20) + 1))
    with pytest.raises(ValueError, match=r"metrics\.jsonl is larger than 1 MiB"):
        read_run(run)


@pytest.mark.parametrize("line", ["[" * 100_000, '{"a/b": 1' + "0" * 400 + "}", '{"epoch": 1e999}'])
@pytest.mark.filterwarnings("ignore:.*unreadable and left out")
def test_absurd_lines_of_the_metrics_leave_the_others(make_run, line):
    run = make_run()
    expected = read_run(run).curves
    with (run / "metrics.jsonl").open("a") as file:
        file.write(f"{line}\n")
    curves = read_run(run).curves
    assert curves.keys() == expected.keys()
    assert all((curves[key].y == expected[key].y).all() for key in curves)


def test_numbers_too_large_for_the_report_are_errors(make_run):
    run = make_run()
    change_summary(run, parameters=10**300)
    with pytest.raises(ValueError, match="'parameters' has 997 bits, expected 64"):
        read_run(run)
    change_summary(run, parameters=1, final={"top1": 10**400})
    with pytest.raises(ValueError, match="'top1' has hundreds of digits"):
        read_run(run)


def test_halves_of_surrogate_pairs_are_replaced(make_run):
    record = read_run(make_run(label="a\ud800b", environment={"\udcff": "\udcff"}))
    assert record.label.isascii() is False
    record.label.encode()
    assert all(text.encode() for pair in record.environment.items() for text in pair)


def test_class_names_that_are_no_texts_get_their_number(make_run, make_gallery):
    gallery = {**make_gallery(), "class_names": [3, None, ["deep"]]}
    assert read_run(make_run(gallery=gallery)).gallery.images[0].true_class == "class 0"
