"""Weights of the task's and the method's loss, as functions of the epoch."""

from __future__ import annotations

from typing import Literal

from softlabels.distill.distiller import Distiller
from softlabels.losses import WeightedSum
from softlabels.training.config import Config

__all__ = ["set_weights"]


def set_weights(distiller: Distiller, config: Config, epoch: int) -> None:
    """Give a distiller's losses their weights of an epoch, counted from 0.

    One that rises over n epochs is multiplied by min((epoch + 1) / n, 1).
    """
    weight = _risen(config.method_weight, config.method_warmup_epochs, config, epoch)
    task = config.task.weight
    distiller.task_weight = 1.0 - weight if task == "rest" else 1.0 if task is None else task
    summed = distiller.method
    built_here = config.method.kind != "none"  # else it is the caller's, with weights of its own
    if not (built_here and isinstance(summed, WeightedSum)):
        distiller.method_weight = weight
        return
    others = [_risen(f.weight, f.warmup_epochs, config, epoch) for f in config.further_methods]
    distiller.method_weight = 1.0
    summed.weights = dict(zip(summed.weights, [weight, *others], strict=True))


def _risen(
    weight: float | None, over: float | Literal["run"] | None, config: Config, epoch: int
) -> float:
    epochs = float(config.epochs) if over == "run" else over or 0.0
    factor = min((epoch + 1) / epochs, 1.0) if epochs else 1.0
    return factor * (1.0 if weight is None else weight)
