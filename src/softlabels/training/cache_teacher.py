"""Fills a teacher cache: the teacher runs once over some draws of the augmentation."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from filelock import FileLock, Timeout
from pydantic import Field
from rich.console import Console
from torch import Tensor

from softlabels.data import Batch, DataSource
from softlabels.distill.answers import Answers, compress, densify, unreadable
from softlabels.distill.cache_folder import VERSION, CacheFolder, Manifest
from softlabels.distill.teacher import Teacher
from softlabels.distill.teacher_cache import TeacherCache
from softlabels.io.console import progress_bar, say
from softlabels.io.files import remove_leftovers
from softlabels.training.build import build_teacher, opened_source
from softlabels.training.config import Config, check_unmixed
from softlabels.training.distributed import from_main, lost_processes, start
from softlabels.training.errors import Interrupted, InterruptGuard, disk_full_as_run_error
from softlabels.training.precision import with_precision
from softlabels.training.run_folder import differences
from softlabels.training.settings import Section
from softlabels.training.validate import check_fingerprints, teacher_fingerprint

__all__ = ["CacheOptions", "answer_error", "build_cache"]


class CacheOptions(Section):
    """Settings of a run, and what of its teacher's answers is stored where.

    --draws, --top and --images-per-file say what is stored; --output is the folder of the cache,
    by default the recipe's teacher.cache.
    """

    draws: int = Field(8, ge=1, description="Draws of the augmentation for each image.")
    top: int = Field(10, ge=1, description="Classes of each answer that are stored exactly.")
    images_per_file: int = Field(65_536, ge=1, description="Images whose answers share a file.")


def build_cache(
    config: Config,
    path: str | Path,
    options: CacheOptions,
    *,
    source: DataSource | None = None,
    teacher: Teacher | None = None,
    console: Console | None = None,
) -> TeacherCache:
    """Store a teacher's answers to every training image, as each draw of the augmentation shows it.

    What was interrupted goes on with the same call: finished files are checked and kept. Under
    torchrun the processes take different files. N images, K draws and k classes take
    N K (4 k + 4) bytes (k (2 + 4) + 4 a view above 32,767 classes), and some 700 bytes a file.

    Args:
        config: Of the run that will use the cache: data, teacher, seed, device and precision.
        path: The folder: new, or with files of the same cache.
        options: K `draws`, which training shows in turn, epoch by epoch; the `top` k classes, 1..C;
            and `images_per_file`, which a process takes at a time and an interruption may lose.
        source: Data in place of those that the settings name.
        teacher: In place of the one that the settings name.
        console: Where progress is shown; None: nowhere.

    Returns:
        The cache.

    Raises:
        ValueError: A setting that does not fit, a folder that holds something else, or logits
            beyond half precision.
        RunError: A full disk, or a lost process.
        Interrupted: A signal came; finished files are kept.
    """
    if teacher is None and config.teacher.name is None:
        raise ValueError("a teacher cache needs a teacher: give teacher.name")
    check_unmixed(config)
    accelerator = start(config)
    console = console if accelerator.is_main_process else None
    with opened_source(config, source) as source:
        info, top = source.info, options.top
        if top > info.num_classes:
            raise ValueError(
                f"top must be in 1..{info.num_classes}, the number of classes, got {top}"
            )
        network = build_teacher(config.teacher, info) if teacher is None else teacher
        if network.mode != "eval":
            raise ValueError(
                "teacher.mode must be eval: in train mode an answer depends on the batch around it"
            )
        config = with_precision(config, network.model, accelerator.device)
        accelerator = start(config)
        if config.channels_last is True:
            network.to(memory_format=torch.channels_last)
        described = partial(
            Manifest,
            version=VERSION,
            num_images=source.num_train,
            num_classes=info.num_classes,
            num_draws=options.draws,
            top=top,
            seed=config.seed,
            images_per_file=options.images_per_file,
            precision=config.precision,
            teacher=config.teacher.name or type(network.model).__name__,
            error={},
        )
        _fill(CacheFolder(path), described, config, source, network, accelerator, console)
        return TeacherCache(path)


def _fill(
    folder: CacheFolder,
    described: Callable[..., Manifest],
    config: Config,
    source: DataSource,
    teacher: Teacher,
    accelerator: Accelerator,
    console: Console | None,
) -> None:
    """Write all files; `described` makes the manifest from its fingerprints."""
    with ExitStack() as stack:
        stack.enter_context(lost_processes(accelerator, config.process_timeout))
        stack.enter_context(disk_full_as_run_error(folder.path, "finished files are whole"))

        def prepared() -> Manifest:
            of_teacher = teacher_fingerprint(teacher, config.teacher, source.info)
            prints = {"teacher": of_teacher, **source.fingerprints()}
            identified = described(fingerprints=prints)
            stack.enter_context(_held(folder, identified))
            return identified

        manifest = from_main(accelerator, prepared)
        teacher = teacher.to(accelerator.device)
        builder = _Builder(folder, manifest, source, teacher, accelerator, console)
        builder.run(batch_size=config.eval_batch_size)
        accelerator.wait_for_everyone()
        from_main(accelerator, partial(_finish, folder, manifest))


@contextmanager
def _held(folder: CacheFolder, manifest: Manifest) -> Iterator[None]:
    """Make the folder or check what it holds, and keep other builders out."""
    path = folder.path
    _check_folder(folder, manifest)
    path.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(path / "cache.lock", timeout=0):
            _check_folder(folder, manifest)  # what another one wrote before it let go
            for part in (path, *path.glob("draw-*")):
                remove_leftovers(part)
            if not folder.manifest.is_file():
                manifest.write(folder.manifest)
            yield
    except Timeout as error:
        raise ValueError(f"{path} is being filled by another process: wait for its end") from error


def _check_folder(folder: CacheFolder, manifest: Manifest) -> None:
    """Raise unless the folder is new, or holds the same cache, finished or not."""
    path = folder.path
    if not folder.manifest.is_file():
        leftovers = {path / "cache.lock", *path.glob(".*.part")}
        if path.exists() and (not path.is_dir() or any(p not in leftovers for p in path.iterdir())):
            raise ValueError(f"{path} exists and is no teacher cache: choose another --output")
        return
    there = folder.read_manifest()
    check_fingerprints(path, there.fingerprints, manifest.fingerprints)
    old, new = (m.model_dump(exclude={"error", "teacher"}) for m in (there, manifest))
    if found := differences(old, new):
        raise ValueError(
            f"{path} holds another cache: {found}; choose another --output, or remove the folder"
        )


def answer_error(logits: Tensor, answers: Answers) -> tuple[Tensor, Tensor]:
    """What is lost of some answers.

    Args:
        logits: [B, C], the teacher's.
        answers: What is stored of them, on the CPU.

    Returns:
        KL(full || stored) at temperature 1, [B] float64, nats; and whether the largest class is
        the same, [B] boolean.
    """
    full = logits.detach().cpu().double()
    dense = densify(answers, full.shape[1]).double()
    expected, got = full.log_softmax(1), dense.log_softmax(1)
    divergence = (expected.exp() * (expected - got)).sum(1)
    return divergence, full.argmax(1) == dense.argmax(1)


@dataclass(frozen=True)
class _Builder:
    """Writes this process' share of the files."""

    folder: CacheFolder
    manifest: Manifest
    source: DataSource
    teacher: Teacher
    accelerator: Accelerator
    console: Console | None

    def run(self, *, batch_size: int) -> None:
        """Write each file that is not there yet, or damaged."""
        manifest = self.manifest
        files = manifest.files[self.accelerator.process_index :: self.accelerator.num_processes]
        with InterruptGuard() as interrupt, progress_bar(self.console) as progress:
            total = sum(len(manifest.images_of(chunk)) for _, chunk in files)
            task = progress.add_task("teacher's answers", total=total, speed="", news="")
            for number, (draw, chunk) in enumerate(files):
                images = manifest.images_of(chunk)
                if self._is_done(draw, chunk):
                    progress.advance(task, len(images))
                    continue
                collected = _Collected(manifest, chunk)
                views = self.source.train_views(
                    draw=(manifest.seed, draw),
                    batch_size=batch_size,
                    start=images.start,
                    stop=images.stop,
                    device=self.accelerator.device,
                )
                for batch in views:
                    collected.add(batch, self._logits(batch))
                    progress.advance(task, len(batch.index))
                    if interrupt.asked:
                        raise Interrupted(
                            f"stopped by a signal; {number} of {len(files)} files are finished in "
                            f"{self.folder.path}: the same command goes on from there",
                            interrupt.asked,
                        )
                self.folder.write(manifest, draw, chunk, collected.answers, collected.error())

    def _is_done(self, draw: int, chunk: int) -> bool:
        if not self.folder.file(draw, chunk).is_file():
            return False
        try:
            self.folder.read(self.manifest, draw, chunk)
        except ValueError as error:
            say(self.console, f"made again: {error}")
            return False
        return True

    def _logits(self, batch: Batch) -> Tensor:
        with self.accelerator.autocast():
            logits: Tensor = self.teacher(batch.images)
        if logits.shape[1] != self.manifest.num_classes:
            raise ValueError(
                f"the teacher has {logits.shape[1]} classes, the data {self.manifest.num_classes}: "
                "give teacher.class_map, the teacher's index of each class of the data"
            )
        return logits.float()


