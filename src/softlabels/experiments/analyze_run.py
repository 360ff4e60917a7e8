"""The analysis of a run: written at its end, or later from its folder."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from softlabels.analysis.analyze import Analyzed, analyze
from softlabels.data import DataInfo
from softlabels.distill.teacher import Teacher, Teachers
from softlabels.export.predict import load_student
from softlabels.io.files import replace_file
from softlabels.training.build import build_source, build_teacher
from softlabels.training.config import Config, load_recipe, parse
from softlabels.training.distributed import start
from softlabels.training.run_folder import RunFolder
from softlabels.training.schemas import Analysis
from softlabels.training.settings import TeacherSettings
from softlabels.training.teacher_check import teacher_name

__all__ = ["analyze_run", "write_analysis"]


def write_analysis(folder: RunFolder, found: Analyzed) -> None:
    """Write analysis.json and predictions.npz, each whole or not at all."""
    with replace_file(folder.predictions) as file:
        np.savez_compressed(file, **found.predictions)  # type: ignore[arg-type]  # by name
    Analysis.model_validate(found.content).write(folder.analysis)


def analyze_run(folder: Path) -> None:
    """Write the analysis of a finished run, anew if there is one.

    Student, data, and the teacher if its weights are in a file or published, are those that the
    run's record names.

    Raises:
        FileNotFoundError: The student's or the teacher's file is gone.
        ValueError: No finished run, or data or a teacher that cannot be opened.
    """
    run = RunFolder(folder)
    if not run.is_complete():
        raise ValueError(f"expected the folder of a finished run, {folder} holds none")
    config = parse(load_recipe(str(run.config)))
    network, _ = load_student(folder)
    accelerator = start(config)  # device, precision and threads of the run
    source = build_source(config)
    try:
        teacher = _teacher_of(config, folder, source.info)
        found = analyze(
            network.to(accelerator.device),
            source,
            batch_size=config.eval_batch_size,
            device=accelerator.device,
            autocast=accelerator.autocast,
            teacher=None if teacher is None else teacher.to(accelerator.device),
            teacher_name=teacher_name(config, teacher),
        )
    finally:
        source.close()
    write_analysis(run, found)


def _teacher_of(config: Config, folder: Path, info: DataInfo) -> Teacher | Teachers | None:
    """The live teacher of a run, if it can be built again."""
    settings = [config.teacher, *config.further_teachers]
    if config.generations > 1:
        before = RunFolder(folder / f"generation-{config.generations - 1}")
        settings = [TeacherSettings(name=f"file:{before.student}")]
    if config.teacher.cache is not None or not all(map(_has_weights, settings)):
        return None
    every = [build_teacher(each, info) for each in settings]
    return every[0] if len(every) == 1 else Teachers(every)


def _has_weights(settings: TeacherSettings) -> bool:
    name = settings.name
    if name is None or name.startswith("object:"):
        return False
    return settings.weights is not None or settings.pretrained or name.startswith("file:")
