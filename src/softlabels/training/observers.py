"""Who is told of a run as it goes, and what is written down of it: metrics, times, weights."""

from __future__ import annotations

import json
import math
import os
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from accelerate.utils import gather_object
from rich.console import Console
from torch.utils.tensorboard import SummaryWriter

from softlabels.io.console import progress_bar
from softlabels.io.files import write_json
from softlabels.io.records import Record
from softlabels.io.weights import not_finite, save_weights
from softlabels.training.checkpoint import Progress, state_of
from softlabels.training.config import Config
from softlabels.training.errors import NonFiniteLossError
from softlabels.training.run_folder import RunFolder
from softlabels.training.schemas import Metrics, Timing

if TYPE_CHECKING:
    from softlabels.training.engine import Engine

__all__ = ["Observer", "Recorder", "Tracker", "TrainedRun", "infinite_parts"]


@dataclass(frozen=True)
class TrainedRun:
    """A run after its last epoch.

    Attributes:
        config: Its settings.
        engine: Has the trained network, the data and the device.
        folder: Where its files are.
    """

    config: Config
    engine: Engine
    folder: RunFolder


class Observer:
    """Who is told of a run; each of the methods does nothing here.

    `step`, `epoch` and `store` are called on every process, the others on the first one alone.
    """

    def step(
        self, epoch: int, step: int, images: int, seconds: float, scalars: dict[str, float]
    ) -> None:
        """A step is done; `scalars` is not empty at every `log_every`-th."""

    def epoch(self, epoch: int, step: int, scalars: dict[str, float]) -> None:
        """So many epochs are trained; `scalars` is empty if the last was not evaluated."""

    def store(self) -> None:
        """The state is to be written down, so that the run can go on from here."""

    def trained(self, run: TrainedRun) -> None:
        """The last epoch is done; after this the summary calls the run complete."""

    def completed(self, run: TrainedRun) -> None:
        """All of the run's own files are written."""


@dataclass
class Recorder(Observer):
    """Writes down what the engine tells, and stores weights and checkpoints.

    Args:
        engine: Whose states are stored.
        tracker: Where scalars and progress go.
        folder: The run's.
        metadata: Header of the student's file.
        progress: Where the run goes on from; the attribute of this name tells how far it is.
        infinite_before: `infinite_parts` of the network as it was built.
    """

    engine: Engine
    tracker: Tracker
    folder: RunFolder
    metadata: Mapping[str, str]
    progress: Progress
    infinite_before: set[str]

    def __post_init__(self) -> None:
        self._since, self._images = time.perf_counter(), 0

    def step(
        self, epoch: int, step: int, images: int, seconds: float, scalars: dict[str, float]
    ) -> None:
        """Take down a step."""
        images *= self.engine.accelerator.num_processes
        before_seconds, before_images = self.progress.of_epoch
        self._progressed(of_epoch=(before_seconds + seconds, before_images + images))
        self._images += images
        self.tracker.advance()
        now = time.perf_counter()
        if now - self._since > 1:
            speed = f"{self._images / (now - self._since):,.0f} images/s"
            self.tracker.advance(0, speed=speed)
            self._since, self._images = now, 0
        if scalars:
            self.tracker.metrics(epoch, step, scalars)

    def epoch(self, epoch: int, step: int, scalars: dict[str, float]) -> None:
        """Take down an epoch, and store the student."""
        self._check_weights()
        progress, task = self.progress, self.engine.task
        seconds, images = progress.of_epoch
        final, improved = progress.final, False
        if scalars:
            self.tracker.metrics(epoch, step, scalars)
            final = {name.removeprefix("eval/"): value for name, value in scalars.items()}
            improved = final[task.metric] > progress.best.get(task.metric, -math.inf)
            self.tracker.advance(0, news=f"epoch {epoch}: {task.headline(final)}")
        self.tracker.timing(epoch, step, seconds, images / seconds if seconds else 0.0)
        self._progressed(
            final=final,
            best={**final, "epoch": epoch} if improved else progress.best,
            seconds=progress.seconds + seconds,
            of_epoch=(0.0, 0),
        )
        # What some process could not read, with the reasons.
        by_process = gather_object([dict(getattr(self.engine.source, "skipped", {}))])
        skipped = {path: why for found in by_process for path, why in sorted(found.items())}
        if self.engine.accelerator.is_main_process:
            save_weights(self.engine.network, self.folder.student, metadata=self.metadata)
            if improved:
                save_weights(self.engine.network, self.folder.best_student, metadata=self.metadata)
            if skipped:
                write_json(self.folder.skipped_images, skipped)
        self._since, self._images = time.perf_counter(), 0

    def _check_weights(self) -> None:
        """Make sure that what is stored can be gone on with: a loss may be finite all the same."""
        by_process = gather_object([infinite_parts(self.engine)])
        bad = sorted({name for names in by_process for name in names} - self.infinite_before)
        if bad:
            more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
            raise NonFiniteLossError(
                f"the loss is finite, but {bad[0]}{more} of the network is not, after step "
                f"{self.engine.step}; try a smaller learning rate or other images. The last "
                "checkpoint is from before",
                self.engine.step,
                bad,
            )

    def store(self) -> None:
        """Store a checkpoint."""
        engine = self.engine
        self._progressed(
            step=engine.step,
            finished_epochs=engine.finished_epochs,
            lengths=self.tracker.lengths(),
        )
        # On every process: this looks at the losses since the last line, which tell more than
        # the weights do.
        state = state_of(self.progress.model_dump(), engine.stateful)
        self._check_weights()
        if engine.accelerator.is_main_process:
            self.folder.checkpoints(engine.config.checkpoint.keep).save(engine.step, state)
        engine.accelerator.wait_for_everyone()

    def _progressed(self, **changes: Any) -> None:
        self.progress = self.progress.model_copy(update=changes)


