"""The model card of an exported student: what it is, how to use it, and what is known of it.

Most of its text comes from files: names of classes, paths, reasons. All of that is escaped, so that
it is shown as it is and changes nothing else of the card.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import timm
from huggingface_hub import EvalResult, ModelCardData
from jinja2 import Environment, PackageLoader, StrictUndefined

from softlabels.analysis.scores import SCORES
from softlabels.models.record import METADATA_KEY, FileRecord
from softlabels.training.config import Config, dump
from softlabels.training.precision import describe_precision
from softlabels.training.run_records import RunRecord
from softlabels.training.schemas import Summary

__all__ = ["PUBLIC_FAMILIES", "Exported", "Format", "Trained", "Weights", "render_card"]

Format = Literal["safetensors", "onnx"]
Weights = Literal["last", "best"]

PUBLIC_FAMILIES = ("timm", "torchvision")
"""Kinds of model names that a weights file may be built by, as `build_model` holds it."""

_UNKNOWN_LICENCE = "unknown"  # one of the hub's own words
_DATA_LICENCES = {
    "glyphs100": "images rendered from 319 open fonts, of which 306 are under the SIL Open Font "
    "License 1.1 and 13 under the Apache License 2.0; the NOTICE of softlabels tells more",
}
_SPECIAL = re.compile(r"([\\`*_\[\]<>|~$&]|:(?=//))")  # the last would become a link


@dataclass(frozen=True)
class Trained:
    """A trained student's file, and what is known of it.

    Attributes:
        file: The file.
        record: What its header says: how the network is built and fed.
        image_shape: (channels, height, width).
        weights: Which of the run's weights it holds.
        run: The run with its results; None without a summary, as before its end.
        config: The run's settings; None without a run's folder.
    """

    file: Path
    record: FileRecord
    image_shape: tuple[int, int, int]
    weights: Weights
    run: RunRecord | None
    config: Config | None

    @property
    def code_name(self) -> str | None:
        """The name by which `build_model` builds the network; None: it was an object."""
        return None if self.record.model.startswith("object:") else self.record.model


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What was written, and how it was checked.

    Attributes:
        file: The network.
        card: Its model card, beside it.
        format: The file's format.
        network: Name by which `build_model` builds the network; None: no name does.
        parameters: Number of the network's parameters, None where it could not be built.
        largest_difference: Between a logit of the file and of the trained network, on random
            images; None where the network could not be built, and the files were compared.
        num_images: How many of these images.
        opset: The operator set of an ONNX file.
        license: Of the weights, None where nobody has said it.
    """

    file: Path
    card: Path
    format: Format
    network: str | None
    parameters: int | None
    largest_difference: float | None
    num_images: int
    opset: int | None
    license: str | None


class _Markdown(str):
    """Text that is Markdown already."""

    __slots__ = ()


