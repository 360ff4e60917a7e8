"""The commands that make many runs: `compare`, `sweep`, `reproduce` and `demo`."""

import shlex
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field
from tyro.conf import Positional, UseAppendAction, arg

from softlabels.cli.parsing import Count, UsageError, command, configured
from softlabels.io.console import echo, progress_console

__all__ = ["compare", "demo", "reproduce", "sweep"]


def compare(arguments: list[str]) -> None:
    """Compare methods over seeds."""
    from softlabels.experiments.compare import compare as run_comparison
    from softlabels.experiments.comparison import CompareOptions, Comparison, read_comparison
    from softlabels.training.config import load_recipe

    given: Comparison | None = None

    def load(name: str) -> dict[str, Any]:
        nonlocal given
        given = read_comparison(name)
        return load_recipe(name) if given is None else given.values

    config, options = configured(arguments, "compare", CompareOptions, load)
    output = Path(config.output or "runs/compare")
    run_comparison(
        options.comparison(config, given),
        output=output,
        runs=None if options.runs is None else Path(options.runs),
        jobs=options.jobs,
        threads=config.threads,
        command=shlex.join(["softlabels", "compare", *arguments]),
        console=progress_console(),
    )
    echo(f"everything is in {output} (report.html, comparison.md, .csv and .json)")


def sweep(arguments: list[str]) -> None:
    """Search a method's weights and temperature."""
    try:
        from softlabels.experiments.sweep import run_sweep
    except ModuleNotFoundError as error:
        if error.name != "optuna":
            raise
        raise UsageError("sweep needs Optuna: pip install 'softlabels[sweep]'") from error
    from softlabels.experiments.sweep_record import SweepOptions
    from softlabels.experiments.sweep_results import flags, rank_of

    config, options = configured(arguments, "sweep", SweepOptions)
    folder = config.output or f"runs/sweep-{config.data.source}-{config.label}"
    result = run_sweep(
        config,
        options,
        output=Path(folder),
        seed=config.seed,
        threads=config.threads,
        console=progress_console(),
    )
    record, best = result.record, result.best
    echo(
        f"best: trial {best.number}, top-1 {best.mean('top1'):.2f} % and NLL "
        f"{best.mean('nll'):.3f} nats on {record.validation_images:,} validation images; the "
        f"settings as given have rank {rank_of(record, 0) or 'none'} of {len(record.trials)}"
    )
    echo(f"settings: {flags(best)}")
    echo(f"results: {result.folder / 'sweep.md'}; softlabels train {result.folder / 'best.yaml'}")


@command("reproduce")
def reproduce(
    table: Positional[str],
    rows: tuple[str, ...] = (),
    data_path: Annotated[str | None, arg(name="data.path")] = None,
    seeds: Count = 1,
    change: UseAppendAction[tuple[tuple[str, ...], ...]] = (),
    output: str = "runs/reproduce",
    jobs: Count = 1,
    threads: int | None = None,
    processes: Count = 1,
    smoke: bool = False,
) -> None:
    """Run rows of a published table, their baselines and teachers, and compare with the paper.

    A teacher without weights is trained first, once. What is complete is not run again, and
    runs of the same settings are shared between rows and tables. Ends with a table, in
    OUTPUT/TABLE.json and OUTPUT/TABLE.md too.

    Args:
        table: A folder of recipes, such as table1 (`softlabels recipes` lists them).
        rows: Some of its recipes; none: all.
        data_path: Folder of the data.
        seeds: Runs of each row, with seeds 0, 1, ...
        change: Settings that differ from all recipes, as KEY=VALUE: epochs=10
            data.workers=8. They are recorded beside the results. May be given several times.
        output: Folder of the runs and the results.
        jobs: Runs at a time.
        threads: CPU threads of each process.
        processes: Processes of each run, started with torchrun: one for each GPU.
        smoke: Shrink all runs to seconds; the figures then mean nothing.
    """
    from softlabels.experiments.reproduce import reproduce as run_rows
    from softlabels.training.recipes import settings_of

    changes = settings_of([text for texts in change for text in texts])
    if data_path is not None:
        changes.setdefault("data", {})["path"] = data_path
    run_rows(
        table,
        rows=rows,
        changes=changes,
        seeds=seeds,
        output=Path(output),
        jobs=jobs,
        threads=threads,
        processes=processes,
        smoke=smoke,
        console=progress_console(),
    )
    echo(f"results: {Path(output, table)}.json and .md")


@command("demo")
def demo(
    output: str = "runs/demo",
    epochs: Count = 8,
    seed: int = 0,
    jobs: Count = 2,
    steps: Annotated[int, Field(ge=2)] = 30,
    fonts: int | None = None,
) -> None:
    """Train one small student four ways on the embedded glyphs100, and compare.

    Cross-entropy, Zipf's LS, USKD, and NKD with the teacher that ships in the package; equal
    initial weights, data and steps. Ends with a table and report.html.

    Args:
        output: Folder of the four runs and the report.
        epochs: Passes over the training set.
        seed: Of everything random.
        jobs: Runs at a time, one thread each.
        steps: Rounds of the step-time measurement at the end, 2 or more.
        fonts: Train on so many of the 239 fonts only, for a quick look.
    """
    from softlabels.experiments.demo import run_demo

    report = run_demo(
        Path(output),
        epochs=epochs,
        seed=seed,
        jobs=jobs,
        rounds=steps,
        console=progress_console(),
        num_fonts=fonts,
    )
    echo(f"report: {report}")
