"""Checkpoints that nobody should have, and runs that are to go on from them."""

from __future__ import annotations

import copy
import json
import os
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from shared.fuzzing import HOSTILE_TEXTS, assert_finite, case, command, fuzz, mutated, texts
from shared.tiny_runs import checkpoint_name, saved, train_arguments
from softlabels.cli import main

HALFWAY = (
    "--epochs", "2", "--ema-decay", "0.9", "--optimizer.name", "adamw", "--method.kind", "uskd",
)  # fmt: skip


@pytest.fixture(scope="module")
def halfway(pictures, tmp_path_factory) -> Path:
    """A run of two epochs that was stopped after the first."""
    run = tmp_path_factory.mktemp("runs") / "halfway"
    assert main(train_arguments(pictures, run, *HALFWAY)) == 0
    last = max((run / "checkpoints").iterdir())
    last.unlink()
    for name in ("summary.json", "report.html", "gallery.json"):
        (run / name).unlink(missing_ok=True)
    assert len([*(run / "checkpoints").iterdir()]) == 1
    return run


odd_numbers = st.sampled_from([0, 1, -1, 2, 3, 10**9, -(2**62), 1.5, float("nan"), float("inf")])
odd_tensors = st.sampled_from(
    [torch.zeros(()), torch.zeros(0), torch.full((2, 2), float("nan")), torch.zeros(4, 4).bool(),
     torch.eye(2).to_sparse(), torch.zeros(3, dtype=torch.int64)]
)  # fmt: skip
plain = st.one_of(
    odd_numbers, odd_tensors, st.none(), st.booleans(), st.sampled_from(HOSTILE_TEXTS)
)
odd_things = st.one_of(
    plain, st.lists(plain, max_size=2), st.dictionaries(st.sampled_from(["a", "step"]), plain)
)


def damage(draw: st.DrawFn, content: dict) -> None:
    """Changes one thing somewhere inside of a checkpoint."""
    here = content
    while True:
        keys = sorted(here, key=str) if isinstance(here, dict) else [*range(len(here))]
        key = draw(st.sampled_from(keys))
        inner = here[key]
        if isinstance(inner, (dict, list)) and len(inner) and draw(st.integers(0, 5)):
            here = inner
            continue
        break
    kind = draw(st.sampled_from(["replace", "replace", "remove", "add", "number"]))
    if kind == "remove":
        del here[key]
    elif kind == "add" and isinstance(here, dict):
        here[draw(texts)] = draw(odd_things)
    elif kind == "number" and isinstance(inner, Tensor) and inner.is_floating_point():
        here[key] = torch.full(inner.shape, float(draw(odd_numbers)))
    else:
        here[key] = draw(odd_things)


@fuzz("checkpoints", cost=3)
@given(data=st.data())
def test_checkpoints(halfway, pictures, data):
    original = next((halfway / "checkpoints").iterdir())
    kind = data.draw(st.sampled_from(["content", "content", "content", "bytes", "digest"]))
    if kind == "content":
        content = copy.deepcopy(torch.load(original, weights_only=True))
        for _ in range(data.draw(st.integers(1, 2))):
            damage(data.draw, content)
        damaged = saved(content)
    else:
        damaged = data.draw(mutated(original.read_bytes(), 3))
    step = data.draw(st.sampled_from([1, 1, 1, 0, 2, 3, 99_999_999, 10**12]))
    name = original.name if kind == "digest" else checkpoint_name(damaged, step)
    with case("checkpoints"), tempfile.TemporaryDirectory() as folder:
        run = Path(shutil.copytree(halfway, Path(folder) / "run"))
        os.remove(run / "checkpoints" / original.name)
        (run / "checkpoints" / name).write_bytes(damaged)
        outcome = command(train_arguments(pictures, run, *HALFWAY), statuses=(0, 1, 2))
        for stored in run.glob("*.safetensors"):
            assert_finite(load_file(stored))
        if outcome.status == 0:
            summary = json.loads((run / "summary.json").read_text())
            assert summary["complete"] is True
        assert {path.name for path in Path(folder).iterdir()} == {"run"}
