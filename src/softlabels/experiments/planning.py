"""Plans runs that share an output folder: each once, named by what decides its numbers."""

from __future__ import annotations

import json
from hashlib import blake2b
from pathlib import Path

from softlabels.experiments.launcher import PlannedRun
from softlabels.io.files import replace_file
from softlabels.training.config import Config, dump
from softlabels.training.run_folder import fixed_settings

__all__ = ["RunPlan"]


class RunPlan:
    """Runs below one folder; equal settings and seed are one run, whoever asks for it.

    A run's folder is `STUDENT-LABEL-HASH/seed-SEED`, with a hash of its resolved settings. What was
    complete before is found there again, and a changed setting leads elsewhere.

    Args:
        folder: The folder.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._runs: dict[Path, PlannedRun] = {}
        self._rounds: dict[Path, int] = {}

    def add(
        self, name: str, config: Config, seed: int, *, taught_by: PlannedRun | None = None
    ) -> PlannedRun:
        """Plan a run, if it is not planned yet.

        Args:
            name: What is shown of it.
            config: Its settings; seed and output are set here.
            seed: Its seed.
            taught_by: A planned run whose student is the teacher.
        """
        values = config.model_copy(update={"seed": 0})
        by: str | None = None
        if taught_by is not None:
            weights = {"weights": str(taught_by.folder.student)}
            config = config.model_copy(
                update={"teacher": config.teacher.model_copy(update=weights)}
            )
            # The folder is named by what decides the teacher, not by where it lies.
            by = str(taught_by.folder.path.relative_to(self._folder))
        folder = self._folder / _name(values, by) / f"seed-{seed}"
        if folder not in self._runs:
            config = config.model_copy(update={"seed": seed, "output": str(folder)})
            file = folder.with_suffix(".yaml")
            file.parent.mkdir(parents=True, exist_ok=True)
            with replace_file(file) as handle:
                handle.write(dump(config).encode())
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


def _name(config: Config, taught_by: str | None) -> str:
    """A folder's name: student, label, and a hash of what decides the numbers."""
    values = fixed_settings(config)
    if taught_by is not None:
        values["teacher"]["weights"] = taught_by
    text = json.dumps(values, sort_keys=True, default=str)
    digest = blake2b(text.encode(), digest_size=4).hexdigest()
    student = (config.student.name or "default").rpartition(":")[2].replace("/", "_")
    return f"{student}-{config.label}-{digest}"
