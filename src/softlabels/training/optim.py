"""The optimizer and the learning rate's schedule, by timm's factories."""

from __future__ import annotations

from typing import Any, cast

import torch
from timm.layers import RmsNorm, RmsNorm2d
from timm.optim import create_optimizer_v2, list_optimizers
from timm.optim import param_groups_weight_decay as decay_groups
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from softlabels.training.settings import OptimizerSettings, ScheduleSettings

__all__ = ["build_optimizer", "build_schedule"]

_NORMS = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm, RmsNorm, RmsNorm2d)
# timm's networks name their own in `no_weight_decay`; torchvision's do not.
_TORCHVISION_TOKENS = (".class_token", ".pos_embedding", ".relative_position_bias_table")
# Of our names; the others are timm's too.
_OF_TIMM = {"constant": "multistep", "linear": "poly"}


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


def build_schedule(
    settings: ScheduleSettings,
    optimizer: torch.optim.Optimizer,
    *,
    epochs: int,
    steps_per_epoch: int,
) -> Scheduler:
    """A schedule of timm's, per step.

    With S steps in all, E steps an epoch, W steps of warm-up, the optimizer's rate r as the peak
    and the lowest rate m, the rate of step t = 0, 1, ... is, for t >= W:

    * cosine: m + (r - m) (1 + cos(pi t / S)) / 2;
    * linear: m + (r - m) (1 - t / S);
    * step, multistep: r times `decay_rate` for each drop at or before t; drops are at whole steps,
      the one after 1.5 epochs at round(1.5 E), and those of step are a step apart at least;
    * constant: r;

    and before that `warmup_lr` + (r - `warmup_lr`) t / W, or just `warmup_lr` if the warm-up is
    constant. The form goes on as if there had been no warm-up: it does not start at its end.

    MMClassification, which the recipes of the NKD and USKD paper are for, warms up per step too,
    also where it counts the warm-up in epochs. Until version 0.25 its warm-up is a factor on the
    form's own rate at that step, so that it ends at that one, not at r; the rate of a constant
    warm-up of 0.1 is 0.1 r (1 - t / S) there. From version 1.0 on its cosine and its linear fall
    start at the end of the warm-up, and the cosine changes once an epoch. In the recipes at hand
    the rates differ by 1 % of r at the end of the warm-up, and less later.

    Returns:
        The schedule. `step_update(t)` sets the rate of step t, whatever was set before: a resume
        needs no state.
    """
    num_steps = epochs * steps_per_epoch
    drops = sorted(round(epoch * steps_per_epoch) for epoch in settings.decay_epochs)
    # timm's epochs are steps here: its factory takes whole numbers of them.
    made, _ = create_scheduler_v2(
        optimizer,
        sched=_OF_TIMM.get(settings.name, settings.name),
        num_epochs=num_steps,
        decay_epochs=max(1, drops[0]) if drops else num_steps,
        # timm's multistep looks one step ahead.
        decay_milestones=[drop + 1 for drop in drops or [num_steps]],
        # timm's poly takes its power from here.
        decay_rate=1.0 if settings.name == "linear" else settings.decay_rate,
        min_lr=settings.min_lr,
        warmup_epochs=settings.warmup_steps or round(settings.warmup_epochs * steps_per_epoch),
        warmup_lr=settings.warmup_lr,
        step_on_epochs=False,
        updates_per_epoch=1,
    )
    if settings.warmup == "constant":
        # What timm adds to each group's rate at each step of its warm-up.
        made.warmup_steps = [0.0] * len(optimizer.param_groups)
    scheduler = cast("Scheduler", made)
    scheduler.step_update(0)
    return scheduler
