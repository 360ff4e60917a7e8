"""A method in one file: it reads two stages, has learned parts and remembers samples.

No other file knows it. It draws the projected features of each sample to those that the sample
had when it was last seen.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from softlabels.inputs import Features, FromBatch
from softlabels.losses import Method
from softlabels.losses._method import Count


class ToyAdapters(nn.Module):
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


class ToyLoss(Method):
    width: Count = 6
    num_samples: Count = 10

    inputs: ClassVar = {"features": Features(stages=("stage1", "last"))}
    adapter_inputs: ClassVar = {"index": FromBatch("index")}
    of_batch = True

    def build_adapters(self, shapes: Mapping[str, object]) -> ToyAdapters:
        self.built_from = dict(shapes)
        widths = [shape[1] for shape in shapes["features"]]
        return ToyAdapters(widths, self.width, self.num_samples)

    def terms(self, features: list[Tensor], remembered: Tensor) -> dict[str, Tensor]:
        return {"distance": sum((f - remembered).square().mean() for f in features)}
