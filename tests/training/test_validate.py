"""What a method needs and a run cannot give: one clear line, before anything is trained."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn

import softlabels
from shared.small_networks import small_cnn
from softlabels import Distiller
from softlabels.cli import main
from softlabels.data import Batch
from softlabels.data.in_memory import InMemorySource
from softlabels.data.sources.noise import noise
from softlabels.losses import CRDLoss, PSKDLoss
from softlabels.models import build_model
from softlabels.training.build import build_distiller, build_source, with_defaults
from softlabels.training.checkpoint import CheckpointFolder
from softlabels.training.config import resolve
from softlabels.training.validate import check_needs

DATA = {
    "num_train": 32, "num_test": 16, "num_classes": 4, "image_size": 8, "in_channels": 1,
}  # fmt: skip
SETTINGS = {
    "data": {"source": "noise", **DATA}, "student": "timm:resnet8", "epochs": 1, "batch_size": 16,
    "gallery": 0, "report": False, "progress": False,
}  # fmt: skip
TEACHER = {"name": "timm:resnet8"}
MIXED = {"mix": {"mixup": 0.4}}
CUT = {"mix": {"cutmix": 1.0}}


def refused(tmp_path: Path, **settings: Any) -> str:
    """The error of a run that does not begin."""
    with pytest.raises(ValueError) as found:
        softlabels.train(**{**SETTINGS, "output": tmp_path / "run", **settings})
    assert not (tmp_path / "run").exists()
    message = str(found.value)
    assert "\n" not in message
    return message


# Batches


@pytest.mark.parametrize("mix", [MIXED, CUT])
@pytest.mark.parametrize("method", ["cs_kd", {"kind": "cs_kd", "temperature": 2.0}])
def test_partners_go_without_mixing(tmp_path, method, mix):
    assert refused(tmp_path, method=method, **mix) == (
        "cs_kd reads another image of each image's class, and mixed images have two classes: "
        "mix.mixup and mix.cutmix must be 0"
    )


def test_a_further_method_has_needs_too(tmp_path):
    message = refused(tmp_path, method="ols", further_methods=[{"kind": "cs_kd"}], **MIXED)

    assert message.startswith("ols+cs_kd reads another image of each image's class")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (MIXED, "mixskd mixes images itself: mix.mixup and mix.cutmix must be 0"),
        (CUT, "mixskd mixes images itself: mix.mixup and mix.cutmix must be 0"),
        ({"grad_accum_steps": 2}, "mixskd mixes the images of a batch: grad_accum_steps must be "
                                  "1, got 2"),
        ({"batch_size": 15}, "mixskd mixes pairs of images: batch_size must be a multiple of 2, "
                             "got 15"),
    ],
)  # fmt: skip
def test_what_a_method_that_mixes_needs(tmp_path, settings, message):
    assert refused(tmp_path, method="mixskd", **settings) == message


def test_pairs_of_a_set_that_is_smaller_than_a_batch(tmp_path):
    data = {"source": "noise", **DATA, "num_train": 7}

    assert refused(tmp_path, method="mixskd", data=data) == (
        "mixskd mixes pairs of images: a training set that is smaller than batch_size must be a "
        "multiple of 2, got 7 images"
    )


def needs_of(num_processes: int, source: Any = None, **settings: Any) -> None:
    values = {k: v for k, v in {**SETTINGS, **settings}.items() if k != "progress"}
    values["student"] = {"name": values["student"]}
    source = noise(**DATA) if source is None else source
    config = with_defaults(resolve(values), source.info, source.num_train)
    distiller = build_distiller(config, source.info)
    check_needs(config, distiller, source, num_processes)


def test_each_process_needs_pairs_of_its_own():
    needs_of(2, method="mixskd", batch_size=16)
    with pytest.raises(ValueError, match="batch_size must be a multiple of 4, got 18"):
        needs_of(2, method="mixskd", batch_size=18)


def test_what_there_is_enough_for_passes():
    needs_of(1, method="cs_kd")
    needs_of(1, method="cs_kd", grad_accum_steps=2)
    needs_of(1, method="ddgsd", **MIXED)  # both views are mixed alike
    needs_of(1, method="mixskd")
    needs_of(2, method="ps_kd", **MIXED)
    needs_of(1, method="none", **CUT)


# Data


class Plain:
    """A source that knows nothing of further images."""

    def __init__(self) -> None:
        self._source = noise(**DATA)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    def train_batches(
        self, *, seed: int, epoch: int, batch_size: int, rank: int = 0, world_size: int = 1,
        start_step: int = 0, draw: tuple[int, int] | None = None, device: Any,
    ) -> Iterator[Batch]:  # fmt: skip
        return self._source.train_batches(
            seed=seed, epoch=epoch, batch_size=batch_size, rank=rank, world_size=world_size,
            start_step=start_step, draw=draw, device=device,
        )  # fmt: skip


class PassesOn(InMemorySource):
    """A source that passes on whatever it is asked for."""

    def __init__(self) -> None:
        self.__dict__.update(noise(**DATA).__dict__)
        self.asked: list[dict[str, Any]] = []

    def train_batches(self, **where: Any) -> Iterator[Batch]:
        self.asked.append(where)
        return super().train_batches(**where)


@pytest.mark.parametrize(("method", "names"), [("cs_kd", "partner"), ("ddgsd", "second_view")])
def test_a_source_without_further_images(tmp_path, method, names):
    assert refused(tmp_path, data=Plain(), method=method) == (
        f"{method} reads {names} from the batch, but train_batches of Plain takes no `extras`"
    )


def test_a_source_without_further_images_does_for_methods_that_need_none(tmp_path):
    for method in ("ps_kd", "mixskd"):  # images are mixed by the trainer
        result = softlabels.train(
            **{**SETTINGS, "data": Plain(), "method": method, "output": tmp_path / method}
        )
        assert result.final["top1"] >= 0


def test_a_source_that_passes_everything_on(tmp_path):
    source = PassesOn()

    softlabels.train(**{**SETTINGS, "data": source, "method": "cs_kd", "output": tmp_path / "run"})

    assert all(where["extras"] == ["partner"] for where in source.asked)


def test_partners_need_two_images_of_each_class(tmp_path):
    data = {"source": "noise", **DATA, "num_train": 7}

    message = refused(tmp_path, data=data, method="cs_kd", batch_size=4)

    assert message == "a partner needs two training images of each class, class '3' has 1"


# Size


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ({"kind": "ps_kd", "most_memory": 1e-9},
         "PS-KD's memory of 32 samples of 4 classes takes 544 bytes"),
        ({"kind": "crd", "most_memory": 1e-9}, "CRD's memory of 32 samples takes 33024 bytes"),
    ],
)  # fmt: skip
def test_a_memory_that_would_be_too_large(tmp_path, method, message):
    teacher = TEACHER if method["kind"] == "crd" else None

    assert message in refused(tmp_path, method=method, teacher=teacher)


@pytest.mark.parametrize("method", [PSKDLoss(), CRDLoss()])
def test_a_loop_of_ones_own_must_say_how_large_the_training_set_is(method):
    teacher = small_cnn(seed=1) if isinstance(method, CRDLoss) else None

    with pytest.raises(ValueError, match="set num_samples to the size of") as found:
        Distiller(small_cnn(), method, teacher=teacher, example_shape=(3, 16, 16))
    assert "\n" not in str(found.value)


def test_a_wrong_size_of_the_training_set_is_told_before_an_index_is_looked_up():
    """In a loop of one's own the indices may go beyond."""
    distiller = Distiller(
        small_cnn(), CRDLoss(num_samples=4), teacher=small_cnn(seed=1), example_shape=(3, 16, 16)
    )

    with pytest.raises(ValueError, match=r"index must lie in \[0, 4\) for num_samples=4"):
        distiller(torch.randn(2, 3, 16, 16), torch.tensor([0, 1]), index=torch.tensor([3, 4]))


