"""Half precision with a gradient scaler, on a CPU: accelerate itself offers it on accelerators."""

from __future__ import annotations

import json
import math

import pytest
import torch
from accelerate import Accelerator

import softlabels
from softlabels.data.in_memory import InMemorySource
from softlabels.training import distributed as processes
from softlabels.training.errors import NonFiniteLossError


@pytest.fixture
def scaled(monkeypatch):
    """Lets a run with `precision: fp16` train on a CPU, as it would on an accelerator."""

    def build(**settings) -> Accelerator:
        assert settings["mixed_precision"] == "fp16"
        accelerator = Accelerator(**{**settings, "mixed_precision": "no"})
        accelerator.state._mixed_precision = "fp16"
        accelerator.native_amp = True
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, growth_interval=4)
        return accelerator

    monkeypatch.setattr(processes, "Accelerator", build)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)


def train(source: InMemorySource, output, **settings) -> softlabels.training.TrainResult:
    fixed = {
        "epochs": 4,
        "batch_size": 32,
        "optimizer": {"lr": 0.1},
        "log_every": 1,
        "gallery": 0,
        "report": False,
        "precision": "fp16",
        "progress": False,
    }
    names = ("timm:resnet8_glyphs", "uskd")
    return softlabels.train(source, *names, output=str(output), **{**fixed, **settings})


def skipped_steps(folder) -> list[int]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    return [line["train/skipped_steps"] for line in lines if "train/skipped_steps" in line]


@pytest.mark.parametrize("max_grad_norm", [None, 5.0])
def test_steps_that_overflow_are_skipped_until_the_scale_fits(
    source, tmp_path, scaled, max_grad_norm
):
    result = train(source, tmp_path / "run", max_grad_norm=max_grad_norm, batch_size=8, epochs=8)
    counts = skipped_steps(result.folder)
    assert counts[0] == 1  # a scale of 2**40 is beyond half precision
    assert 20 < counts[-1] < 60  # it halves each time, and grows again
    assert counts[-1] < len(counts)
    assert all(v.isfinite().all() for v in result.student.state_dict().values())
    assert result.final["top1"] > 60

    newest = max((result.folder / "checkpoints").iterdir())
    scaler = torch.load(newest, weights_only=True)["parts"]["scaler"]
    assert math.log2(scaler["scale"]) < 24


def test_a_loss_that_stays_not_finite_stops_the_run(source, tmp_path, scaled):
    with pytest.raises(NonFiniteLossError, match="after 5 skipped steps"):
        train(source, tmp_path / "run", max_skipped_steps=5)
