"""The learning rate as a function of the step."""

from __future__ import annotations

from typing import cast

import torch
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler

from softlabels.training.settings import ScheduleSettings

__all__ = ["build_schedule"]

# Of our names; the others are timm's too.
_OF_TIMM = {"constant": "multistep", "linear": "poly"}


def build_schedule(
    settings: ScheduleSettings,
    optimizer: torch.optim.Optimizer,
    *,
    epochs: int,
    steps_per_epoch: int,
) -> Scheduler:
    """A schedule of timm's, per step.

    With S steps in all, E steps an epoch, W steps of warm-up, the peak rate r and the lowest rate
    m, the rate of step t = 0, 1, ... is, for t >= W:

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

    Args:
        settings: Form, warm-up and lowest rate.
        optimizer: With the peak rate of each of its groups.
        epochs: Of the run.
        steps_per_epoch: Optimizer steps in an epoch.

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
