"""Filling a teacher cache, and training from it."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from filelock import FileLock
from timm import create_model
from torch import Tensor

import softlabels
from softlabels import Teacher, TeacherCache
from softlabels.cli import main
from softlabels.data import DataInfo, open_source
from softlabels.data.augment import Affine, Compose, Noise
from softlabels.data.in_memory import InMemorySource, Split
from softlabels.distill.answers import compress
from softlabels.io.weights import save_weights
from softlabels.report import write_report
from softlabels.training.build import build_teacher
from softlabels.training.cache_teacher import CacheOptions, answer_error, build_cache
from softlabels.training.config import Config, resolve
from softlabels.training.errors import Interrupted, RunError
from softlabels.training.settings import TeacherSettings
from softlabels.training.validate import teacher_fingerprint

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
NUM_IMAGES = 96
PER_FILE = 40  # 3 files a draw, the last one smaller
FLOAT32 = {"precision": "no", "channels_last": False}
FAST = {
    "student": "timm:resnet8_glyphs",
    "batch_size": 32,
    "optimizer": {"lr": 0.1},
    "log_every": 1,
    "progress": False,
}


def split(seed: int, count: int) -> Split:
    """Gray pictures of six fixed patterns, each with noise of its own."""
    patterns = np.random.default_rng(0).integers(0, 2, (6, 4, 4)).repeat(4, 1).repeat(4, 2)
    labels = np.tile(np.arange(6), count)
    noise = np.random.default_rng(seed + 1).normal(0, 0.2, (6 * count, 16, 16))
    pictures = np.clip(0.2 + 0.6 * patterns[labels] + noise, 0, 1)
    return Split.from_arrays((255 * pictures).astype(np.uint8), labels)


def augmented(noise: float = 0.05, first: int = 0) -> InMemorySource:
    info = DataInfo("patterns", tuple("abcdef"), 1, (16, 16), (0.5,), (0.35,))
    augmentation = Compose((Affine(10, (0.9, 1.1), 5, 1), Noise(noise)))
    return InMemorySource(split(first, 16), split(100, 8), info, augmentation=augmentation)


def network(seed: int = 5) -> torch.nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = create_model("resnet8_glyphs", num_classes=6)
        # Fresh batch norms would all but ignore the image.
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_var.fill_(0.05)
        model.fc.weight.data *= 10
    return model


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("teacher") / "teacher.safetensors"
    save_weights(network(), path)
    return path


def config_of(weights: Path, **settings: Any) -> Config:
    teacher = {
        "name": "timm:resnet8_glyphs",
        "weights": str(weights),
        **settings.pop("teacher", {}),
    }
    return resolve({"teacher": teacher, "seed": 3, "eval_batch_size": 16, **FLOAT32, **settings})


def build(weights: Path, path: Path, source: Any = None, **settings: Any) -> TeacherCache:
    how = {"draws": 2, "top": 3, "images_per_file": PER_FILE}
    how |= {name: settings.pop(name) for name in list(settings) if name in how}
    source = augmented() if source is None else source
    return build_cache(config_of(weights, **settings), path, CacheOptions(**how), source=source)


@pytest.fixture(scope="module")
def built(weights, tmp_path_factory) -> Path:
    """A cache that no test may change."""
    return build(weights, tmp_path_factory.mktemp("caches") / "built").path


def files_of(path: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(path)): file.read_bytes()
        for file in sorted(path.rglob("*"))
        if file.is_file() and file.suffix != ".lock"
    }


def losses(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["train/loss"] for line in lines if "train/loss" in line]


# What is stored


def test_the_answers_are_the_teachers_to_the_views_of_each_draw(weights, tmp_path):
    cache = build(weights, tmp_path / "cache", top=6)
    teacher = Teacher(network())

    assert cache.draw(3) == (3, 1)
    for number in range(2):
        source = augmented()
        for batch in source.train_batches(
            seed=11, epoch=4, batch_size=24, draw=cache.draw(number), device="cpu"
        ):
            logits = cache.logits(batch.index, batch.draw, "cpu")
            torch.testing.assert_close(logits, teacher(batch.images), rtol=1e-3, atol=1e-3)
    first, second = (cache.logits(torch.arange(8), torch.full((8,), d), "cpu") for d in (0, 1))
    assert (first - second).abs().max() > 0.01


def test_a_finished_cache_has_these_files_and_says_what_is_lost(built):
    cache = TeacherCache(built)
    names = {f"draw-{d:03d}/chunk-{c:05d}.safetensors" for d in range(2) for c in range(3)}

    assert files_of(built).keys() == {"manifest.json", *names}
    assert cache.error["views"] == 2 * NUM_IMAGES
    assert cache.error["unreadable"] == 0
    source, teacher = augmented(), Teacher(network())
    found = [
        answer_error(logits, compress(logits, 3))
        for draw in range(2)
        for batch in source.train_views(draw=(3, draw), batch_size=50, device="cpu")
        for logits in [teacher(batch.images)]
    ]
    divergence = torch.cat([of_batch for of_batch, _ in found])
    assert cache.error["mean_kl"] == pytest.approx(float(divergence.mean()), rel=1e-3)
    assert cache.error["max_kl"] == pytest.approx(float(divergence.max()), rel=1e-3)
    assert cache.error["mean_kl"] > 1e-4
    assert cache.error["top1_agreement"] == pytest.approx(1, abs=0.02)
    size = sum(len(content) for name, content in files_of(built).items() if name in names)
    assert cache.num_bytes == 2 * NUM_IMAGES * 16
    assert cache.num_bytes < size < cache.num_bytes + 6 * 800


def test_the_error_shrinks_with_each_further_class_of_a_real_teacher():
    settings = resolve({"method": "none"}).teacher.model_copy(
        update={
            "name": "timm:resnet14x4_glyphs",
            "weights": "package:recipes/glyphs100/teacher.safetensors",
        }
    )
    source = open_source("glyphs100", num_fonts=1)
    teacher = build_teacher(settings, source.info)
    batch = next(source.train_views(draw=(0, 0), batch_size=100, device="cpu"))
    logits = teacher(batch.images)

    means = [
        float(answer_error(logits, compress(logits, top))[0].mean())
        for top in (1, 2, 5, 10, 20, 50, 90, 100)
    ]

    assert all(larger > smaller for larger, smaller in itertools.pairwise(means))
    assert means[0] > 0.1
    assert 0 <= means[-1] < 1e-5  # what half precision rounds


# Training


class Replaying(Teacher):
    """A live teacher whose run shows two draws in turn, as a cache's does."""

    def draw(self, epoch: int) -> tuple[int, int]:
        return 3, epoch % 2


