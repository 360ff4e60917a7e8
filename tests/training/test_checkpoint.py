from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest
import torch
from torch import nn

from softlabels.training.checkpoint import load_checkpoint, save_checkpoint

CPU = torch.device("cpu")


def test_round_trip_restores_state_and_progress(tmp_path):
    path = tmp_path / "checkpoints" / "last.pt"
    layer = nn.Linear(2, 3)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
    layer(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    save_checkpoint(
        path, {"finished_epochs": 3, "best": {"top1": 1.5}}, {"a": layer, "o": optimizer, "n": None}
    )

    other = nn.Linear(2, 3)
    momentum = torch.optim.SGD(other.parameters(), lr=0.1, momentum=0.9)
    progress = load_checkpoint(path, {"a": other, "o": momentum, "n": None}, CPU)

    assert progress == {"finished_epochs": 3, "best": {"top1": 1.5}}
    assert torch.equal(other.weight, layer.weight)
    assert momentum.state_dict()["state"][0]["momentum_buffer"] is not None
    assert [p.name for p in path.parent.iterdir()] == ["last.pt"]


def test_failed_write_keeps_the_older_checkpoint(tmp_path):
    path = tmp_path / "last.pt"
    save_checkpoint(path, {"n": 1}, {})

    class Broken:
        def state_dict(self):
            return {"cannot": lambda: None}

        def load_state_dict(self, state):
            return None

    with pytest.raises((AttributeError, pickle.PicklingError)):
        save_checkpoint(path, {"n": 2}, {"a": Broken()})
    assert load_checkpoint(path, {}, CPU) == {"n": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"]


class _Payload:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


def test_pickle_with_code_is_refused_and_does_not_run(tmp_path):
    target = tmp_path / "ran"
    path = tmp_path / "last.pt"
    torch.save({"progress": {}, "parts": _Payload(target)}, path)
    with pytest.raises(ValueError, match="is no readable checkpoint"):
        load_checkpoint(path, {}, CPU)
    assert not target.exists()
    # The payload does run where pickles are trusted: the test can fail.
    torch.load(path, weights_only=False)
    assert target.exists()


@pytest.mark.parametrize("cut", [0, 10, 300])
def test_damaged_file_is_a_clear_error(tmp_path, cut):
    path = tmp_path / "last.pt"
    save_checkpoint(path, {"n": 1}, {"a": nn.Linear(2, 2)})
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(ValueError, match=r"last\.pt is no readable checkpoint"):
        load_checkpoint(path, {"a": nn.Linear(2, 2)}, CPU)


def test_checkpoint_of_other_parts_is_refused(tmp_path):
    path = tmp_path / "last.pt"
    save_checkpoint(path, {}, {"trained": nn.Linear(2, 2)})
    with pytest.raises(
        ValueError, match=r"holds \['trained'\], this run needs \['ema', 'trained'\]"
    ):
        load_checkpoint(path, {"trained": nn.Linear(2, 2), "ema": nn.Linear(2, 2)}, CPU)
