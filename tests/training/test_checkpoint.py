from __future__ import annotations

import os
import pickle
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from softlabels.training.checkpoint import (
    CheckpointFolder,
    OptimizerState,
    Progress,
    restore,
    state_of,
)


def checkpoints(tmp_path: Path, keep: int = 2) -> CheckpointFolder:
    return CheckpointFolder(tmp_path / "checkpoints", keep)


def content(step: int) -> dict:
    return state_of({"step": step}, {})


def test_round_trip_restores_state_and_progress(tmp_path):
    folder = checkpoints(tmp_path)
    layer = nn.Linear(2, 3)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
    layer(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    parts = {"a": layer, "o": optimizer, "n": None}
    path = folder.save(7, state_of({"step": 7, "best": {"top1": 1.5}}, parts))

    other = nn.Linear(2, 3)
    momentum = torch.optim.SGD(other.parameters(), lr=0.1, momentum=0.9)
    found = folder.newest()
    progress = restore(found.content, {"a": other, "o": momentum, "n": None})

    assert progress == {"step": 7, "best": {"top1": 1.5}}
    assert torch.equal(other.weight, layer.weight)
    assert momentum.state_dict()["state"][0]["momentum_buffer"] is not None
    assert (found.name, list(found.damaged)) == (path.name, [])
    assert list(folder.path.iterdir()) == [path]


def test_a_folder_without_checkpoints_has_none(tmp_path):
    assert checkpoints(tmp_path).newest().content is None
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "notes.txt").write_text("mine")
    assert checkpoints(tmp_path).newest().content is None


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_newest_ones_are_kept(tmp_path, keep):
    folder = checkpoints(tmp_path, keep)
    for step in (3, 8, 12, 20):
        folder.save(step, content(step))
    steps = [int(path.name.split("-")[1]) for path in folder.files()]
    assert steps == [20, 12, 8, 3][:keep]


def test_the_same_step_twice_is_one_checkpoint(tmp_path):
    folder = checkpoints(tmp_path, 3)
    folder.save(3, content(3))
    folder.save(3, content(3))
    assert len(folder.files()) == 1


def test_a_step_beyond_ten_million_million_is_newer(tmp_path):
    folder = checkpoints(tmp_path)
    folder.save(99_999_999, content(1))
    folder.save(100_000_000, content(2))
    assert folder.newest().content["progress"] == {"step": 2}


def test_what_a_run_that_went_back_left_ahead_is_removed(tmp_path):
    folder = checkpoints(tmp_path, 3)
    for step in (1, 2, 3):
        folder.save(step, content(step))
    folder.files()[0].write_bytes(b"damaged")
    folder.save(2, content(20))
    assert folder.newest().content["progress"] == {"step": 20}
    assert folder.files()[0].name.startswith("step-00000002-")


class Unpicklable:
    def state_dict(self):
        return {"cannot": lambda: None}

    def load_state_dict(self, state):
        return None


def test_failed_write_keeps_the_older_checkpoint(tmp_path):
    folder = checkpoints(tmp_path, 1)
    folder.save(1, content(1))
    with pytest.raises((AttributeError, pickle.PicklingError)):
        folder.save(2, state_of({"step": 2}, {"a": Unpicklable()}))
    assert folder.newest().content["progress"] == {"step": 1}
    assert len(list(folder.path.iterdir())) == 1


def test_what_a_killed_writer_left_is_no_checkpoint_and_is_cleaned(tmp_path):
    folder = checkpoints(tmp_path)
    path = folder.save(1, content(1))
    whole = path.read_bytes()
    (folder.path / ".step-00000002.pt.abcd1234.part").write_bytes(whole[:100])
    (folder.path / "step-00000003.pt").write_bytes(whole)  # killed between its two names
    assert folder.newest().name == path.name

    folder.clean()
    assert list(folder.path.iterdir()) == [path]


