"""timm's DenseNet with a stem for 32x32 images, registered with timm: `densenet121_cifar`.

The network of the runs of Zipf's label smoothing on CIFAR-100 and TinyImageNet
(`CIFAR_DenseNet121`): a 3x3 convolution of stride 1 without batch norm, ReLU or pooling before the
first dense block. Weights start as PyTorch's do.
"""

from __future__ import annotations

from typing import Any

from timm.models.densenet import DenseNet
from torch import nn

from softlabels.models.zoo.small_network import cifar_cfg, register, shrink_stem


def _densenet(**settings: Any) -> DenseNet:
    model = DenseNet(**settings)
    shrink_stem(model, "features.conv0", ["features.norm0", "features.pool0"])
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.reset_parameters()
    return model


register(
    _densenet,
    {"densenet121_cifar": {"growth_rate": 32, "block_config": (6, 12, 24, 16)}},
    cifar_cfg(pool_size=(4, 4), first_conv="features.conv0", classifier="classifier"),
    num_stages=5,
)
