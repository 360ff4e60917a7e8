"""A run's folder: what is written where, and whether a run may write into it."""

from __future__ import annotations

import contextlib
import os
import platform
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from softlabels.data import DataSource
from softlabels.io.files import remove_leftovers, write_text
from softlabels.training.checkpoint import CheckpointFolder
from softlabels.training.config import Config, dump, load_recipe, parse
from softlabels.training.recipes import flattened
from softlabels.training.schemas import DataContent, Environment, Summary

__all__ = ["RunFolder", "as_begun", "content_of", "differences", "environment", "fixed_settings"]

_PACKAGES = ("softlabels", "torch", "torchvision", "timm", "accelerate", "torchmetrics", "numpy")
# What may differ between a run and its continuation: it changes no number.
_FREE = {
    "analysis",
    "assumed",
    "checkpoint",
    "log_every",
    "max_skipped_steps",
    "output",
    "paper",
    "process_timeout",
    "report",
    "threads",
}
_FREE_OF_DATA = {
    "cache",
    "download",
    "index",
    "max_bad_images",
    "max_worker_restarts",
    "workers",
}
_FREE_OF_TEACHER = {"check"}
_MOST_TOLD = 4  # differences in a message


class RunFolder:
    """Names and checks of the files of one run.

    Args:
        path: The folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.data = path / "data.json"
        self.environment = path / "environment.json"
        self.summary = path / "summary.json"
        self.metrics = path / "metrics.jsonl"
        self.timings = path / "timings.jsonl"
        self.gallery = path / "gallery.json"
        self.analysis = path / "analysis.json"
        self.predictions = path / "predictions.npz"
        self.report = path / "report.html"
        self.teacher = path / "teacher.json"
        self.failure = path / "failure.json"
        self.skipped_images = path / "skipped_images.json"
        self.lock = path / "run.lock"
        self.student = path / "student.safetensors"
        self.best_student = path / "student_best.safetensors"

    def is_complete(self) -> bool:
        """Whether a run ended here."""
        summary = Summary.found(self.summary)
        return summary is not None and summary.complete

    def checkpoints(self, keep: int) -> CheckpointFolder:
        """The run's checkpoints, of which so many are kept."""
        return CheckpointFolder(self.path / "checkpoints", keep)

    def check(self, config: Config, data: DataContent | None = None) -> None:
        """Check that the folder is new, or holds a run of the same settings and the same data.

        Where both runs tell what their data are (`content_of`), the paths of these may differ.

        Raises:
            ValueError: It holds a run with other settings or data, or something that is no run.
        """
        if self.config.is_file():
            before = parse(load_recipe(str(self.config)))
            config = as_begun(config, self.decided())
            old, new = (flattened(fixed_settings(each)) for each in (before, config))
            known = DataContent.found(self.data)
            if known is not None and data is not None:
                old, new = (
                    {**settings, "data.path": None, **flattened(content.model_dump(), "data: ")}
                    for settings, content in ((old, known), (new, data))
                )
            found = differences(old, new)
            if found:
                raise ValueError(
                    f"{self.path} holds another run: {found}; choose another --output, or remove "
                    "the folder"
                )
        elif self.path.exists():
            # A killed start leaves some files, and earlier generations have folders here.
            ours = {self.lock, *self.path.glob(".*.part"), *self.path.glob("generation-*")}
            if not self.path.is_dir() or not ours.issuperset(self.path.iterdir()):
                raise ValueError(
                    f"{self.path} exists and is no run folder: choose another --output"
                )

    def decided(self) -> dict[str, Any]:
        """What the run in the folder decided of what settings may leave open (`auto`)."""
        if not self.config.is_file():
            return {}
        before = parse(load_recipe(str(self.config)))
        return {name: getattr(before, name) for name in ("precision", "channels_last")}

    @contextlib.contextmanager
    def held(self, config: Config, data: DataContent | None = None) -> Iterator[None]:
        """`check`, then make the folder, write the configuration, and keep other runs out.

        The lock is the system's: it ends with the process, however that ends.

        Raises:
            ValueError: As `check`, or another run is at work in the folder.
        """
        self.check(config, data)
        self.path.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(self.lock, timeout=0):
                self.check(config, data)  # what another run wrote before it let go
                remove_leftovers(self.path)
                self.checkpoints(config.checkpoint.keep).clean()
                write_text(self.config, dump(config))
                if data is not None:
                    data.write(self.data)
                self.failure.unlink(missing_ok=True)
                yield
        except Timeout as error:
            start = Environment.found(self.environment)
            owner = "" if start is None else f", process {start.process} on {start.host}"
            raise ValueError(
                f"{self.path} is in use by another run{owner}: wait for its end, or choose another "
                "--output"
            ) from error

    def write_environment(self, start: Environment) -> None:
        """Write what a start runs on; what earlier starts of the run ran on stays beside it."""
        before = Environment.found(self.environment)
        starts = () if before is None else (*before.earlier_starts, before)
        own = {
            "host": socket.gethostname(),
            "process": os.getpid(),
            "earlier_starts": [each.dump() | {"earlier_starts": []} for each in starts],
        }
        Environment(**start.dump() | own).write(self.environment)


