"""Rules that find a network's stages, and what ends one: its norm and its activation."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from softlabels.taps.dry_run import DryRun, Record, within
from softlabels.taps.feature_tap import find_module

__all__ = [
    "Classifier",
    "activation_after",
    "last_classifier",
    "norm_before",
    "num_layers",
]

_ACTIVATIONS = (
    nn.ReLU,
    nn.ReLU6,
    nn.LeakyReLU,
    nn.SiLU,
    nn.GELU,
    nn.Hardswish,
    nn.ELU,
    nn.PReLU,
)
_SHORTCUTS = ("downsample", "shortcut", "skip")


@dataclass(frozen=True)
class Classifier:
    """The last layer of a model.

    Attributes:
        path: Dotted name of the module.
        in_features: Width of the feature that it classifies.
        out_features: Number of classes.
    """

    path: str
    in_features: int
    out_features: int


def activation_after(model: nn.Module, run: DryRun, place: Record) -> str | None:
    """Path of the activation whose output is that of a place, or None."""
    for record in reversed(run.records):
        same = record.address == place.address and record.shape == place.shape
        if not same or record.finished > place.finished:
            continue
        # A placeholder (Identity) gives on what came before it.
        given_on = record.finished < place.started and not place.has_parameters
        if not (given_on or within(record.path, place.path)):
            continue
        if isinstance(find_module(model, record.path), _ACTIVATIONS):
            return record.path
    return None


def norm_before(model: nn.Module, run: DryRun, place: Record) -> Record | None:
    """The BatchNorm that the feature of a place comes out of before its activation.

    The next layer, if that is a BatchNorm; else the last one of the stage that is as wide as its
    output, those of shortcuts left out.
    """
    leaves = (r for r in run.records if _is_layer(find_module(model, r.path)))
    following = [record for record in leaves if record.started > place.finished]
    following.sort(key=lambda record: record.started)
    if following and _fits(model, following[0], place):
        return following[0]
    inner = [
        record
        for record in run.records
        if within(record.path, place.path)
        and _fits(model, record, place)
        and not any(name in record.path for name in _SHORTCUTS)
    ]
    if inner:
        return inner[-1]
    # A single activation after its norm: the layers are no children of the place.
    earlier = [r for r in run.records if r.finished < place.started and _fits(model, r, place)]
    return earlier[-1] if earlier else None


def _is_layer(module: nn.Module) -> bool:
    # timm's norms hold their activation.
    return isinstance(module, nn.BatchNorm2d) or next(module.children(), None) is None


def _fits(model: nn.Module, record: Record, place: Record) -> bool:
    module = find_module(model, record.path)
    return isinstance(module, nn.BatchNorm2d) and record.shape == place.shape


def num_layers(module: nn.Module) -> int:
    """Convolutions, linear layers and others with a matrix of weights."""
    return sum(
        any(parameter.dim() > 1 for parameter in part.parameters(recurse=False))
        for part in module.modules()
    )


def last_classifier(model: nn.Module, run: DryRun) -> Classifier | None:
    """The last linear layer or convolution, if it is as wide as the logits."""
    for record in reversed(run.records):
        module = find_module(model, record.path)
        if isinstance(module, nn.Linear):
            layer = Classifier(record.path, module.in_features, module.out_features)
        elif isinstance(module, nn.Conv2d):
            layer = Classifier(record.path, module.in_channels, module.out_channels)
        else:
            continue
        return layer if layer.out_features == run.num_classes else None
    return None
