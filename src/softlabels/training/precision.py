"""Which precision and which memory format a network is trained in, where the settings say auto."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from softlabels.models.zoo.resnet_small import PointwiseConv2d
from softlabels.training.config import Config

__all__ = ["describe_precision", "overrun", "with_precision"]

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
# What a CPU says of itself when it multiplies bfloat16 as fast as it should.
_BF16_OF_CPUS = ("avx512_bf16", "amx_bf16", "amx_tile")
_SKIPPED = 50  # a gradient scaler begins too high, and comes down by steps that are not finite
_NARROW = 16  # channels, of a block of oneDNN's kernels


def with_precision(config: Config, network: nn.Module, device: torch.device) -> Config:
    """Decide what the settings leave open by the network that is trained; for all processes alike.

    * `precision`: bfloat16 where the device computes it fast. Not on a CPU if a convolution is
      depthwise: those are slower in it, and a whole network with them is (`docs/speed.md`).
    * `channels_last`: for networks with more convolutions than linear layers, unless `overrun`.
    * `max_skipped_steps`: 50 with a gradient scaler. Without one nothing heals what is not finite.

    Args:
        config: The settings; what they say stays.
        network: What is trained, or a teacher whose answers are stored.
        device: Where.

    Raises:
        ValueError: Channels last are asked for where they would damage memory (`overrun`).
    """
    layer = overrun(network) if device.type == "cpu" else None
    if layer is not None and config.channels_last is True:
        raise ValueError(
            "channels_last must be false or auto on a CPU for a network with a layer like "
            f"{layer}, a convolution of 1x1 with a stride and fewer than {_NARROW} channels: "
            "torch's kernel for its gradient writes beyond its memory (oneDNN issue 6035)"
        )
    chosen: dict[str, Any] = {}
    if config.precision == "auto":
        chosen["precision"] = "bf16" if _bf16_is_fast(network, device) else "no"
    if config.channels_last == "auto":
        kinds = [*map(type, network.modules())]
        convolutions = sum(issubclass(kind, nn.Conv2d) for kind in kinds)
        linear = sum(issubclass(kind, nn.Linear) for kind in kinds)
        chosen["channels_last"] = convolutions > linear and layer is None
    if config.max_skipped_steps is None:
        precision = chosen.get("precision", config.precision)
        chosen["max_skipped_steps"] = _SKIPPED if precision == "fp16" else 0
    return config.model_copy(update=chosen)


def overrun(network: nn.Module) -> str | None:
    """The first layer with whose gradient a CPU writes beyond its memory in channels last, or None.

    oneDNN's kernel does so for a convolution of 1x1 with a stride, whose input has fewer channels
    than a block of 16 (https://github.com/uxlfoundation/oneDNN/issues/6035). The process dies, or
    numbers are wrong.
    """
    return next(
        (
            name
            for name, layer in network.named_modules()
            if isinstance(layer, nn.Conv2d)
            and not isinstance(layer, PointwiseConv2d)
            and max(layer.kernel_size) == 1
            and max(layer.stride) > 1
            and layer.in_channels // layer.groups < _NARROW
        ),
        None,
    )


def _bf16_is_fast(network: nn.Module, device: torch.device) -> bool:
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type != "cpu":
        return False
    # Not there in older versions of torch, and other keys on other processors: then float32.
    find = getattr(torch.cpu, "get_capabilities", dict)
    can: dict[str, Any] = find()
    return any(can.get(name) for name in _BF16_OF_CPUS) and not any(
        isinstance(module, _CONVOLUTIONS) and 1 < module.groups == module.in_channels
        for module in network.modules()
    )


def describe_precision(config: Config) -> str:
    """The precision and the memory format, in a few words."""
    precision = {"no": "float32", "bf16": "bfloat16", "fp16": "float16"}.get(config.precision, "")
    return f"{precision}, channels last" if config.channels_last is True else precision
