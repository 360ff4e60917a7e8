"""Each benchmark runs to its end, shrunk: minutes of measuring are not lost on the way."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

SHRUNK = {
    "precision": ("--rounds", "2", "--networks", "timm:resnet8_glyphs"),
    "reading": ("--rounds", "2", "photographs"),
    "run": ("--rounds", "2"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(SHRUNK))
def test_a_benchmark_writes_its_file(tmp_path: Path, name: str) -> None:
    output = tmp_path / f"{name}.json"
    arguments = list(SHRUNK[name])
    if name == "reading":
        arguments[-1] = str(tmp_path)
        pixels = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
        for number in range(64):
            Image.fromarray(pixels).save(tmp_path / f"{number}.jpg")
    subprocess.run(
        [sys.executable, "-m", f"benchmarks.{name}", "--output", str(output), *arguments],
        check=True,
        timeout=900,
    )
    assert json.loads(output.read_text())["environment"]["torch"]
