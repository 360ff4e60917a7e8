"""Shrinks a run to seconds: the real network, loss and schedule on images made on the spot."""

from __future__ import annotations

import tempfile
from pathlib import Path

from pydantic import Field
from rich.console import Console

from softlabels.data import DataInfo
from softlabels.data.sources.by_name import SOURCES
from softlabels.experiments.search_space import with_values
from softlabels.experiments.train import ReportWriter
from softlabels.export.export import Exported, export_run
from softlabels.training.build import with_defaults
from softlabels.training.config import Config
from softlabels.training.distributed import start
from softlabels.training.settings import Section
from softlabels.training.trainer import TrainResult, run

__all__ = ["TrainOptions", "shrunk", "smoke"]

_IMAGES_A_PROCESS = 4  # mixup needs an even number
_STEPS = 2
_PUBLIC = ("timm", "torchvision", "file")  # a student's file can say these by itself
_CLASSES, _SIDE, _CHANNELS = 10, 224, 3  # where the data alone would say


class TrainOptions(Section):
    """Settings of a run."""

    smoke: bool = Field(
        False,
        description="Shrink the run to seconds: two steps on images made on the spot, an "
        "evaluation, an export. Its folder is temporary unless --output names one.",
    )


def smoke(config: Config, *, console: Console | None = None) -> tuple[TrainResult, Exported | None]:
    """Train a shrunk run, evaluate it, export its student and load that back.

    Args:
        config: The run, not shrunk. Without an output its folder is removed at the end.
        console: Where progress is shown; None: nowhere.

    Returns:
        What the run gave, and the export, which the first of several processes makes.

    Raises:
        ValueError: Parts that do not fit.
        RunError: The run failed.
    """
    with tempfile.TemporaryDirectory(prefix="softlabels-smoke-") as temporary:
        output = config.output or str(Path(temporary, "run"))
        accelerator = start(config)
        small = shrunk(config, processes=accelerator.num_processes)
        small = small.model_copy(update={"output": output})
        result = run(small, observers=[ReportWriter()], console=console)
        if not accelerator.is_main_process:
            return result, None
        builds_itself = (config.student.name or "timm:").partition(":")[0] in _PUBLIC
        network = None if builds_itself else config.student.name
        return result, export_run(result.folder, network=network, overwrite=True)


def shrunk(config: Config, *, processes: int = 1) -> Config:
    """A run of two steps and an evaluation in place of the one that is configured.

    What stays: student, teacher, method, task's loss, optimizer, size of the images, number of
    classes, mixing, averaging of weights, and the schedule, in which all epochs become one. Weights
    are random where they would be downloaded or read. It proves that the parts fit, and nothing
    about accuracy. Each process that will train it gets four images a step.
    """
    batch_size = _IMAGES_A_PROCESS * processes
    kind = config.data.source
    facts = SOURCES[kind]
    given = config.data.model_dump()
    side = given.get("image_size") or facts.image_size or _SIDE
    classes = given.get("num_classes") or facts.num_classes or _CLASSES
    channels = given.get("in_channels") or facts.in_channels or _CHANNELS
    info = DataInfo(
        kind,
        tuple(map(str, range(classes))),
        channels,
        (side, side),
        (0.5,) * channels,
        (0.5,) * channels,
    )
    config = with_defaults(config, info)
    schedule = config.schedule
    small = {
        "data": {
            "source": "noise",
            "num_classes": classes,
            "image_size": side,
            "in_channels": channels,
            "num_train": _STEPS * batch_size,
            "num_test": batch_size,
        },
        "student.pretrained": False,
        "student.weights": None,
        "teacher.cache": None,
        "teacher.check": "off",
        "teacher.pretrained": False,
        "teacher.recipe": None,
        "teacher.weights": None,
        "schedule.decay_epochs": [epoch / config.epochs for epoch in schedule.decay_epochs],
        "schedule.warmup_epochs": schedule.warmup_epochs / config.epochs,
        "schedule.warmup_steps": min(schedule.warmup_steps, 1),
        "grad_accum_steps": 1,
        "batch_size": batch_size,
        "epochs": 1,
        "eval_batch_size": batch_size,
        "gallery": min(config.gallery, 1),
        "log_every": 1,
        "precise_bn": None if config.precise_bn is None else batch_size,
    }
    return with_values(config, small)
