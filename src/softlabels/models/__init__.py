"""Networks for small images, registered with timm, and one way to build any model by name."""

from __future__ import annotations

from softlabels.models.build import InputSpec, build_model, model_input, model_metadata

# Each registers its models with timm.
from softlabels.models.zoo import (
    densenet_small,
    mobilenet_small,
    preact_resnet,
    resnet_cifar,
    resnet_small,
    shufflenet_small,
    vgg_small,
    vit_small,
)

__all__ = [
    "InputSpec",
    "build_model",
    "densenet_small",
    "mobilenet_small",
    "model_input",
    "model_metadata",
    "preact_resnet",
    "resnet_cifar",
    "resnet_small",
    "shufflenet_small",
    "vgg_small",
    "vit_small",
]
