"""Several teachers: together by their mean prediction, or one for each method."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import softlabels
from shared.recording import Recording
from shared.small_networks import (
    IMAGE_SHAPE,
    hard_labels,
    images_of,
    small_cnn,
    small_vit,
)
from softlabels import Distiller, KDLoss, Teacher
from softlabels.data.sources.noise import noise
from softlabels.distill.teacher import Teachers, ensembled
from softlabels.inputs import Classifier, Features, Input, NormParameters, TeacherLogits
from softlabels.io.weights import save_weights
from softlabels.losses import ATLoss, FitNetLoss, NKDLoss, WeightedSum
from softlabels.training.config import ConfigError, parse, resolve


def three() -> list[nn.Module]:
    return [small_cnn(seed=k) for k in (1, 2, 3)]


def values_of(teacher: object, **inputs: Input) -> dict[str, Any]:
    method = Recording(**inputs)
    distiller = Distiller(small_cnn(), method, teacher=teacher, example_shape=IMAGE_SHAPE)
    distiller(images_of(), hard_labels())
    return method.values


# Their mean prediction


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_together_they_say_the_logarithm_of_their_mean_prediction(dtype):
    generator = torch.Generator().manual_seed(2)
    logits = [5 * torch.randn(4, 7, generator=generator).to(dtype) for _ in range(3)]

    found = ensembled(logits)

    mean = torch.stack([each.double().softmax(1) for each in logits]).mean(0)
    wanted = torch.float64 if dtype == torch.float64 else torch.float32
    assert found.dtype == wanted
    torch.testing.assert_close(found, mean.log().to(wanted))
    torch.testing.assert_close(found.exp().sum(1), torch.ones(4, dtype=wanted))


def test_the_mean_is_finite_where_the_teachers_are_sure():
    logits = [torch.tensor([[1e4, 0.0, -1e4]]), torch.tensor([[-1e4, 1e4, 0.0]])]

    found = ensembled(logits)

    assert found.isfinite().all()
    torch.testing.assert_close(found[0, :2], torch.full((2,), math.log(0.5)))


def test_one_alone_says_what_it_says():
    logits = torch.randn(4, 7)

    assert ensembled([logits]) is logits


def test_logits_of_all_and_of_each():
    models = three()
    values = values_of(models, all=TeacherLogits(), first=TeacherLogits(0), last=TeacherLogits(2))

    of_each = [model(images_of()) for model in models]
    torch.testing.assert_close(values["first"], of_each[0])
    torch.testing.assert_close(values["last"], of_each[2])
    mean = torch.stack([logits.softmax(1) for logits in of_each]).mean(0)
    torch.testing.assert_close(values["all"], mean.log())
    assert not any(value.requires_grad for value in values.values())


def test_kd_from_several_is_kd_from_their_mean():
    models = three()
    distiller = Distiller(small_cnn().eval(), KDLoss(temperature=2.0), teacher=models)

    step = distiller(images_of(), hard_labels())

    mean = torch.stack([model(images_of()).softmax(1) for model in models]).mean(0).detach()
    expected = KDLoss(temperature=2.0)(step.logits, mean.log())
    torch.testing.assert_close(step.terms["method"], expected)


def test_a_sequence_is_the_same_as_teachers():
    models = three()
    teachers = Teachers([Teacher(models[0]), *models[1:]])

    for given in (models, tuple(models), teachers):
        distiller = Distiller(small_cnn(), KDLoss(), teacher=given)
        assert isinstance(distiller.teacher, Teachers)
        assert [each.model for each in distiller.teacher.all] == models
    torch.testing.assert_close(
        teachers(images_of()), ensembled([model(images_of()) for model in models])
    )
    one = Distiller(small_cnn(), KDLoss(), teacher=models[:1])
    torch.testing.assert_close(one.teacher(images_of()), models[0](images_of()))


def test_each_runs_once_a_batch():
    calls = []
    models = three()
    for number, model in enumerate(models):
        model.register_forward_hook(lambda *_, number=number: calls.append(number))
    method = WeightedSum({"a": KDLoss(), "b": NKDLoss(), "c": ATLoss()}, teachers={"b": 2, "c": 1})
    distiller = Distiller(small_cnn(), method, teacher=models, example_shape=IMAGE_SHAPE)
    calls.clear()

    distiller(images_of(), hard_labels())

    assert calls == [0, 1, 2]


def test_they_are_frozen_and_neither_trained_nor_stored():
    models = three()
    distiller = Distiller(small_cnn(), KDLoss(), teacher=models).train()

    distiller(images_of(), hard_labels()).loss.backward()

    assert not any(module.training for model in models for module in model.modules())
    assert not any(parameter.requires_grad for model in models for parameter in model.parameters())
    names = {name for name, _ in distiller.named_parameters()} | distiller.state_dict().keys()
    assert all(name.startswith("trainable.student.") for name in names)
    assert {p.dtype for p in distiller.double().teacher.parameters()} == {torch.float64}


# One for each method


def test_one_teacher_for_each_method():
    models = three()
    method = WeightedSum(
        {"a": KDLoss(), "b": KDLoss(), "all": KDLoss()},
        {"a": 0.5, "b": 2.0},
        teachers={"a": 0, "b": 2},
    )
    distiller = Distiller(small_cnn().eval(), method, teacher=models)

    step = distiller(images_of(), hard_labels())

    of_each = [model(images_of()) for model in models]
    kd = KDLoss()
    expected = (
        0.5 * kd(step.logits, of_each[0])
        + 2.0 * kd(step.logits, of_each[2])
        + kd(step.logits, ensembled(of_each))
    )
    torch.testing.assert_close(step.terms["method"], expected)


def test_features_of_each_teacher_are_its_own():
    models = [small_cnn(seed=1), small_vit()]
    values = values_of(
        models,
        of_first=Features("teacher", ("stages",), "map"),
        of_second=Features("teacher", ("block:1", "last"), "pooled", teacher=1),
        before=Features("teacher", ("last",), before_activation=True),
        norms=NormParameters(),
        classifier=Classifier(teacher=1),
    )

    assert [tuple(value.shape) for value in values["of_first"]] == [
        (4, 8, 16, 16), (4, 12, 8, 8), (4, 16, 4, 4),
    ]  # fmt: skip
    assert [tuple(value.shape) for value in values["of_second"]] == [(4, 24), (4, 24)]
    torch.testing.assert_close(values["before"][0].relu(), values["of_first"][2])
    weight, bias = values["classifier"]
    assert torch.equal(weight, models[1].head.weight)
    torch.testing.assert_close(values["of_second"][1] @ weight.T + bias, models[1](images_of()))


def test_taps_name_places_of_the_first():
    models = [small_cnn(seed=1), small_cnn(seed=2)]
    method = Recording(
        first=Features("teacher", ("middle",)), second=Features("teacher", ("middle",), teacher=1)
    )
    distiller = Distiller(
        small_cnn(), method, teacher=models, taps={"teacher.middle": "stem"},
        example_shape=IMAGE_SHAPE,
    )  # fmt: skip
    distiller(images_of(), hard_labels())

    assert tuple(method.values["first"][0].shape) == (4, 8, 16, 16)
    assert tuple(method.values["second"][0].shape) == (4, 12, 8, 8)


def test_each_sees_images_in_its_own_way():
    normalization = ((0.2, 0.3, 0.4), (0.5, 0.6, 0.7))
    other = Teacher(
        small_vit(), normalization=normalization,
        student_normalization=((0.5,), (0.25,)), input_size=16,
    )  # fmt: skip
    first = Teacher(small_cnn(seed=1), input_size=32)
    values = values_of([first, other], a=TeacherLogits(0), b=TeacherLogits(1))

    torch.testing.assert_close(values["a"], first.model(first.prepared(images_of())))
    pixels = images_of() * 0.25 + 0.5
    mean, std = (torch.tensor(each).view(1, 3, 1, 1) for each in normalization)
    torch.testing.assert_close(values["b"], other.model((pixels - mean) / std))


# Classes


def test_class_counts_may_differ_where_a_map_says_which_are_which():
    class_map = [6, 0, 3, 2, 5]
    models = [small_cnn(seed=1), small_cnn(7, seed=2)]
    values = values_of([models[0], Teacher(models[1], class_map=class_map)], all=TeacherLogits())

    logits = [models[0](images_of()), models[1](images_of())[:, class_map]]
    torch.testing.assert_close(values["all"], ensembled(logits))


def test_class_counts_that_differ_are_an_error():
    models = [small_cnn(seed=1), small_cnn(7, seed=2)]

    with pytest.raises(
        ValueError, match=r"teachers must have the same classes, got \[5, 7\]: pass"
    ):
        Distiller(small_cnn(), KDLoss(), teacher=models, example_shape=IMAGE_SHAPE)
    one_each = WeightedSum({"a": KDLoss(), "b": KDLoss()}, teachers={"a": 0, "b": 1})
    with pytest.raises(ValueError, match="the teacher has 7 classes, the student 5"):
        Distiller(small_cnn(), one_each, teacher=models, example_shape=IMAGE_SHAPE)


def test_classes_do_not_matter_where_features_alone_are_read():
    method = WeightedSum(
        {"at": ATLoss(), "fitnet": FitNetLoss(stages=("stage1",))}, teachers={"fitnet": 1}
    )
    models = [small_cnn(seed=1), small_cnn(7, seed=2)]
    distiller = Distiller(small_cnn(), method, teacher=models, example_shape=IMAGE_SHAPE)

    assert distiller(images_of(), hard_labels()).loss.isfinite()


# Errors


def test_teachers_that_make_no_sense():
    with pytest.raises(ValueError, match="teachers must be one or more, got none"):
        Distiller(small_cnn(), KDLoss(), teacher=[])
    with pytest.raises(TypeError, match=r"model must be an nn\.Module, got str"):
        Distiller(small_cnn(), KDLoss(), teacher=[small_cnn(seed=1), "timm:resnet8"])
    with pytest.raises(ValueError, match="reads from no teacher, but one is given"):
        Distiller(small_cnn(), teacher=three())
    student = small_cnn()
    with pytest.raises(ValueError, match="teacher and student share parameters"):
        Distiller(student, KDLoss(), teacher=[small_cnn(seed=1), student])


@pytest.mark.parametrize(
    "kind", [TeacherLogits(2), Features("teacher", teacher=2), Classifier(2), NormParameters()]
)
def test_a_teacher_that_is_not_there(kind):
    if isinstance(kind, NormParameters):
        kind = NormParameters(teacher=2)

    with pytest.raises(ValueError, match="reads teacher 2, counted from 0, got 2 teachers"):
        values_of(three()[:2], value=kind)


# In a run


NOISE = {
    "source": "noise", "num_train": 64, "num_test": 256, "num_classes": 4, "image_size": 8,
    "in_channels": 1,
}  # fmt: skip


class Knowing(nn.Module):
    """Knows the patterns of the classes of the noise data, as well as `gain` says."""

    def __init__(self, gain: float = 4.0, *, classes: int = 4) -> None:
        super().__init__()
        source = noise(**{k: v for k, v in NOISE.items() if k != "source"})
        batch = next(iter(source.test_batches(batch_size=256, device="cpu")))
        means = torch.stack([batch.images[batch.target == k].mean(0).flatten() for k in range(4)])
        self.fc = nn.Linear(64, classes)
        with torch.no_grad():
            self.fc.weight.zero_()
            self.fc.bias.zero_()
            self.fc.weight[:4] = gain * means / 64
            self.fc.bias[:4] = -gain * means.square().sum(1) / 128

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(images.flatten(1))


def knowing_file(path: Path, code: Path, gain: float) -> dict[str, Any]:
    """Settings of such a teacher."""
    save_weights(Knowing(gain), path)
    return {"name": f"{code.stem}:linear", "weights": str(path)}


@pytest.fixture
def linear(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[float], dict[str, Any]]:
    """Makes settings of teachers that know the data, of a network in a file of code."""
    code = tmp_path / "several_teachers_code.py"
    code.write_text(
        "from torch import nn\n"
        "class Linear(nn.Module):\n"
        "    def __init__(self, num_classes):\n"
        "        super().__init__()\n"
        "        self.fc = nn.Linear(64, num_classes)\n"
        "    def forward(self, images):\n"
        "        return self.fc(images.flatten(1))\n"
        "def linear(num_classes=4):\n"
        "    return Linear(num_classes)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))

    def make(gain: float) -> dict[str, Any]:
        return knowing_file(tmp_path / f"{gain}.safetensors", code, gain)

    return make


def train(output: Path, **settings: Any) -> softlabels.training.TrainResult:
    return softlabels.train(
        **{
            "data": NOISE, "student": "timm:resnet8", "epochs": 2, "batch_size": 32, "gallery": 2,
            "progress": False, "output": output, "optimizer": {"lr": 0.05}, **settings,
        }
    )  # fmt: skip


def test_a_run_with_two_teachers(linear, tmp_path):
    result = train(
        tmp_path / "run", teacher=linear(1.0), further_teachers=[linear(16.0)], method="kd"
    )

    summary = json.loads((result.folder / "summary.json").read_text())
    name = "several_teachers_code:linear"
    assert summary["teacher"]["name"] == f"{name} + {name}"
    assert summary["teacher"]["top1"] > 90
    assert result.final["top1"] > 25
    assert len(json.loads((result.folder / "gallery.json").read_text())["images"]) == 2


def test_a_run_in_which_each_method_has_its_teacher(linear, tmp_path):
    losses = {}
    for number in (0, 1):
        result = train(
            tmp_path / str(number),
            teacher=linear(1.0),
            further_teachers=[linear(16.0)],
            method={"kind": "kd"},
            method_weight=0.0,
            further_methods=[{"kind": "nkd", "teacher": number}],
            epochs=1,
        )
        first = (result.folder / "metrics.jsonl").read_text().splitlines()
        logged = next(json.loads(line) for line in first if "train/method" in line)
        losses[number] = logged["train/method"]
        terms = {k: v for k, v in logged.items() if k.startswith("train/term/method/kd")}
        assert [*terms.values()] == [0.0] * len(terms) != []

    assert losses[0] != losses[1]


def test_a_teacher_that_knows_nothing_hides_behind_no_other(linear, tmp_path):
    """What all say together is measured."""
    lost = linear(-64.0)

    with pytest.raises(ValueError, match=r"is right on .* of the 256 test images"):
        train(tmp_path / "run", teacher=lost, further_teachers=[lost], method="kd")
    assert not (tmp_path / "run").exists()


def test_a_network_of_ones_own_and_further_teachers(linear, tmp_path):
    result = train(
        tmp_path / "run", teacher=Knowing(1.0), further_teachers=[linear(16.0)], method="kd",
        further_methods=[{"kind": "nkd", "teacher": 1}], epochs=1,
    )  # fmt: skip

    summary = json.loads((result.folder / "summary.json").read_text())
    assert summary["teacher"]["name"] == "object:Knowing + several_teachers_code:linear"


def test_a_run_with_teachers_of_other_classes_whose_features_alone_are_read(tmp_path):
    """They are not measured, since their answers are of no classes of the data."""
    resnet = {"name": "timm:resnet8"}
    result = train(
        tmp_path / "run", teacher=resnet, further_teachers=[{**resnet, "num_classes": 7}],
        method="at", further_methods=[{"kind": "fitnet", "teacher": 1}], epochs=1,
    )  # fmt: skip

    assert json.loads((result.folder / "summary.json").read_text())["teacher"] is None


def test_further_teachers_need_a_first_one():
    teacher = {"name": "timm:resnet8"}
    with pytest.raises(ConfigError, match=r"further_teachers stand beside teacher.name"):
        resolve({"further_teachers": [teacher]})
    with pytest.raises(ConfigError, match=r"further_teachers stand beside teacher.name"):
        resolve({"method": "kd", "teacher": {"cache": "x"}, "further_teachers": [teacher]})
    assert parse({"further_teachers": [teacher]}).further_teachers[0].name == "timm:resnet8"
