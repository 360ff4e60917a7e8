"""One run, from a configuration to a folder with everything in it."""

from __future__ import annotations

import resource
import statistics
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from rich.console import Console
from torch import nn

from softlabels.data import DataInfo, DataSource
from softlabels.data.randomness import derive_seed
from softlabels.distill.distiller import Distiller
from softlabels.distill.teacher_cache import TeacherCache
from softlabels.io.console import say
from softlabels.io.records import read_lines
from softlabels.losses import Method
from softlabels.models import FileRecord, model_metadata
from softlabels.training.build import (
    build_distiller,
    build_teacher,
    opened_source,
    with_defaults,
    with_findings,
)
from softlabels.training.checkpoint import Progress, restore
from softlabels.training.compilation import compiled_method, compiles_method
from softlabels.training.config import Config, with_object
from softlabels.training.distributed import from_main, lost_processes, start
from softlabels.training.engine import Engine
from softlabels.training.errors import (
    Interrupted,
    InterruptGuard,
    NonFiniteLossError,
    disk_full_as_run_error,
)
from softlabels.training.observers import Observer, Recorder, Tracker, TrainedRun, infinite_parts
from softlabels.training.optim import build_optimizer, build_schedule
from softlabels.training.precise_bn import check_precise_bn
from softlabels.training.precision import describe_precision, with_precision
from softlabels.training.run_folder import RunFolder, as_begun, content_of, environment
from softlabels.training.schemas import (
    Failure,
    NamedScore,
    Summary,
    TeacherScore,
    Timing,
)
from softlabels.training.settings import NoMethod, TeacherSettings
from softlabels.training.task import ClassificationTask
from softlabels.training.teacher_check import checked_teacher
from softlabels.training.validate import check_cache, check_needs

__all__ = ["TrainResult", "peak_memory", "run"]


@dataclass(frozen=True)
class TrainResult:
    """What a finished run gives.

    Attributes:
        folder: Everything that was written.
        final: Metrics after the last epoch, by name.
        best: Metrics of the epoch that is best by the task's metric, and `epoch`.
        student: The plain trained network, on the CPU, in eval mode.
    """

    folder: Path
    final: dict[str, float]
    best: dict[str, float]
    student: nn.Module


def run(
    config: Config,
    *,
    student: nn.Module | None = None,
    teacher: nn.Module | None = None,
    method: Method | None = None,
    source: DataSource | None = None,
    observers: Sequence[Observer] = (),
    console: Console | None = None,
) -> TrainResult:
    """Train as a configuration says, or go on where an earlier call stopped.

    With `generations`, each earlier one has a folder inside of the run's, `generation-1` and so
    on, with a seed of its own.

    Args:
        config: The settings.
        student: A network to train in place of the one that the settings name.
        teacher: Likewise.
        method: Likewise.
        source: Data in place of those that the settings name.
        observers: Told of the run as it goes; of several generations, of each.
        console: Where progress is shown; None: nowhere.

    Raises:
        ValueError: Anything that does not fit, before the first step.
        RunError: The run failed on its way: `NonFiniteLossError`, a full disk, a lost process.
        Interrupted: The user asked to stop; the state is stored.
    """
    if method is not None:
        config = with_object(config, method)
    if config.generations > 1 and (student is not None or teacher is not None):
        raise ValueError(
            f"generations {config.generations}: each begins with a new student that the last "
            "one teaches, so student must be a name and teacher none"
        )
    one = partial(_run_one, observers=observers, console=console)
    if config.generations > 1:
        with opened_source(config, source) as source:
            return _run_generations(config, method, source, partial(one, source=source))
    return one(config, student, teacher, method, source=source)


def _run_generations(
    config: Config,
    method: Method | None,
    source: DataSource,
    run_one: Callable[[Config, None, nn.Module | None, Method | None], TrainResult],
) -> TrainResult:
    config = with_defaults(config, source.info, source.num_train, method)
    config = _with_output(config, source.info)
    # The first one has no teacher, and so no method.
    untaught = {
        "method": NoMethod(),
        "further_methods": (),
        "method_weight": 1.0,
        "method_warmup_epochs": 0.0,
        "task": config.task.model_copy(update={"weight": 1.0}),
    }
    taught_by = config.teacher
    for number in range(1, config.generations):
        # A run of its own, that its own record repeats.
        changed = {
            "output": str(Path(config.output or "") / f"generation-{number}"),
            "seed": derive_seed(config.seed, "generation", number),
            "generations": 1,
            "teacher": taught_by,
            **(untaught if number == 1 else {}),
        }
        own = config.model_copy(update=changed)
        result = run_one(own, None, None, None if number == 1 else method)
        taught_by = TeacherSettings(name=f"file:{RunFolder(result.folder).student}")
    return run_one(config, None, build_teacher(taught_by, source.info), method)


