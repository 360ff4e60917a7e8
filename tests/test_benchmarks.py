"""Each benchmark runs to its end, shrunk: minutes of measuring are not lost on the way."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SHRUNK = {
    "precision": ("--rounds", "2", "--networks", "timm:resnet8_glyphs"),
    "run": ("--rounds", "2"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(SHRUNK))
def test_a_benchmark_writes_its_file(tmp_path: Path, name: str) -> None:
    output = tmp_path / f"{name}.json"
    subprocess.run(
        [sys.executable, "-m", f"benchmarks.{name}", "--output", str(output), *SHRUNK[name]],
        check=True,
        timeout=900,
    )
    assert json.loads(output.read_text())["environment"]["torch"]
