"""What a run writes while it goes: metrics.jsonl, timings.jsonl, TensorBoard, progress bars."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from torch.utils.tensorboard import SummaryWriter

from softlabels.io.records import Record
from softlabels.training.schemas import Metrics, Timing

__all__ = ["Tracker"]


class _JsonLines:
    """A file of JSON objects, one a line, that can be cut back to an earlier length."""

    def __init__(self, path: Path, length: int) -> None:
        path.touch()
        size = path.stat().st_size
        if size < length:
            warnings.warn(
                f"{path} has {size} bytes, the checkpoint was written after {length}: what is "
                "missing stays missing",
                stacklevel=2,
            )
        if size > length:
            os.truncate(path, length)
        self._file = path.open("a", encoding="utf-8")

    def write(self, line: Record) -> None:
        self._file.write(json.dumps(line.dump()) + "\n")
        self._file.flush()

    def length(self) -> int:
        """Bytes written so far, all of them on the disk."""
        os.fsync(self._file.fileno())
        return os.fstat(self._file.fileno()).st_size

    def close(self) -> None:
        self._file.close()


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

    FILES = ("metrics.jsonl", "timings.jsonl")

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
        self._files: dict[str, _JsonLines] = {}
        self._writer: SummaryWriter | None = None
        if folder is not None:
            self._files = {n: _JsonLines(folder / n, lengths.get(n, 0)) for n in self.FILES}
            self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step)
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[speed]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[news]}"),
            console=console or Console(quiet=True),
            disable=console is None,
        )
        self._task: TaskID = self._progress.add_task(
            label, total=total_steps, completed=first_step, speed="", news=""
        )

    def __enter__(self) -> Tracker:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()
        if self._writer is not None:
            self._writer.close()
        for file in self._files.values():
            file.close()

    def lengths(self) -> dict[str, int]:
        """Bytes of each file so far, for a checkpoint."""
        return {name: file.length() for name, file in self._files.items()}

    def metrics(self, epoch: int, step: int, values: Mapping[str, float]) -> None:
        """Write scalars that a repetition of the run gives again.

        Args:
            epoch: Finished epochs for an evaluation, else the running one, from 0.
            step: Optimizer steps so far.
            values: By `split/name`.
        """
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
        self._files[name].write(line)
        for curve, value in curves.items():
            self._writer.add_scalar(curve, value, step)

    def advance(self, steps: int = 1, speed: str | None = None, news: str | None = None) -> None:
        """Move the bar; `speed` and `news` are shown beside it."""
        fields = {"speed": speed, "news": news}
        shown: dict[str, Any] = {name: text for name, text in fields.items() if text is not None}
        self._progress.update(self._task, advance=steps, **shown)