@pytest.mark.parametrize("damage", ["cut", "flip", "empty"])
def test_a_damaged_one_is_left_out_and_told(tmp_path, damage):
    folder = checkpoints(tmp_path)
    layer = nn.Linear(50, 50)
    older = folder.save(1, state_of({"step": 1}, {"a": layer}))
    newer = folder.save(2, state_of({"step": 2}, {"a": layer}))
    changed = bytearray(newer.read_bytes())
    if damage == "flip":
        changed[len(changed) // 2] ^= 1  # in the weights: a reader of zip files sees nothing
    newer.write_bytes(changed[: {"cut": 300, "empty": 0}.get(damage, len(changed))])

    found = folder.newest()
    assert found.name == older.name
    assert found.content["progress"] == {"step": 1}
    assert [newer.name in problem for problem in found.damaged] == [True]


def test_no_whole_one_at_all_is_a_clear_error(tmp_path):
    folder = checkpoints(tmp_path)
    for step in (1, 2):
        folder.save(step, content(step)).write_bytes(b"")
    with pytest.raises(ValueError, match=r"no checkpoint in .* is readable .* choose another"):
        folder.newest()


class _Payload:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


def test_pickle_with_code_is_refused_and_does_not_run(tmp_path):
    target = tmp_path / "ran"
    folder = checkpoints(tmp_path)
    # With the right digest in its name: the digest is against accidents, not against strangers.
    path = folder.save(1, {"progress": {}, "parts": _Payload(target)})
    with pytest.raises(ValueError, match="no readable checkpoint"):
        folder.newest()
    assert not target.exists()
    # The payload does run where pickles are trusted: the test can fail.
    torch.load(path, weights_only=False)
    assert target.exists()


@pytest.mark.parametrize("other", [{"progress": {}}, [1], {"progress": {}, "parts": 3}])
def test_something_else_in_the_file_is_a_clear_error(tmp_path, other):
    folder = checkpoints(tmp_path)
    good = folder.save(1, content(1))
    path = folder.save(2, content(2))
    torch.save(other, path)
    import hashlib

    digest = hashlib.blake2b(path.read_bytes(), digest_size=8).hexdigest()
    path.rename(path.with_name(f"step-00000002-{digest}.pt"))
    found = folder.newest()
    assert found.name == good.name
    assert "no checkpoint of a run" in found.damaged[0]


def test_checkpoint_of_other_parts_is_refused():
    state = state_of({}, {"trained": nn.Linear(2, 2)})
    with pytest.raises(
        ValueError, match=r"holds \['trained'\], this run needs \['ema', 'trained'\]"
    ):
        restore(state, {"trained": nn.Linear(2, 2), "ema": nn.Linear(2, 2)})


def test_checkpoint_of_other_shapes_is_refused():
    state = state_of({}, {"trained": nn.Linear(2, 2)})
    with pytest.raises(ValueError, match="the checkpoint's 'trained' does not fit this run"):
        restore(state, {"trained": nn.Linear(2, 3)})


def momentum_state(change) -> None:
    """Restore an optimizer's state after a change of it."""
    layer = nn.Linear(2, 3)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
    layer(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    state = state_of({}, {"optimizer": OptimizerState(optimizer)})
    change(state["parts"]["optimizer"])
    restore(state, {"optimizer": OptimizerState(optimizer)})


def test_an_optimizers_state_comes_back():
    momentum_state(lambda state: None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda s: s["state"][0].update(momentum_buffer=[]),
            r"finite tensor of \(3, 2\), got \[\]",
        ),
        (lambda s: s["state"][0].update(momentum_buffer=torch.ones(2)), r"finite tensor of"),
        (lambda s: s["state"][0]["momentum_buffer"].fill_(torch.inf), r"finite tensor of"),
        (lambda s: s["state"][0]["momentum_buffer"].fill_(torch.nan), "it holds NaN"),
        (lambda s: s["state"].update({9: {"momentum_buffer": None}}), "does not fit this run"),
        (lambda s: s["param_groups"][0].update(momentum="much"), "must be like 0.9, got 'much'"),
        (lambda s: s["param_groups"][0].update(lr=float("nan")), "must be like 0.1, got nan"),
        (lambda s: s["param_groups"].clear(), "does not fit this run"),
        (lambda s: s["state"][0].clear(), "kept for one parameter is missing for another"),
    ],
)
def test_what_no_optimizer_stores_is_refused(change, message):
    with pytest.raises(ValueError, match="the checkpoint's 'optimizer' does not fit") as found:
        momentum_state(change)
    assert re.search(message, str(found.value))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"step": -1}, "step: Input should be greater than or equal to 0"),
        ({"step": "many"}, "step: Input should be a valid integer"),
        ({"best": {"top1": []}}, r"best\.top1"),
        ({"of_epoch": (1.0,)}, r"of_epoch"),
        ({"more": 1}, "more: Extra inputs are not permitted"),
    ],
)
def test_progress_that_is_none_is_refused(changes, message):
    with pytest.raises(ValueError, match=rf"the checkpoint's progress does not fit: {message}"):
        Progress.of({**Progress(step=3, best={"top1": 1.5, "epoch": 1}).model_dump(), **changes})


def test_whole_numbers_stay_whole():
    values = {"best": {"top1": 50.0, "epoch": 1}}
    assert isinstance(Progress.of(values).best["epoch"], int)
    assert isinstance(Progress.of(values).best["top1"], float)


@pytest.mark.parametrize("value", [None, torch.zeros(()), torch.zeros(3, 2).to_sparse(), 0.5])
@pytest.mark.parametrize("name", ["exp_avg", "exp_avg_sq"])
def test_an_average_of_gradients_has_the_shape_of_its_parameter(name, value):
    layer = nn.Linear(2, 3)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    parts = {"optimizer": OptimizerState(optimizer)}
    state = state_of({}, parts)
    restore(state, parts)
    state["parts"]["optimizer"]["state"][0][name] = value
    with pytest.raises(ValueError, match=rf"{name} of parameter 0 must be a finite tensor of"):
        restore(state, parts)
