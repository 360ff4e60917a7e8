"""timm's ResNets with a stem for 32x32 images, registered with timm.

`resnet50_cifar` is the teacher that distillation papers compare on, as RepDistiller writes it;
`resnet18_cifar` and `resnet34_cifar` are OpenMMLab's `ResNet_CIFAR`, on which USKD and the
temperatures of NKD were measured with CIFAR-100. All have a 3x3 convolution of stride 1 and no
pooling before the four stages. They differ in how weights start: OpenMMLab's last batch norm of
every block is zero, and its classifier's weights have a standard deviation of 0.01.
"""

from __future__ import annotations

from typing import Any

from timm.models.resnet import BasicBlock, Bottleneck, ResNet

from softlabels.models.zoo.small_network import cifar_cfg, normal_weights, register, shrink_stem


def _resnet(*, zero_init_last: bool, linear_std: float | None = None, **settings: Any) -> ResNet:
    model = ResNet(**settings)
    shrink_stem(model, "conv1", ["maxpool"])
    normal_weights(model, linear_std=linear_std)
    for module in model.modules():
        if zero_init_last and isinstance(module, BasicBlock | Bottleneck):
            module.zero_init_last()
    return model


_OPENMMLAB = {"block": BasicBlock, "zero_init_last": True, "linear_std": 0.01}

register(
    _resnet,
    {
        "resnet18_cifar": {"layers": (2, 2, 2, 2), **_OPENMMLAB},
        "resnet34_cifar": {"layers": (3, 4, 6, 3), **_OPENMMLAB},
        "resnet50_cifar": {"layers": (3, 4, 6, 3), "block": Bottleneck, "zero_init_last": False},
    },
    cifar_cfg(pool_size=(4, 4)),
    num_stages=5,
)
