"""The optimizer, by timm's factory, and which parameters decay."""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import RmsNorm, RmsNorm2d
from timm.optim import create_optimizer_v2, list_optimizers
from timm.optim import param_groups_weight_decay as decay_groups
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from softlabels.training.settings import OptimizerSettings

__all__ = ["build_optimizer"]

_NORMS = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm, RmsNorm, RmsNorm2d)
# timm's networks name their own in `no_weight_decay`; torchvision's do not.
_TORCHVISION_TOKENS = (".class_token", ".pos_embedding", ".relative_position_bias_table")


def build_optimizer(settings: OptimizerSettings, trained: nn.Module) -> torch.optim.Optimizer:
    """An optimizer of timm's factory over all parameters of a module.

    Raises:
        ValueError: timm has no optimizer of this name.
    """
    name = settings.name.lower()
    if name not in list_optimizers():
        raise ValueError(
            f"optimizer.name must be a name of timm's factory (sgd, adamw, ...), got {name!r}"
        )
    if name == "sgd" and not settings.nesterov:
        name = "momentum"  # timm's "sgd" is Nesterov's
    groups: Any = trained
    if not settings.decay_norm_and_bias:
        groups = decay_groups(
            trained, settings.weight_decay, no_weight_decay_list=_tokens_of(trained)
        )
    elif not settings.decay_norm:
        groups = _without_norms(trained, settings.weight_decay)
    optimizer: torch.optim.Optimizer = create_optimizer_v2(
        groups,
        opt=name,
        lr=settings.lr,
        weight_decay=settings.weight_decay,
        momentum=settings.momentum,
        filter_bias_and_bn=False,
    )
    return optimizer


def _tokens_of(trained: nn.Module) -> list[str]:
    """Parameters that stand for vectors whatever their shape: tokens, embeddings of places."""
    exempt = getattr(getattr(trained, "student", None), "no_weight_decay", set)
    named = {f"student.{parameter}" for parameter in exempt()}
    others = (name for name, _ in trained.named_parameters() if name.endswith(_TORCHVISION_TOKENS))
    return sorted({*named, *others})


def _without_norms(trained: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups, of which the first, what belongs to norms, does not decay."""
    of_norms = {
        id(parameter)
        for module in trained.modules()
        if isinstance(module, _NORMS)
        for parameter in module.parameters(recurse=False)
    }
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for parameter in trained.parameters():
        if parameter.requires_grad:
            groups[id(parameter) in of_norms].append(parameter)
    return [
        {"params": groups[True], "weight_decay": 0.0},
        {"params": groups[False], "weight_decay": weight_decay},
    ]
