"""Weights of the losses over the epochs of a run."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import softlabels
from shared.small_networks import IMAGE_SHAPE, hard_labels, images_of, small_cnn
from softlabels import Distiller
from softlabels.data import Batch
from softlabels.data.in_memory import InMemorySource
from softlabels.data.sources.noise import noise
from softlabels.losses import KDLoss, NKDLoss, WeightedSum
from softlabels.training.build import with_defaults
from softlabels.training.config import Config, ConfigError, build_method, resolve
from softlabels.training.epoch_weights import set_weights
from softlabels.training.errors import Interrupted

DATA = {
    "num_train": 32, "num_test": 16, "num_classes": 4, "image_size": 8, "in_channels": 1,
}  # fmt: skip
KD = {"method": "kd", "teacher": {"name": "timm:resnet8"}}


def config_of(**values: Any) -> Config:
    return with_defaults(resolve(values), noise(**DATA).info, 32)


def weights_of(config: Config, epochs: int | None = None) -> list[tuple[float, ...]]:
    """Of the task and of the method, or of each of a sum, in each epoch."""
    method = build_method(config)
    distiller = Distiller(small_cnn(), method, teacher=small_cnn(seed=1), example_shape=IMAGE_SHAPE)
    found = []
    for epoch in range(config.epochs if epochs is None else epochs):
        set_weights(distiller, config, epoch)
        of_each = method.weights.values() if isinstance(method, WeightedSum) else [1.0]
        found.append((distiller.task_weight, *(distiller.method_weight * w for w in of_each)))
    return found


@pytest.mark.parametrize(
    ("over", "expected"),
    [
        (0, [2.0, 2.0, 2.0, 2.0, 2.0]),
        (1, [2.0, 2.0, 2.0, 2.0, 2.0]),
        (4, [0.5, 1.0, 1.5, 2.0, 2.0]),
        (2.5, [0.8, 1.6, 2.0, 2.0, 2.0]),
        (20, [0.1, 0.2, 0.3, 0.4, 0.5]),
        ("run", [0.4, 0.8, 1.2, 1.6, 2.0]),
        (None, [2.0, 2.0, 2.0, 2.0, 2.0]),  # KD's paper has none
    ],
)
def test_a_weight_rises_over_its_epochs_and_stays(over, expected):
    found = weights_of(config_of(**KD, method_weight=2.0, method_warmup_epochs=over, epochs=5))

    assert [of_method for _, of_method in found] == pytest.approx(expected)
    assert {of_task for of_task, _ in found} == {1.0}


def test_the_rest_is_the_tasks_in_every_epoch():
    found = weights_of(
        config_of(**KD, method_weight=0.8, method_warmup_epochs="run", task={"weight": "rest"},
                  epochs=4)
    )  # fmt: skip

    assert found == [
        pytest.approx(pair) for pair in [(0.8, 0.2), (0.6, 0.4), (0.4, 0.6), (0.2, 0.8)]
    ]


@pytest.mark.parametrize(("given", "expected"), [(0.9, 0.9), (0, 0.0), (3, 3.0), (None, 1.0)])
def test_a_weight_of_the_task_is_the_same_in_every_epoch(given, expected):
    found = weights_of(config_of(**KD, method_warmup_epochs=2, task={"weight": given}, epochs=3))

    assert [of_task for of_task, _ in found] == [expected] * 3


def test_each_method_of_a_sum_has_a_weight_and_a_rise_of_its_own():
    config = config_of(
        **KD,
        method_weight=0.4,
        method_warmup_epochs=2,
        task={"weight": "rest"},
        further_methods=[
            {"kind": "nkd", "weight": 3.0, "warmup_epochs": 3},
            {"kind": "nkd", "weight": 5.0, "warmup_epochs": "run"},
            {"kind": "kd", "weight": 0.0},
        ],
        epochs=4,
    )

    assert weights_of(config) == [
        pytest.approx(row)
        for row in [
            (0.8, 0.2, 1.0, 1.25, 0.0),
            (0.6, 0.4, 2.0, 2.5, 0.0),
            (0.6, 0.4, 3.0, 3.75, 0.0),
            (0.6, 0.4, 3.0, 5.0, 0.0),
        ]
    ]


def test_the_weights_of_an_epoch_do_not_depend_on_those_before():
    config = config_of(
        **KD, method_weight=1.0, method_warmup_epochs=4,
        further_methods=[{"kind": "nkd", "weight": 2.0, "warmup_epochs": 4}], epochs=8,
    )  # fmt: skip
    method = build_method(config)
    distiller = Distiller(small_cnn(), method, teacher=small_cnn(seed=1))

    for epoch in (5, 0, 2, 0):
        set_weights(distiller, config, epoch)

    assert method.weights == {"kd": 0.25, "nkd": 0.5}
    assert (distiller.task_weight, distiller.method_weight) == (1.0, 1.0)


def test_a_sum_of_ones_own_keeps_its_weights():
    method = WeightedSum({"kd": KDLoss(), "nkd": NKDLoss()}, {"kd": 0.3, "nkd": 0.7})
    config = with_defaults(
        resolve({"method_weight": 2.0, "method_warmup_epochs": 4}), noise(**DATA).info, 32, method
    )
    distiller = Distiller(small_cnn(), method, teacher=small_cnn(seed=1))

    set_weights(distiller, config, 0)

    assert method.weights == {"kd": 0.3, "nkd": 0.7}
    assert distiller.method_weight == 0.5


def test_the_weights_make_the_loss():
    config = config_of(
        **KD, method_weight=0.5, method_warmup_epochs=2, task={"weight": "rest"},
        further_methods=[{"kind": "nkd", "weight": 2.0}],
    )  # fmt: skip
    teacher = small_cnn(seed=1)
    distiller = Distiller(small_cnn().eval(), build_method(config), teacher=teacher)
    set_weights(distiller, config, 0)

    step = distiller(images_of(), hard_labels())

    logits, of_teacher = step.logits, teacher(images_of())
    expected = (
        0.75 * torch.nn.functional.cross_entropy(logits, hard_labels())
        + 0.25 * KDLoss()(logits, of_teacher)
        + 2.0 * NKDLoss()(logits, of_teacher, hard_labels())
    )
    torch.testing.assert_close(step.loss, expected)


# What papers use


def test_defaults_are_those_of_the_methods():
    config = config_of(
        method="ps_kd", further_methods=[{"kind": "ols"}, {"kind": "dkd"}],
        teacher={"name": "timm:resnet8"},
    )  # fmt: skip

    assert (config.method_weight, config.method_warmup_epochs) == (0.8, "run")
    assert config.task.weight == "rest"
    assert config.method.num_samples == 32
    assert [(f.weight, f.warmup_epochs) for f in config.further_methods] == [(0.5, 0.0), (1.0, 0.0)]


def test_a_setting_outdoes_a_default():
    config = config_of(
        method={"kind": "ps_kd", "num_samples": 40}, method_weight=0.0, method_warmup_epochs=0,
        task={"weight": 0.0}, further_methods=[{"kind": "ps_kd", "weight": 0.0}],
    )  # fmt: skip

    assert (config.method_weight, config.method_warmup_epochs, config.task.weight) == (0, 0, 0)
    assert config.method.num_samples == 40
    assert config.further_methods[0].weight == 0
    assert config.further_methods[0].warmup_epochs == "run"
    assert config.further_methods[0].settings["num_samples"] == 32


@pytest.mark.parametrize(
    ("settings", "where"),
    [
        ({"method_warmup_epochs": -1}, "method_warmup_epochs"),
        ({"method_warmup_epochs": "always"}, "method_warmup_epochs"),
        ({"method_weight": -0.1}, "method_weight"),
        ({"task": {"weight": -1}}, "task.weight"),
        ({"task": {"weight": "half"}}, "task.weight"),
        ({"further_methods": [{"kind": "nkd", "weight": -1}]}, "further_methods.0.weight"),
    ],
)
def test_a_weight_that_makes_no_sense(settings, where):
    with pytest.raises(ConfigError, match=f"^{where}: "):
        resolve({**KD, **settings})


# In a run


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


SETTINGS = {
    "student": "timm:resnet8", "method": "ps_kd", "epochs": 4, "batch_size": 16, "log_every": 1,
    "gallery": 0, "report": False, "progress": False, "optimizer": {"lr": 1e-5},
    "further_methods": [{"kind": "tf_kd", "weight": 2.0, "warmup_epochs": 8}],
}  # fmt: skip


def logged(folder: Path) -> list[dict[str, float]]:
    lines = (json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if "train/loss" in line]


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> softlabels.training.TrainResult:
    output = tmp_path_factory.mktemp("runs") / "straight"
    return softlabels.train(noise(**DATA), output=output, **SETTINGS)


def test_a_run_trains_with_the_weights_of_its_epochs(straight):
    steps = logged(straight.folder)

    # Two steps an epoch; PS-KD rises to 0.8 over the run, the task has the rest.
    # At so low a rate the cross-entropy hardly changes, but for its weight.
    weights = (0.8, 0.8, 0.6, 0.6, 0.4, 0.4, 0.2, 0.2)
    bare = [line["train/task"] / w for line, w in zip(steps, weights, strict=True)]
    assert bare == pytest.approx([bare[0]] * 8, rel=0.15)
    of_tf_kd = []
    for line in steps:
        parts = {k: v for k, v in line.items() if k.startswith("train/term/method/")}
        total = sum(parts.values())
        assert line["train/loss"] == pytest.approx(line["train/term/task"] + total, rel=1e-5)
        assert line["train/method"] == pytest.approx(total, rel=1e-5)
        of_tf_kd.append(sum(v for k, v in parts.items() if "/tf_kd" in k))
    # At so low a rate its value hardly changes, but for its weight.
    rises = (0.25, 0.25, 0.5, 0.5, 0.75, 0.75, 1.0, 1.0)
    plain = [value / weight for value, weight in zip(of_tf_kd, rises, strict=True)]
    assert plain == pytest.approx([plain[0]] * 8, rel=0.15)


@pytest.mark.parametrize("stop_after", [3, 4], ids=["within", "epoch's end"])
def test_a_run_that_goes_on_has_the_weights_of_the_epochs_that_are_left(
    straight, tmp_path, stop_after
):
    source = noise(**DATA)
    with pytest.raises(Interrupted, match=f"after step {stop_after}"):
        softlabels.train(Stopping(source, stop_after), output=tmp_path / "run", **SETTINGS)
    config = tmp_path / "run" / "config.yaml"
    config.write_text(config.read_text().replace("object:Stopping", "object:InMemorySource"))

    resumed = softlabels.train(source, output=tmp_path / "run", **SETTINGS)

    for first, second in zip(logged(straight.folder), logged(resumed.folder), strict=True):
        assert first == second
    for name, value in straight.student.state_dict().items():
        assert torch.equal(value, resumed.student.state_dict()[name]), name
