"""What is written when the last epoch is done."""

from __future__ import annotations

import resource
import statistics
import sys

import torch

from softlabels.analysis.gallery import make_gallery
from softlabels.distill.teacher import Teacher, Teachers
from softlabels.experiments.analyze import analyze, teacher_name, write_analysis
from softlabels.io.records import read_lines
from softlabels.training.config import Config
from softlabels.training.engine import Engine
from softlabels.training.recorder import Recorder
from softlabels.training.run_folder import RunFolder
from softlabels.training.schemas import (
    Gallery,
    NamedScore,
    Summary,
    TeacherScore,
    Timing,
)

__all__ = ["finish", "peak_memory"]


def finish(
    config: Config,
    engine: Engine,
    recorder: Recorder,
    folder: RunFolder,
    num_parameters: int,
    teacher: TeacherScore | None,
) -> None:
    """Write gallery, analysis and, last of all, the summary that calls the run complete.

    Args:
        config: The run's settings.
        engine: After its last epoch.
        recorder: Likewise.
        folder: The run's.
        num_parameters: Of the student.
        teacher: Its score, if it was measured.
    """
    memory = peak_memory(engine.accelerator.device)  # of the training, not of what follows
    if config.gallery:
        gallery = make_gallery(
            engine.distiller,
            engine.network,
            engine.source,
            num_images=config.gallery,
            batch_size=config.eval_batch_size,
            device=engine.accelerator.device,
        )
        Gallery.model_validate(gallery).write(folder.gallery)
    if config.analysis:
        asked = engine.distiller.teacher
        live = asked if isinstance(asked, Teacher | Teachers) else None  # a cache has no answers
        analysis = analyze(
            engine.network,
            engine.source,
            batch_size=config.eval_batch_size,
            device=engine.accelerator.device,
            autocast=engine.accelerator.autocast,
            teacher=live,
            teacher_name=teacher_name(config, live),
        )
        write_analysis(folder, analysis)
    skipped = len(getattr(engine.source, "skipped", {}))
    seconds = [line.seconds for line in read_lines(folder.timings, Timing)]
    Summary(
        label=config.label,
        method=None if config.method.kind == "none" else config.method.kind,
        model=config.student.name,
        teacher=None if teacher is None else NamedScore(name=teacher.name, top1=teacher.top1),
        data=engine.source.info.name,
        test_images=engine.source.num_test,
        seed=config.seed,
        epochs=config.epochs,
        final=recorder.final,
        best=recorder.best,
        seconds=recorder.seconds,
        seconds_per_epoch=statistics.median(seconds) if seconds else None,
        peak_memory=memory,
        parameters=num_parameters,
        assumed=config.assumed,
        skipped_images=skipped,
        complete=True,
    ).write(folder.summary)


def peak_memory(device: torch.device) -> int:
    """The most memory that this process has had so far, bytes.

    Args:
        device: A CUDA device: what tensors took there; else the process' largest resident size.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size if sys.platform == "darwin" else 1024 * size
