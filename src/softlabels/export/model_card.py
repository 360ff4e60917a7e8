"""The model card of an exported student: what it is, how to use it, and what is known of it.

Most of its text comes from files: names of classes, paths, reasons. All of that is escaped, so that
it is shown as it is and changes nothing else of the card.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from importlib.metadata import version
from typing import Literal

import timm
from huggingface_hub import EvalResult, ModelCardData
from jinja2 import Environment, StrictUndefined

from softlabels.models.record import METADATA_KEY, FileRecord
from softlabels.training.config import Config, dump
from softlabels.training.run_records import RunRecord
from softlabels.training.schemas import Summary

__all__ = ["PUBLIC_FAMILIES", "CardFacts", "Format", "Weights", "render_card"]

Format = Literal["safetensors", "onnx"]
Weights = Literal["last", "best"]

PUBLIC_FAMILIES = ("timm", "torchvision")
"""Kinds of model names that a weights file may be built by, as `build_model` holds it."""

_UNKNOWN_LICENCE = "unknown"  # one of the hub's own words
_DATA_LICENCES = {
    "glyphs100": "images rendered from 319 open fonts, of which 306 are under the SIL Open Font "
    "License 1.1 and 13 under the Apache License 2.0; the NOTICE of softlabels tells more",
}
_HEADINGS = {
    "top1": "top-1 %",
    "top5": "top-5 %",
    "group_top1": "group top-1 %",
    "nll": "NLL nats",
    "ece": "ECE %",
}
_SPECIAL = re.compile(r"([\\`*_\[\]<>|~$&]|:(?=//))")  # the last would become a link


@dataclass(frozen=True, kw_only=True)
class CardFacts:
    """What a card tells.

    Attributes:
        file: Name of the exported file, which lies beside the card.
        format: Its format.
        record: How the network is built and fed.
        weights: Those after the last epoch, or of the best one.
        network: Name by which `build_model` builds the network; None: no name does.
        parameters: Number of the network's parameters, None where it was not built.
        largest_difference: Between the logits of the file and of the network, None where the
            network was not built.
        num_images: Random images on which the two were compared.
        opset: The operator set of an ONNX file.
        license: Of the weights, None where nobody has said it.
        run: The run with its results, None where there is none or it has not ended.
        config: The run's settings, None where there are none.
    """

    file: str
    format: Format
    record: FileRecord
    weights: Weights
    network: str | None
    parameters: int | None
    largest_difference: float | None
    num_images: int
    opset: int | None
    license: str | None
    run: RunRecord | None
    config: Config | None


class _Markdown(str):
    """Text that is Markdown already."""

    __slots__ = ()


@dataclass(frozen=True)
class _Row:
    """A row of the results."""

    name: str
    cells: tuple[str, ...]


def render_card(facts: CardFacts) -> str:
    """Write a model card as the Hugging Face hub reads it: YAML between two rules, then Markdown.

    Args:
        facts: What it tells.

    Returns:
        The text.
    """
    environment = Environment(
        finalize=_escaped,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"code": _code, "fenced": _fenced, "markdown": _Markdown}
    template = resources.files("softlabels.export").joinpath("model_card.md.j2")
    record, config = facts.record, facts.config
    run = None if facts.run is None else facts.run.summary
    ran_on = None if facts.run is None else facts.run.environment
    height, width = record.image_size or (0, 0)
    scores = [key for key in _HEADINGS if run is not None and key in run.final]
    return environment.from_string(template.read_text(encoding="utf-8")).render(
        facts=facts,
        record=record,
        run=run,
        ran_on={} if ran_on is None else ran_on.texts(),
        config=config,
        is_code=record.model.partition(":")[0] not in PUBLIC_FAMILIES,
        front_matter=_Markdown(_front_matter(facts)),
        title=_title(facts),
        label=None if config is None else config.label,
        data=None if run is None else run.data,
        height=height,
        width=width,
        colors={1: "gray", 3: "RGB"}.get(record.in_channels, f"{record.in_channels} channels"),
        resize=_resize(record),
        normalization=_normalization(record),
        blocks=_loading_code(facts),
        headings=[_HEADINGS[key] for key in scores],
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
    return _SPECIAL.sub(r"\\\1", _one_line(value)) if _is_plain(value) else value


def _is_plain(value: object) -> bool:
    return isinstance(value, str) and not isinstance(value, _Markdown)


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


def _title(facts: CardFacts) -> str:
    name = facts.record.model.partition(":")[2] or facts.record.model
    return _one_line(name if facts.run is None else f"{name} on {facts.run.summary.data}")


def _front_matter(facts: CardFacts) -> str:
    run = None if facts.run is None else facts.run.summary
    family = facts.record.model.partition(":")[0]
    tags = ["image-classification", "softlabels", facts.format]
    tags += [family] if family in PUBLIC_FAMILIES else []
    tags += [run.method] if run is not None and run.method else []
    scores = {} if run is None else run.best if facts.weights == "best" else run.final
    results = [
        EvalResult(
            task_type="image-classification",
            dataset_type=_one_line(run.data),
            dataset_name=_one_line(run.data),
            dataset_split="test",
            metric_type="accuracy",
            metric_name=_HEADINGS[key],
            metric_value=scores[key],
        )
        for key in ("top1", "top5")
        if run is not None and math.isfinite(scores.get(key, math.nan))
    ]
    data = ModelCardData(
        license=facts.license or _UNKNOWN_LICENCE,
        tags=[_one_line(tag) for tag in tags],
        datasets=None if run is None else [_one_line(run.data)],
        metrics=["accuracy"],
        pipeline_tag="image-classification",
        model_name=_title(facts),
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


def _results(run: Summary, scores: list[str]) -> list[_Row]:
    def row(name: str, values: Mapping[str, float]) -> _Row:
        digits = {"nll": 4}
        cells = (f"{values[key]:.{digits.get(key, 2)}f}" if key in values else "" for key in scores)
        return _Row(name, tuple(cells))

    rows = [row(f"the last epoch, {run.epochs}", run.final)]
    if run.best:
        rows.append(row(f"the best epoch, {run.best['epoch']}", run.best))
    return rows


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
        "precision": {"no": "float32"}.get(config.precision, config.precision),
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


def _loading_code(facts: CardFacts) -> list[tuple[str, str]]:
    """Blocks of Python that load the file, with a sentence before each."""
    record, file = facts.record, facts.file
    kind, _, name = record.model.partition(":")
    if facts.format == "onnx":
        return [("With onnxruntime, any number of images at a time:", _onnx_code(facts))]
    if kind not in PUBLIC_FAMILIES:
        return [] if facts.network is None else [("With the network's code:", _own_code(facts))]
    by_itself = (
        "With softlabels, which reads from the file what network it is:",
        "from softlabels.export.predict import load_student\n\n"
        f"model, record = load_student({file!r})",
    )
    if kind == "timm":
        return [by_itself, ("With timm:", _timm_code(name, file, record))]
    if record.in_channels != 3:  # torchvision itself has no such network
        return [by_itself]
    return [by_itself, ("With torchvision:", _torchvision_code(name, file, record))]


def _onnx_code(facts: CardFacts) -> str:
    shape = (2, facts.record.in_channels, *(facts.record.image_size or ()))
    return f"""\
