"""What is stored is finite, also where every loss was."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from shared.tiny_runs import write_pictures
from softlabels import train
from softlabels.training.checkpoint import CheckpointFolder
from softlabels.training.errors import NonFiniteLossError


def network(scale: float) -> nn.Module:
    """The batch norm hides how large its input is, and its running variance overflows."""
    torch.manual_seed(0)
    first = nn.Conv2d(3, 4, 3)
    first.weight.data *= scale
    return nn.Sequential(
        first, nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)
    )


@pytest.mark.parametrize("every", [None, 1])
def test_a_buffer_that_overflows_stops_the_run_before_it_is_stored(tmp_path, every):
    data = {
        "path": str(write_pictures(tmp_path / "shades", train=8)), "image_size": 8, "workers": 0,
    }  # fmt: skip
    settings = {"epochs": 1, "batch_size": 8, "checkpoint": {"every": every}, "progress": False}
    output = tmp_path / "run"

    with pytest.raises(NonFiniteLossError, match=r"student\.1\.running_var .*is not, after step"):
        train(data, network(1e30), output=str(output), **settings)

    assert "running_var" in json.loads((output / "failure.json").read_text())["error"]
    assert not list(output.glob("*.safetensors"))
    assert not list(output.glob("checkpoints/*"))
    train(data, network(1.0), output=str(tmp_path / "fine"), **settings)


def test_a_mask_may_be_infinite(tmp_path):
    model = network(1.0)
    model.register_buffer("mask", torch.tensor(-float("inf")))
    data = {"path": str(write_pictures(tmp_path / "shades")), "image_size": 8, "workers": 0}

    result = train(data, model, epochs=1, batch_size=8, output=str(tmp_path / "r"), progress=False)

    assert result.student.mask == -float("inf")


def test_a_checkpoint_with_infinite_averages_is_not_gone_on_with(tmp_path):
    data = {"path": str(write_pictures(tmp_path / "shades")), "image_size": 8, "workers": 0}
    settings = {
        "epochs": 2, "batch_size": 8, "ema_decay": 0.5, "progress": False,
        "output": str(tmp_path / "run"),
    }  # fmt: skip
    train(data, network(1.0), **settings)
    folder = CheckpointFolder(tmp_path / "run" / "checkpoints", keep=2)
    content = folder.newest().content
    for path in folder.path.iterdir():
        path.unlink()
    content["parts"]["ema"]["module.student.1.running_mean"].fill_(float("inf"))
    content["progress"].update(step=1, finished_epochs=1)
    folder.save(1, content)
    (tmp_path / "run" / "summary.json").unlink()

    with pytest.raises(NonFiniteLossError, match=r"ema\.student\.1\.running_mean .*is not"):
        train(data, network(1.0), **settings)
