"""How many operations a loss is: on an accelerator each costs a launch, however small it is.

Counted on the meta device, where nothing is computed: forward and backward, without views. The
figures are those of docs/speed.md.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from softlabels.losses import (
    KDLoss,
    NKDLoss,
    USKDLoss,
    ZipfLSLoss,
    kd_loss,
    nkd_loss,
    uskd_loss,
    zipf_ls_loss,
)

SHAPE = 256, 1000
NUM_VOTES = 49
SPEED = Path(__file__).parents[2] / "docs" / "speed.md"


class Operations(TorchDispatchMode):
    """Names of the operations that run, without those that only look at their input anew."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None) -> Any:
        if not func.is_view:
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def logits() -> Tensor:
    return torch.empty(SHAPE, device="meta", requires_grad=True)


def integers(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.int64, device="meta")


def operations(loss: Callable[..., Tensor], *names: str) -> int:
    """Those of a loss and its gradients, for inputs by their names."""
    made = {
        "logits": logits,
        "weak_logits": logits,
        "teacher_logits": lambda: logits().detach(),
        "target": lambda: integers(SHAPE[0]),
        "votes": lambda: integers(SHAPE[0], NUM_VOTES),
    }
    inputs = [made[name]() for name in names]
    with Operations() as counted:
        value = loss(*inputs)
        torch.autograd.grad(value, [i for i in inputs if i.requires_grad])
    return len(counted.names)


def test_cross_entropy_is_five():
    assert operations(functional.cross_entropy, "logits", "target") == 5


@pytest.mark.parametrize(
    ("function", "module", "names", "documented"),
    [
        (kd_loss, KDLoss(), ("logits", "teacher_logits"), "18 for KD"),
        (nkd_loss, NKDLoss(), ("logits", "teacher_logits", "target"), "39 for NKD"),
        (uskd_loss, USKDLoss(), ("logits", "weak_logits", "target"), "79 for USKD"),
        (zipf_ls_loss, ZipfLSLoss(), ("logits", "target", "votes"), "48 for Zipf's LS"),
    ],
    ids=["kd", "nkd", "uskd", "zipf_ls"],
)
def test_class_indices_take_no_more_operations_than_documented(function, module, names, documented):
    assert documented in " ".join(SPEED.read_text(encoding="utf-8").split())
    most = int(documented.split()[0])
    assert operations(function, *names) <= most
    assert operations(module, *names) <= most
