"""Trainings in a row: in each but the first the student of the one before is the teacher."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import yaml
from torch import Tensor, nn

import softlabels
from softlabels.data import Batch
from softlabels.data.in_memory import InMemorySource
from softlabels.data.sources.noise import noise
from softlabels.inputs import FromBatch, Logits, TeacherLogits
from softlabels.io.weights import load_weights
from softlabels.losses import Method
from softlabels.models import build_model
from softlabels.training import trainer
from softlabels.training.config import ConfigError, resolve
from softlabels.training.errors import Interrupted

DATA = {
    "num_train": 32, "num_test": 16, "num_classes": 4, "image_size": 8, "in_channels": 1,
}  # fmt: skip
SETTINGS = {
    "student": "timm:resnet8", "method": "ban", "generations": 2, "epochs": 2, "batch_size": 16,
    "gallery": 0, "log_every": 1, "optimizer": {"lr": 0.05}, "precision": "no",
}  # fmt: skip


def train(output: Path, source: Any = None, **settings: Any) -> softlabels.training.TrainResult:
    source = noise(**DATA) if source is None else source
    return softlabels.train(source, output=output, progress=False, **{**SETTINGS, **settings})


def logged(folder: Path) -> list[dict[str, float]]:
    lines = (json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if "train/loss" in line]


def network(file: Path) -> nn.Module:
    model = build_model("timm:resnet8", num_classes=4, in_channels=1)
    load_weights(model, file, strict=True)
    return model.eval()


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> softlabels.training.TrainResult:
    return train(tmp_path_factory.mktemp("generations") / "run")


def test_an_earlier_generation_has_a_folder_inside_of_the_last_ones(result):
    folder = result.folder

    assert [path.name for path in folder.glob("generation-*")] == ["generation-1"]
    for each in (folder, folder / "generation-1"):
        assert json.loads((each / "summary.json").read_text())["complete"] is True
        assert (each / "student.safetensors").is_file()
        assert (each / "report.html").is_file()
    first, last = (yaml.safe_load((f / "config.yaml").read_text())
                   for f in (folder / "generation-1", folder))  # fmt: skip
    assert first["method"]["kind"] == "none"
    assert last["method"]["kind"] == "ban"
    assert first["generations"] == 1
    assert last["generations"] == 2
    assert first["epochs"] == last["epochs"] == 2


def test_the_first_generation_has_the_task_alone(result):
    steps = logged(result.folder / "generation-1")

    assert len(steps) == 4
    for line in steps:
        assert "train/method" not in line
        assert line["train/loss"] == pytest.approx(line["train/task"])
    for line in logged(result.folder):
        assert line["train/loss"] == pytest.approx(line["train/method"])  # BAN's task weight is 0


def test_each_generation_begins_with_weights_and_draws_of_its_own(result):
    first, last = (
        yaml.safe_load((f / "config.yaml").read_text())["seed"]
        for f in (result.folder / "generation-1", result.folder)
    )

    assert last == 0
    assert first != last


def test_the_last_generations_student_is_the_runs(result):
    images = next(iter(noise(**DATA).test_batches(batch_size=16, device="cpu"))).images
    first, last = (
        network(folder / "student.safetensors")
        for folder in (result.folder / "generation-1", result.folder)
    )

    assert torch.equal(result.student(images), last(images))
    assert not torch.allclose(first(images), last(images))


class Watching(Method):
    """A method that keeps what the teacher says of the batches, by image."""

    inputs: ClassVar = {
        "logits": Logits(), "teacher_logits": TeacherLogits(), "index": FromBatch(),
    }  # fmt: skip

    def __init__(self) -> None:
        super().__init__()
        self.said: list[Tensor] = []

    def terms(self, logits: Tensor, teacher_logits: Tensor, index: Tensor) -> dict[str, Tensor]:
        if not any(said is teacher_logits for said in self.said[-1:]):  # a logged step asks twice
            self.said.append(teacher_logits)
        return {"gap": (logits - teacher_logits).square().mean(1)}


class StillImages(InMemorySource):
    """A source whose training images are not augmented, and which keeps them."""

    def __init__(self, source: InMemorySource) -> None:
        self.__dict__.update(source.__dict__)
        self.shown: list[Tensor] = []

    def train_batches(self, **where: Any) -> Iterator[Batch]:
        for batch in super().train_batches(**where):
            self.shown.append(batch.images.clone())
            yield batch


def test_the_teacher_is_the_student_of_the_generation_before(tmp_path):
    method, source = Watching(), StillImages(noise(**DATA))
    config = resolve(
        {
            **SETTINGS, "student": {"name": "timm:resnet8"}, "generations": 3, "epochs": 1,
            "output": str(tmp_path / "run"), "data": {"source": "noise", **DATA},
        }
    )  # fmt: skip
    run = trainer.run(config, method=method, source=source)

    folders = [run.folder / f"generation-{k}" for k in (1, 2)]
    assert sorted(p.name for p in run.folder.glob("generation-*")) == [f.name for f in folders]
    teachers = [network(folder / "student.safetensors") for folder in folders]
    shown, said = source.shown[2:], method.said  # two steps a generation, the first without
    assert len(shown) == len(said) == 4
    for step, (images, logits) in enumerate(zip(shown, said, strict=True)):
        expected = teachers[step // 2](images)
        torch.testing.assert_close(logits, expected.detach(), rtol=1e-4, atol=1e-5)
    assert run.final["top1"] >= 0


def test_settings_of_the_method_are_for_the_generations_that_have_it(tmp_path):
    run = train(
        tmp_path / "run", method="kd", method_weight=0.5, method_warmup_epochs="run",
        task={"weight": "rest", "label_smoothing": 0.1},
        further_methods=[{"kind": "nkd", "weight": 0.0}],
        optimizer={"lr": 1e-6},  # so that losses change by their weights alone, and the batch
    )  # fmt: skip

    first = logged(run.folder / "generation-1")
    assert all(line["train/term/task"] == pytest.approx(line["train/task"]) for line in first)
    weights = (0.75, 0.75, 0.5, 0.5)
    lines = zip(logged(run.folder), weights, strict=True)
    bare = [line["train/task"] / weight for line, weight in lines]
    assert bare == pytest.approx([bare[0]] * 4, rel=0.1)


# Going on


class Stopping(InMemorySource):
    """A source whose n-th training batch comes with a signal to the process."""

    def __init__(self, source: InMemorySource, number: int) -> None:
        self.__dict__.update(source.__dict__)
        self._left = number

    def train_batches(self, **where: Any) -> Iterator[Batch]:
        for batch in super().train_batches(**where):
            self._left -= 1
            if self._left == 0:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch


@pytest.mark.parametrize(
    ("stop_after", "inside"), [(3, True), (5, False)], ids=["first generation", "second"]
)
def test_a_run_goes_on_in_the_generation_in_which_it_stopped(
    result, tmp_path, stop_after, inside, monkeypatch
):
    output = tmp_path / "run"
    with pytest.raises(Interrupted, match="after step"):
        train(output, Stopping(noise(**DATA), stop_after))
    assert (output / "generation-1" / "summary.json").exists() is not inside
    assert not (output / "summary.json").exists()
    for config in output.rglob("config.yaml"):
        text = config.read_text()
        config.write_text(text.replace("object:Stopping", "object:InMemorySource"))
    before = (output / "generation-1" / "metrics.jsonl").read_text()

    resumed = train(output)

    after = (output / "generation-1" / "metrics.jsonl").read_text()
    assert (after == before) is not inside  # what is done is not trained again
    for first, second in ((result.folder, output), *[
        (f / "generation-1" for f in (result.folder, output))
    ]):  # fmt: skip
        for line, wanted in zip(logged(second), logged(first), strict=True):
            assert line == wanted
    for name, value in result.student.state_dict().items():
        assert torch.equal(value, resumed.student.state_dict()[name]), name


def test_a_complete_run_is_not_trained_again(result):
    files = [*result.folder.rglob("metrics.jsonl")]
    before = [file.read_bytes() for file in files]

    again = train(result.folder)

    assert len(files) == 2
    assert [file.read_bytes() for file in files] == before
    assert again.final == result.final


def test_a_folder_with_another_number_of_generations_is_refused(result):
    with pytest.raises(ValueError, match="holds another run: generations: 2 there, 3 here"):
        train(result.folder, generations=3)


def test_the_source_is_opened_once_and_closed(tmp_path, monkeypatch):
    opened: list[InMemorySource] = []
    closed: list[int] = []

    def build(config: Any) -> InMemorySource:
        source = noise(**DATA)
        monkeypatch.setattr(source, "close", lambda: closed.append(1), raising=False)
        opened.append(source)
        return source

    monkeypatch.setattr("softlabels.training.build.build_source", build)
    softlabels.train(
        {"source": "noise", **DATA}, output=tmp_path / "run", progress=False, **SETTINGS
    )

    assert (len(opened), len(closed)) == (1, 1)


# Errors


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "ols"}, "each teaches the next, but method 'ols' reads from no teacher"),
        ({"method": "none"}, "each teaches the next, but method 'none' reads from no teacher"),
        (
            {"method": "kd", "teacher": {"name": "timm:resnet8"}},
            "is taught by the one before, leav",
        ),
        ({"method": "kd", "teacher": {"cache": "x"}}, "is taught by the one before, leave the"),
        ({"method": "kd", "further_teachers": [{"name": "timm:resnet8"}]}, "by the one before"),
        ({"method": "kd", "generations": 0}, "generations: "),
        ({"method": "kd", "generations": 101}, "generations: "),
    ],
)
def test_generations_that_make_no_sense(settings, message):
    with pytest.raises(ConfigError, match=message) as error:
        resolve({"generations": 2, **settings})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("part", ["student", "teacher"])
def test_networks_of_ones_own_cannot_begin_anew(tmp_path, part):
    model = build_model("timm:resnet8", num_classes=4, in_channels=1)

    with pytest.raises(ValueError, match=r"generations 2: "):
        train(tmp_path / "run", **{part: model})
    assert not (tmp_path / "run").exists()