@pytest.mark.parametrize("method", ["nkd", "kd"])
def test_training_equals_that_with_the_teacher_on_the_same_draws(weights, tmp_path, method):
    """Four epochs: both draws are shown twice."""
    build(weights, tmp_path / "cache", top=6)
    options = {
        **FAST, "optimizer": {"lr": 0.01}, "method": method, "epochs": 4, "gallery": 0,
        "report": False, "grad_accum_steps": 2, "precision": "no",
    }  # fmt: skip

    softlabels.train(
        augmented(), teacher=Replaying(network()), output=str(tmp_path / "live"), **options
    )
    softlabels.train(
        augmented(),
        teacher={"cache": str(tmp_path / "cache")},
        output=str(tmp_path / "cached"),
        **options,
    )

    live, cached = losses(tmp_path / "live"), losses(tmp_path / "cached")
    assert len(live) == 12
    assert cached[:2] == pytest.approx(live[:2], rel=2e-4)
    assert cached == pytest.approx(
        live, rel=1e-2
    )  # a training magnifies what half precision rounds
    assert cached != live


def test_training_with_few_classes_learns_and_shows_training_images(built, tmp_path):
    result = softlabels.train(
        augmented(), method="nkd", teacher={"cache": str(built)}, epochs=6, gallery=5,
        output=str(tmp_path / "run"), **FAST,
    )  # fmt: skip

    assert result.final["top1"] > 40  # chance is 17 %
    gallery = json.loads((result.folder / "gallery.json").read_text())
    assert gallery["split"] == "training"
    assert "These are training images" in gallery["what"]
    assert len(gallery["images"]) == 5
    assert all(entry["non_target"] for entry in gallery["images"])
    page = (result.folder / "report.html").read_text()
    assert f"training image {gallery['images'][0]['index']}" in page
    assert "test image 0" not in page


