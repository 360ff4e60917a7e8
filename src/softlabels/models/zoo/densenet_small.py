"""timm's DenseNet with a stem for 32x32 images, registered with timm: `densenet121_cifar`.

The network of the runs of Zipf's label smoothing on CIFAR-100 and TinyImageNet
(`CIFAR_DenseNet121`): a 3x3 convolution of stride 1 without batch norm, ReLU or pooling before the
first dense block. Weights start as PyTorch's do.
"""

from __future__ import annotations

from typing import Any

from timm.models import generate_default_cfgs, register_model
from timm.models.densenet import DenseNet
from torch import nn

from softlabels.models.zoo.small_network import build, cifar_cfg, shrink_stem

__all__: list[str] = []

default_cfgs = generate_default_cfgs(
    {
        "densenet121_cifar": cifar_cfg(
            pool_size=(4, 4), first_conv="features.conv0", classifier="classifier"
        )
    }
)


def _densenet(**settings: Any) -> DenseNet:
    model = DenseNet(**settings)
    shrink_stem(model, "features.conv0", ["features.norm0", "features.pool0"])
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.reset_parameters()
    return model


@register_model
def densenet121_cifar(pretrained: bool = False, **settings: Any) -> DenseNet:
    """DenseNet-121 (growth 32; 6, 12, 24 and 16 layers) with a 3x3 stem."""
    return build(
        _densenet,
        "densenet121_cifar",
        pretrained,
        settings,
        num_stages=5,
        growth_rate=32,
        block_config=(6, 12, 24, 16),
    )
