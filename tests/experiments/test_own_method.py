"""A method of the user's own, with learned parts and a memory, in comparisons and in sweeps."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml

from softlabels.cli import main

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
SETTINGS = [
    "--data.source", "noise", "--data.num-train", "40", "--data.num-classes", "4",
    "--data.num-test", "8", "--data.image-size", "16", "--student.name", "timm:resnet8_glyphs",
    "--epochs", "1", "--batch-size", "16", "--gallery", "0", "--device", "cpu", "--threads", "1",
]  # fmt: skip


@pytest.fixture
def own(tmp_path, monkeypatch) -> str:
    """The example's class, in a module beside the user."""
    name = "own_" + "".join(c for c in tmp_path.name if c.isalnum())
    shutil.copy(ROOT / "examples" / "own_method.py", tmp_path / f"{name}.py")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")  # of the runs' processes
    return f"{name}:CenterLoss"


def test_it_is_compared_and_what_is_complete_is_kept(own, tmp_path):
    output = tmp_path / "out"
    command = ["compare", *SETTINGS, "--methods", f"ce,{own}", "--output", str(output)]
    assert main([*command, "--seeds", "1"]) == 0
    (run,) = runs_of(output, own)
    first = (run / "student.safetensors").stat().st_mtime_ns
    # A further seed: the comparison goes on, and trains no run again.
    assert main([*command, "--seeds", "2"]) == 0
    assert (run / "student.safetensors").stat().st_mtime_ns == first
    assert len(runs_of(output, own)) == 2
    record = json.loads((output / "comparison.json").read_text())
    assert [variant["name"] for variant in record["variants"]] == ["cross_entropy", own]
    assert yaml.safe_load((run / "config.yaml").read_text())["method"]["width"] == 32


def runs_of(output: Path, method: str) -> list[Path]:
    configs = (output / "runs").rglob("config.yaml")
    kinds = {path.parent: yaml.safe_load(path.read_text())["method"]["kind"] for path in configs}
    return [run for run, kind in kinds.items() if kind == method]


def test_its_settings_are_searched(own, tmp_path):
    output = tmp_path / "out"
    command = [
        "sweep", *SETTINGS, "--method.kind", own, "--trials", "2", "--output", str(output),
        "--space", "method.width=8..32",
    ]  # fmt: skip
    assert main(command) == 0
    best = yaml.safe_load((output / "best.yaml").read_text())
    assert best["method"]["kind"] == own
    assert 8 <= best["method"]["width"] <= 32
    trials = json.loads((output / "sweep.json").read_text())["trials"]
    assert len(trials) == 2
    # The same call again reads the record, and trains nothing.
    before = (output / trials[1]["runs"][0] / "metrics.jsonl").stat().st_mtime_ns
    assert main(command) == 0
    assert (output / trials[1]["runs"][0] / "metrics.jsonl").stat().st_mtime_ns == before