def as_begun(config: Config, decided: Mapping[str, Any]) -> Config:
    """With what a run has decided (`RunFolder.decided`) where the settings leave it open."""
    left_open = {name: value for name, value in decided.items() if getattr(config, name) == "auto"}
    return config.model_copy(update=left_open)


def fixed_settings(config: Config) -> dict[str, Any]:
    """The settings that a run and its continuation share, as plain data.

    A path of the data is the same however it is written: below the working folder it is relative,
    else absolute.
    """
    values = config.model_dump(mode="json", exclude=_FREE)
    for part, free in (("data", _FREE_OF_DATA), ("teacher", _FREE_OF_TEACHER)):
        values[part] = {k: v for k, v in values[part].items() if k not in free}
    path = values["data"].get("path")
    if path is not None and os.path.exists(os.path.expanduser(path)):  # else a name on the hub
        whole, here = Path(os.path.abspath(os.path.expanduser(path))), Path.cwd()
        near = whole.relative_to(here) if whole.is_relative_to(here) else whole
        values["data"]["path"] = near.as_posix()
    return values


def content_of(source: DataSource) -> DataContent:
    """What a run's data are, wherever they lie."""
    find = getattr(source, "fingerprints", None)  # a source of one's own may have none
    return DataContent(
        train_images=source.num_train,
        test_images=source.num_test,
        digest=None if find is None else find()["data"],
    )


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """The settings in which two mappings differ, as `data.image_size: 3 there, 32 here`."""
    keys = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    told = [
        f"{key}: {_shown(before.get(key)):.120} there, {_shown(now.get(key)):.120} here"
        for key in keys[:_MOST_TOLD]
    ]
    more = len(keys) - len(told)
    return "; ".join([*told, *([f"and {more} more"] if more else [])])


def _shown(value: Any) -> str:
    return "none" if value is None else str(value)


def environment(config: Config, device: torch.device, num_processes: int) -> Environment:
    """Versions, commit, hardware and seed of a run."""
    versions: dict[str, str] = {}
    for package in _PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            versions[package] = version(package)
    accelerator = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    name = Path(sys.argv[0]).name
    program = "python -m softlabels" if name == "__main__.py" else name
    return Environment(
        python=platform.python_version(),
        **versions,
        commit=_commit(),
        system=platform.platform(),
        processor=_processor(),
        cores=os.cpu_count(),
        threads=torch.get_num_threads(),
        device=str(device),
        accelerator=accelerator,
        processes=num_processes,
        seed=config.seed,
        command=" ".join([program, *sys.argv[1:]]),
    )


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _commit() -> str | None:
    """The commit of this package's checkout; None for an installed wheel."""
    root = Path(__file__).parents[3]
    if not (root / ".git").exists():
        return None
    try:
        result = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip() or None