class Watching(InMemorySource):
    """A source that keeps what was printed when the first batch was asked for."""

    def __init__(self, source: InMemorySource, printed: io.StringIO) -> None:
        self.__dict__.update(source.__dict__)
        self._printed = printed
        self.before = ""

    def train_batches(self, **where: Any) -> Iterator[Batch]:
        for batch in super().train_batches(**where):
            self.before = self.before or self._printed.getvalue()
            yield batch


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        # 400 samples of 300 classes in 4 bytes each, and a byte for each sample.
        ({"method": "ps_kd"}, "ps_kd keeps 0.5 MiB in each process for its method"),
        ({"method": "ps_kd", "ema_decay": 0.9}, "ps_kd keeps 0.9 MiB in each process"),
        ({"method": "ols", "further_methods": [{"kind": "ps_kd"}]}, "ols+ps_kd keeps 1.1 MiB"),
        ({"method": "cs_kd"}, None),
        ({"method": None}, None),
    ],
)
def test_what_a_method_keeps_is_told_before_training(tmp_path, settings, told, monkeypatch):
    printed = io.StringIO()
    monkeypatch.setattr(
        "softlabels.experiments.train.Console", lambda **_: Console(file=printed, width=500)
    )
    source = Watching(noise(**{**DATA, "num_train": 600, "num_classes": 200}), printed)
    if settings["method"] == "ps_kd" or "further_methods" in settings:
        source = Watching(noise(**{**DATA, "num_train": 400, "num_classes": 300}), printed)
    softlabels.train(
        **{**SETTINGS, "batch_size": 200, "output": tmp_path / "run", **settings,
           "data": source, "progress": True}
    )  # fmt: skip

    assert ("MiB" in source.before) is (told is not None)
    if told is not None:
        assert told in source.before


