"""The command line under torchrun: two gloo processes train what one process trains."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def train(launcher: list[str], folder: Path, output: Path, *more: str) -> Path:
    command = [
        *launcher, "-m", "softlabels", "train", "--data.path", str(folder),
        "--data.image-size", "32", "--data.workers", "0", "--epochs", "2",
        "--student.name", "timm:vit_mini_patch4_32", "--student.settings", "depth", "2",
        "--batch-size", "16", "--optimizer.lr", "0.05", "--gallery", "0", "--device", "cpu",
        "--output", str(output), *more,
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=200)
    assert result.returncode == 0, result.stderr
    return output


@pytest.mark.distributed
def test_two_processes_equal_one_on_the_same_global_batches(image_folder, tmp_path):
    more = ("--method.kind", "zipf_ls", "--mix.mixup", "0.4", "--ema-decay", "0.9")
    two = train(TORCHRUN, image_folder, tmp_path / "two", *more)
    one = train([sys.executable], image_folder, tmp_path / "one", *more)

    weights = [load_file(folder / "student.safetensors") for folder in (one, two)]
    initial_scale = max(value.abs().max() for value in weights[0].values())
    for name, value in weights[0].items():
        torch.testing.assert_close(
            value, weights[1][name], rtol=1e-3, atol=1e-4 * float(initial_scale), msg=name
        )
    finals = [json.loads((f / "summary.json").read_text())["final"] for f in (one, two)]
    assert finals[0]["nll"] == pytest.approx(finals[1]["nll"], rel=1e-3)
    # 24 test images: each counted once, none padded.
    assert finals[0]["top1"] == pytest.approx(finals[1]["top1"], abs=1e-4)
    assert json.loads((two / "environment.json").read_text())["processes"] == 2