import json

import numpy
import onnxruntime

session = onnxruntime.InferenceSession({facts.file!r}, providers=["CPUExecutionProvider"])
images = numpy.zeros({shape}, dtype=numpy.float32)  # normalized as above
(logits,) = session.run(["logits"], {{"images": images}})
record = json.loads(session.get_modelmeta().custom_metadata_map["{METADATA_KEY}"])
class_names = record["class_names"]"""


def _own_code(facts: CardFacts) -> str:
    record = facts.record
    return f"""\
from softlabels.models import build_model
from softlabels.io.weights import load_weights

model = build_model(
    {facts.network!r}, num_classes={record.num_classes}, in_channels={record.in_channels},
    image_size={record.image_size}, settings={record.settings!r},
)
load_weights(model, {facts.file!r})
model.eval()"""


def _timm_code(name: str, file: str, record: FileRecord) -> str:
    architecture = name.partition(".")[0]
    is_ours = timm.model_entrypoint(architecture).__module__.startswith("softlabels.")
    published = timm.get_pretrained_cfg(name)
    size = f", img_size={record.image_size}" if published and published.fixed_input_size else ""
    imports = "import softlabels.models  # registers the network\n" if is_ours else ""
    return f"""\
{imports}import timm

model = timm.create_model(
    {name!r}, checkpoint_path={file!r}, num_classes={record.num_classes},
    in_chans={record.in_channels}{size}{_as_arguments(record)}
).eval()"""


def _torchvision_code(name: str, file: str, record: FileRecord) -> str:
    sizes = {
        "vit": f", image_size={(record.image_size or (0,))[0]}",
        "maxvit": f", input_size={record.image_size}",
    }
    size = sizes.get(name.partition("_")[0], "")
    return f"""\
import torchvision
from safetensors.torch import load_file

model = torchvision.models.get_model(
    {name!r}, weights=None, num_classes={record.num_classes}{size}{_as_arguments(record)}
)
model.load_state_dict(load_file({file!r}))
model.eval()"""


def _as_arguments(record: FileRecord) -> str:
    return f", **{record.settings!r}" if record.settings else ""
