"""The command that searches settings: `sweep`."""

from pathlib import Path

from softlabels.cli.parsing import UsageError, configured
from softlabels.io.console import echo, progress_console

__all__ = ["sweep"]


def sweep(arguments: list[str]) -> int:
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
    return 0
