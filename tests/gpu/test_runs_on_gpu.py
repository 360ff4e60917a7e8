"""Whole runs on an accelerator, through `softlabels.train` and the command line."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import softlabels
from shared.signalling import Signalling
from softlabels.data import open_source
from softlabels.data.in_memory import InMemorySource
from softlabels.training.errors import Interrupted

pytestmark = pytest.mark.gpu

FAST = {
    "student": "timm:resnet8_glyphs",
    "epochs": 4,
    "batch_size": 64,
    "optimizer": {"lr": 0.2, "nesterov": True},
    "log_every": 10,
    "gallery": 3,
    "report": False,
    "progress": False,
}
METHODS = (None, "uskd", "zipf_ls", "nkd")


@pytest.fixture(scope="module")
def glyphs() -> InMemorySource:
    return open_source("glyphs100", num_fonts=120)


def train(source, output: Path, method=None, **settings) -> softlabels.training.TrainResult:
    teacher = {}
    if method == "nkd":
        teacher = {
            "teacher": {
                "name": "timm:resnet14x4_glyphs",
                "weights": "package:recipes/glyphs100/teacher.safetensors",
            }
        }
    return softlabels.train(
        source, method=method, output=str(output), **{**FAST, **teacher, **settings}
    )


def losses(result: softlabels.training.TrainResult) -> torch.Tensor:
    lines = map(json.loads, (result.folder / "metrics.jsonl").read_text().splitlines())
    return torch.tensor([line["train/loss"] for line in lines if "train/loss" in line])


@pytest.mark.parametrize("method", METHODS)
def test_half_precision_learns_what_full_precision_learns(glyphs, tmp_path, method):
    found = {
        precision: train(glyphs, tmp_path / precision, method, precision=precision)
        for precision in ("no", "bf16", "fp16")
    }

    top1 = {precision: result.final["top1"] for precision, result in found.items()}
    assert top1["no"] > 10  # chance is 1 %
    assert max(top1.values()) - min(top1.values()) < 8
    environment = json.loads((found["fp16"].folder / "environment.json").read_text())
    assert environment["accelerator"] == torch.cuda.get_device_name()
    summary = json.loads((found["no"].folder / "summary.json").read_text())
    assert 1e6 < summary["peak_memory"] < 1e10  # the device's, not the process'


def test_an_accelerator_learns_what_a_cpu_learns(glyphs, tmp_path):
    settings = {"method": "uskd", "epochs": 1, "log_every": 1}
    there = train(glyphs, tmp_path / "there", **settings)
    here = train(glyphs, tmp_path / "here", device="cpu", **settings)

    assert float(losses(there)[0]) == pytest.approx(float(losses(here)[0]), rel=1e-3)
    assert float(losses(there)[-1]) == pytest.approx(float(losses(here)[-1]), rel=0.1)


@pytest.fixture
def same_sums(monkeypatch) -> Iterator[None]:
    """Sums in the same order each time, where a device can."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("precision", ["no", "fp16"])
def test_a_stopped_run_goes_on_as_if_it_had_not_been(glyphs, tmp_path, precision, same_sums):
    settings = {"method": "uskd", "precision": precision, "epochs": 2, "log_every": 1}
    straight = train(glyphs, tmp_path / "straight", **settings)
    with pytest.raises(Interrupted):
        train(Signalling(glyphs, 200, signal.SIGTERM), tmp_path / "resumed", **settings)
    config = tmp_path / "resumed" / "config.yaml"
    named = f"object:{type(glyphs).__name__}"
    config.write_text(config.read_text().replace("object:Signalling", named))
    resumed = train(glyphs, tmp_path / "resumed", **settings)

    assert len(losses(resumed)) == len(losses(straight))
    torch.testing.assert_close(losses(resumed)[:205], losses(straight)[:205], rtol=2e-2, atol=0.0)


@pytest.mark.parametrize("method", ["uskd", "nkd"])
def test_compiled_and_channels_last_training_learns_as_eager_does(glyphs, tmp_path, method):
    settings = {"epochs": 2, "channels_last": True}
    eager = train(glyphs, tmp_path / "eager", method, **settings)
    compiled = train(glyphs, tmp_path / "compiled", method, compile=True, **settings)
    assert compiled.final["nll"] == pytest.approx(eager.final["nll"], rel=0.15)


def test_steps_of_a_run_do_not_wait_for_the_device(glyphs, tmp_path):
    """Runs, epochs and lines of the log do; no line of code does in every step."""

    def waits(epochs: int) -> Counter[str]:
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as seen:
                warnings.simplefilter("always")
                train(
                    glyphs,
                    tmp_path / str(epochs),
                    "uskd",
                    epochs=epochs,
                    log_every=1000,
                    eval_every=100,
                    gallery=0,
                    analysis=False,
                    mix={"mixup": 0.4},
                )
        finally:
            torch.cuda.set_sync_debug_mode("default")
        found = [w for w in seen if "synchroniz" in str(w.message)]
        return Counter(f"{w.filename}:{w.lineno}" for w in found)

    of_an_epoch = waits(2) - waits(1)
    assert {k: n for k, n in of_an_epoch.items() if n >= glyphs.steps_per_epoch(64)} == {}


def test_a_comparison_of_two_processes_shares_the_device(tmp_path):
    command = [
        sys.executable, "-m", "softlabels", "compare", "glyphs100/cross_entropy",
        "--methods", "ce,uskd", "--seeds", "2", "--jobs", "2", "--data.num-fonts", "4",
        "--epochs", "1", "--gallery", "0", "--output", str(tmp_path / "compared"),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "compared" / "comparison.json").read_text())
    assert "cuda" in json.dumps(found)
