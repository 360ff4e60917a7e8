"""Searches a method's weights and temperature on images that are held out of the training set."""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from filelock import FileLock, Timeout
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.trial import BaseTrial, TrialState
from rich.console import Console

from softlabels.data.randomness import derive_seed
from softlabels.experiments.launcher import PlannedRun, RunPlan, launch_runs
from softlabels.experiments.search_space import (
    Range,
    Space,
    default_space,
    fitted_space,
    read_space,
    value_of,
    with_values,
)
from softlabels.experiments.sweep_record import (
    MEASURED,
    Metric,
    SweepOptions,
    SweepRecord,
    Trial,
    shown,
)
from softlabels.experiments.sweep_results import write_results
from softlabels.io.console import say
from softlabels.io.files import write_text
from softlabels.training.build import build_source
from softlabels.training.config import Config, resolve
from softlabels.training.errors import RunError
from softlabels.training.recipes import flattened
from softlabels.training.run_folder import differences, fixed_settings
from softlabels.training.schemas import Summary

__all__ = ["VALIDATION", "SweepResult", "run_sweep"]

VALIDATION = 0.2
"""What is held out if the settings do not say."""

_JOURNAL = "journal.log"
_USUAL = SweepOptions()
# What the calls of one sweep share.
_SHARED = {"settings", "space", "metric", "seeds", "search_seed", "startup"}


@dataclass(frozen=True)
class SweepResult:
    """All trials, the best one, and its settings to train with on the whole training set."""

    folder: Path
    record: SweepRecord
    best: Trial
    config: Config


def run_sweep(
    config: Config,
    options: SweepOptions = _USUAL,
    *,
    output: Path,
    seed: int = 0,
    threads: int | None = None,
    console: Console,
) -> SweepResult:
    """Search settings with Optuna's TPE, on a part of the training set that is held out.

    Trial 0 is the settings as given. What is proposed is a function of the seed and of the trials
    that are recorded, so a sweep that was stopped goes on as if it had not been.

    Args:
        config: What the trials share. Without `data.validation` a fifth is held out; the test set
            is never read.
        options: How it is searched; trials of an earlier call count, and runs of one trial have
            the same seeds as those of another.
        output: Folder of the runs, journal.log (Optuna's record, with which a sweep goes on),
            sweep.json, sweep.csv, sweep.md and best.yaml.
        seed: Of the proposals. The runs have the configuration's seed.
        threads: CPU threads of each process; None: its share of the cores.
        console: Where progress is shown.

    Returns:
        The trials, and the best of them.

    Raises:
        ValueError: Settings, data or a space that do not fit, or `output` holds something else or
            is in use.
        RunError: A run failed, or no trial has a finite loss. The same call goes on from there.
    """
    given = with_values(config, {"output": None, "paper": {}})
    own: dict[str, Any] = {"gallery": 0, "report": False}  # nobody looks at those of the trials
    if given.data.validation is None:
        say(
            console,
            f"{VALIDATION:.0%} of the training set is held out for choosing (data.validation "
            f"{VALIDATION:g}); the test set is not read",
        )
        own["data.validation"] = VALIDATION
    config = with_values(given, own)
    space = fitted_space(config, read_space(options.space) or default_space(config))
    source = build_source(config)
    source.close()
    new = SweepRecord(
        label=config.label,
        data=source.info.name,
        train_images=source.num_train,
        validation_images=source.num_test,
        metric=options.metric,
        space={
            key: str(values) if isinstance(values, Range) else ", ".join(map(str, values))
            for key, values in space.items()
        },
        seeds=tuple(range(config.seed, config.seed + options.seeds)),
        search_seed=seed,
        startup=options.startup,
        settings=fixed_settings(config),
    )
    with _held(output):
        sweep = _Sweep(config, space, new, output)
        record = sweep.record
        if record.trials:
            say(console, f"{len(record.trials)} trials are in {output} already")
        while (left := options.trials - len(record.trials)) > 0:
            # A sweep that was killed within a round goes on with the rest of it.
            count = min(options.jobs - len(record.trials) % options.jobs, left)
            sweep.extend(count, jobs=options.jobs, threads=threads, console=console)
            record = sweep.record
    write_text(output / "sweep.json", record.model_dump_json(indent=1) + "\n")
    ranked = record.ranked
    if not ranked:
        raise RunError(
            f"none of {len(record.trials)} trials has a finite loss: try a smaller learning rate "
            f"or another space ({output / 'sweep.json'})"
        )
    whole = {"data.validation": None, "data.train_share": None}
    best = with_values(given, {**whole, **ranked[0].values})
    write_results(record, best, output)
    return SweepResult(output, record, ranked[0], best)