def test_the_memory_of_a_distiller():
    source = noise(**DATA)
    config = with_defaults(resolve({"method": "ps_kd"}), source.info, source.num_train)

    (memory,) = build_distiller(config, source.info).memories()
    assert memory.num_bytes() == 32 * (4 * 4 + 1)
    assert not [*build_distiller(resolve({"student": TEACHER}), source.info).memories()]


# Networks


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        # The student, then the teacher, is no vision transformer.
        ({"method": "vitkd", "teacher": TEACHER},
         "found no run of blocks that return tokens in SmallResNet: it needs a vision transformer"),
        ({"method": "vitkd", "student": "timm:vit_mini_patch4_32", "teacher": TEACHER},
         "found no run of blocks that return tokens in SmallResNet: it needs a vision transformer"),
        # Maps of a place that has none.
        ({"method": {"kind": "at", "stages": ["fc"]}, "teacher": TEACHER},
         "the method needs maps with rows and columns, but 'fc' of the student gives a feature of "
         "kind 'vector' without a grid: name other places in the method's settings, or a network "
         "with maps"),
        ({"method": {"kind": "at", "stages": ["layer7"]}, "teacher": TEACHER},
         "SmallResNet has no module 'layer7'; near names: "),
        ({"method": {"kind": "at", "stages": ["stage:3"]}, "teacher": TEACHER},
         "'stage:3' does not exist: the network has 3 stages"),
        # A BatchNorm that is not there.
        ({"method": "ofd", "teacher": {"name": "timm:vit_mini_patch4_32"}},
         "needs a BatchNorm with weight and bias at the end of "),
        # Teachers.
        ({"method": "kd"}, "method 'kd' reads from a teacher: give teacher.name and "),
        ({"method": "at"}, "method 'at' reads from a teacher: give teacher.name and "),
        ({"method": "crd"}, "method 'crd' reads from a teacher: give teacher.name and "),
        ({"method": "uskd", "teacher": TEACHER},
         "uskd reads from no teacher, but one is given: leave teacher out"),
        ({"teacher": TEACHER},
         "cross_entropy reads from no teacher, but one is given: leave teacher out"),
        ({"method": "ols", "further_methods": [{"kind": "cs_kd"}], "teacher": TEACHER},
         "ols+cs_kd reads from no teacher, but one is given: leave teacher out"),
        ({"method": "ols", "further_methods": [{"kind": "kd"}]},
         "reads from a teacher: give teacher.name and teacher.weights, or teacher.cache"),
    ],
)  # fmt: skip
def test_networks_that_do_not_have_what_a_method_reads(tmp_path, settings, message):
    assert message in refused(tmp_path, **settings)


def test_a_network_without_maps_at_all(tmp_path):
    student = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 4))

    message = refused(tmp_path, student=student, method="sad")

    assert message.startswith("found no last map or tokens in Sequential; name one with taps=")


def test_a_teacher_of_ones_own_that_nobody_reads(tmp_path):
    message = refused(tmp_path, method="uskd", teacher=small_cnn(4, channels=1))

    assert "reads from no teacher, but one is given: leave" in message


def test_a_peer_of_a_student_of_ones_own_must_be_named(tmp_path):
    student = build_model("timm:resnet8", num_classes=4, in_channels=1)
    settings = {"student": student, "method": "kdcl"}

    assert refused(tmp_path, **settings) == (
        "kdcl trains a second network along: beside a student of your own it needs peer.name"
    )
    result = softlabels.train(
        **{**SETTINGS, **settings, "peer": {"name": "timm:resnet8"}, "output": tmp_path / "run"}
    )
    assert result.student.state_dict().keys() == student.state_dict().keys()


def test_an_unknown_setting_of_a_further_method(tmp_path):
    further = {"kind": "nkd", "settings": {"temperature_": 2.0}}

    assert refused(tmp_path, method="kd", teacher=TEACHER, further_methods=[further]) == (
        "method: nkd: unknown setting 'temperature_': expected temperature"
    )


# Weights


def test_the_rest_needs_a_weight_of_1_at_most(tmp_path):
    settings = {"method": "ols", "task": {"weight": "rest"}}

    assert refused(tmp_path, **settings, method_weight=1.5) == (
        "task.weight rest is 1 - method_weight: method_weight must be at most 1, got 1.5"
    )
    needs_of(1, **settings, method_weight=1.0)


