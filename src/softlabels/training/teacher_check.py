"""Whether a teacher knows the data, measured before a run is given to it."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from accelerate import Accelerator

from softlabels.data import DataSource
from softlabels.distill.distiller import Distiller
from softlabels.distill.teacher import Teacher, Teachers
from softlabels.taps import undisturbed
from softlabels.training.config import Config, method_reads_teacher
from softlabels.training.metrics import evaluate
from softlabels.training.schemas import TeacherScore

__all__ = ["checked_teacher", "near_chance", "teacher_name"]

_DEVIATIONS = 3.0


def near_chance(score: TeacherScore) -> bool:
    """Whether a teacher does no better than guessing, as far as its test images can tell.

    With C classes guessing is right on a share 1 / C of the images, with a binomial deviation. A
    teacher is near chance if its share is within three of these deviations, and below 2 / C. That
    is said only of test sets that are large enough: on a small one a good teacher may look like
    guessing. So for a teacher that is a quarter of the way from guessing to perfect, the range of
    three deviations must lie above that of guessing: 43 images of 100 classes are enough, 105 of
    10, and 558 of 2.
    """
    guessing = 1 / score.num_classes
    knowing = guessing + (1 - guessing) / 4
    highest = guessing + _DEVIATIONS * _deviation(guessing, score.test_images)
    lowest = knowing - _DEVIATIONS * _deviation(knowing, score.test_images)
    return highest < lowest and score.top1 / 100 < min(highest, 2 * guessing)


def _deviation(share: float, count: int) -> float:
    return math.sqrt(share * (1 - share) / count)


def teacher_name(config: Config, teacher: Teacher | Teachers | None) -> str:
    """What a run calls its teacher: as the settings do, else by the networks' classes."""
    if teacher is None:
        return ""
    every = teacher.all
    names = [settings.name or "" for settings in (config.teacher, *config.further_teachers)]
    if not all(names) or len(names) != len(every):
        names = [type(each.model).__name__ for each in every]
    return " + ".join(names)


def checked_teacher(
    config: Config,
    distiller: Distiller,
    source: DataSource,
    accelerator: Accelerator,
    *,
    known: TeacherScore | None,
    say: Callable[[str], None],
) -> TeacherScore | None:
    """Measure a teacher on the test images, and refuse one that is near chance.

    It is measured as it teaches, with its class map, size and precision; a teacher in train mode
    in eval mode all the same. Each process takes its share of the images. What an earlier start of
    the run measured, `known`, is not measured again.

    Returns:
        The score; None if no network teaches, the settings turn the check off, or its answers are
        of other classes than the data's, which a method that reads its features can do with.

    Raises:
        ValueError: The teacher is near chance or its answers are not finite, and the settings do
            not say that this is a warning.
    """
    teacher = distiller.teacher
    if config.teacher.check == "off" or not isinstance(teacher, Teacher | Teachers):
        return None
    if not method_reads_teacher(distiller.method):
        return None
    info = source.info
    name = teacher_name(config, teacher)
    problem = None
    score = known
    if score is None:
        shape = (info.in_channels, *info.image_size)
        for each in teacher.all:
            with undisturbed(each):
                num_classes = each(torch.zeros(1, *shape, device=accelerator.device)).shape[1]
            if num_classes != info.num_classes:
                say(
                    f"teacher {name}: not checked, it has {num_classes} classes and the data have "
                    f"{info.num_classes}"
                )
                return None
        batches = source.test_batches(
            batch_size=config.eval_batch_size,
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
            device=accelerator.device,
        )
        metrics = evaluate(teacher, batches, info, accelerator.device, accelerator.autocast)
        score = TeacherScore(
            name=name,
            top1=metrics["top1"],
            test_images=source.num_test,
            num_classes=info.num_classes,
        )
        if not math.isfinite(metrics["nll"]):
            problem = f"the teacher's answers are not all finite: {name} on {info.name}"
    say(f"teacher {name}: top-1 {score.top1:.2f} % on {score.test_images:,} test images")
    if problem is None and near_chance(score):
        problem = (
            f"the teacher {name} is right on {score.top1:.2f} % of the {score.test_images:,} test "
            f"images, and guessing on {100 / score.num_classes:.2f} %: it has no trained weights "
            "(teacher.weights), or another order of classes (teacher.class_map) or normalization "
            "(teacher.mean, teacher.std)"
        )
    if problem is not None and config.teacher.check == "error":
        raise ValueError(f"{problem}; teacher.check warn trains all the same")
    if problem is not None:
        say(f"warning: {problem}")
    return score