def _run_one(
    config: Config,
    student: nn.Module | None,
    teacher: nn.Module | None,
    method: Method | None,
    *,
    source: DataSource | None,
    observers: Sequence[Observer],
    console: Console | None,
) -> TrainResult:
    accelerator = start(config)
    _check_processes(config, accelerator)
    console = console if accelerator.is_main_process else None
    with opened_source(config, source) as source, ExitStack() as stack:
        config = with_defaults(config, source.info, source.num_train, method)
        distiller = build_distiller(
            config, source.info, student=student, teacher=teacher, method=method
        ).to(accelerator.device)
        check_needs(config, distiller, source, accelerator.num_processes)
        prepare = getattr(source, "prepare", None)  # a source of one's own may have none
        if prepare is not None:
            prepare(console)
        config = with_findings(config, source)
        config = _with_output(config, source.info)
        folder = RunFolder(Path(config.output or ""))
        # The folder is the main process' alone: others may be on machines without it.
        config = as_begun(config, from_main(accelerator, folder.decided))
        config = with_precision(config, distiller.trainable, accelerator.device)
        accelerator = start(config)
        cache = distiller.teacher
        if isinstance(cache, TeacherCache):
            from_main(accelerator, lambda: check_cache(cache, config, source))
        if config.precise_bn is not None:
            check_precise_bn(distiller.student)
        if config.channels_last is True:
            distiller.to(memory_format=torch.channels_last)
        stack.enter_context(lost_processes(accelerator, config.process_timeout))
        stack.enter_context(disk_full_as_run_error(folder.path))
        data = from_main(accelerator, lambda: content_of(source))
        from_main(accelerator, lambda: folder.check(config, data))
        score = checked_teacher(
            config,
            distiller,
            source,
            accelerator,
            known=from_main(accelerator, lambda: TeacherScore.found(folder.teacher)),
            say=partial(say, console),
        )
        from_main(accelerator, lambda: stack.enter_context(folder.held(config, data)))
        return _fit(config, distiller, source, accelerator, folder, score, observers, console)


