"""A run's folder: what is written where, and whether a run may write into it."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from softlabels.training.config import Config, dump, load_recipe, resolve

__all__ = ["RunFolder", "environment"]

_PACKAGES = ("softlabels", "torch", "torchvision", "timm", "accelerate", "torchmetrics", "numpy")
# What may differ between a run and its continuation: it changes no number.
_FREE = {"output", "threads", "log_every"}


class RunFolder:
    """Names and checks of the files of one run.

    Args:
        path: The folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.environment = path / "environment.json"
        self.summary = path / "summary.json"
        self.gallery = path / "gallery.json"
        self.report = path / "report.html"
        self.last = path / "checkpoints" / "last.pt"
        self.student = path / "student.safetensors"
        self.best_student = path / "student_best.safetensors"

    def is_complete(self) -> bool:
        """Whether a run ended here."""
        if not self.summary.is_file():
            return False
        content: dict[str, Any] = json.loads(self.summary.read_text(encoding="utf-8"))
        return bool(content.get("complete"))

    def check(self, config: Config) -> None:
        """Check that the folder is new, or holds a run of the same settings.

        Raises:
            ValueError: It holds a run with other settings, or something that is no run.
        """
        if self.config.is_file():
            before = resolve(load_recipe(str(self.config)))
            old, new = before.model_dump(), config.model_dump()
            differing = [k for k in new if k not in _FREE and old.get(k) != new[k]]
            if differing:
                key = differing[0]
                raise ValueError(
                    f"{self.path} holds a run with another {key}: it has {old[key]!r:.120}, this "
                    f"run {new[key]!r:.120}; choose another --output, or remove the folder"
                )
        elif self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            raise ValueError(f"{self.path} exists and is no run folder: choose another --output")

    def claim(self, config: Config) -> None:
        """`check`, then make the folder and write the configuration."""
        self.check(config)
        self.path.mkdir(parents=True, exist_ok=True)
        self.config.write_text(dump(config), encoding="utf-8")

    def write_json(self, path: Path, content: Any) -> None:
        """Write a JSON file whole or not at all."""
        temporary = path.with_suffix(".tmp")
        temporary.write_text(
            json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
        )
        os.replace(temporary, path)


def environment(config: Config, device: torch.device, num_processes: int) -> dict[str, Any]:
    """Versions, commit, hardware and seed of a run."""
    versions: dict[str, Any] = {}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    accelerator = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "python": platform.python_version(),
        **versions,
        "commit": _commit(),
        "system": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": str(device),
        "accelerator": accelerator,
        "processes": num_processes,
        "seed": config.seed,
        "command": " ".join([_program(), *sys.argv[1:]]),
    }


def _program() -> str:
    name = Path(sys.argv[0]).name
    return "python -m softlabels" if name == "__main__.py" else name


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
