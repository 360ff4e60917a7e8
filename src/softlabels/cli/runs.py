"""The commands that make one run, or prepare it: `train` and `cache-teacher`."""

from typing import Any

from softlabels.cli.parsing import UsageError, configured, metrics_line
from softlabels.io.console import echo, progress_console

__all__ = ["cache_teacher", "train"]


def train(arguments: list[str]) -> None:
    """Train a student."""
    from accelerate import PartialState

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
        return
    result = run(settings, observers=[ReportWriter()], console=progress_console())
    if not PartialState().is_main_process:
        return
    echo(metrics_line(result.final))
    page = "report.html, " if settings.report else ""
    echo(f"everything is in {result.folder} ({page}student.safetensors)")


def cache_teacher(arguments: list[str]) -> None:
    """Store a teacher's answers."""
    from accelerate import PartialState

    from softlabels.training.cache_teacher import CacheOptions, build_cache
    from softlabels.training.config import load_recipe

    def load(name: str) -> dict[str, Any]:
        # The recipe's own output is the folder of its run.
        return {key: value for key, value in load_recipe(name).items() if key != "output"}

    config, options = configured(arguments, "cache-teacher", CacheOptions, load)
    path = config.output or config.teacher.cache
    if path is None:
        raise UsageError("say where the cache shall be: --output FOLDER")
    cache = build_cache(config, path, options, console=progress_console())
    if not PartialState().is_main_process:
        return
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
