"""A method in one file: it reads two stages, has a learned head and remembers samples.

No other file knows it. It draws the projected features of each sample to those that the sample
had when it was last seen.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from softlabels.inputs import Features, FromBatch, Input


class ToyHeads(nn.Module):
    """A linear projection of each stage, and a memory of each sample."""

    memory: Tensor
    num_epochs: Tensor

    def __init__(self, widths: list[int], width: int, num_samples: int) -> None:
        super().__init__()
        self.projections = nn.ModuleList(nn.Linear(w, width) for w in widths)
        self.register_buffer("memory", torch.zeros(num_samples, width))
        self.register_buffer("num_epochs", torch.zeros((), dtype=torch.long))

    def forward(self, values: Mapping[str, object]) -> dict[str, object]:
        projected = [
            projection(feature.mean((2, 3)))
            for projection, feature in zip(self.projections, values["features"], strict=True)
        ]
        return {"features": projected, "remembered": self.memory[values["index"]]}

    def after_step(self, values: Mapping[str, object]) -> None:
        self.memory[values["index"]] = torch.stack(values["features"]).mean(0)

    def after_epoch(self) -> None:
        self.num_epochs += 1


class ToyLoss(nn.Module):
    inputs: ClassVar[Mapping[str, Input]] = {
        "features": Features(stages=("stage1", "last")),
        "index": FromBatch("index"),
    }

    def __init__(self, *, width: int = 6, num_samples: int = 10) -> None:
        super().__init__()
        self.width = width
        self.num_samples = num_samples
        self.built_from: dict[str, object] = {}

    def build_adapters(self, shapes: Mapping[str, object]) -> ToyHeads:
        self.built_from = dict(shapes)
        widths = [shape[1] for shape in shapes["features"]]
        return ToyHeads(widths, self.width, self.num_samples)

    def forward(
        self, features: list[Tensor], index: Tensor, remembered: Tensor | None = None
    ) -> Tensor:
        return sum((feature - remembered).square().mean() for feature in features)
