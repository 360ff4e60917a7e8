"""Reads tensors out of a model that nobody edits, and finds the right layer by itself.

A *map* is a [B, C, H, W] or [B, H, W, C] output, *tokens* are a [B, N, D] output.
"""

from softlabels.taps.describe import Finding, TapSurvey, describe_taps
from softlabels.taps.dry_run import undisturbed
from softlabels.taps.feature_tap import FeatureTap, TapPoint, find_module
from softlabels.taps.layout import Layout
from softlabels.taps.position_head import PositionHead
from softlabels.taps.stages import Classifier

__all__ = [
    "Classifier",
    "FeatureTap",
    "Finding",
    "Layout",
    "PositionHead",
    "TapPoint",
    "TapSurvey",
    "describe_taps",
    "find_module",
    "undisturbed",
]