def render_card(trained: Trained, exported: Exported) -> str:
    """Write a model card as the Hugging Face hub reads it: YAML between two rules, then Markdown.

    Args:
        trained: The student.
        exported: The file that was made of it.

    Returns:
        The text.
    """
    templates = Environment(
        loader=PackageLoader("softlabels.export", "."),
        finalize=_escaped,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    templates.filters |= {"code": _code, "fenced": _fenced, "repr": lambda v: _Markdown(repr(v))}
    record, config = trained.record, trained.config
    run = None if trained.run is None else trained.run.summary
    ran_on = None if trained.run is None else trained.run.environment
    kind, _, name = record.model.partition(":")
    height, width = trained.image_shape[1:]
    scores = [key for key in SCORES if run is not None and key in run.final]
    return templates.get_template("model_card.md.j2").render(
        exported=exported,
        record=record,
        weights=trained.weights,
        run=run,
        ran_on={} if ran_on is None else ran_on.texts(),
        config=config,
        kind=kind,
        name=name,
        is_code=kind not in PUBLIC_FAMILIES,
        is_ours=kind == "timm" and _is_ours(name),
        size_argument=_Markdown(_size_argument(kind, name, record)),
        metadata_key=METADATA_KEY,
        front_matter=_Markdown(_front_matter(trained, exported)),
        title=_title(trained),
        height=height,
        width=width,
        colors={1: "gray", 3: "RGB"}.get(record.in_channels, f"{record.in_channels} channels"),
        resize=_resize(record),
        normalization=_normalization(record),
        headings=[SCORES[key].column for key in scores],
        results=[] if run is None else _results(run, scores),
        published=None if config is None else _published(config),
        training={} if config is None else _training(config, run),
        settings=None if config is None else dump(config),
        data_licence=_DATA_LICENCES.get(run.data if run else "", "unknown, nothing here tells it"),
        origin=None if config is None else _origin(config),
        has_teacher=config is not None and _teacher(config) is not None,
        version=version("softlabels"),
    )


def _escaped(value: object) -> object:
    """Text as Markdown that shows it; jinja2 calls this for everything that it fills in."""
    if isinstance(value, str) and not isinstance(value, _Markdown):
        return _SPECIAL.sub(r"\\\1", _one_line(value))
    return value


def _one_line(text: object) -> str:
    return " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())


def _code(text: str) -> _Markdown:
    """A code span that shows any text; not for tables, where a bar would end the cell."""
    line = _one_line(text)
    ticks = "`" * (1 + max(map(len, re.findall("`+", line)), default=0))
    space = " " if "`" in line else ""
    return _Markdown(f"{ticks}{space}{line}{space}{ticks}")


def _fenced(text: str, language: str) -> _Markdown:
    """A block of code that shows any text."""
    ticks = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return _Markdown(f"{ticks}{language}\n{text.rstrip()}\n{ticks}")


def _title(trained: Trained) -> str:
    name = trained.record.model.partition(":")[2] or trained.record.model
    return _one_line(name if trained.run is None else f"{name} on {trained.run.summary.data}")


def _front_matter(trained: Trained, exported: Exported) -> str:
    run = None if trained.run is None else trained.run.summary
    family = trained.record.model.partition(":")[0]
    tags = ["image-classification", "softlabels", exported.format]
    tags += [family] if family in PUBLIC_FAMILIES else []
    tags += [run.method] if run is not None and run.method else []
    scores = {} if run is None else run.best if trained.weights == "best" else run.final
    results = [
        EvalResult(
            task_type="image-classification",
            dataset_type=_one_line(run.data),
            dataset_name=_one_line(run.data),
            dataset_split="test",
            metric_type="accuracy",
            metric_name=SCORES[key].column,
            metric_value=scores[key],
        )
        for key in ("top1", "top5")
        if run is not None and math.isfinite(scores.get(key, math.nan))
    ]
    data = ModelCardData(
        license=exported.license or _UNKNOWN_LICENCE,
        tags=[_one_line(tag) for tag in tags],
        datasets=None if run is None else [_one_line(run.data)],
        metrics=["accuracy"],
        pipeline_tag="image-classification",
        model_name=_title(trained),
        eval_results=results or None,
    )
    return data.to_yaml().strip()


def _resize(record: FileRecord) -> str:
    """How the images of a test are resized, as `softlabels predict` does it."""
    height, width = (
        math.floor(side / record.crop_fraction) for side in record.image_size or (0, 0)
    )
    if height == width:
        return f"the shorter side to {height} pixels"
    return f"in its own proportions, to cover {height} x {width} pixels"


def _normalization(record: FileRecord) -> str:
    if record.mean is None or record.std is None:
        return "not recorded"
    mean, std = (
        ", ".join(f"{number:.6g}" for number in values) for values in (record.mean, record.std)
    )
    return f"({mean}) and ({std}), for pixels in 0 to 1"


def _results(run: Summary, scores: list[str]) -> list[tuple[str, list[str]]]:
    """Names and cells of the rows: after the last epoch, and after the best one if it is known."""
    rows = {f"the last epoch, {run.epochs}": run.final}
    if run.best:
        rows[f"the best epoch, {run.best['epoch']}"] = run.best
    return [
        (name, [f"{row[key]:.{SCORES[key].digits}f}" if key in row else "" for key in scores])
        for name, row in rows.items()
    ]


def _published(config: Config) -> str | None:
    """The result of a paper that a run repeats."""
    paper = config.paper
    if paper.table is None or paper.top1 is None:
        return None
    row = "" if paper.row is None else f", {paper.row}"
    deviation = "" if paper.top1_std is None else f" (deviation over runs {paper.top1_std:g})"
    return (
        f"{paper.table}{row}, published top-1 {paper.top1:g} %{deviation}, {paper.reported} epoch"
    )


def _training(config: Config, run: Summary | None) -> dict[str, str]:
    """The settings that a reader looks for first."""
    optimizer, schedule = config.optimizer, config.schedule
    warmup = f"{schedule.warmup_epochs:g} epochs" if schedule.warmup_epochs else ""
    warmup = f"{schedule.warmup_steps} steps" if schedule.warmup_steps else warmup
    facts = {
        "method": config.label + (f" ({config.method.kind})" if ":" in config.method.kind else ""),
        "epochs": str(config.epochs),
        "batch size": str(config.batch_size),
        "optimizer": f"{optimizer.name}, learning rate {optimizer.lr:g}, momentum "
        f"{optimizer.momentum:g}, weight decay {optimizer.weight_decay:g}",
        "schedule": schedule.name + (f", warm-up of {warmup}" if warmup else ""),
        "precision": describe_precision(config),
        "seed": str(config.seed),
    }
    teacher = _teacher(config)
    if teacher is not None:
        facts["teacher"] = teacher
    if run is not None and run.teacher is not None:
        facts["teacher's test top-1"] = f"{run.teacher.top1:.2f} %"
    return facts


def _teacher(config: Config) -> str | None:
    teacher = config.teacher
    if teacher.name is None:
        return None if teacher.cache is None else f"its stored answers, {teacher.cache}"
    weights = "published weights" if teacher.pretrained else teacher.weights
    return teacher.name if weights is None else f"{teacher.name}, {weights}"


def _origin(config: Config) -> str | None:
    """Where the student's first weights came from, if not from random numbers."""
    student = config.student
    if student.weights is not None:
        return student.weights
    if student.pretrained:
        return f"published for {student.name}"
    return student.name if (student.name or "").startswith("file:") else None


def _is_ours(name: str) -> bool:
    """Whether timm knows a network from this package alone."""
    entry = timm.model_entrypoint(name.partition(".")[0])
    return str(entry.__module__).startswith("softlabels.")


def _size_argument(kind: str, name: str, record: FileRecord) -> str:
    """The argument that tells a network the size of its images, where it takes one."""
    side = (record.image_size or (0,))[0]
    if kind == "timm":
        published = timm.get_pretrained_cfg(name)
        is_fixed = published and published.fixed_input_size
        return f", img_size={record.image_size}" if is_fixed else ""
    sizes = {"vit": f", image_size={side}", "maxvit": f", input_size={record.image_size}"}
    return sizes.get(name.partition("_")[0], "")
