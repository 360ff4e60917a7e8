"""The demo: one small student, trained four ways on the embedded data, and a report."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from softlabels.data import Batch, DataSource
from softlabels.distiller import Distiller
from softlabels.report import write_report
from softlabels.training.assemble import (
    build_distiller,
    build_optimizer,
    build_source,
    with_defaults,
)
from softlabels.training.config import Config, load_recipe, resolve
from softlabels.training.folder import RunFolder
from softlabels.training.guards import RunError
from softlabels.training.timing import Ratio, interleaved, ratio

__all__ = ["RECIPES", "run_demo", "step_ratios"]

RECIPES = ("cross_entropy", "zipf_ls", "uskd", "nkd")
_DATA_NOTE = (
    "glyphs100 is rendered text (100 accented Latin letters in 319 open fonts, 32x32 gray), not "
    "natural images."
)


def run_demo(
    output: Path,
    *,
    epochs: int,
    seed: int,
    jobs: int,
    rounds: int,
    console: Console,
    num_fonts: int | None = None,
) -> Path:
    """Train the four runs, time their steps, write the table and the report.

    Runs that are complete in `output` are not trained again.

    Args:
        output: Folder of everything.
        epochs: Passes over the training set.
        seed: Of all runs.
        jobs: Runs at a time, one thread each.
        rounds: Of the interleaved step times.
        console: Where progress and the table are shown.
        num_fonts: Train on so many fonts only, for a quick look; None: all.

    Returns:
        The report's path.

    Raises:
        ValueError: `output` holds runs of other settings.
        RunError: A run failed; the message ends with its last line.
    """
    options: dict[str, Any] = {"epochs": epochs, "seed": seed, "threads": 1}
    if num_fonts is not None:
        options["data.num_fonts"] = num_fonts
    configs = {name: _config(name, output, options) for name in RECIPES}
    command = _command_line(epochs, seed, num_fonts)
    source = build_source(configs[RECIPES[0]])
    for config in configs.values():
        RunFolder(Path(config.output or "")).check(with_defaults(config, source.info))
    output.mkdir(parents=True, exist_ok=True)
    console.print(
        f"{len(configs)} runs of {epochs} epochs on glyphs100, {jobs} at a time, into {output}",
        highlight=False,
    )
    _train_all(configs, options, jobs, console)
    console.print(f"step times, in turn, {rounds} rounds", highlight=False)
    ratios = step_ratios(configs, source, rounds=rounds)
    summaries = {
        name: json.loads(RunFolder(output / name).summary.read_text(encoding="utf-8"))
        for name in configs
    }
    results = {name: _result(summaries[name], ratios[name]) for name in configs}
    _write_results(output, results, command, summaries[RECIPES[0]]["parameters"])
    console.print(_table(results))
    console.print(f"One seed ({seed}): no evidence of a difference. {_DATA_NOTE}", highlight=False)
    return write_report(
        [output / name for name in configs],
        output / "report.html",
        title="glyphs100: one small student, four kinds of labels",
        table=[{"step time / cross-entropy": f"{ratios[n].median:.3f}"} for n in configs],
        notes=[
            _DATA_NOTE,
            "Same initial weights, data order, augmentation and number of steps in all runs. Step "
            f"times: median of {rounds} rounds in turn, one thread, batch 128; NKD includes the "
            "teacher's forward.",
        ],
        command=command,
    )


def _command_line(epochs: int, seed: int, num_fonts: int | None) -> str:
    fonts = "" if num_fonts is None else f" --fonts {num_fonts}"
    return f"softlabels demo --epochs {epochs} --seed {seed}{fonts}"


def _config(name: str, output: Path, options: Mapping[str, Any]) -> Config:
    values = load_recipe(f"glyphs100/{name}")
    values["output"] = str(output / name)
    for key, value in options.items():
        *sections, last = key.split(".")
        place = values
        for section in sections:
            place = place[section]
        place[last] = value
    return resolve(values)


def _command(name: str, config: Config, options: Mapping[str, Any]) -> list[str]:
    given = [part for key, value in options.items() for part in (f"--{key}", str(value))]
    own = [sys.executable, "-m", "softlabels", "train", f"glyphs100/{name}"]
    return [*own, *given, "--output", str(config.output)]


def _train_all(
    configs: Mapping[str, Config], options: Mapping[str, Any], jobs: int, console: Console
) -> None:
    """Train in processes of one thread each, `jobs` at a time, with a bar for each."""
    # Those with a teacher take longest: first, so that none is left running alone at the end.
    longest_first = sorted(configs, key=lambda name: configs[name].teacher.name is None)
    waiting = [
        name
        for name in longest_first
        if not RunFolder(Path(configs[name].output or "")).is_complete()
    ]
    complete = [name for name in configs if name not in waiting]
    if complete:
        console.print(f"complete already: {', '.join(complete)}", highlight=False)
    running: dict[str, subprocess.Popen[bytes]] = {}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    columns = (TextColumn("{task.description:14}"), BarColumn(), TextColumn("{task.fields[news]}"))
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        tasks = {
            name: progress.add_task(name, total=config.epochs, news="waits", start=False)
            for name, config in configs.items()
        }
        for name in complete:
            progress.update(tasks[name], completed=configs[name].epochs, news="complete")
        try:
            while waiting or running:
                while waiting and len(running) < jobs:
                    name = waiting.pop(0)
                    log = Path(configs[name].output or "").with_suffix(".log")
                    with log.open("wb") as file:
                        running[name] = subprocess.Popen(
                            _command(name, configs[name], options),
                            stdout=file,
                            stderr=file,
                            env=environment,
                        )
                    progress.start_task(tasks[name])
                time.sleep(0.3)
                for name, process in list(running.items()):
                    _show(progress, tasks[name], configs[name])
                    if process.poll() is not None:
                        del running[name]
                        if process.returncode:
                            raise RunError(_failure(name, configs[name], process.returncode))
                        progress.stop_task(tasks[name])
        finally:
            for process in running.values():
                process.terminate()
            for process in running.values():
                process.wait()


def _show(progress: Progress, task: TaskID, config: Config) -> None:
    """Move a bar to what the run's own log says."""
    lines = _lines(Path(config.output or "") / "metrics.jsonl")
    evaluated = [line for line in lines if "eval/top1" in line]
    news = f"top-1 {evaluated[-1]['eval/top1']:5.1f} %" if evaluated else "starts"
    done = evaluated[-1]["epoch"] if evaluated else 0
    since = [line for line in lines if line.get("epoch") == done and "train/loss" in line]
    progress.update(
        task, completed=done + (0.5 if since and done < config.epochs else 0), news=news
    )


