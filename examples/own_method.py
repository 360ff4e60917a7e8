"""A method of one's own, in a file of one's own: settings, learned parts and a memory.

`python own_method.py` uses it in a loop. The trainer takes it by its name, from this folder:
`softlabels train --data.path flowers/ --method.kind own_method:CenterLoss --method.width 16`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from softlabels import Distiller
from softlabels.inputs import Features, Logits, Target
from softlabels.losses import Count, Defaults, MemoryBank, Method, Shapes, Share, Value
from softlabels.models import build_model


class Centers(MemoryBank):
    """A projection of the feature, and for each class the mean of its projections."""

    memory_inputs = ("features", "target")
    means: Tensor

    def __init__(self, channels: int, num_classes: int, width: int, momentum: float) -> None:
        super().__init__()
        self.projection = nn.Linear(channels, width)
        self.register_buffer("means", torch.zeros(num_classes, width))
        self.momentum = momentum

    def forward(self, values: Mapping[str, Value]) -> dict[str, Value]:
        """Replace the features by their projections, and add the means of the batch's classes."""
        target = cast("Tensor", values["target"])
        classes = target if target.dim() == 1 else target.argmax(1)
        return {
            "features": [self.projection(values["features"][0])],
            "center": self.means[classes.long()],
            "target": classes,
        }

    def after_step(self, values: Mapping[str, Value]) -> None:
        """Draw the means of the batch's classes towards the batch."""
        classes = cast("Tensor", values["target"]).long()
        of_class = nn.functional.one_hot(classes, len(self.means)).to(self.means.dtype)
        count = of_class.sum(0).unsqueeze(1)
        found = of_class.T @ values["features"][0].to(self.means.dtype) / count.clamp(min=1)
        moved = self.momentum * self.means + (1 - self.momentum) * found
        self.means.copy_(torch.where(count > 0, moved, self.means))


class CenterLoss(Method):
    """The squared distance of a feature's projection from the mean of its class.

    Args:
        width: Of the projection.
        momentum: What a step keeps of the means, in [0, 1].
    """

    width: Count = 32
    momentum: Share = 0.9

    inputs: ClassVar = {"features": Features(form="pooled")}
    adapter_inputs: ClassVar = {"logits": Logits(), "target": Target()}
    defaults = Defaults(weight=0.01)

    def build_adapters(self, shapes: Shapes) -> nn.Module:
        """The projection and the means."""
        channels, num_classes = shapes["features"][0][1], shapes["logits"][1]
        return Centers(channels, num_classes, self.width, self.momentum)

    def terms(self, features: list[Tensor], center: Tensor) -> dict[str, Tensor]:
        """`"distance"`, [B]: `center` comes from the adapters."""
        return {"distance": (features[0] - center).square().mean(1)}


def main() -> None:
    torch.manual_seed(0)
    student = build_model("resnet20", num_classes=10)
    method = CenterLoss(width=16)
    distiller = Distiller(
        student, method, method_weight=method.defaults.weight, example_shape=(3, 32, 32)
    )
    optimizer = torch.optim.SGD(distiller.parameters(), lr=0.1)  # the projection is among them
    for step in range(3):
        output = distiller(torch.randn(8, 3, 32, 32), torch.randint(0, 10, (8,)))
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        distiller.after_step()  # now the means move
        print(f"step {step + 1}: loss {output.loss.item():.3f}")


if __name__ == "__main__":
    main()
