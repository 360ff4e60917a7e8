"""`softlabels.train`: a run with its analysis and report."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import nn

from softlabels.data import DataSource
from softlabels.experiments.analyze_run import write_analysis
from softlabels.losses import Method
from softlabels.report import write_report
from softlabels.training.config import resolve
from softlabels.training.observers import Observer, TrainedRun
from softlabels.training.schemas import Gallery
from softlabels.training.trainer import TrainResult, run

__all__ = ["ReportWriter", "train"]


class ReportWriter(Observer):
    """Writes a run's gallery, analysis and report, as far as its settings ask for them."""

    def trained(self, run: TrainedRun) -> None:
        """Write the gallery and the analysis."""
        if run.config.gallery:
            gallery = run.engine.task.gallery(run.engine)
            Gallery.model_validate(gallery).write(run.folder.gallery)
        if run.config.analysis:
            write_analysis(run.folder, run.engine.task.analyze(run.engine))

    def completed(self, run: TrainedRun) -> None:
        """Write the report, which shows the summary too."""
        if run.config.report:
            write_report(
                [run.folder.path],
                run.folder.report,
                title=f"{run.config.label} on {run.engine.source.info.name}",
                notes=[f"Assumed {key}: {reason}" for key, reason in run.config.assumed.items()],
            )


def train(
    data: str | Path | Mapping[str, Any] | DataSource | None = None,
    student: str | Mapping[str, Any] | nn.Module | None = None,
    method: str | Mapping[str, Any] | Method | None = None,
    teacher: str | Mapping[str, Any] | nn.Module | None = None,
    *,
    progress: bool = True,
    **settings: Any,
) -> TrainResult:
    """Train a classifier: the Python form of `softlabels train`.

    Args:
        data: A folder, settings of the data, or a source of your own. None: glyphs100.
        student: A model's name (`timm:NAME`, ...), settings, or a network of your own.
        method: A method's name (`"uskd"`), settings with its `kind`, or a `Method`, whose
            class and settings are recorded. None: cross-entropy alone.
        teacher: A model's name, settings, or a network; needed by some methods. Settings may have
            a network as the name: `{"name": network, "check": "warn"}`.
        progress: Whether a progress bar is shown.
        **settings: Any other setting of a run, as in a recipe: `epochs=20`,
            `optimizer={"lr": 0.1}`, `output="runs/mine"`.

    Returns:
        Folder, metrics and the trained network.

    Raises:
        ValueError: A setting or an input that does not fit, before the first step.

    Example:
        softlabels.train(data="flowers/", student="timm:resnet18", method="uskd", epochs=30)
    """
    values = {name: str(v) if isinstance(v, Path) else v for name, v in settings.items()}
    modules: dict[str, nn.Module] = {}
    for part, given in (("student", student), ("teacher", teacher)):
        if given is None:
            continue
        part_settings = dict(given) if isinstance(given, Mapping) else {"name": given}
        name = part_settings.get("name")
        if isinstance(name, nn.Module):
            modules[part] = name
            part_settings["name"] = f"object:{type(name).__name__}"
        values[part] = part_settings
    own = method if isinstance(method, Method) else None
    if isinstance(method, str):
        values["method"] = {"kind": method}
    elif isinstance(method, Mapping):
        values["method"] = dict(method)
    elif method is not None and own is None:
        raise TypeError(
            "method must be a name, settings or a softlabels.losses.Method, "
            f"got {type(method).__name__}"
        )
    source: DataSource | None = None
    if isinstance(data, str | Path):
        values["data"] = {"path": str(data)}
    elif isinstance(data, Mapping):
        values["data"] = dict(data)
    elif data is not None:
        source = data
        values["data"] = {"source": f"object:{type(data).__name__}"}
    return run(
        resolve(values, own),
        student=modules.get("student"),
        teacher=modules.get("teacher"),
        method=own,
        source=source,
        observers=[ReportWriter()],
        console=Console(stderr=True) if progress else None,
    )
