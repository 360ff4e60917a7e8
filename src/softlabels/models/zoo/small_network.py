"""What the networks for small images share: their head, their weights, their registration."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from timm.layers.classifier import create_classifier
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.densenet import DenseNet
from timm.models.resnet import ResNet
from torch import Tensor, nn

__all__ = ["SmallNetwork", "cifar_cfg", "normal_weights", "register", "shrink_stem", "stages"]


class SmallNetwork(nn.Module):
    """A chain of modules, global pooling and a linear classifier, with timm's methods.

    Args:
        chain: The modules before the pooling, by name, in the order in which they are called.
        stages: The members of the chain that end a stage, each with the factor by which its map
            is smaller than the image and its number of channels.
        num_features: Channels of the last map.
        num_classes: Number of classes; 0 leaves out the classifier.
        global_pool: timm's name of the pooling before the classifier; "" for none.
        drop_rate: Dropout probability before the classifier, 0 to 1.

    Attributes:
        feature_info: timm's description of the stages.
    """

    def __init__(
        self,
        chain: Mapping[str, nn.Module],
        stages: Iterable[tuple[str, int, int]],
        *,
        num_features: int,
        num_classes: int = 100,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.num_features = self.head_hidden_size = num_features
        self.feature_info: list[dict[str, Any]] = [
            {"num_chs": width, "reduction": reduction, "module": name}
            for name, reduction, width in stages
        ]
        self._chain = tuple(chain)
        for name, module in chain.items():
            self.add_module(name, module)
        self.global_pool: nn.Module
        self.fc: nn.Module
        self.global_pool, self.fc = create_classifier(
            num_features, num_classes, pool_type=global_pool
        )
        self.head_drop = nn.Dropout(drop_rate)

    def get_classifier(self) -> nn.Module:
        """Return the last layer (an identity if `num_classes` is 0)."""
        return self.fc

    def reset_classifier(self, num_classes: int, global_pool: str = "avg") -> None:
        """Replace the last layer by a freshly initialized one; arguments as of the class."""
        self.num_classes = num_classes
        self.global_pool, fc = create_classifier(
            self.num_features, num_classes, pool_type=global_pool
        )
        self.fc = fc.to(next(self.parameters()))

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the map at the end of the chain, [B, num_features, h, w], of [B, C, H, W]."""
        for name in self._chain:
            x = getattr(self, name)(x)
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Return the logits, [B, num_classes], of what `forward_features` returns.

        With `pre_logits` the pooled features, [B, num_features], instead.
        """
        x = self.head_drop(self.global_pool(x))
        if not pre_logits:
            x = self.fc(x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits, [B, num_classes], of images, [B, in_chans, H, W]."""
        return self.forward_head(self.forward_features(x))


def stages(
    block: Callable[[int, int, int], nn.Module],
    in_width: int,
    shapes: Iterable[tuple[int, int, int]],
    reduction: int = 1,
) -> tuple[dict[str, nn.Module], list[tuple[str, int, int]]]:
    """Return `layer1`, `layer2`, ... for the chain of a `SmallNetwork`, and its `stages`.

    Args:
        block: Makes a block from its channels in, its channels out and its stride.
        in_width: Channels of the map that the first block gets.
        shapes: Of each stage the number of blocks, at least 1, the channels that each of them
            returns, and the stride of the first one.
        reduction: Factor by which that map is smaller than the image.
    """
    chain: dict[str, nn.Module] = {}
    described = []
    for number, (num_blocks, width, stride) in enumerate(shapes, 1):
        first = block(in_width, width, stride)
        rest = (block(width, width, 1) for _ in range(num_blocks - 1))
        chain[f"layer{number}"] = nn.Sequential(first, *rest)
        reduction, in_width = reduction * stride, width
        described.append((f"layer{number}", reduction, width))
    return chain, described


def normal_weights(model: nn.Module, *, linear_std: float | None = None) -> None:
    """Draw a network's weights as He et al. do, from a normal distribution of the fan-out.

    Args:
        model: All its convolutions and batch norms are set, in place.
        linear_std: Standard deviation of the weights of its linear layers, whose biases become 0.
            None: these keep PyTorch's own.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Linear) and linear_std is not None:
            nn.init.normal_(module.weight, std=linear_std)
            nn.init.zeros_(module.bias)


def shrink_stem(model: ResNet | DenseNet, convolution: str, dropped: Iterable[str]) -> None:
    """Give a network of timm a 3x3 convolution of stride 1 in place of its large stem.

    Args:
        model: Is changed in place, its `feature_info` too. The new weights are PyTorch's own.
        convolution: Path of its first convolution, of stride 2.
        dropped: Paths of what goes, a pooling of stride 2 among it. Identities stay there, as
            timm counts the modules of some networks.

    Raises:
        ValueError: If the stem is not a single convolution.
    """
    large = model.get_submodule(convolution)
    if not isinstance(large, nn.Conv2d):
        raise ValueError(f"the stem must be one convolution, got {type(large).__name__}")
    small = nn.Conv2d(large.in_channels, large.out_channels, 3, padding=1, bias=False)
    model.set_submodule(convolution, small.to(large.weight))
    for path in dropped:
        model.set_submodule(path, nn.Identity())
    stages: list[Any] = model.feature_info
    for info in stages:
        info["reduction"] = max(1, info["reduction"] // 4)


def cifar_cfg(**changes: Any) -> dict[str, Any]:
    """Return timm's configuration of a network for CIFAR-100.

    Args:
        **changes: What differs from three stages of which the last is 8x8.
    """
    return {
        "num_classes": 100,
        "input_size": (3, 32, 32),
        "pool_size": (8, 8),
        "crop_pct": 1.0,
        "interpolation": "bilinear",
        # Statistics of CIFAR-100's training images.
        "mean": (0.5071, 0.4867, 0.4408),
        "std": (0.2675, 0.2565, 0.2761),
        "first_conv": "conv1",
        "classifier": "fc",
    } | changes


def register(
    network: Callable[..., nn.Module],
    variants: Mapping[str, Mapping[str, Any]],
    cfg: Mapping[str, Any],
    num_stages: int | None = None,
) -> None:
    """Register variants of a network with timm, as if each were a function of the network's module.

    Args:
        network: Its class, or a function that returns it.
        variants: By name, what makes each of them; settings of the user win over that.
        cfg: What `cifar_cfg` returns.
        num_stages: Entries of its `feature_info`, which `features_only=True` returns. None: timm
            chooses.
    """
    module = sys.modules[network.__module__]
    cfgs = generate_default_cfgs({name: dict(cfg) for name in variants})
    vars(module).setdefault("default_cfgs", {}).update(cfgs)
    # Hooks find a stage at any depth.
    stages = {"feature_cls": "hook", "out_indices": tuple(range(num_stages or 0))}
    features: dict[str, Any] = {} if num_stages is None else {"feature_cfg": stages}

    def entrypoint(variant: str, shape: Mapping[str, Any]) -> Callable[..., nn.Module]:
        def create(pretrained: bool = False, **settings: Any) -> nn.Module:
            model: nn.Module = build_model_with_cfg(
                network, variant, pretrained, **features, **{**shape, **settings}
            )
            return model

        create.__name__ = create.__qualname__ = variant
        create.__module__ = network.__module__
        return create

    for variant, shape in variants.items():
        vars(module)[variant] = register_model(entrypoint(variant, shape))
