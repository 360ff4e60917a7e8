"""Reads tensors out of a model that nobody edits, and finds the right layer by itself.

A *map* is a [B, C, H, W] or [B, H, W, C] output, *tokens* are a [B, N, D] output.
"""

from softlabels.taps.feature_tap import FeatureTap, TapPoint, find_module
from softlabels.taps.layout import Layout, undisturbed
from softlabels.taps.position_head import PositionHead, votes_of

__all__ = [
    "FeatureTap",
    "Layout",
    "PositionHead",
    "TapPoint",
    "find_module",
    "undisturbed",
    "votes_of",
]
