"""A teacher is measured before training: told, recorded, and refused where it only guesses."""

from __future__ import annotations

import io
import json
import math
import signal
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor, nn

import softlabels
from shared.living_runs import LivingRun
from shared.patterns import FAST
from shared.signalling import Signalling
from softlabels import Teacher
from softlabels.data import DataInfo
from softlabels.data.in_memory import InMemorySource, Split
from softlabels.data.randomness import derive_seed
from softlabels.data.sources.folder import FolderSource
from softlabels.inputs import Features, Logits
from softlabels.io.weights import load_weights
from softlabels.losses import Method
from softlabels.models import build_model
from softlabels.training.cache_teacher import CacheOptions, build_cache
from softlabels.training.config import resolve
from softlabels.training.errors import Interrupted
from softlabels.training.precise_bn import recompute_statistics
from softlabels.training.run_records import read_run
from softlabels.training.schemas import NamedScore, TeacherScore
from softlabels.training.teacher_check import near_chance

CLASSES = 8
LEVELS = torch.linspace(0, 1, CLASSES)


def shades(each: int) -> Split:
    """So many flat images of each of eight shades."""
    target = np.tile(np.arange(CLASSES), each)
    images = np.broadcast_to(np.round(255 * target / 7)[:, None, None], (len(target), 16, 16))
    return Split.from_arrays(images.astype(np.uint8), target)


@pytest.fixture
def shaded() -> InMemorySource:
    names = tuple(f"shade {number}" for number in range(CLASSES))
    info = DataInfo("shades", names, 1, (16, 16), (0.5,), (0.25,))
    return InMemorySource(shades(8), shades(26), info)


class Knowing(nn.Module):
    """Tells shades apart, in images that are normalized as above; `noise` of them wrongly."""

    def __init__(self, order: list[int] | None = None, gain: float = 50.0) -> None:
        super().__init__()
        self.register_buffer("levels", LEVELS[order] if order else LEVELS)
        self.gain = gain

    def forward(self, images: Tensor) -> Tensor:
        shade = images.mean((1, 2, 3)) * 0.25 + 0.5
        return -self.gain * (shade[:, None] - self.levels).square()


class Guessing(Knowing):
    """Says the first class of everything."""

    def __init__(self) -> None:
        super().__init__(gain=0.0)


def run(
    source: InMemorySource, output: Path, teacher: Any, method: Any = "nkd", **more: Any
) -> str:
    """Train for an epoch, and give what was printed."""
    printed = io.StringIO()
    values = {**FAST, "epochs": 1, "method": method, "progress": True, **more}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "softlabels.experiments.train.Console", lambda **_: Console(file=printed, width=500)
        )
        softlabels.train(
            source, output=str(output), teacher=teacher, **{**values, "progress": True}
        )
    return printed.getvalue()


def test_a_teachers_score_is_told_and_recorded(shaded, tmp_path):
    printed = run(shaded, tmp_path / "run", Knowing(), report=True)

    assert "teacher object:Knowing: top-1 100.00 % on 208 test images" in printed
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["teacher"] == {"name": "object:Knowing", "top1": 100.0}
    record = read_run(tmp_path / "run")
    assert record.summary.teacher == NamedScore(name="object:Knowing", top1=100.0)
    page = (tmp_path / "run" / "report.html").read_text()
    assert "100.00 % (object:Knowing)" in page


def test_a_teacher_that_guesses_stops_the_run_before_it_begins(shaded, tmp_path):
    message = (
        r"object:Guessing is right on 12.50 % of the 208 test images, and guessing on 12.50 %.*"
        "teacher.check warn trains all the same"
    )
    with pytest.raises(ValueError, match=message) as found:
        run(shaded, tmp_path / "run", Guessing())
    assert "\n" not in str(found.value)
    assert not (tmp_path / "run").exists()


def test_a_warning_trains_all_the_same(shaded, tmp_path):
    printed = run(shaded, tmp_path / "run", {"name": Guessing(), "check": "warn"})
    assert "warning: the teacher object:Guessing is right on 12.50 %" in printed
    assert read_run(tmp_path / "run").summary.teacher.top1 == 12.5


def test_a_check_that_is_off_measures_nothing(shaded, tmp_path):
    printed = run(shaded, tmp_path / "run", {"name": Guessing(), "check": "off"})
    assert "test images" not in printed
    assert not (tmp_path / "run" / "teacher.json").exists()
    assert read_run(tmp_path / "run").summary.teacher is None


