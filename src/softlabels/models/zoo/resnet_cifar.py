"""timm's ResNets with a stem for 32x32 images, registered with timm.

`resnet50_cifar` is the teacher that distillation papers compare on, as RepDistiller writes it;
`resnet18_cifar` and `resnet34_cifar` are OpenMMLab's `ResNet_CIFAR`, on which USKD and the
temperatures of NKD were measured with CIFAR-100. All have a 3x3 convolution of stride 1 and no
pooling before the four stages. They differ in how weights start: OpenMMLab's last batch norm of
every block is zero, and its classifier's weights have a standard deviation of 0.01.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from timm.models import generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock, Bottleneck, ResNet

from softlabels.models.zoo.small_network import build, cifar_cfg, normal_weights, shrink_stem

__all__: list[str] = []

_CFG = cifar_cfg(pool_size=(4, 4))

default_cfgs = generate_default_cfgs(
    {"resnet18_cifar": _CFG, "resnet34_cifar": _CFG, "resnet50_cifar": _CFG}
)


def _resnet(*, zero_init_last: bool, linear_std: float | None = None, **settings: Any) -> ResNet:
    model = ResNet(**settings)
    shrink_stem(model, "conv1", ["maxpool"])
    normal_weights(model, linear_std=linear_std)
    for module in model.modules():
        if zero_init_last and isinstance(module, BasicBlock | Bottleneck):
            module.zero_init_last()
    return model


_build = partial(build, _resnet, num_stages=5)
_build_openmmlab = partial(_build, block=BasicBlock, zero_init_last=True, linear_std=0.01)


@register_model
def resnet18_cifar(pretrained: bool = False, **settings: Any) -> ResNet:
    """ResNet-18 with a 3x3 stem."""
    return _build_openmmlab("resnet18_cifar", pretrained, settings, layers=(2, 2, 2, 2))


@register_model
def resnet34_cifar(pretrained: bool = False, **settings: Any) -> ResNet:
    """ResNet-34 with a 3x3 stem."""
    return _build_openmmlab("resnet34_cifar", pretrained, settings, layers=(3, 4, 6, 3))


@register_model
def resnet50_cifar(pretrained: bool = False, **settings: Any) -> ResNet:
    """ResNet-50 with a 3x3 stem."""
    return _build(
        "resnet50_cifar",
        pretrained,
        settings,
        block=Bottleneck,
        layers=(3, 4, 6, 3),
        zero_init_last=False,
    )
