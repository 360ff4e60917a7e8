"""The two samples that the hand-made vectors of every loss share, and how to compare."""

from __future__ import annotations

import torch
from torch import Tensor

SIX_DIGITS = 1e-6


def rows(*values: list[float]) -> Tensor:
    """A float64 tensor of the given rows."""
    return torch.tensor(values, dtype=torch.float64)


def logits_of(*probabilities: list[float]) -> Tensor:
    """Logits whose softmax is the given rows."""
    return rows(*probabilities).log()


STUDENT_LOGITS = rows([2, 1, 0.5, -1, 0], [0.2, -0.3, 1.5, 0.7, -0.6])
TEACHER_LOGITS = rows([3, 0, 1, -2, 0.5], [0, 0.4, 2, 1, -1])
WEAK_LOGITS = rows([0.3, 0.1, 0.2, 0, 0.4], [0.1, 0.5, -0.2, 0, 0.3])
TARGET = torch.tensor([0, 3])
MIXED_TARGET = rows([0.7, 0, 0.3, 0, 0], [0, 0.4, 0, 0.6, 0])
VOTES = torch.tensor([[0, 0, 1, 1, 2, 0, 0, 1, 0], [2, 2, 2, 3, 3, 0, 2, 1, 2]])


def assert_six_digits(actual: Tensor, *expected: float | list[float]) -> None:
    """Compare with numbers that are given to six digits after the point."""
    numbers = torch.tensor(expected if len(expected) > 1 else expected[0], dtype=torch.float64)
    torch.testing.assert_close(actual, numbers, rtol=0, atol=SIX_DIGITS)