def infinite_parts(engine: Engine) -> set[str]:
    """Names of what is not finite in the trained network, and in the averaged one."""
    names = {*not_finite(engine.core.state_dict())}
    if engine.ema is not None:
        names |= {f"ema.{name}" for name in not_finite(engine.ema.module.state_dict())}
    return names


def _opened(path: Path, length: int) -> TextIO:
    """A file of lines, cut back to an earlier length, that is written on."""
    file = path.open("a", encoding="utf-8", buffering=1)
    size = _length(file)
    if size < length:
        warnings.warn(
            f"{path} has {size} bytes, the checkpoint was written after {length}: what is missing "
            "stays missing",
            stacklevel=2,
        )
    if size > length:
        os.truncate(path, length)
    return file


def _length(file: TextIO) -> int:
    """Bytes written so far, all of them on the disk."""
    os.fsync(file.fileno())
    return os.fstat(file.fileno()).st_size


class Tracker:
    """Writes scalars to files and shows how far the run is; silent on all but one process.

    `metrics.jsonl` holds what a run with the same configuration gives again; times go to
    `timings.jsonl`.

    Args:
        folder: The run's folder; None: nothing is written (another process writes).
        lengths: Bytes of each file that are kept, from a checkpoint; {} starts anew.
        total_steps: Of the whole run.
        console: Where progress is shown; None: nowhere.
        label: Name of the run beside its bar.
    """

    def __init__(
        self,
        folder: Path | None,
        lengths: Mapping[str, int],
        *,
        total_steps: int,
        console: Console | None,
        label: str,
        first_step: int = 0,
    ) -> None:
        self._files: dict[str, TextIO] = {}
        self._writer: SummaryWriter | None = None
        if folder is not None:
            for name in ("metrics.jsonl", "timings.jsonl"):
                self._files[name] = _opened(folder / name, lengths.get(name, 0))
            self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step)
        self._progress = progress_bar(console)
        self._task = self._progress.add_task(
            label, total=total_steps, completed=first_step, speed="", news=""
        )

    def __enter__(self) -> Tracker:
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()
        if self._writer is not None:
            self._writer.close()
        for file in self._files.values():
            file.close()

    def lengths(self) -> dict[str, int]:
        """Bytes of each file so far, for a checkpoint."""
        return {name: _length(file) for name, file in self._files.items()}

    def metrics(self, epoch: int, step: int, values: Mapping[str, float]) -> None:
        """Write scalars that a repetition of the run gives again; see `Metrics`."""
        line = Metrics.model_validate({"epoch": epoch, "step": step, **values})
        self._write("metrics.jsonl", line, step, values)

    def timing(self, epoch: int, step: int, seconds: float, images_per_second: float) -> None:
        """Write how long an epoch's training took."""
        line = Timing(epoch=epoch, seconds=seconds, images_per_second=images_per_second)
        curve = {"time/images_per_second": images_per_second}
        self._write("timings.jsonl", line, step, curve)

    def _write(self, name: str, line: Record, step: int, curves: Mapping[str, float]) -> None:
        if self._writer is None:
            return
        self._files[name].write(json.dumps(line.dump()) + "\n")
        for curve, value in curves.items():
            self._writer.add_scalar(curve, value, step)

    def advance(self, steps: int = 1, **shown: str) -> None:
        """Move the bar; the texts `speed` and `news` are shown beside it."""
        fields: dict[str, Any] = dict(shown)
        self._progress.update(self._task, advance=steps, **fields)
