"""Networks for small images, registered with timm, and one way to build any model by name."""

from __future__ import annotations

from softlabels.models import resnet_small, vit_small  # registers their models with timm
from softlabels.models.build import InputSpec, build_model, model_input, model_metadata

__all__ = [
    "InputSpec",
    "build_model",
    "model_input",
    "model_metadata",
    "resnet_small",
    "vit_small",
]
