"""Searches a method's weights and temperature on images that are held out of the training set."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from rich.console import Console

from softlabels.data.randomness import derive_seed
from softlabels.experiments.launcher import PlannedRun, launch_runs
from softlabels.experiments.planning import RunPlan
from softlabels.experiments.search_space import (
    Range,
    Space,
    default_space,
    fitted_space,
    value_of,
    with_values,
)
from softlabels.experiments.sweep_record import MEASURED, Metric, SweepRecord, Trial, shown
from softlabels.experiments.sweep_results import write_results
from softlabels.io.files import replace_file
from softlabels.training.build import build_source
from softlabels.training.config import Config, ConfigError, explain, resolve
from softlabels.training.errors import RunError
from softlabels.training.run_folder import fixed_settings
from softlabels.training.settings import PaperSettings

__all__ = ["VALIDATION", "SweepResult", "run_sweep"]

VALIDATION = 0.2
"""What is held out if the settings do not say."""

_INSTALL = "softlabels sweep needs Optuna: pip install 'softlabels[sweep]'"


@dataclass(frozen=True)
class SweepResult:
    """What a sweep gave.

    Attributes:
        folder: Where everything is.
        record: All trials.
        best: The best one.
        config: The settings to train with: the best values, on the whole training set.
    """

    folder: Path
    record: SweepRecord
    best: Trial
    config: Config


def run_sweep(
    config: Config,
    space: Space | None = None,
    *,
    trials: int = 20,
    output: Path,
    seed: int = 0,
    startup: int = 8,
    seeds: int = 1,
    jobs: int = 1,
    threads: int | None = None,
    metric: Metric = "top1",
    console: Console,
) -> SweepResult:
    """Search settings with Optuna's TPE, on a part of the training set that is held out.

    Trial 0 is the settings as given. What is proposed is a function of the seed and of the trials
    that are recorded, so a sweep that was stopped goes on as if it had not been.

    Args:
        config: What the trials share. Without `data.validation` a fifth is held out; the test set
            is never read.
        space: What may be tried, by setting; None: `default_space`.
        trials: How many settings are tried, with those of an earlier call.
        output: Folder of the runs, sweep.json, sweep.csv, sweep.md and best.yaml.
        seed: Of the proposals. The runs have the configuration's seed.
        startup: Trials that are drawn at random before the search learns from them.
        seeds: Runs of each trial, with seeds one after the other, the same for all trials.
        jobs: Runs at a time, each in a process of its own; so many trials are proposed together.
        threads: CPU threads of each process; None: its share of the cores.
        metric: What decides: the highest `"top1"` or the lowest `"nll"`.
        console: Where progress is shown.

    Returns:
        The trials, and the best of them.

    Raises:
        ValueError: Settings, data or a space that do not fit, no Optuna, or `output` holds
            something else.
        RunError: A run failed, or no trial has a finite loss. The same call goes on from there.
    """
    for name, value in (("trials", trials), ("seeds", seeds), ("jobs", jobs)):
        if value < 1:
            raise ValueError(f"{name} must be 1 or more, got {value}")
    if startup < 0:
        raise ValueError(f"startup must be 0 or more, got {startup}")
    _optuna()
    given = config.model_copy(update={"output": None, "paper": PaperSettings()})
    config = _with_validation(given, console)
    sweep = _Sweep(
        config,
        fitted_space(config, default_space(config) if space is None else space),
        output,
        metric=metric,
        seed=seed,
        startup=startup,
        seeds=tuple(range(config.seed, config.seed + seeds)),
    )
    record = sweep.begun(console)
    while len(record.trials) < trials:
        count = min(jobs, trials - len(record.trials))
        record = sweep.extended(record, count, jobs=jobs, threads=threads, console=console)
        sweep.save(record)
    ranked = record.ranked
    if not ranked:
        raise RunError(
            f"none of {len(record.trials)} trials has a finite loss: try a smaller learning rate "
            f"or another space ({output / 'sweep.json'})"
        )
    best = with_values(_on_all_images(given), ranked[0].values)
    write_results(record, best, output)
    return SweepResult(output, record, ranked[0], best)


def _with_validation(config: Config, console: Console) -> Config:
    if config.data.validation is not None:
        return config
    _say(
        console,
        f"{VALIDATION:.0%} of the training set is held out for choosing (data.validation "
        f"{VALIDATION:g}); the test set is not read",
    )
    return _with_data(config, validation=VALIDATION)


def _on_all_images(config: Config) -> Config:
    return _with_data(config, validation=None, train_share=None)


def _with_data(config: Config, **changes: float | None) -> Config:
    return config.model_copy(update={"data": config.data.model_copy(update=changes)})


class _Sweep:
    """Proposes trials and trains them.

    Args:
        config: What they share.
        space: What may be tried; checked.
        output: Folder of the sweep.
        metric: What decides.
        seed: Of the proposals.
        startup: Trials that are drawn at random.
        seeds: Of each trial's runs.
    """

    def __init__(
        self,
        config: Config,
        space: Space,
        output: Path,
        *,
        metric: Metric,
        seed: int,
        startup: int,
        seeds: tuple[int, ...],
    ) -> None:
        # Nobody looks at the trials' galleries and pages.
        self._config = config.model_copy(update={"gallery": 0, "report": False})
        self._space = space
        self._output = output
        self._metric = metric
        self._seed = seed
        self._startup = startup
        self._seeds = seeds
        self._file = output / "sweep.json"

    def begun(self, console: Console) -> SweepRecord:
        """The record so far: of an earlier call, or a new one.

        Raises:
            ValueError: The data cannot be read, or the folder holds something else.
        """
        new = self._new_record()
        earlier = self._earlier()
        if earlier is None:
            self.save(new)
            return new
        for name in ("settings", "space", "metric", "seeds", "search_seed", "startup"):
            before, now = getattr(earlier, name), getattr(new, name)
            if name == "settings":  # with the defaults of settings that are newer than the record
                before = _recorded(resolve(before))
            if before != now:
                differing = ""
                if isinstance(now, dict):
                    keys = sorted(k for k in {*before, *now} if before.get(k) != now.get(k))
                    differing = f" ({', '.join(keys)})"
                raise ValueError(
                    f"{self._output} holds a sweep with another {name}{differing}: choose another "
                    "--output, or remove the folder"
                )
        if earlier.trials:
            _say(console, f"{len(earlier.trials)} trials are in {self._file} already")
        return earlier

    def _new_record(self) -> SweepRecord:
        source = build_source(self._config)
        source.close()
        return SweepRecord(
            label=self._config.label,
            data=source.info.name,
            train_images=source.num_train,
            validation_images=source.num_test,
            metric=self._metric,
            space={key: _as_text(values) for key, values in self._space.items()},
            seeds=self._seeds,
            search_seed=self._seed,
            startup=self._startup,
            settings=_recorded(self._config),
        )

    def _earlier(self) -> SweepRecord | None:
        if not self._file.is_file():
            if self._output.exists() and (not self._output.is_dir() or any(self._output.iterdir())):
                raise ValueError(
                    f"{self._output} exists and holds no sweep: choose another --output"
                )
            return None
        try:
            return SweepRecord.model_validate_json(self._file.read_bytes())
        except ValidationError as error:
            raise ValueError(f"{self._file} is no record of a sweep: {explain(error)}") from error

    def save(self, record: SweepRecord) -> None:
        """Write the record, whole or not at all."""
        self._output.mkdir(parents=True, exist_ok=True)
        with replace_file(self._file) as file:
            file.write((record.model_dump_json(indent=1) + "\n").encode())

    def extended(
        self,
        record: SweepRecord,
        count: int,
        *,
        jobs: int,
        threads: int | None,
        console: Console,
    ) -> SweepRecord:
        """Propose so many trials, train them, and add them to the record."""
        first = len(record.trials)
        proposed: list[dict[str, Any]] = []
        if first == 0:
            proposed.append({key: value_of(self._config, key) for key in self._space})
        proposed += self._proposals(record.trials, count - len(proposed))
        plan = RunPlan(self._output / "trials")
        planned = [
            [plan.add(f"trial {number}", with_values(self._config, values), s) for s in self._seeds]
            for number, values in enumerate(proposed, first)
        ]
        for runs in plan.rounds:
            _train(runs, jobs=jobs, threads=threads, console=console)
        added = [
            self._trial(number, values, runs)
            for number, (values, runs) in enumerate(zip(proposed, planned, strict=True), first)
        ]
        record = record.model_copy(update={"trials": (*record.trials, *added)})
        if not record.environment:
            text = planned[0][0].folder.environment.read_text(encoding="utf-8")
            record = record.model_copy(update={"environment": json.loads(text)})
        for trial in added:
            _say(console, f"trial {trial.number}: {self._in_words(trial)}")
        return record

    def _proposals(self, trials: Sequence[Trial], count: int) -> list[dict[str, Any]]:
        """What to try next: a function of the seed and the trials so far."""
        if count == 0:
            return []
        optuna = _optuna()
        distributions = {key: _distribution(values) for key, values in self._space.items()}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            sampler = optuna.samplers.TPESampler(
                n_startup_trials=self._startup,
                multivariate=True,
                constant_liar=True,  # what is proposed together keeps apart
                seed=derive_seed(self._seed, "sweep", len(trials)) % 2**32,
            )
        study = optuna.create_study(
            sampler=sampler, direction="maximize" if self._metric == "top1" else "minimize"
        )
        states = optuna.trial.TrialState
        for trial in trials:
            # The settings as given may lie outside of the space, and teach nothing about it then.
            if all(trial.values[key] in values for key, values in self._space.items()):
                score = trial.mean(self._metric)
                study.add_trial(
                    optuna.trial.create_trial(
                        params=trial.values,
                        distributions=distributions,
                        value=score,
                        # What is pruned counts as worse than all that is complete.
                        state=states.PRUNED if score is None else states.COMPLETE,
                    )
                )
        asked = [study.ask(distributions).params for _ in range(count)]
        return [{key: self._rounded(key, params[key]) for key in self._space} for params in asked]

    def _rounded(self, key: str, value: Any) -> Any:
        values = self._space[key]
        return values.rounded(value) if isinstance(values, Range) else value

    def _trial(self, number: int, values: Mapping[str, Any], runs: Sequence[PlannedRun]) -> Trial:
        folders = tuple(run.folder.path.relative_to(self._output).as_posix() for run in runs)
        if any(run.folder.failure.is_file() for run in runs):
            return Trial(number=number, values=dict(values), runs=folders, metrics={}, seconds=())
        summaries = [json.loads(run.folder.summary.read_text(encoding="utf-8")) for run in runs]
        return Trial(
            number=number,
            values=dict(values),
            runs=folders,
            metrics={name: tuple(s["final"][name] for s in summaries) for name in MEASURED},
            seconds=tuple(summary["seconds"] for summary in summaries),
        )

    def _in_words(self, trial: Trial) -> str:
        tried = ", ".join(f"{key} {shown(value)}" for key, value in trial.values.items())
        top1, nll = trial.mean("top1"), trial.mean("nll")
        if top1 is None or nll is None:
            return f"the loss was not finite, with {tried}"
        return f"top-1 {top1:.2f} %, NLL {nll:.3f} nats, with {tried}"


def _recorded(config: Config) -> dict[str, Any]:
    """What decides a configuration's numbers, as it is read back from a record."""
    values: dict[str, Any] = json.loads(json.dumps(fixed_settings(config), default=str))
    return values


def _train(runs: Sequence[PlannedRun], *, jobs: int, threads: int | None, console: Console) -> None:
    """Train runs; those whose loss is not finite end, and the others go on."""
    while waiting := [run for run in runs if not run.folder.failure.is_file()]:
        try:
            launch_runs(waiting, jobs=jobs, threads=threads, console=console)
        except RunError:
            if not any(run.folder.failure.is_file() for run in waiting):
                raise
        else:
            return


def _distribution(values: Range | Sequence[Any]) -> Any:
    distributions = _optuna().distributions
    if not isinstance(values, Range):
        return distributions.CategoricalDistribution(values)
    kind = distributions.IntDistribution if values.whole else distributions.FloatDistribution
    return kind(*values.ends, log=values.log)


def _as_text(values: Range | Sequence[Any]) -> str:
    return str(values) if isinstance(values, Range) else ", ".join(map(str, values))


def _optuna() -> Any:
    """The library, which is optional, without its own words about each trial."""
    try:
        import optuna
    except ModuleNotFoundError as error:
        raise ConfigError(_INSTALL) from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def _say(console: Console, text: str) -> None:
    """Print a line as it is, whatever it holds."""
    console.print(text, highlight=False, markup=False, soft_wrap=True)
