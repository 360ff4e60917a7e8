"""Where features are read in a network, and in which form they are handed on."""

from __future__ import annotations

from typing import Literal, TypeAlias

from torch import Tensor

from softlabels.inputs import Features
from softlabels.taps import Layout, TapPoint

__all__ = ["Form", "in_form", "points_of"]

Form: TypeAlias = Literal["raw", "map", "pooled"]


def points_of(kind: Features, layout: Layout) -> list[TapPoint]:
    """The places of an input's features in a network.

    Raises:
        ValueError: A stage is not found, or a map is asked for where there is no grid.
    """
    find = layout.before_activation if kind.before_activation else layout.point
    points = [find(stage) for stage in layout.expanded(kind.stages)]
    for point in points:
        if kind.form == "map" and not point.has_grid:
            raise ValueError(
                f"the method needs maps with rows and columns, but {point.path!r} of the "
                f"{kind.of} gives a feature of kind {point.kind!r} without a grid: name other "
                "places in the method's settings, or a network with maps"
            )
    return points


def in_form(point: TapPoint, feature: Tensor, form: Form) -> Tensor:
    """A feature as it is, as a map [B, D, H, W], or pooled, [B, D]."""
    if form == "map":
        return point.as_map(feature)
    return point.pooled(feature) if form == "pooled" else feature
