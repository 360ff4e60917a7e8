"""Several runs, each in processes of its own, some at a time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from softlabels.training.config import Config
from softlabels.training.folder import RunFolder
from softlabels.training.guards import RunError

__all__ = ["PlannedRun", "train_several"]

_SECONDS_BETWEEN_LOOKS = 0.3


@dataclass(frozen=True)
class PlannedRun:
    """A run that is to be complete.

    Attributes:
        name: What is shown of it.
        config: Its settings, with `output`.
        arguments: What follows `softlabels train` on the command line, without `--output`.
    """

    name: str
    config: Config
    arguments: tuple[str, ...]

    @property
    def folder(self) -> RunFolder:
        """Where the run is."""
        return RunFolder(Path(self.config.output or ""))

    @property
    def log(self) -> Path:
        """What its process prints."""
        return self.folder.path.with_name(f"{self.folder.path.name}.log")


def train_several(
    runs: Sequence[PlannedRun],
    *,
    jobs: int,
    console: Console,
    threads: int | None = None,
    processes: int = 1,
) -> None:
    """Train what is not complete yet, with a bar for each run.

    Runs with a teacher take longest and come first, so that none is left alone at the end.

    Args:
        runs: In folders that differ.
        jobs: Runs at a time.
        console: Where progress is shown.
        threads: CPU threads of each process; None: torch's choice.
        processes: Of each run; more than 1 are started with torchrun.

    Raises:
        RunError: A run failed; the message ends with its last line. The others are stopped, and
            go on from there the next time.
    """
    waiting = sorted(
        (run for run in runs if not run.folder.is_complete()),
        key=lambda run: run.config.teacher.name is None,
    )
    complete = [run for run in runs if run not in waiting]
    if complete:
        console.print(
            f"complete already: {', '.join(run.name for run in complete)}",
            highlight=False,
            soft_wrap=True,
        )
    running: list[tuple[PlannedRun, subprocess.Popen[bytes]]] = []
    columns = (TextColumn("{task.description:14}"), BarColumn(), TextColumn("{task.fields[news]}"))
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        tasks = {
            run.log: progress.add_task(run.name, total=run.config.epochs, news="waits", start=False)
            for run in runs
        }
        for run in complete:
            progress.update(tasks[run.log], completed=run.config.epochs, news="complete")
        try:
            while waiting or running:
                while waiting and len(running) < jobs:
                    run = waiting.pop(0)
                    running.append((run, _started(run, threads, processes)))
                    progress.start_task(tasks[run.log])
                time.sleep(_SECONDS_BETWEEN_LOOKS)
                for run, process in list(running):
                    _show(progress, tasks[run.log], run)
                    if process.poll() is not None:
                        running.remove((run, process))
                        if process.returncode:
                            raise RunError(_failure(run, process.returncode))
                        progress.stop_task(tasks[run.log])
        finally:
            for _, process in running:
                process.terminate()
            for _, process in running:
                process.wait()


def _started(run: PlannedRun, threads: int | None, processes: int) -> subprocess.Popen[bytes]:
    limit = (
        {} if threads is None else dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), threads)
    )
    command = [sys.executable, "-m"]
    if processes > 1:
        command += ["torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", "-m"]
    command += ["softlabels", "train", *run.arguments, "--output", str(run.folder.path)]
    run.log.parent.mkdir(parents=True, exist_ok=True)
    with run.log.open("wb") as file:
        return subprocess.Popen(
            command,
            stdout=file,
            stderr=file,
            env={**os.environ, **{name: str(value) for name, value in limit.items()}},
        )


def _show(progress: Progress, task: TaskID, run: PlannedRun) -> None:
    """Move a bar to what the run's own log says."""
    lines = _lines(run.folder.path / "metrics.jsonl")
    evaluated = [line for line in lines if "eval/top1" in line]
    news = f"top-1 {evaluated[-1]['eval/top1']:5.1f} %" if evaluated else "starts"
    done = evaluated[-1]["epoch"] if evaluated else 0
    since = [line for line in lines if line.get("epoch") == done and "train/loss" in line]
    begun = bool(since) and done < run.config.epochs
    progress.update(task, completed=done + (0.5 if begun else 0), news=news)


def _lines(path: Path) -> list[dict[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError:
        return []
    whole = text[: text.rfind("\n") + 1]  # the last line may be half written
    return [json.loads(line) for line in whole.splitlines()]


def _failure(run: PlannedRun, status: int) -> str:
    text = run.log.read_text(encoding="utf-8", errors="replace").strip()
    lines = [line for line in text.splitlines() if line.strip()] or ["no output"]
    told = [line for line in lines if line.startswith("softlabels ")]  # not torchrun's words
    last = (told or lines)[-1]
    return f"the run {run.name} ended with status {status}: {last} (all of it: {run.log})"