def _check_processes(config: Config, accelerator: Accelerator) -> None:
    num_processes, num_parts = accelerator.num_processes, config.grad_accum_steps
    if config.batch_size % (num_processes * num_parts):
        raise ValueError(
            f"batch_size {config.batch_size} must be a multiple of processes * grad_accum_steps = "
            f"{num_processes} * {num_parts}"
        )
    kind = accelerator.distributed_type
    if kind in (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise ValueError(
            f"the trainer holds the whole student in each process (DDP), got {kind.value}: start "
            "it with torchrun; docs/scaling.md shows a loop of your own for sharded students"
        )


def _with_output(config: Config, info: DataInfo) -> Config:
    if config.output is not None:
        return config
    student = (config.student.name or "").rpartition(":")[2].replace("/", "_")
    name = f"{info.name}-{student}-{config.label}-{config.seed}"
    return config.model_copy(update={"output": str(Path("runs") / name)})


def _fit(
    config: Config,
    distiller: Distiller,
    source: DataSource,
    accelerator: Accelerator,
    folder: RunFolder,
    teacher: TeacherScore | None,
    observers: Sequence[Observer],
    console: Console | None,
) -> TrainResult:
    torch.manual_seed(derive_seed(config.seed, "run"))
    info, label = source.info, config.label
    optimizer = build_optimizer(config.optimizer, distiller.trainable)
    schedule = build_schedule(
        config.schedule,
        optimizer,
        epochs=config.epochs,
        steps_per_epoch=source.steps_per_epoch(config.batch_size),
    )
    record = FileRecord(
        model=config.student.name or "",
        num_classes=info.num_classes,
        in_channels=info.in_channels,
        image_size=info.image_size,
        settings=config.student.settings,
        mean=info.mean,
        std=info.std,
        class_names=info.class_names,
        crop_fraction=info.crop_fraction,
        interpolation=info.interpolation,
    )
    engine = Engine(
        distiller,
        optimizer,
        schedule,
        source,
        accelerator,
        config,
        ClassificationTask(config, info, distiller.extras),
    )
    infinite = infinite_parts(engine)  # masks; before a checkpoint is read, which may be anybody's
    progress = _resumed(engine, folder, console)
    if accelerator.is_main_process:
        folder.write_environment(environment(config, accelerator.device, accelerator.num_processes))
        if teacher is not None:
            teacher.write(folder.teacher)
    plan = f"{config.student.name}, {config.epochs} epochs, seed {config.seed}"
    say(console, f"{label}: {plan}, {describe_precision(config)} -> {folder.path}")
    for key, reason in config.assumed.items():
        say(console, f"assumed {key}: {reason}")
    remembered = sum(memory.num_bytes() for memory in distiller.memories())
    remembered *= 1 if engine.ema is None else 2
    if remembered:
        say(console, f"{label} keeps {remembered / 2**20:,.1f} MiB in each process for its method")
    with (
        InterruptGuard() as interrupt,
        Tracker(
            folder.path if accelerator.is_main_process else None,
            progress.lengths,
            total_steps=config.epochs * engine.steps_per_epoch,
            console=console,
            label=label,
            first_step=engine.step,
        ) as tracker,
    ):
        recorder = Recorder(engine, tracker, folder, model_metadata(record), progress, infinite)
        compiles = compiles_method(config, accelerator.device)
        try:
            with compiled_method(distiller.method if compiles else None, partial(say, console)):
                engine.fit([recorder, *observers], interrupt)
        except Interrupted as error:
            raise Interrupted(
                f"stopped by a signal after step {engine.step}, in epoch "
                f"{engine.finished_epochs + 1} of {config.epochs}; all is stored in {folder.path}: "
                "the same command goes on from there",
                error.number,
            ) from error
        except NonFiniteLossError as error:
            if accelerator.is_main_process:
                Failure(error=str(error), **vars(error)).write(folder.failure)
            raise
    progress = recorder.progress
    if accelerator.is_main_process:
        memory = peak_memory(accelerator.device)  # of the training, not of what follows
        trained = TrainedRun(config, engine, folder)
        for observer in observers:
            observer.trained(trained)
        seconds = [line.seconds for line in read_lines(folder.timings, Timing)]
        skipped = len(getattr(source, "skipped", {}))
        Summary(
            label=label,
            method=None if config.method.kind == "none" else config.method.kind,
            model=config.student.name,
            teacher=None if teacher is None else NamedScore(name=teacher.name, top1=teacher.top1),
            data=info.name,
            test_images=source.num_test,
            seed=config.seed,
            epochs=config.epochs,
            final=progress.final,
            best=progress.best,
            seconds=progress.seconds,
            seconds_per_epoch=statistics.median(seconds) if seconds else None,
            peak_memory=memory,
            parameters=sum(p.numel() for p in distiller.student.parameters()),
            assumed=config.assumed,
            skipped_images=skipped,
            complete=True,
        ).write(folder.summary)
        for observer in observers:
            observer.completed(trained)
        if skipped:
            name = folder.skipped_images.name
            say(console, f"{skipped} unreadable images were left out: {name} names them")
    accelerator.wait_for_everyone()
    exported = engine.distiller.export() if engine.ema is None else engine.network
    exported = exported.cpu().to(memory_format=torch.contiguous_format).eval()
    return TrainResult(folder.path, progress.final, progress.best, exported)


def _resumed(engine: Engine, folder: RunFolder, console: Console | None) -> Progress:
    """Bring the engine to where the newest checkpoint was written, if there is one."""
    checkpoints = folder.checkpoints(engine.config.checkpoint.keep)
    found = from_main(engine.accelerator, checkpoints.newest)
    for problem in found.damaged:
        say(console, f"a checkpoint is left out: {problem}")
    if found.content is None:
        return Progress()
    progress = Progress.of(restore(found.content, engine.stateful))
    within = progress.step - progress.finished_epochs * engine.steps_per_epoch
    if progress.finished_epochs > engine.config.epochs or not 0 <= within <= engine.steps_per_epoch:
        raise ValueError(
            f"{found.name} is no checkpoint of this run: step {progress.step} with "
            f"{progress.finished_epochs} epochs done does not fit {engine.steps_per_epoch} steps "
            "an epoch"
        )
    engine.step, engine.finished_epochs = progress.step, progress.finished_epochs
    engine.schedule.step_update(engine.step)
    say(
        console,
        f"going on after step {engine.step}, with {engine.finished_epochs} of "
        f"{engine.config.epochs} epochs done, from {found.name}",
    )
    return progress


def peak_memory(device: torch.device) -> int:
    """The most memory that this process has had so far, bytes.

    Args:
        device: A CUDA device: what tensors took there; else the process' largest resident size.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size if sys.platform == "darwin" else 1024 * size