def test_a_method_without_a_teacher_shows_the_same_draws_and_test_images(built, tmp_path):
    result = softlabels.train(
        augmented(), method="uskd", teacher={"cache": str(built)}, epochs=1, gallery=2,
        output=str(tmp_path / "run"), **FAST,
    )  # fmt: skip

    assert json.loads((result.folder / "gallery.json").read_text())["split"] == "test"


def test_a_comparison_keeps_training_and_test_images_apart(built, tmp_path):
    """The image of some index is another one in each split."""
    options = {**FAST, "epochs": 1, "gallery": NUM_IMAGES}
    runs = [
        softlabels.train(
            augmented(), method="nkd", teacher=teacher, output=str(tmp_path / name), **options
        ).folder
        for name, teacher in (("cached", {"cache": str(built)}), ("live", network()))
    ]

    write_report(runs, tmp_path / "report.html", title="both")

    page = (tmp_path / "report.html").read_text()
    assert page.count("training image 7<") == 1
    assert page.count("test image 7<") == 1


def test_the_teacher_is_compared_if_it_is_named(built, weights, tmp_path):
    teacher = {"name": "timm:resnet8_glyphs", "weights": str(weights), "cache": str(built)}

    softlabels.train(
        augmented(), method="nkd", teacher=teacher, epochs=1, gallery=0, report=False,
        output=str(tmp_path / "run"), **FAST,
    )  # fmt: skip

    save_weights(network(6), tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="holds another teacher's answers: the teacher finger"):
        softlabels.train(
            augmented(),
            method="nkd",
            teacher={**teacher, "weights": str(tmp_path / "other.safetensors")},
            output=str(tmp_path / "other"),
            **FAST,
        )
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (lambda: augmented(first=1), "holds answers to other training images or labels"),
        (lambda: augmented(noise=0.06), "holds answers to images that were augmented in another"),
    ],
    ids=["data", "augmentation"],
)
def test_other_data_are_refused_before_a_run_begins(built, weights, tmp_path, source, message):
    with pytest.raises(ValueError, match=message):
        softlabels.train(
            source(), method="nkd", teacher={"cache": str(built)},
            output=str(tmp_path / "run"), **FAST,
        )  # fmt: skip
    assert not (tmp_path / "run").exists()
    shutil.copytree(built, tmp_path / "cache")
    with pytest.raises(ValueError, match=message):
        build(weights, tmp_path / "cache", source())


def test_mixing_and_a_cache_do_not_go_together(built):
    with pytest.raises(ValueError, match=r"unmixed images: mix.mixup and mix.cutmix must be 0"):
        resolve({"teacher": {"cache": str(built)}, "mix": {"cutmix": 1.0}})


def test_a_cache_is_a_teacher_for_the_settings(built, tmp_path):
    resolve({"method": {"kind": "nkd"}, "teacher": {"cache": str(built)}})
    with pytest.raises(
        ValueError, match=r"give teacher.name and teacher.weights, or teacher.cache"
    ):
        resolve({"method": {"kind": "nkd"}})
    with pytest.raises(FileNotFoundError, match="is no teacher cache"):
        softlabels.train(
            augmented(), method="nkd", teacher={"cache": str(tmp_path / "none")},
            output=str(tmp_path / "run"), **FAST,
        )  # fmt: skip


# Fingerprints of the teacher


