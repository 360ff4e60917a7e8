"""A run of any method that is stopped and goes on ends like one that is not: slow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import softlabels
from shared.method_runs import (
    BATCH_SIZE,
    CNN,
    STEPS_PER_EPOCH,
    TEACHER_WEIGHTS,
    VIT,
    VIT_SETTINGS,
    able,
    source,
    teacher_signals,
    trained_vit,
)
from softlabels.data.in_memory import InMemorySource
from softlabels.losses import METHODS
from softlabels.training.checkpoint import CheckpointFolder

pytestmark = pytest.mark.slow

EPOCHS = 2
EVERY = 2
STOPPED_AT = STEPS_PER_EPOCH + 3  # within the second epoch, after the checkpoint of step 6
NEVER = -1
GLYPHS_TEACHER = {"name": "timm:resnet14x4_glyphs", "weights": f"package:{TEACHER_WEIGHTS}"}


class Stopping(InMemorySource):
    """A source whose n-th training batch, over all epochs, does not come: Ctrl+C comes."""

    def __init__(self, source: InMemorySource, number: int) -> None:
        self.__dict__.update(source.__dict__)
        self._left = number

    def train_batches(self, **where):
        for batch in super().train_batches(**where):
            self._left -= 1
            if self._left == 0:
                raise KeyboardInterrupt
            yield batch


def train(kind: str, output: Path, data: InMemorySource) -> softlabels.training.TrainResult:
    settings: dict[str, Any] = {"teacher": GLYPHS_TEACHER if teacher_signals(kind) else None}
    student = {"name": "timm:resnet8_glyphs", "settings": {"drop_rate": 0.1}}
    if not able(kind, CNN):
        student = {"name": VIT, "settings": {**VIT_SETTINGS, "drop_rate": 0.1}}
        settings["teacher"] = {"name": trained_vit(), "check": "off"}
    return softlabels.train(
        data,
        student,
        kind,
        epochs=EPOCHS,
        batch_size=BATCH_SIZE,
        optimizer={"name": "adamw", "lr": 1e-3},
        checkpoint={"every": EVERY},
        gallery=0,
        report=False,
        log_every=STEPS_PER_EPOCH,
        device="cpu",
        progress=False,
        output=output,
        **settings,
    )


def checkpoint_of(folder: Path) -> dict[str, Any]:
    content = CheckpointFolder(folder / "checkpoints", 2).newest().content
    assert content is not None
    return content


@pytest.mark.parametrize("kind", METHODS)
def test_a_stopped_run_goes_on_to_the_same_bits(kind, tmp_path):
    straight = train(kind, tmp_path / "straight", Stopping(source(), NEVER))
    with pytest.raises(KeyboardInterrupt):
        train(kind, tmp_path / "stopped", Stopping(source(), STOPPED_AT))
    assert checkpoint_of(tmp_path / "stopped")["progress"]["step"] == STOPPED_AT - 2

    resumed = train(kind, tmp_path / "stopped", Stopping(source(), NEVER))

    assert resumed.final == straight.final
    expected, found = (checkpoint_of(run.folder)["parts"] for run in (straight, resumed))
    assert found["trained"].keys() == expected["trained"].keys()
    for name, value in expected["trained"].items():  # the student, heads, peer and memory
        assert torch.equal(found["trained"][name], value), name
    assert str(found["optimizer"]) == str(expected["optimizer"])
    for name, value in straight.student.state_dict().items():
        assert torch.equal(resumed.student.state_dict()[name], value), name