class _Collected:
    """The answers of one file while it is made."""

    def __init__(self, manifest: Manifest, chunk: int) -> None:
        self._images = manifest.images_of(chunk)
        self.answers = unreadable(len(self._images), manifest.num_classes, manifest.top)
        self._divergence = torch.zeros(len(self._images), dtype=torch.float64)
        self._agrees = torch.zeros(len(self._images), dtype=torch.bool)

    def add(self, batch: Batch, logits: Tensor) -> None:
        rows = batch.index - self._images.start
        stored = Answers(*(v.cpu() for v in compress(logits, self.answers.values.shape[1])))
        for kept, value in zip(self.answers, stored, strict=True):
            kept[rows] = value
        self._divergence[rows], self._agrees[rows] = answer_error(logits, stored)

    def error(self) -> dict[str, float]:
        """Sums over the readable images, and how many those were."""
        return {
            "views": int((self.answers.classes[:, 0] >= 0).sum()),
            "kl_sum": float(self._divergence.sum()),
            "kl_max": float(self._divergence.max()),
            "top1_agreements": int(self._agrees.sum()),
        }


def _finish(folder: CacheFolder, manifest: Manifest) -> None:
    """Write the manifest of the finished cache, with the error over all files."""
    of_files = [folder.read_error(manifest, *numbers) for numbers in manifest.files]
    views = sum(error["views"] for error in of_files)
    if not views:
        raise ValueError("none of the training images can be read")
    error = {
        "mean_kl": math.fsum(error["kl_sum"] for error in of_files) / views,
        "max_kl": max(error["kl_max"] for error in of_files),
        "top1_agreement": sum(error["top1_agreements"] for error in of_files) / views,
        "views": views,
        "unreadable": manifest.num_images * manifest.num_draws - views,
    }
    manifest.model_copy(update={"error": error}).write(folder.manifest)