def _lines(path: Path) -> list[dict[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError:
        return []
    whole = text[: text.rfind("\n") + 1]  # the last line may be half written
    return [json.loads(line) for line in whole.splitlines()]


def _failure(name: str, config: Config, status: int) -> str:
    log = Path(config.output or "").with_suffix(".log")
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["no output"]
    return f"the run {name} ended with status {status}: {lines[-1]} (all of it: {log})"


def step_ratios(
    configs: Mapping[str, Config], source: DataSource, *, rounds: int
) -> dict[str, Ratio]:
    """Time of a training step over the first configuration's, one thread, in turn.

    Args:
        configs: By name; all on the same data and batch size.
        source: These data.
        rounds: How often each step is timed.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        first = next(iter(configs.values()))
        batches = source.train_batches(
            seed=first.seed, epoch=0, batch_size=first.batch_size, device="cpu"
        )
        batch = next(iter(batches))
        steps = {name: _step(config, source, batch) for name, config in configs.items()}
        seconds = interleaved(steps, rounds=rounds)
    finally:
        torch.set_num_threads(threads)
    baseline = seconds[next(iter(seconds))]
    return {name: ratio(times, baseline) for name, times in seconds.items()}


def _step(config: Config, source: DataSource, batch: Batch) -> Any:
    distiller = build_distiller(with_defaults(config, source.info), source.info)
    optimizer = build_optimizer(config.optimizer, distiller.trainable)
    return partial(_one_step, distiller, optimizer, batch)


def _one_step(distiller: Distiller, optimizer: torch.optim.Optimizer, batch: Batch) -> None:
    distiller(batch.images, batch.target, index=batch.index).loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _result(summary: Mapping[str, Any], time_ratio: Ratio) -> dict[str, float]:
    names = ("top1", "group_top1", "nll", "ece")
    return {
        **{name: summary["final"][name] for name in names},
        "step_time_ratio": time_ratio.median,
        "step_time_ratio_low": time_ratio.low,
        "step_time_ratio_high": time_ratio.high,
    }


def _write_results(
    output: Path,
    results: Mapping[str, Mapping[str, float]],
    command: str,
    parameters: int,
) -> None:
    first = RunFolder(output / next(iter(results)))
    environment = json.loads(first.environment.read_text(encoding="utf-8"))
    content = {
        "command": command,
        "environment": environment,
        "parameters": parameters,
        "results": results,
    }
    first.write_json(output / "demo.json", content)


def _table(results: Mapping[str, Mapping[str, float]]) -> Table:
    table = Table(title="After the last epoch, 8,000 test images")
    headings = ("", "top-1 %", "group %", "NLL nats", "ECE %", "step time / cross-entropy")
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="left" if number == 0 else "right")
    for name, values in results.items():
        table.add_row(*row_of(name, values))
    return table


def row_of(name: str, values: Mapping[str, float]) -> Sequence[str]:
    """A run's cells in the demo's table."""
    low, high = values["step_time_ratio_low"], values["step_time_ratio_high"]
    return (
        name,
        f"{values['top1']:.1f}",
        f"{values['group_top1']:.1f}",
        f"{values['nll']:.3f}",
        f"{values['ece']:.1f}",
        f"{values['step_time_ratio']:.2f} ({low:.2f} to {high:.2f})",
    )