@pytest.mark.parametrize("order", [[3, 0, 2, 1, 7, 6, 5, 4], None])
def test_the_class_map_is_part_of_what_is_measured(shaded, tmp_path, order):
    shuffled = [3, 0, 2, 1, 7, 6, 5, 4]
    class_map = None if order is None else [shuffled.index(number) for number in range(CLASSES)]
    teacher = Teacher(Knowing(shuffled), class_map=class_map)
    if order is None:  # right on one shade of eight
        with pytest.raises(ValueError, match=r"is right on 12.50 %"):
            run(shaded, tmp_path / "run", teacher)
    else:
        assert "top-1 100.00 %" in run(shaded, tmp_path / "run", teacher)


def test_a_teacher_in_train_mode_is_measured_in_eval_mode_and_left_as_it_was(shaded, tmp_path):
    norm = nn.BatchNorm2d(1)
    teacher = Teacher(nn.Sequential(norm, Knowing()), mode="train")
    norm.running_mean.fill_(-40.0)
    with pytest.raises(ValueError, match=r"is right on .* test images"):
        run(shaded, tmp_path / "run", teacher)
    assert norm.num_batches_tracked == 0
    assert all(module.training for module in teacher.modules())


@pytest.mark.filterwarnings("ignore:Encountered `nan` values")
def test_answers_that_are_not_finite_are_an_error(shaded, tmp_path):
    with pytest.raises(ValueError, match="the teacher's answers are not all finite"):
        run(shaded, tmp_path / "run", Knowing(gain=math.nan))


@pytest.mark.parametrize("method", [None, "uskd"])
def test_a_teacher_that_nobody_reads_is_an_error(shaded, tmp_path, method):
    with pytest.raises(ValueError, match="reads from no teacher, but one is given: leave teacher"):
        run(shaded, tmp_path / "run", Guessing(), method)
    assert not (tmp_path / "run").exists()


class FeatureMethod(Method):
    """Reads maps of the teacher, and no logits."""

    inputs: ClassVar = {"logits": Logits(), "maps": Features(of="teacher", stages=("last",))}
    of_batch = True

    def terms(self, logits: Tensor, maps: list[Tensor]) -> dict[str, Tensor]:
        return {"product": logits.mean() * maps[0].mean()}


@pytest.mark.parametrize(
    ("num_classes", "told"), [(8, "top-1"), (5, "not checked, it has 5 classes")]
)
def test_a_teacher_of_features_is_measured_where_its_classes_are_the_datas(
    shaded, tmp_path, num_classes, told
):
    torch.manual_seed(0)
    network = build_model("timm:resnet8_glyphs", num_classes=num_classes, in_channels=1)
    teacher = {"name": network, "check": "warn"}
    assert told in run(shaded, tmp_path / "run", teacher, FeatureMethod())


def test_a_cache_of_answers_is_not_measured(shaded, tmp_path):
    config = resolve({**{k: FAST[k] for k in ("epochs", "batch_size")}, "teacher": {"name": "x"}})
    build_cache(
        config,
        tmp_path / "cache",
        CacheOptions(draws=1, top=CLASSES),
        source=shaded,
        teacher=Teacher(Guessing()),
    )
    printed = run(shaded, tmp_path / "run", {"cache": str(tmp_path / "cache")})
    assert "test images" not in printed


class Counting(InMemorySource):
    """A source that counts the readings of its test set."""

    def __init__(self, source: InMemorySource) -> None:
        self.__dict__.update(source.__dict__)
        self.readings = 0

    def test_batches(self, **where: Any) -> Any:
        self.readings += 1
        return super().test_batches(**where)


def test_a_resumed_run_measures_its_teacher_no_second_time(shaded, tmp_path):
    run_folder = tmp_path / "run"
    stopping = Signalling(shaded, 3, signal.SIGTERM)  # of four steps in two epochs
    with pytest.raises(Interrupted):
        run(stopping, run_folder, Knowing(), epochs=2, gallery=0, report=False)
    measured = json.loads((run_folder / "teacher.json").read_text())
    config = run_folder / "config.yaml"
    config.write_text(config.read_text().replace("object:Signalling", "object:Counting"))
    counting = Counting(shaded)

    teacher = {"name": Knowing(), "check": "warn"}  # which is no other run
    printed = run(counting, run_folder, teacher, epochs=2, gallery=0, report=False, analysis=False)

    assert counting.readings == 1  # the evaluation of the second epoch
    assert "top-1 100.00 % on 208 test images" in printed
    summary = json.loads((run_folder / "summary.json").read_text())
    assert summary["teacher"]["top1"] == measured["top1"]


