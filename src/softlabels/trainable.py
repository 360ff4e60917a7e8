"""What is trained: the student and the learned parts beside it, in one module."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

from torch import Tensor, nn

from softlabels.signals import Provider, Value
from softlabels.taps import FeatureTap

__all__ = ["Trainable"]


class Trainable(nn.Module):
    """All that is trained: the student and the learned parts beside it.

    This alone is compiled, wrapped by DDP, copied for EMA and stored. Its forward returns a
    dictionary of tensors: the logits, and each value that the method reads.

    Args:
        student: The plain network.
        providers: By argument of the method, what provides the student's signals.
        heads: The method's own learned parts, or None.
    """

    def __init__(
        self, student: nn.Module, providers: Mapping[str, Provider], heads: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.student = student
        self.providers = nn.ModuleDict(providers)
        self.heads = heads
        paths = sorted({point.path for p in providers.values() for point in p.points})
        self.tap = FeatureTap(student, paths)
        self.tap.enabled = False

    def forward(self, images: Tensor, given: Mapping[str, Value] | None = None) -> dict[str, Value]:
        """Run the student once and provide its signals.

        Args:
            images: [B, C, H, W].
            given: Values from outside (labels, teacher, extras), by argument, for the heads.

        Returns:
            `"logits"`, [B, C]; `"read/ARGUMENT"` for each value that comes from here; and
            `"monitored/NAME"`, scalars that signals report.
        """
        self.tap.enabled = True
        try:
            logits = self.student(images)
            features = self.tap.pop()
        finally:
            self.tap.enabled = False
            self.tap.clear()
        values: dict[str, Value] = {}
        monitored: dict[str, Tensor] = {}
        for argument, module in self.providers.items():
            provider = cast("Provider", module)
            values[argument] = provider(self.student, logits, features)
            monitored.update(provider.monitored(values[argument], logits))
        if self.heads is not None:
            values.update(self.heads({**(given or {}), **values}))
        return {
            "logits": logits,
            **{f"read/{argument}": value for argument, value in values.items()},
            **{f"monitored/{name}": value for name, value in monitored.items()},
        }
