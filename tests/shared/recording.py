"""A method that keeps what it is given, for tests of what inputs provide."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from softlabels.inputs import Input
from softlabels.losses import Method


class Recording(Method):
    """Keeps its values; its loss is the sum of the squares of all that has a gradient."""

    of_batch = True

    def __init__(self, **inputs: Input) -> None:
        super().__init__()
        self.read = inputs
        self.values: Mapping[str, object] = {}

    @property
    def inputs(self) -> Mapping[str, Input]:
        return self.read

    def terms(self, **values: object) -> dict[str, Tensor]:
        self.values = values
        tensors = [t for v in values.values() for t in (v if isinstance(v, list) else [v])]
        squares = (t.square().mean() for t in tensors if t.requires_grad)
        return {"squares": sum(squares, torch.zeros(()))}
