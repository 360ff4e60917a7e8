"""Reads the numbers in tests/golden, which published reference codes gave."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

GOLDEN = Path(__file__).parents[1] / "golden"


def cases_of(name: str) -> list[dict[str, Tensor]]:
    """The cases of a file, each a mapping from names to float64 or int64 tensors."""
    cases: dict[str, dict[str, Tensor]] = {}
    with np.load(GOLDEN / f"{name}.npz") as stored:
        for key in stored.files:
            number, _, field = key.partition(".")
            cases.setdefault(number, {})[field] = torch.from_numpy(stored[key])
    return [*cases.values()]


def assert_close(actual: Tensor, expected: Tensor) -> None:
    """Equal to 1e-9, relative or absolute."""
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)
