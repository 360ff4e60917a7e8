"""The commands that train: `train`, `cache-teacher`, `demo` and `reproduce`."""

from pathlib import Path
from typing import Annotated, Any

from softlabels.cli.parsing import UsageError, call, configured, is_main_process, metrics_line
from softlabels.io.console import echo, progress_console

__all__ = ["cache_teacher", "demo", "reproduce", "train"]


def train(arguments: list[str]) -> int:
    """Train a student."""
    from softlabels.experiments.smoke import TrainOptions, smoke
    from softlabels.experiments.train import ReportWriter
    from softlabels.training.trainer import run

    settings, options = configured(arguments, "train", TrainOptions)
    if options.smoke:
        _, exported = smoke(settings, console=progress_console())
        if exported is not None:
            echo(
                f"smoke: two steps, an evaluation and an export ran; the exported student is "
                f"within {exported.largest_difference or 0.0:.1g} of the trained one. Accuracies "
                "mean nothing here"
            )
        return 0
    result = run(settings, observers=[ReportWriter()], console=progress_console())
    if not is_main_process():
        return 0
    echo(metrics_line(result.final))
    page = "report.html, " if settings.report else ""
    echo(f"everything is in {result.folder} ({page}student.safetensors)")
    return 0


def cache_teacher(arguments: list[str]) -> int:
    """Store a teacher's answers."""
    from softlabels.training.cache_teacher import CacheOptions, build_cache
    from softlabels.training.config import load_recipe

    def load(name: str) -> dict[str, Any]:
        # The recipe's own output is the folder of its run.
        return {key: value for key, value in load_recipe(name).items() if key != "output"}

    config, options = configured(arguments, "cache-teacher", CacheOptions, load)
    path = config.output or config.teacher.cache
    if path is None:
        raise UsageError("say where the cache shall be: --output FOLDER")
    cache = build_cache(
        config,
        path,
        draws=options.draws,
        top=options.top,
        images_per_file=options.images_per_file,
        console=progress_console(),
    )
    if not is_main_process():
        return 0
    error, views = cache.error, cache.num_images * cache.num_draws
    echo(
        f"{cache.num_images:,} images x {cache.num_draws} draws, {cache.top} of "
        f"{cache.num_classes} classes: {cache.num_bytes / 1e6:,.2f} MB, "
        f"{cache.num_bytes / views:g} MB per million images and draw"
    )
    echo(
        f"against the full answers: KL mean {error['mean_kl']:.2g}, largest {error['max_kl']:.2g} "
        f"nats; the first class agrees in {error['top1_agreement']:.2%}"
    )
    if error["unreadable"]:
        echo(f"{error['unreadable']} views have no answer: their images could not be read")
    echo(f"train with --teacher.cache {path}")
    return 0


def demo(arguments: list[str]) -> int:
    """Compare four kinds of labels on the embedded data."""

    def demo(
        output: str = "runs/demo",
        epochs: int = 8,
        seed: int = 0,
        jobs: int = 2,
        steps: int = 30,
        fonts: int | None = None,
    ) -> int:
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

        for name, value, least in (("epochs", epochs, 1), ("jobs", jobs, 1), ("steps", steps, 2)):
            if value < least:
                raise UsageError(f"{name} must be {least} or more, got {value}")
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
        return 0

    return call(demo, arguments, "demo")


def reproduce(arguments: list[str]) -> int:
    """Run rows of a published table."""
    import tyro

    def reproduce_table(
        table: Annotated[str, tyro.conf.Positional],
        rows: tuple[str, ...] = (),
        data_path: Annotated[str | None, tyro.conf.arg(name="data.path")] = None,
        seeds: int = 1,
        change: Annotated[tuple[tuple[str, ...], ...], tyro.conf.UseAppendAction] = (),
        output: str = "runs/reproduce",
        jobs: int = 1,
        threads: int | None = None,
        processes: int = 1,
        smoke: bool = False,
    ) -> int:
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

        for name, value in (("seeds", seeds), ("jobs", jobs), ("processes", processes)):
            if value < 1:
                raise UsageError(f"{name} must be 1 or more, got {value}")
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
        return 0

    return call(reproduce_table, arguments, "reproduce")