@pytest.mark.parametrize(
    "change",
    [
        {"mode": "train"},
        {"input_size": 20},
        {"class_map": (1, 0, 2, 3, 4, 5), "num_classes": 6},
        {"mean": (0.4,), "std": (0.2,)},
        {"settings": {"drop_rate": 0.1}},
        {"name": "timm:resnet8_glyphs_other"},
        {"weights": "other"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_each_thing_that_the_answers_depend_on_changes_the_fingerprint(weights, tmp_path, change):
    source = augmented()

    def fingerprint(**changes: Any) -> str:
        settings = config_of(weights).teacher.model_copy(update=changes)
        # The name alone, without a network of that name.
        known = settings.model_copy(update={"name": "timm:resnet8_glyphs"})
        return teacher_fingerprint(build_teacher(known, source.info), settings, source.info)

    if change == {"weights": "other"}:
        model = network()
        model.state_dict()["fc.bias"][0] += 1e-6
        save_weights(model, tmp_path / "other.safetensors")
        change = {"weights": str(tmp_path / "other.safetensors")}
    assert fingerprint(**change) != fingerprint()


def test_the_place_of_the_weights_does_not_change_the_fingerprint(weights, tmp_path):
    shutil.copy(weights, tmp_path / "moved.safetensors")
    info = augmented().info
    found = set()
    for path in (weights, tmp_path / "moved.safetensors"):
        settings = config_of(path).teacher
        found.add(teacher_fingerprint(build_teacher(settings, info), settings, info))
    assert len(found) == 1
    assert len(found.pop()) == 32


def test_a_bfloat16_teacher_has_a_fingerprint():
    settings, info = TeacherSettings(name="timm:resnet8_glyphs"), augmented().info
    full, half = Teacher(network()), Teacher(network().bfloat16())

    found = {teacher_fingerprint(teacher, settings, info) for teacher in (full, half)}

    assert len(found) == 2


# Going on, and refusing


class Signalling(InMemorySource):
    """A source whose n-th batch of views comes with a signal to the process."""

    def __init__(self, number: int, signal_number: int = signal.SIGTERM) -> None:
        self.__dict__.update(augmented().__dict__)
        self._left = number
        self._number = signal_number

    def train_views(self, **where):
        for batch in super().train_views(**where):
            self._left -= 1
            if self._left == 0:
                os.kill(os.getpid(), self._number)
            yield batch


class Counting(InMemorySource):
    """A source that notes which views it was asked for."""

    def __init__(self) -> None:
        self.__dict__.update(augmented().__dict__)
        self.asked: list[tuple[int, int]] = []

    def train_views(self, **where):
        self.asked.append((where["draw"][1], where["start"]))
        return super().train_views(**where)


@pytest.mark.parametrize("number", [1, 7, 12])
def test_a_build_that_was_stopped_goes_on(built, weights, tmp_path, number):
    path = tmp_path / "cache"
    with pytest.raises(Interrupted, match=r"; \d of 6 files are finished in .*goes on") as stop:
        build(weights, path, Signalling(number))
    assert stop.value.status == 143
    with pytest.raises(ValueError, match="is not finished"):
        TeacherCache(path)
    there = files_of(path)
    assert len(there) == {1: 1, 7: 3, 12: 5}[number]  # with the manifest

    source = Counting()
    build(weights, path, source)

    assert len(source.asked) == 6 - (len(there) - 1)
    assert files_of(path) == files_of(built)


def test_only_a_damaged_or_missing_file_is_made_again(built, weights, tmp_path):
    path = Path(shutil.copytree(built, tmp_path / "cache"))
    damaged = path / "draw-001" / "chunk-00001.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-3] ^= 1
    damaged.write_bytes(content)
    (path / "draw-000" / "chunk-00002.safetensors").unlink()
    (path / "draw-000" / ".chunk-00002.safetensors.0a1b.part").write_bytes(b"half")
    source = Counting()

    build(weights, path, source)

    assert source.asked == [(0, 80), (1, 40)]
    assert files_of(path) == files_of(built)


def test_a_finished_cache_is_left_as_it_is(built, weights, tmp_path):
    path = Path(shutil.copytree(built, tmp_path / "cache"))
    source = Counting()

    build(weights, path, source)

    assert source.asked == []
    assert files_of(path) == files_of(built)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"top": 4}, "another cache: top: 3 there, 4 here; choose another --output"),
        ({"draws": 3}, "another cache: num_draws: 2 there, 3 here"),
        ({"images_per_file": 50}, "another cache: images_per_file: "),
        ({"seed": 4}, "another cache: seed: 3 there, 4 here"),
        ({"precision": "bf16"}, "another cache: precision: no there, bf16 here"),
        ({"teacher": {"input_size": 20}}, "another teacher's answers"),
    ],
)
def test_a_folder_with_another_cache_is_refused(built, weights, tmp_path, change, message):
    path = Path(shutil.copytree(built, tmp_path / "cache"))

    with pytest.raises(ValueError, match=message):
        build(weights, path, **change)

    assert files_of(path) == files_of(built)


