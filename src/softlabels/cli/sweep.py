"""The command that searches settings: `sweep`."""

from pathlib import Path

from softlabels.cli.parsing import UsageError, configured
from softlabels.io.console import echo, progress_console

__all__ = ["sweep"]


def sweep(arguments: list[str]) -> int:
    """Search a method's weights and temperature."""
    from softlabels.experiments.search_space import read_space

    try:
        from softlabels.experiments.sweep import run_sweep
    except ModuleNotFoundError as error:
        if error.name != "optuna":
            raise
        raise UsageError("sweep needs Optuna: pip install 'softlabels[sweep]'") from error
    from softlabels.experiments.sweep_results import flags, rank_of
    from softlabels.experiments.sweep_settings import SweepOptions

    config, options = configured(arguments, "sweep", SweepOptions)
    folder = config.output or f"runs/sweep-{config.data.source}-{config.label}"
    result = run_sweep(
        config,
        read_space(options.space) or None,
        trials=options.trials,
        output=Path(folder),
        seed=config.seed,
        startup=options.startup,
        seeds=options.seeds,
        jobs=options.jobs,
        threads=config.threads,
        metric=options.metric,
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
    return 0
