"""Plans many runs, each once, and launches them, each in processes of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from hashlib import blake2b
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from softlabels.io.console import say
from softlabels.io.files import write_text
from softlabels.training.config import Config, dump
from softlabels.training.errors import RunError
from softlabels.training.run_folder import RunFolder, fixed_settings

__all__ = ["PlannedRun", "RunPlan", "launch_runs"]

_SECONDS_TO_AN_ESTIMATE = 20
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


class RunPlan:
    """Runs below one folder; equal settings and seed are one run, whoever asks for it.

    A run's folder is `STUDENT-LABEL-HASH/seed-SEED`, with a hash of its resolved settings. What was
    complete before is found there again, and a changed setting leads elsewhere.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._runs: dict[Path, PlannedRun] = {}
        self._rounds: dict[Path, int] = {}

    def add(
        self, name: str, config: Config, seed: int, *, taught_by: PlannedRun | None = None
    ) -> PlannedRun:
        """Plan a run, if it is not planned yet; seed, output and a planned teacher are set here."""
        values = config.model_copy(update={"seed": 0})
        by: str | None = None
        if taught_by is not None:
            weights = {"weights": str(taught_by.folder.student)}
            config = config.model_copy(
                update={"teacher": config.teacher.model_copy(update=weights)}
            )
            # The folder is named by what decides the teacher, not by where it lies.
            by = str(taught_by.folder.path.relative_to(self._folder))
        folder = self._folder / _folder_name(values, by) / f"seed-{seed}"
        if folder not in self._runs:
            config = config.model_copy(update={"seed": seed, "output": str(folder)})
            file = folder.with_suffix(".yaml")
            file.parent.mkdir(parents=True, exist_ok=True)
            write_text(file, dump(config))
            self._runs[folder] = PlannedRun(name, config, (str(file),))
            before = -1 if taught_by is None else self._rounds[taught_by.folder.path]
            self._rounds[folder] = before + 1
        return self._runs[folder]

    @property
    def rounds(self) -> list[list[PlannedRun]]:
        """All runs: first those without a planned teacher, then those that these teach, ..."""
        numbers = range(max(self._rounds.values(), default=-1) + 1)
        return [
            [run for folder, run in self._runs.items() if self._rounds[folder] == number]
            for number in numbers
        ]


def _folder_name(config: Config, taught_by: str | None) -> str:
    """A folder's name: student, label, and a hash of what decides the numbers."""
    values = fixed_settings(config)
    if taught_by is not None:
        values["teacher"]["weights"] = taught_by
    text = json.dumps(values, sort_keys=True, default=str)
    digest = blake2b(text.encode(), digest_size=4).hexdigest()
    student = (config.student.name or "default").rpartition(":")[2].replace("/", "_")
    return f"{student}-{config.label}-{digest}"


