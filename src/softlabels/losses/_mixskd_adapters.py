"""The learned parts of MixSKD."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from softlabels.losses._features import Values, tensors_of
from softlabels.losses._non_target import in_float32
from softlabels.losses.byot import split_branches

__all__ = ["Discriminators", "MixSKDAdapters", "interpolated"]

Discriminators: TypeAlias = Literal["adversarial", "joint", "fixed"]

_HIDDEN = 128  # width of a discriminator


def interpolated(values: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    """Each row mixed with its partner's."""
    values = in_float32(values)
    share = weight.to(values.dtype).view(-1, *[1] * (values.dim() - 1))
    return share * values + (1 - share) * values[index.long()]


class MixSKDAdapters(nn.Module):
    """The learned parts of MixSKD: an aggregating classifier, and a discriminator for each exit.

    The classifier is linear on a linear mixture of all exits' pooled features; a discriminator is
    a two-layer perceptron on the pooled feature of one. Default PyTorch initialization.

    Args:
        widths: Channels of the exits' maps, shallow to deep; the final one is last.
        num_classes: Width of the logits.
        discriminators: As of `MixSKDLoss`.
        fixed_classifier: The aggregating classifier is not trained.
    """

    def __init__(
        self,
        widths: Sequence[int],
        num_classes: int,
        *,
        discriminators: Discriminators = "adversarial",
        fixed_classifier: bool = False,
    ) -> None:
        super().__init__()
        self.reversed = discriminators == "adversarial"
        self.mixture = nn.Linear(sum(widths), widths[-1], bias=False)
        self.classifier = nn.Linear(widths[-1], num_classes)
        self.discriminators = nn.ModuleList(
            nn.Sequential(nn.Linear(width, _HIDDEN), nn.ReLU(), nn.Linear(_HIDDEN, 2))
            for width in widths
        )
        # What no term trains takes no part in the optimizer and in the exchange of gradients.
        self.mixture.requires_grad_(not fixed_classifier)
        self.classifier.requires_grad_(not fixed_classifier)
        self.discriminators.requires_grad_(discriminators != "fixed")

    def forward(self, values: Values) -> dict[str, Tensor | list[Tensor]]:
        """`aggregate_logits` and `discriminator_logits`, as `MixSKDLoss.terms` takes them."""
        (index,), (weight,) = (tensors_of(values, f"mixup_{name}") for name in ("index", "weight"))
        own = [
            interpolated(pooled, index, weight)
            for pooled in _pooled(values, "branches", "last_map")
        ]
        mixed = _pooled(values, "mixed_branches", "mixed_last_map")
        both = [torch.cat(pair) for pair in zip(own, mixed, strict=True)]
        aggregate = self.classifier(self.mixture(torch.cat(both, 1)))
        told = [
            discriminator(2 * pooled.detach() - pooled if self.reversed else pooled)
            for discriminator, pooled in zip(self.discriminators, both, strict=True)
        ]
        return {"aggregate_logits": [*aggregate.chunk(2)], "discriminator_logits": told}


def _pooled(values: Values, branches: str, last_map: str) -> list[Tensor]:
    maps = chain(split_branches(tensors_of(values, branches))[1], tensors_of(values, last_map))
    return [in_float32(feature).mean((2, 3)) for feature in maps]
