"""What a method needs of a batch, compared with what the data and the settings can give."""

from __future__ import annotations

import inspect

from softlabels.data import DataSource
from softlabels.data.extra_views import PARTNER
from softlabels.data.mixup import MIXUP_EXTRAS
from softlabels.distill.distiller import Distiller
from softlabels.training.config import Config

__all__ = ["check_needs", "memory_of"]


def check_needs(
    config: Config, distiller: Distiller, source: DataSource, num_processes: int
) -> None:
    """Check that each batch can bring what the method reads.

    Raises:
        ValueError: It cannot.
    """
    further = [name for name in distiller.extras if name not in ("index", "draw")]
    mixed = bool(config.mix.mixup or config.mix.cutmix)
    label = config.label
    if config.task.weight == "rest":
        _check_rest(config, distiller)
    if PARTNER in further and mixed:
        raise ValueError(
            f"{label} reads another image of each image's class, and mixed images have two "
            "classes: mix.mixup and mix.cutmix must be 0"
        )
    if MIXUP_EXTRAS & {*further}:
        if mixed:
            raise ValueError(f"{label} mixes images itself: mix.mixup and mix.cutmix must be 0")
        if config.grad_accum_steps > 1:
            raise ValueError(
                f"{label} mixes the images of a batch: grad_accum_steps must be 1, got "
                f"{config.grad_accum_steps}"
            )
        if config.batch_size % (2 * num_processes):
            raise ValueError(
                f"{label} mixes pairs of images: batch_size must be a multiple of "
                f"{2 * num_processes}, got {config.batch_size}"
            )
        if source.num_train < config.batch_size and source.num_train % (2 * num_processes):
            raise ValueError(
                f"{label} mixes pairs of images: a training set that is smaller than batch_size "
                f"must be a multiple of {2 * num_processes}, got {source.num_train} images"
            )
    asked = [name for name in further if name not in MIXUP_EXTRAS]
    if not asked:
        return
    parameters = inspect.signature(source.train_batches).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    if "extras" not in parameters and not takes_any:
        raise ValueError(
            f"{label} reads {', '.join(asked)} from the batch, but train_batches of "
            f"{type(source).__name__} takes no `extras`"
        )
    # The call alone checks what the source can give; no batch is read.
    source.train_batches(
        seed=config.seed,
        epoch=0,
        batch_size=config.batch_size,
        rank=0,
        world_size=num_processes,
        device="cpu",
        extras=asked,
    )


def _check_rest(config: Config, distiller: Distiller) -> None:
    """Check that what a method leaves for the task's loss is a weight."""
    if distiller.method is None:
        raise ValueError("task.weight rest is 1 - method_weight, and there is no method")
    weight = 1.0 if config.method_weight is None else config.method_weight
    if weight > 1:
        raise ValueError(
            "task.weight rest is 1 - method_weight: method_weight must be at most 1, got "
            f"{weight:g}"
        )


def memory_of(distiller: Distiller) -> int:
    """Bytes that the method keeps between steps, in each process."""
    return sum(memory.num_bytes() for memory in distiller.memories())
