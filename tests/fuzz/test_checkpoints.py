"""Checkpoints that nobody should have, and runs that are to go on from them."""

from __future__ import annotations

import copy
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from fuzzing import case, command, fuzz, mutated, values
from hypothesis import event, given
from hypothesis import strategies as st
from safetensors.torch import load_file

from softlabels.cli import main
from tiny_runs import checkpoint_name, saved, train_arguments


def arguments(pictures: Path, output: Path) -> list[str]:
    run = train_arguments(pictures, output, "--method.kind", "uskd", "--ema-decay", "0.5")
    run[run.index("--epochs") + 1] = "2"
    run[run.index("--gallery") + 1] = "0"
    return run


@pytest.fixture(scope="module")
def half_done(pictures, tmp_path_factory) -> Path:
    """The folder of a run of two epochs that has a checkpoint of the first one alone."""
    output = tmp_path_factory.mktemp("half") / "run"
    assert main(arguments(pictures, output)) == 0
    (output / "summary.json").unlink()
    newest = max((output / "checkpoints").glob("step-*.pt"))
    newest.unlink()
    (older,) = (output / "checkpoints").glob("step-*.pt")
    assert older.name.startswith("step-00000001-")
    return output


def places(content: Any, path: tuple = ()) -> list[tuple]:
    """The path of everything inside of nested containers."""
    inner = content.items() if isinstance(content, dict) else ()
    if isinstance(content, list | tuple):
        inner = enumerate(content)
    return [path, *(place for key, value in inner for place in places(value, (*path, key)))]


def changed(content: Any, path: tuple, value: Any) -> Any:
    """A copy with another value at a place."""
    if not path:
        return value
    if isinstance(content, tuple):
        content = list(content)
    other = copy.copy(content)
    other[path[0]] = changed(content[path[0]], path[1:], value)
    return other


tensors = st.one_of(
    st.builds(lambda *shape: torch.zeros(shape), st.integers(0, 3), st.integers(0, 3)),
    st.sampled_from(
        [torch.zeros(()), torch.zeros(3, dtype=torch.int64), torch.full((2,), float("nan"))]
    ),
)


@fuzz("checkpoints", cost=5)
@given(data=st.data())
def test_a_run_goes_on_from_a_whole_checkpoint_or_says_why_not(half_done, pictures, data):
    with case("checkpoints"), tempfile.TemporaryDirectory() as name:
        folder = Path(shutil.copytree(half_done, Path(name) / "run"))
        (file,) = (folder / "checkpoints").glob("step-*.pt")
        if data.draw(st.sampled_from(["bytes", "content", "content"])) == "bytes":
            content = data.draw(mutated(file.read_bytes()))
        else:
            stored = torch.load(file, weights_only=True)
            path = data.draw(st.sampled_from(places(stored)))
            stored = changed(stored, path, data.draw(st.one_of(values, tensors)))
            content = saved(stored) if isinstance(stored, dict) else b"no mapping"
        if data.draw(st.booleans()):
            # As an accident leaves it, or as somebody would make it who knows how.
            file.unlink()
            file = file.with_name(checkpoint_name(content, 1))
        file.write_bytes(content)
        outcome = command(arguments(pictures, folder), statuses=(0, 1, 2))
        event(f"status {outcome.status}")
        if outcome.status == 0:
            weights = load_file(folder / "student.safetensors")
            assert all(bool(weight.isfinite().all()) for weight in weights.values())
