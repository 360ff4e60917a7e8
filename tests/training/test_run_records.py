"""A run's folder as it is read."""

from __future__ import annotations

import json

import pytest

from softlabels.training.run_records import read_run


def test_folder_without_summary_is_an_error_that_names_it(tmp_path):
    with pytest.raises(ValueError, match=rf"{tmp_path} has no summary\.json"):
        read_run(tmp_path)


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
    lines = ['{"epoch": 0, "step": 0, "train/task": NaN, "train/method": Infinity}']
    lines += ['{"epoch": 0, "step": 1, "train/task": 2.5, "train/method": NaN}']
    lines += ['{"epoch": 0, "step": 2, "train/task": 1' + "0" * 400 + "}"]
    curves = read_run(make_run(metrics="\n".join(lines))).curves
    assert curves["train/task"].x.tolist() == [1]
    assert "train/method" not in curves


def test_class_without_a_name_gets_its_number(make_run, make_gallery):
    gallery = read_run(make_run(gallery=make_gallery(["ant"], prediction=[[0, 1.0]]))).gallery
    assert gallery.name_of(0) == "ant"
    assert gallery.name_of(2) == "class 2"
    assert gallery.images[0].is_right