@contextlib.contextmanager
def _held(output: Path) -> Iterator[None]:
    """Make a sweep's folder, and keep other sweeps out of it."""
    lock, journal = output / "sweep.lock", output / _JOURNAL
    others = output.is_dir() and any(path != lock for path in output.iterdir())
    if (output.exists() and not output.is_dir()) or (others and not journal.is_file()):
        raise ValueError(f"{output} exists and holds no sweep: choose another --output")
    output.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(lock, timeout=0):
            yield
    except Timeout as error:
        raise ValueError(f"{output} is in use by another sweep: choose another --output") from error


class _Sweep:
    """Proposes trials and trains them; an Optuna study holds what came out.

    A trial's parameters are what the search learns from. Its attributes are `values`, what is tried
    where that was not proposed just now, and `outcome`.

    Args:
        config: What the trials share.
        space: What may be tried; checked.
        new: What the sweep is, without trials.
        output: Its folder.

    Raises:
        ValueError: The folder holds another sweep, or a damaged one.
    """

    def __init__(self, config: Config, space: Space, new: SweepRecord, output: Path) -> None:
        self._config = config
        self._space = space
        self._new = new
        self._output = output
        self._study = _opened(output / _JOURNAL, new.metric)
        earlier = self._study.user_attrs.get("sweep")
        if earlier is None:
            self._study.set_user_attr("sweep", new.model_dump(mode="json"))
        else:
            self._check(SweepRecord.model_validate(earlier))
        trials = self._study.trials
        if not trials:
            self._enqueue({key: value_of(config, key) for key in space})
        for trial in trials:  # what was being trained when the sweep was killed
            if trial.state == TrialState.RUNNING and "outcome" in trial.user_attrs:
                self._tell(trial)
            elif trial.state == TrialState.RUNNING:
                self._study.tell(trial.number, state=TrialState.FAIL)
                if "values" in trial.user_attrs or trial.params.keys() == space.keys():
                    self._enqueue(self._values(trial), trial.params)

    def _check(self, earlier: SweepRecord) -> None:
        # With the defaults of settings that are newer than the record.
        settings = fixed_settings(resolve(earlier.settings))
        before, now = (
            flattened(each.model_dump(include=_SHARED))
            for each in (earlier.model_copy(update={"settings": settings}), self._new)
        )
        found = differences(before, now)
        if found:
            raise ValueError(
                f"{self._output} holds another sweep: {found}; choose another --output, or remove "
                "the folder"
            )

    def _enqueue(self, values: dict[str, Any], params: dict[str, Any] | None = None) -> None:
        tried = (params or values) if self._is_inside(values) else {}
        self._study.enqueue_trial(tried, user_attrs={"values": values})

    def _is_inside(self, values: Mapping[str, Any]) -> bool:
        return all(values[key] in self._space[key] for key in self._space)

    def _values(self, trial: BaseTrial) -> dict[str, Any]:
        """What a trial tries: numbers with few digits, unless they were given."""
        given: dict[str, Any] | None = trial.user_attrs.get("values")
        params = trial.params
        return given or {
            key: values.rounded(params[key]) if isinstance(values, Range) else params[key]
            for key, values in self._space.items()
        }

    @property
    def record(self) -> SweepRecord:
        """What the sweep is, and its trials so far."""
        done = [
            t for t in self._study.trials if t.state.is_finished() and "outcome" in t.user_attrs
        ]
        trials = [
            Trial(number=number, values=self._values(trial), **trial.user_attrs["outcome"])
            for number, trial in enumerate(done)
        ]
        environment = self._study.user_attrs.get("environment", {})
        return self._new.model_copy(update={"trials": tuple(trials), "environment": environment})

    def extend(self, count: int, *, jobs: int, threads: int | None, console: Console) -> None:
        """Propose so many trials, train them, and record what came out."""
        first = len(self.record.trials)
        plan = RunPlan(self._output / "trials")
        planned: list[tuple[optuna.Trial, list[PlannedRun]]] = []
        for number in range(first, first + count):
            trial = self._asked(number)
            config = with_values(self._config, self._values(trial))
            runs = [plan.add(f"trial {number}", config, seed) for seed in self._new.seeds]
            planned.append((trial, runs))
        for runs in plan.rounds:
            _train(runs, jobs=jobs, threads=threads, console=console)
        if "environment" not in self._study.user_attrs:
            text = planned[0][1][0].folder.environment.read_text(encoding="utf-8")
            self._study.set_user_attr("environment", json.loads(text))
        for number, (trial, runs) in enumerate(planned, first):
            trial.set_user_attr("outcome", self._outcome(runs))
            self._tell(trial)
            say(console, f"trial {number}: {_in_words(self.record.trials[number])}")

    def _asked(self, number: int) -> optuna.Trial:
        """The next of the queue, or a proposal: a function of the seed and the trials so far."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            self._study.sampler = optuna.samplers.TPESampler(
                n_startup_trials=self._new.startup,
                multivariate=True,
                constant_liar=True,  # what is proposed together keeps apart
                seed=derive_seed(self._new.search_seed, "sweep", number) % 2**32,
            )
        trial = self._study.ask()
        # The settings as given may lie outside of the space, and teach nothing about it then.
        given = trial.user_attrs.get("values")
        if given is None or self._is_inside(given):
            for key, values in self._space.items():
                if not isinstance(values, Range):
                    trial.suggest_categorical(key, values)
                elif values.whole:
                    trial.suggest_int(key, int(values.low), int(values.high), log=values.log)
                else:
                    trial.suggest_float(key, values.low, values.high, log=values.log)
        return trial

    def _outcome(self, runs: Sequence[PlannedRun]) -> dict[str, Any]:
        metrics, seconds = dict[str, Any](), list[float]()
        if not any(run.folder.failure.is_file() for run in runs):
            summaries = [Summary.read(run.folder.summary) for run in runs]
            metrics = {name: [s.final[name] for s in summaries] for name in MEASURED}
            seconds = [summary.seconds for summary in summaries]
        folders = [run.folder.path.relative_to(self._output).as_posix() for run in runs]
        return {"runs": folders, "metrics": metrics, "seconds": seconds}

    def _tell(self, trial: BaseTrial) -> None:
        """Let the search learn from what came out of a trial."""
        scores = trial.user_attrs["outcome"]["metrics"].get(self._new.metric)
        if trial.params.keys() != self._space.keys():
            self._study.tell(trial.number, state=TrialState.FAIL)  # teaches nothing
        elif scores:
            self._study.tell(trial.number, statistics.fmean(scores))
        else:
            self._study.tell(trial.number, state=TrialState.PRUNED)  # worse than all complete ones


def _in_words(trial: Trial) -> str:
    tried = ", ".join(f"{key} {shown(value)}" for key, value in trial.values.items())
    top1, nll = trial.mean("top1"), trial.mean("nll")
    if top1 is None or nll is None:
        return f"the loss was not finite, with {tried}"
    return f"top-1 {top1:.2f} %, NLL {nll:.3f} nats, with {tried}"


def _opened(journal: Path, metric: Metric) -> optuna.Study:
    """The study in a journal, which is new or of an earlier call."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if journal.is_file():  # a kill or a full disk may leave half of a line
        content = journal.read_bytes()
        os.truncate(journal, content.rfind(b"\n") + 1)
    try:
        backend = JournalFileBackend(str(journal), JournalFileOpenLock(str(journal)))
        return optuna.create_study(
            storage=JournalStorage(backend),
            study_name="sweep",
            direction="maximize" if metric == "top1" else "minimize",
            load_if_exists=True,
        )
    except (LookupError, TypeError, ValueError) as error:
        raise ValueError(f"{journal} is no record of a sweep: {error!r:.200}") from error


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
