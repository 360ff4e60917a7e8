"""timm's MobileNetV2 in half width for 32x32 images, registered: `mobilenetv2_050_cifar`.

The student `MobileNetV2` of RepDistiller (`mobile_half`), which distillation papers compare on. It
differs from timm's `mobilenetv2_050`: the second stage keeps its resolution, the first block has a
1x1 convolution although it does not expand, widths are halved without rounding to multiples of 8,
and ReLU has no upper bound.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from timm.models.efficientnet import EfficientNet, decode_arch_def, round_channels
from torch import nn

from softlabels.models.zoo.small_network import cifar_cfg, normal_weights, register

# timm's notation: inverted residuals, repeats, kernel, stride, expansion, channels at full width.
_STAGES = [
    ["ir_r1_k3_s1_e1_c16"],
    ["ir_r2_k3_s1_e6_c24"],
    ["ir_r3_k3_s2_e6_c32"],
    ["ir_r4_k3_s2_e6_c64"],
    ["ir_r3_k3_s1_e6_c96"],
    ["ir_r3_k3_s2_e6_c160"],
    ["ir_r1_k3_s1_e6_c320"],
]


def _mobilenet(**settings: Any) -> EfficientNet:
    rounded = partial(round_channels, multiplier=0.5, divisor=1)
    shape = {"block_args": decode_arch_def(_STAGES), "round_chs_fn": rounded, "num_features": 1280}
    model = EfficientNet(**{**shape, "act_layer": nn.ReLU, **settings})
    normal_weights(model, linear_std=0.01)
    return model


register(
    _mobilenet,
    {"mobilenetv2_050_cifar": {}},
    cifar_cfg(pool_size=(2, 2), first_conv="conv_stem", classifier="classifier"),
    num_stages=4,
)
