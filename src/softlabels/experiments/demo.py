"""The demo: one small student, trained four ways on the embedded data, and a report."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from softlabels.analysis.scores import SCORES
from softlabels.data import Batch, DataSource
from softlabels.experiments.launcher import PlannedRun, launch_runs
from softlabels.experiments.search_space import nested
from softlabels.experiments.timing import Ratio, interleaved, ratio
from softlabels.io.console import say, show_table
from softlabels.io.files import write_json
from softlabels.report import write_report
from softlabels.training.build import (
    build_distiller,
    build_source,
    with_defaults,
    with_findings,
)
from softlabels.training.config import Config, load_recipe, resolve
from softlabels.training.optim import build_optimizer
from softlabels.training.precision import with_precision
from softlabels.training.run_folder import RunFolder
from softlabels.training.schemas import Environment, Summary

__all__ = ["RECIPES", "run_demo", "step_ratios"]

RECIPES = ("cross_entropy", "zipf_ls", "uskd", "nkd")
_DIGITS = {"top1": 1, "group_top1": 1, "nll": 3, "ece": 1}
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
    """Train the four runs, time their steps, write the table and the report, and return its path.

    Runs that are complete in `output` are not trained again. The arguments are those of
    `softlabels demo`; steps are timed in so many `rounds`.

    Raises:
        ValueError: `output` holds runs of other settings.
        RunError: A run failed; the message ends with its last line.
    """
    options: dict[str, Any] = {"epochs": epochs, "seed": seed, "threads": 1}
    if num_fonts is not None:
        options["data.num_fonts"] = num_fonts
    configs = {name: _config(name, output, options) for name in RECIPES}
    fonts = "" if num_fonts is None else f" --fonts {num_fonts}"
    command = f"softlabels demo --epochs {epochs} --seed {seed}{fonts}"
    source = build_source(configs[RECIPES[0]])
    folders = {name: RunFolder(output / name) for name in configs}
    for name, config in configs.items():
        folders[name].check(with_findings(with_defaults(config, source.info), source))
    output.mkdir(parents=True, exist_ok=True)
    say(
        console,
        f"{len(configs)} runs of {epochs} epochs on glyphs100, {jobs} at a time, into {output}",
    )
    launch_runs(
        [PlannedRun(n, config, _arguments(n, options)) for n, config in configs.items()],
        jobs=jobs,
        console=console,
        threads=1,
    )
    say(console, f"step times, in turn, {rounds} rounds")
    ratios = step_ratios(configs, source, rounds=rounds)
    summaries = {name: Summary.read(folder.summary) for name, folder in folders.items()}
    results = {
        name: {
            **{key: summary.final[key] for key in _DIGITS},
            "step_time_ratio": ratios[name].median,
            "step_time_ratio_low": ratios[name].low,
            "step_time_ratio_high": ratios[name].high,
        }
        for name, summary in summaries.items()
    }
    content = {
        "command": command,
        "environment": Environment.read(folders[RECIPES[0]].environment).dump(),
        "parameters": summaries[RECIPES[0]].parameters,
        "results": results,
    }
    write_json(output / "demo.json", content)
    show_table(
        console,
        ("", *(SCORES[key].column for key in _DIGITS), "step time / cross-entropy"),
        [
            [
                name,
                *(f"{results[name][key]:.{digits}f}" for key, digits in _DIGITS.items()),
                f"{time.median:.2f} ({time.low:.2f} to {time.high:.2f})",
            ]
            for name, time in ratios.items()
        ],
        title="After the last epoch, 8,000 test images",
    )
    say(console, f"One seed ({seed}): no evidence of a difference. {_DATA_NOTE}")
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


def _config(name: str, output: Path, options: Mapping[str, Any]) -> Config:
    own = {**options, "output": str(output / name)}
    return resolve(nested(own, load_recipe(f"glyphs100/{name}")))


def _arguments(name: str, options: Mapping[str, Any]) -> tuple[str, ...]:
    given = [part for key, value in options.items() for part in (f"--{key}", str(value))]
    return (f"glyphs100/{name}", *given)


def step_ratios(
    configs: Mapping[str, Config], source: DataSource, *, rounds: int
) -> dict[str, Ratio]:
    """Time of a training step over the first configuration's, one thread, in turn.

    The configurations, by name, are all on these data, with the same batch size.
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


def _step(config: Config, source: DataSource, batch: Batch) -> Callable[[], None]:
    distiller = build_distiller(with_defaults(config, source.info), source.info)
    config = with_precision(config, distiller.trainable, batch.images.device)
    images = batch.images
    if config.channels_last is True:
        distiller.to(memory_format=torch.channels_last)
        images = images.contiguous(memory_format=torch.channels_last)
    optimizer = build_optimizer(config.optimizer, distiller.trainable)
    half = config.precision == "bf16"

    def step() -> None:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=half):
            loss = distiller(images, batch.target, index=batch.index).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step