def test_the_rest_of_no_method_is_nothing(tmp_path):
    assert refused(tmp_path, task={"weight": "rest"}) == (
        "task.weight rest is 1 - method_weight, and there is no method"
    )


# In training and after it


class WithBadImages(InMemorySource):
    """A source one of whose training images is not finite."""

    def __init__(self, source: InMemorySource, bad: int) -> None:
        self.__dict__.update(source.__dict__)
        self._bad = bad

    def train_batches(self, **where: Any) -> Iterator[Batch]:
        for batch in super().train_batches(**where):
            batch.images[batch.index == self._bad] = math.nan
            yield batch


def test_a_step_that_the_trainer_skips_is_not_remembered(tmp_path):
    source = noise(num_train=32, num_test=8, num_classes=4, image_size=8, in_channels=1)
    result = softlabels.train(
        WithBadImages(source, 5), "timm:resnet8", "ps_kd", precision="bf16", max_skipped_steps=50,
        epochs=1, batch_size=8, gallery=0, report=False, progress=False, output=tmp_path / "run",
    )  # fmt: skip

    stored = CheckpointFolder(tmp_path / "run" / "checkpoints", 2).newest().content
    seen = stored["parts"]["trained"]["trainable.adapters.seen"]
    predictions = stored["parts"]["trained"]["trainable.adapters.predictions"]
    assert int(seen.sum()) == 24  # one batch of four is missing
    assert not seen[5]
    torch.testing.assert_close(predictions.sum(1), seen.float())
    assert math.isfinite(result.final["nll"])


@pytest.mark.parametrize("kind", ["mixskd", "cs_kd", "ddgsd", "ps_kd"])
def test_the_gallery_of_a_sum_brings_what_its_methods_read(tmp_path, kind):
    result = softlabels.train(
        **{**SETTINGS, "method": "ols", "further_methods": [{"kind": kind}], "gallery": 2,
           "output": tmp_path / "run"}
    )  # fmt: skip

    assert len(json.loads((result.folder / "gallery.json").read_text())["images"]) == 2


# The command line


def arguments(tmp_path: Path, *more: str) -> list[str]:
    named = [f"--data.{name.replace('_', '-')}={value}" for name, value in DATA.items()]
    return [
        "train", "--data.source", "noise", *named, "--student.name", "timm:resnet8",
        "--epochs", "1", "--batch-size", "16", "--output", str(tmp_path / "run"), *more,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--method.kind", "cs_kd", "--mix.mixup", "0.4"), "mix.mixup and mix.cutmix must be 0"),
        (("--method.kind", "mixskd", "--grad-accum-steps", "2"), "grad_accum_steps must be 1"),
        (("--method.kind", "mixskd", "--batch-size", "15"), "must be a multiple of 2, got 15"),
        (("--method.kind", "cs_kd", "--data.num-train", "7"), "two training images of each class"),
        (("--method.kind", "ps_kd", "--method.most-memory", "1e-9"), "raise most_memory if the"),
        (("--method.kind", "crd", "--method.most-memory", "1e-9", "--teacher.name",
          "timm:resnet8"), "most_memory allows"),
        (("--method.kind", "vitkd", "--teacher.name", "timm:resnet8"), "it needs a vision transf"),
        (("--method.kind", "ofd", "--teacher.name", "timm:vit_mini_patch4_32"), "a BatchNorm with"),
        (("--method.kind", "kd"), "method 'kd' reads from a teacher: give teacher.name"),
        (("--method.kind", "uskd", "--teacher.name", "timm:resnet8"), "leave teacher out"),
        (("--method.kind", "ols", "--generations", "2"), "each teaches the next"),
        (("--method.kind", "ols", "--method-weight", "2", "--task.weight", "rest"), "at most 1"),
    ],
    ids=lambda value: "" if isinstance(value, str) else " ".join(value),
)  # fmt: skip
def test_the_command_line_says_it_in_one_line(capsys, tmp_path, more, message):
    assert main(arguments(tmp_path, *more)) == 2

    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.startswith("softlabels")]
    assert len(lines) == 1, captured.err
    assert message in lines[0]
    assert "Traceback" not in captured.err
    assert not (tmp_path / "run").exists()


def test_the_source_of_a_refused_run_is_closed(monkeypatch):
    closed = []

    def build(config: Any) -> Any:
        source = build_source(config)
        monkeypatch.setattr(source, "close", lambda: closed.append(1), raising=False)
        return source

    monkeypatch.setattr("softlabels.training.build.build_source", build)
    with pytest.raises(ValueError, match=r"mix\.mixup and"):
        softlabels.train(**{**SETTINGS, "method": "cs_kd", **MIXED})
    assert closed == [1]