def test_a_folder_with_something_else_is_refused(weights, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("dear")
    (tmp_path / "file").write_text("dear")
    for name in ("mine", "file"):
        with pytest.raises(ValueError, match="exists and is no teacher cache"):
            build(weights, tmp_path / name)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.tex"]


def test_a_second_builder_is_refused_while_the_first_is_at_work(weights, tmp_path):
    (tmp_path / "cache").mkdir()
    message = "is being filled by another process"
    with FileLock(tmp_path / "cache" / "cache.lock"), pytest.raises(ValueError, match=message):
        build(weights, tmp_path / "cache")
    build(weights, tmp_path / "cache", draws=1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"top": 0}, r"top\s+Input should be greater than or equal to 1"),
        ({"top": 7}, "top must be in 1..6, the number of classes, got 7"),
        ({"draws": 0}, r"draws\s+Input should be greater than or equal to 1"),
        ({"images_per_file": 0}, r"images_per_file\s+Input should be greater than"),
        ({"mix": {"mixup": 0.2}}, r"unmixed images: mix.mixup and mix.cutmix must be 0, got 0.2"),
        ({"teacher": {"name": None}}, "a teacher cache needs a teacher: give teacher.name"),
        ({"teacher": {"mode": "train"}}, r"teacher.mode must be eval"),
    ],
)
def test_settings_that_cannot_be_are_refused_before_anything_is_written(
    weights, tmp_path, change, message
):
    with pytest.raises(ValueError, match=message):
        build(weights, tmp_path / "cache", **change)
    assert not (tmp_path / "cache").exists()


class Fixed(torch.nn.Module):
    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = torch.nn.Parameter(logits)

    def forward(self, images: Tensor) -> Tensor:
        return self.logits.expand(len(images), -1)


@pytest.mark.parametrize(
    ("logits", "message"),
    [
        (torch.tensor([0, 0, 7e4, 0, 0, 0]), r"at most 65,504 in size.*got 70000"),
        (torch.zeros(9), r"the teacher has 9 classes, the data 6: give teacher.class_map"),
    ],
)
def test_answers_that_cannot_be_stored_end_the_build(tmp_path, logits, message):
    config, source, teacher = resolve({}), augmented(), Teacher(Fixed(logits))

    with pytest.raises(ValueError, match=message):
        build_cache(config, tmp_path / "cache", CacheOptions(top=1), source=source, teacher=teacher)
    assert files_of(tmp_path / "cache").keys() == {"manifest.json"}


def test_a_full_disk_is_told_and_keeps_what_is_finished(weights, tmp_path, monkeypatch):
    import resource

    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, most))
    try:
        with pytest.raises(RunError, match=r"no room for .*cache .*finished files are whole"):
            build(weights, tmp_path / "cache")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
        signal.signal(signal.SIGXFSZ, before)
    assert files_of(tmp_path / "cache").keys() == {"manifest.json"}
    build(weights, tmp_path / "cache")


