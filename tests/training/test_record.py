"""The record of a run: all settings as they were, and what a continuation compares with it."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import yaml

import softlabels
from shared.data_files import write_idx
from softlabels.cli import main
from softlabels.experiments.launcher import RunPlan
from softlabels.training.config import resolve

FAST = {
    "student": "timm:resnet8", "epochs": 1, "batch_size": 8, "gallery": 0, "analysis": False,
    "report": False, "progress": False,
}  # fmt: skip


def train(output: Path, data, **settings):
    return softlabels.train(data, output=output, **{**FAST, **settings})


def of_folder(path, **settings):
    return {"path": str(path), "image_size": 32, "workers": 0, **settings}


def test_the_message_names_the_settings_that_differ(image_folder, tmp_path):
    train(tmp_path / "run", of_folder(image_folder))
    message = r"data\.image_size: 32 there, 24 here; data\.random_erasing: 0\.0 there, 0\.5 here"
    with pytest.raises(ValueError, match=message):
        train(tmp_path / "run", of_folder(image_folder, image_size=24, random_erasing=0.5))


def test_the_same_data_go_on_however_their_path_is_written(image_folder, tmp_path, monkeypatch):
    first = train(tmp_path / "run", of_folder(image_folder))
    monkeypatch.chdir(image_folder.parent)
    moved = tmp_path / "moved"
    shutil.copytree(image_folder, moved)
    for path in (f"{image_folder}/", image_folder.name, f"./{image_folder.name}/.", moved):
        again = train(tmp_path / "run", of_folder(path))
        assert again.final == first.final


def test_other_images_at_the_same_path_do_not(image_folder, tmp_path):
    train(tmp_path / "run", of_folder(image_folder))
    image = next((image_folder / "train").rglob("*.*"))
    image.unlink()
    with pytest.raises(ValueError, match=r"data: train_images: \d+ there, \d+ here"):
        train(tmp_path / "run", of_folder(image_folder))


def test_data_of_ones_own_are_compared_too(source, tmp_path):
    train(tmp_path / "run", source)
    with pytest.raises(ValueError, match=r"data: digest: .* there"):
        train(tmp_path / "run", of_the_same_class(source))


def of_the_same_class(source):
    changed = source._train.images.clone()
    changed[0, 0, 0, 0] ^= 255
    return type(source)(
        type(source._train)(changed, source._train.target), source._test, source.info
    )


@pytest.mark.parametrize("command", ["train", "cache-teacher"])
def test_half_precision_without_an_accelerator_is_refused(tmp_path, capsys, command):
    given = ["--data.source", "noise", "--data.num-train", "16", "--epochs", "1",
        "--precision", "fp16", "--device", "cpu"]  # fmt: skip
    more = [] if command == "train" else ["--teacher.name", "timm:resnet8"]
    assert main([command, *given, *more, "--output", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "precision" in line
    assert "fp16" in line
    assert "bf16" in line
    assert not (tmp_path / "out").exists()


def test_a_path_is_one_run_however_it_is_written(tmp_path, monkeypatch):
    (tmp_path / "images" / "train").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    plan = RunPlan(tmp_path / "runs")
    for path in ("images", "images/", str(tmp_path / "images"), os.path.join(".", "images")):
        plan.add("run", resolve({"data": {"source": "folder", "path": path}}), 0)
    plan.add("another", resolve({"data": {"source": "folder", "path": "elsewhere"}}), 0)
    assert len(plan.rounds[0]) == 2


def test_what_the_data_decide_is_recorded(image_folder, tmp_path):
    result = train(tmp_path / "run", {"path": str(image_folder), "image_size": 32, "workers": 0})
    data = yaml.safe_load((result.folder / "config.yaml").read_text())["data"]
    assert data["source"] == "folder"
    assert data["augmentation"] == "random_resized_crop"
    assert data["crop_fraction"] == 0.875
    assert len(data["mean"]) == len(data["std"]) == 3
    content = json.loads((result.folder / "data.json").read_text())
    assert content["train_images"] > 0


def test_what_other_sources_find_is_recorded_too(tmp_path):
    write_idx(tmp_path / "fashion")
    result = train(tmp_path / "run", tmp_path / "fashion")
    data = yaml.safe_load((result.folder / "config.yaml").read_text())["data"]
    assert (data["source"], data["class_names"], data["flip"]) == ("idx", "fashion_mnist", True)