@pytest.mark.parametrize("content", [b"", b"[]", b'{"top1": 1}', b"\xff", b"[" * 100_000])
def test_a_damaged_score_is_none(tmp_path, content):
    (tmp_path / "teacher.json").write_bytes(content)
    assert TeacherScore.found(tmp_path / "teacher.json") is None


def test_a_score_is_read_as_it_was_written(tmp_path):
    score = TeacherScore(name="timm:vgg16", top1=71.5, test_images=10, num_classes=4)
    score.write(tmp_path / "teacher.json")
    assert TeacherScore.found(tmp_path / "teacher.json") == score
    for name, value in (("top1", 101.0), ("top1", math.nan), ("num_classes", 1)):
        (tmp_path / "teacher.json").write_text(json.dumps({**score.model_dump(), name: value}))
        assert TeacherScore.found(tmp_path / "teacher.json") is None


@pytest.mark.parametrize(
    ("right", "images", "classes", "expected"),
    [
        (0, 2, 2, False),  # two images tell nothing
        (1, 2, 2, False),
        (0, 42, 100, False),
        (0, 43, 100, True),
        (50, 50_000, 1000, True),
        (71, 50_000, 1000, True),  # 50 and three deviations are 71.2
        (72, 50_000, 1000, False),
        (100, 10_000, 100, True),
        (129, 10_000, 100, True),
        (130, 10_000, 100, False),
        (500, 1000, 2, True),
        (547, 1000, 2, True),
        (548, 1000, 2, False),
        (300, 1000, 2, True),  # worse than guessing is no better
        (277, 557, 2, False),
        (277, 558, 2, True),
        (3, 150, 100, False),  # twice chance, though within three deviations
        (2, 150, 100, True),
    ],
)
def test_chance_is_told_from_knowledge_where_the_images_allow_it(right, images, classes, expected):
    score = TeacherScore(
        name="t", top1=100 * right / images, test_images=images, num_classes=classes
    )
    assert near_chance(score) == expected


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_measure_and_average_together(image_folder, tmp_path):
    common = [
        "--data.path", str(image_folder), "--data.image-size", "32", "--data.workers", "0",
        "--data.in-memory", "false", "--precision", "no",
        "--student.name", "timm:resnet8", "--epochs", "1", "--batch-size", "16", "--device", "cpu",
        "--optimizer.lr", "0.05", "--gallery", "0",
    ]  # fmt: skip
    teacher = LivingRun(tmp_path / "teacher", common)
    assert teacher.wait() == [0], teacher.text()
    taught = LivingRun(
        tmp_path / "taught",
        [*common, "--method.kind", "nkd", "--teacher.name", f"file:{tmp_path}/teacher",
         "--precise-bn", "32"],
        num_processes=2,
    )  # fmt: skip
    assert taught.wait() == [0, 0], taught.text()

    alone = json.loads((tmp_path / "teacher" / "summary.json").read_text())["final"]["top1"]
    told = json.loads((tmp_path / "taught" / "summary.json").read_text())["teacher"]
    assert told["top1"] == pytest.approx(alone)
    assert taught.text().count(f"teacher file:{tmp_path}/teacher: top-1") == 1

    stored = load_file(tmp_path / "taught" / "student.safetensors")
    source = FolderSource(image_folder, image_size=32, workers=0, in_memory=False)
    shares = []
    for rank in range(2):
        network = build_model("timm:resnet8", num_classes=6)
        load_weights(network, tmp_path / "taught" / "student.safetensors")
        batches = source.train_batches(
            seed=derive_seed(0, "precise_bn"), epoch=0, batch_size=16, rank=rank, world_size=2,
            device="cpu",
        )  # fmt: skip
        recompute_statistics(network, [batch.images for batch in batches][:2])
        shares.append(network.state_dict())
    names = [name for name in stored if "running" in name]
    for name in names:
        torch.testing.assert_close(stored[name], (shares[0][name] + shares[1][name]) / 2, msg=name)
    assert any(not torch.equal(shares[0][name], shares[1][name]) for name in names)