def launch_runs(
    *rounds: Sequence[PlannedRun],
    jobs: int,
    console: Console,
    threads: int | None = None,
    processes: int = 1,
) -> None:
    """Train what is not complete yet, with a bar for each run at work and one for all together.

    Runs with a teacher take longest and come first in their round, so that none is left alone at
    the end.

    Args:
        rounds: Runs in folders that differ; those of a round start when the round before is
            complete.
        jobs: Runs at a time.
        console: Where progress is shown.
        threads: CPU threads of each process; None: its share of the cores, or torch's choice for
            one run at a time.
        processes: Of each run; more than 1 are started with torchrun.

    Raises:
        RunError: A run failed; the message ends with its last line. The others are stopped, and
            go on from there the next time.
    """
    complete = [run for runs in rounds for run in runs if run.folder.is_complete()]
    waiting = [
        sorted(
            (run for run in runs if run not in complete),
            key=lambda run: run.config.teacher.name is None,
        )
        for runs in rounds
    ]
    if complete:
        say(console, f"complete already: {', '.join(run.name for run in complete)}")
    if not any(waiting):
        return
    if threads is None and jobs > 1:
        threads = max(1, _num_cores() // (jobs * processes))
    columns = (
        TextColumn("{task.description:14}"),
        BarColumn(),
        TextColumn("{task.fields[news]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:
        _train(waiting, progress, jobs, threads, processes)


@dataclass
class _Running:
    """A run's process and its bar."""

    run: PlannedRun
    process: subprocess.Popen[bytes]
    task: TaskID
    since: float = field(default_factory=time.perf_counter)
    done: float = 0.0

    @property
    def is_at_work(self) -> bool:
        """Whether it had not ended when it was looked at."""
        return self.process.returncode is None


def _train(
    rounds: Sequence[list[PlannedRun]],
    progress: Progress,
    jobs: int,
    threads: int | None,
    processes: int,
) -> None:
    count = sum(map(len, rounds))
    total = sum(run.config.epochs for runs in rounds for run in runs)
    overall, since = progress.add_task("all runs", total=total, news=""), time.perf_counter()
    begun: tuple[float, float] | None = None  # when the first steps were seen, and how many epochs
    told = False
    started: list[_Running] = []
    try:
        for runs in rounds:
            while runs or any(one.is_at_work for one in started):
                free = jobs - sum(one.is_at_work for one in started)
                for run in runs[:free]:
                    task = progress.add_task(run.name, total=run.config.epochs, news="starts")
                    started.append(_Running(run, _launched(run, threads, processes), task))
                del runs[:free]
                time.sleep(_SECONDS_BETWEEN_LOOKS)
                _look(progress, [one for one in started if one.is_at_work])
                # What is left takes as long as it did so far, without the start of the programs.
                done = sum(one.done for one in started)
                news = f"{sum(not one.is_at_work for one in started)} of {count}"
                now = time.perf_counter()
                begun = begun or ((now, done) if done else None)
                if begun and done > begun[1]:
                    left = (now - begun[0]) * (total - done) / (done - begun[1])
                    news += f", {timedelta(seconds=round(left))} left"
                    passed = now - since
                    if not told and passed > _SECONDS_TO_AN_ESTIMATE:
                        told = True  # a line too, where no bar is shown
                        whole = timedelta(seconds=round(passed + left))
                        say(progress.console, f"{count} runs: about {whole} in all")
                progress.update(overall, completed=done, news=news)
    finally:
        for one in started:
            one.process.terminate()
        for one in started:
            one.process.wait()


def _num_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _launched(run: PlannedRun, threads: int | None, processes: int) -> subprocess.Popen[bytes]:
    limited = () if threads is None else ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
    command = [sys.executable, "-m"]
    if processes > 1:
        command += ["torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", "-m"]
    command += ["softlabels", "train", *run.arguments, "--output", str(run.folder.path)]
    run.log.parent.mkdir(parents=True, exist_ok=True)
    with run.log.open("wb") as file:
        environment = os.environ | dict.fromkeys(limited, str(threads))
        return subprocess.Popen(command, stdout=file, stderr=file, env=environment)


def _look(progress: Progress, running: Sequence[_Running]) -> None:
    """Show how far runs are; those that have ended get a line in place of their bar.

    Raises:
        RunError: One has failed.
    """
    for one in running:
        status = one.process.poll()
        news = _show(progress, one)
        if status:
            raise RunError(_failure(one.run, status))
        if status == 0:
            progress.remove_task(one.task)
            seconds = time.perf_counter() - one.since
            say(progress.console, f"{one.run.name}: {news}, {seconds:.0f} s")


def _show(progress: Progress, one: _Running) -> str:
    """Move a bar to what the run's own log says, and give that in words."""
    lines = _lines(one.run.folder.path / "metrics.jsonl")
    evaluated = [line for line in lines if "eval/top1" in line]
    news = f"top-1 {evaluated[-1]['eval/top1']:.1f} %" if evaluated else "starts"
    if lines:  # a line of training is from within its epoch
        one.done = lines[-1]["epoch"] + (0 if "eval/top1" in lines[-1] else 0.5)
    progress.update(one.task, completed=one.done, news=news)
    return news


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