def test_images_that_cannot_be_read_have_no_answer(image_folder, weights, tmp_path):
    data = Path(shutil.copytree(image_folder, tmp_path / "data"))
    broken = sorted((data / "train").rglob("*.png"))[5]
    broken.write_bytes(b"no picture")
    settings = {"image_size": 16, "workers": 0, "bad_images": "skip"}
    of_teacher = {"name": "timm:resnet8_glyphs", "settings": {}}
    config = resolve({"data": {"path": str(data), **settings}, "teacher": of_teacher})

    with pytest.warns(UserWarning, match="unreadable image"):
        cache = build_cache(
            config, tmp_path / "cache", CacheOptions(draws=2, top=6, images_per_file=10)
        )

    assert cache.error["unreadable"] == 2
    assert cache.error["views"] == 2 * 47
    with pytest.raises(ValueError, match=r"no answer for the images \[5\]"):
        cache.logits(torch.tensor([4, 5]), torch.tensor([0, 1]), "cpu")
    with pytest.warns(UserWarning, match="unreadable image"):
        result = softlabels.train(
            {"path": str(data), **settings}, method="kd", teacher={"cache": str(cache.path)},
            epochs=2, gallery=2, output=str(tmp_path / "run"), **FAST,
        )  # fmt: skip
    assert result.final["nll"] > 0


# The command


def glyphs(path: Path, *more: str) -> list[str]:
    return [
        "cache-teacher", "glyphs100/nkd", "--data.num-fonts", "1", "--draws", "2", "--top", "5",
        "--images-per-file", "30", "--device", "cpu", "--output", str(path), *more,
    ]  # fmt: skip


def test_the_command_fills_a_cache_that_the_recipe_trains_from(tmp_path, capsys):
    path = tmp_path / "cache"
    assert main(glyphs(path)) == 0

    printed = capsys.readouterr().out
    assert "100 images x 2 draws, 5 of 100 classes: 0.00 MB, 24 MB per million images" in printed
    assert "KL mean" in printed
    assert f"train with --teacher.cache {path}" in printed
    command = [
        "train", "glyphs100/nkd", "--data.num-fonts", "1", "--epochs", "1", "--batch-size", "50",
        "--gallery", "0", "--no-report", "--teacher.cache", str(path),
        "--output", str(tmp_path / "run"),
    ]  # fmt: skip
    assert main(command) == 0
    assert "everything is in" in (told := capsys.readouterr().out)
    assert "report.html" not in told  # it was not asked for
    assert "cache: " + str(path) in (tmp_path / "run" / "config.yaml").read_text()


def test_the_recipes_own_cache_is_the_default_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text(
        "data: {num_fonts: 1}\n"
        "output: runs/mine\n"
        "teacher: {name: 'timm:resnet8_glyphs', cache: caches/mine}\n"
        "method: {kind: kd}\n"
    )

    assert main(["cache-teacher", "mine.yaml", "--draws", "1"]) == 0

    assert TeacherCache("caches/mine").num_draws == 1
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--top", "101"), "top must be in 1..100, the number of classes, got 101"),
        (("--draws", "0"), "draws: Input should be greater than or equal to 1"),
        (("--draws", "many"), "invalid"),
        (("--mix.mixup", "0.1"), "mix.mixup and mix.cutmix must be 0"),
        (("--teacher.name", "None"), "give teacher.name"),
        (("--depth", "3"), "--depth"),
    ],
)
def test_mistakes_are_one_line(tmp_path, capsys, more, message):
    assert main(glyphs(tmp_path / "cache", *more)) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("softlabels cache-teacher: ")
    assert message in lines[0]


def test_the_folder_must_be_said(capsys):
    assert main(["cache-teacher", "glyphs100/nkd"]) == 2
    assert "say where the cache shall be: --output FOLDER" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_build_the_same_bytes_as_one(tmp_path):
    command = glyphs(tmp_path / "two")
    done = subprocess.run(
        [*TORCHRUN, "-m", "softlabels", *command],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("KL mean") == 1

    assert main(glyphs(tmp_path / "one")) == 0

    one, two = files_of(tmp_path / "one"), files_of(tmp_path / "two")
    assert len(one) == 1 + 2 * 4
    assert one == two
