"""The schema of a run: every setting, its default and its range; YAML is its record.

The settings of methods and of data sources are declared once, by the keyword-only arguments of
their own constructors; the schema is made from those.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping
from functools import reduce
from operator import or_
from typing import Annotated, Any, Literal, TypeAlias, Union, get_args

import docstring_parser
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model
from torch import nn

from softlabels.data.source import SOURCES
from softlabels.losses import METHODS
from softlabels.losses.label_smoothing import SmoothOver
from softlabels.signals import Signal, reads_teacher
from softlabels.training.recipe import ConfigError, load_recipe, recipe_names

__all__ = [
    "METHOD_SETTINGS",
    "Config",
    "ConfigError",
    "DataSettings",
    "MethodSettings",
    "build_method",
    "checked",
    "describe_method",
    "dump",
    "explain",
    "load_recipe",
    "method_reads_teacher",
    "parse",
    "recipe_names",
    "resolve",
    "with_method",
]

# More is a mistake, or means harm: the numbers end in sizes of memory and in loops.
_MOST = 1_000_000
_MOST_PIXELS = 16_384
_LARGEST_FACTOR = 1e30  # what float32 multiplies with, with room for products
_LONGEST_MESSAGE = 600

# A whole number beyond the limit becomes a fraction, which no depth and no width can be.
Setting: TypeAlias = bool | Annotated[int, Field(ge=-_MOST, le=_MOST)] | float | str


class Section(BaseModel):
    """Base of all parts of the schema: unknown keys are errors, nothing changes afterwards."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def _keyword_settings(target: Callable[..., Any]) -> dict[str, tuple[Any, Any, str]]:
    """Type, default and description of each keyword-only argument of a constructor."""
    bases = [*reversed(inspect.getmro(target))] if inspect.isclass(target) else [target]
    documented = [docstring_parser.parse(inspect.cleandoc(base.__doc__ or "")) for base in bases]
    texts = {
        parameter.arg_name: " ".join((parameter.description or "").split())
        for doc in documented
        for parameter in doc.params
    }
    call = target.__init__ if inspect.isclass(target) else target
    parameters = inspect.signature(call, eval_str=True).parameters
    return {
        name: (parameter.annotation, parameter.default, texts.get(name, ""))
        for name, parameter in parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY
    }


class MethodSettings(Section):
    """Base of the methods' settings; `kind` tells them apart."""

    kind: str


def _method_settings(kind: str, method: type[nn.Module]) -> type[MethodSettings]:
    fields: dict[str, Any] = {"kind": (Literal[kind], kind)}
    for name, (annotation, default, text) in _keyword_settings(method).items():
        if name != "reduction":  # a step's loss is a batch mean
            fields[name] = (annotation, Field(default, description=text))
    return create_model(f"{kind}_settings", __base__=MethodSettings, **fields)


class NoMethod(MethodSettings):
    """Train with the task's own loss alone."""

    kind: Literal["none"] = "none"


METHOD_SETTINGS: dict[str, type[MethodSettings]] = {
    "none": NoMethod,
    **{kind: _method_settings(kind, method) for kind, method in METHODS.items()},
}


def _data_fields() -> dict[str, Any]:
    """All settings of all sources; None stands for the source's own default."""
    found: dict[str, list[tuple[str, Any, Any, str]]] = {}
    for source, constructor in SOURCES.items():
        for name, (annotation, default, text) in _keyword_settings(constructor).items():
            found.setdefault(name, []).append((source, annotation, default, text))
    fields: dict[str, Any] = {}
    for name, uses in found.items():
        if name == "path":
            continue
        types = [*dict.fromkeys(use[1] for use in uses), type(None)]
        annotation = reduce(or_, types)
        by_default: dict[str, list[str]] = {}
        for source, _, default, _ in uses:
            by_default.setdefault(str(default), []).append(source)
        defaults = "; ".join(f"{', '.join(names)}: {value}" for value, names in by_default.items())
        text = uses[0][3].rstrip(".")
        fields[name] = (annotation, Field(None, description=f"{text}. [{defaults}]"))
    return fields


class _DataChoice(Section):
    source: str | None = Field(
        None,
        description=f"Kind of data: {', '.join(SOURCES)}. None: by what `path` holds; without a "
        "path, glyphs100.",
    )
    path: str | None = Field(None, description="Folder of the data.")


DataSettings: type[_DataChoice] = create_model(
    "DataSettings", __base__=_DataChoice, **_data_fields()
)


class StudentSettings(Section):
    """The network that is trained."""

    name: str | None = Field(
        None,
        description="timm:NAME, torchvision:NAME, file:PATH or package.module:function. None: "
        "resnet20 for images up to 64 pixels, else resnet18.",
    )
    settings: dict[str, Setting] = Field({}, description="Further arguments of the model.")
    weights: str | None = Field(None, description="File of weights to start from, strictly.")
    pretrained: bool = Field(False, description="Start from the published weights.")


class TeacherSettings(Section):
    """The frozen network that a method may read from."""

    name: str | None = Field(None, description="As the student's name; needed by some methods.")
    cache: str | None = Field(
        None,
        description="Folder that `softlabels cache-teacher` filled: its answers are used in place "
        "of the network's, and its draws of the augmentation are shown again.",
    )
    recipe: str | None = Field(
        None, description="Recipe that trains it, for `softlabels reproduce`."
    )
    settings: dict[str, Setting] = Field({}, description="Further arguments of the model.")
    weights: str | None = Field(
        None,
        description="File of its weights, loaded strictly; package:PATH ships with softlabels.",
    )
    pretrained: bool = Field(False, description="Use the published weights.")
    num_classes: int | None = Field(
        None, ge=2, le=_MOST, description="Classes of its logits, if others."
    )
    class_map: tuple[Annotated[int, Field(ge=0, le=_MOST)], ...] | Literal["names"] | None = Field(
        None,
        description="For each class of the data, the teacher's index of it; or names: found by the "
        "names of the classes.",
    )
    class_names: str | None = Field(
        None,
        description="File with the names of the teacher's classes, one a line or a JSON list. "
        "None: from the header of its weights, or ImageNet's if they are the published ones.",
    )
    input_size: int | None = Field(
        None,
        ge=1,
        le=_MOST_PIXELS,
        description="Pixels; None: what its weights were trained for, else the data's size.",
    )
    mean: tuple[float, ...] | None = Field(None, description="Its mean per channel, 0 to 1.")
    std: tuple[float, ...] | None = Field(None, description="Its deviation per channel, 0 to 1.")
    mode: Literal["eval", "train"] = Field(
        "eval", description="train: batch statistics, as the reference code of NKD ran."
    )
    check: Literal["error", "warn", "off"] = Field(
        "error",
        description="What an accuracy near chance on the test images does, which is measured "
        "before training; off: it is not measured.",
    )


class TaskSettings(Section):
    """The task's own loss, which every method is added to."""

    weight: float = Field(1.0, ge=0, le=_LARGEST_FACTOR, description="Weight of the task's loss.")
    label_smoothing: float = Field(0.0, ge=0, le=1, description="0: plain cross-entropy.")
    smooth_over: SmoothOver = Field("all", description="Classes that share the smoothing.")


class OptimizerSettings(Section):
    """The optimiser, built by timm's factory."""

    name: str = Field("sgd", description="sgd, adamw, or another name of timm's factory.")
    lr: float = Field(
        0.1,
        gt=0,
        le=_LARGEST_FACTOR,
        description="Peak learning rate, for the global batch as it is.",
    )
    momentum: float = Field(0.9, ge=0, lt=1, description="Momentum, or the first beta.")
    nesterov: bool = Field(False, description="Nesterov momentum, for sgd.")
    weight_decay: float = Field(5e-4, ge=0, le=_MOST, description="Weight decay.")
    decay_norm_and_bias: bool = Field(
        True, description="Whether vectors (norms, biases, tokens) decay too."
    )
    decay_norm: bool = Field(
        True, description="False: of the vectors, those of norms alone do not decay."
    )


class ScheduleSettings(Section):
    """The learning rate's schedule, per step, built by timm's factory."""

    name: Literal["cosine", "linear", "step", "multistep", "constant"] = Field(
        "cosine", description="Form."
    )
    warmup: Literal["linear", "constant"] = Field(
        "linear", description="Rising from warmup_lr to the form's rate, or at warmup_lr."
    )
    warmup_epochs: float = Field(0.0, ge=0, le=_MOST, description="Epochs of warm-up.")
    warmup_steps: int = Field(0, ge=0, le=2**31, description="In place of warmup_epochs: steps.")
    warmup_lr: float = Field(
        1e-6, ge=0, le=_LARGEST_FACTOR, description="Learning rate at the first step of a warm-up."
    )
    min_lr: float = Field(
        0.0,
        ge=0,
        le=_LARGEST_FACTOR,
        description="Lowest learning rate of the cosine and of the linear fall.",
    )
    decay_epochs: tuple[Annotated[float, Field(ge=0, le=_MOST)], ...] = Field(
        (), description="multistep: epochs of the drops; step: one number, epochs per drop."
    )
    decay_rate: float = Field(0.1, gt=0, le=1, description="Factor of a drop.")


class MixSettings(Section):
    """Mixup and cutmix, by timm."""

    mixup: float = Field(0.0, ge=0, le=_MOST, description="Alpha of mixup; 0: off.")
    cutmix: float = Field(0.0, ge=0, le=_MOST, description="Alpha of cutmix; 0: off.")
    probability: float = Field(1.0, ge=0, le=1, description="Share of batches that are mixed.")
    switch_probability: float = Field(0.5, ge=0, le=1, description="Cutmix's share if both are on.")


class CheckpointSettings(Section):
    """What is kept for going on after a stop."""

    every: int | None = Field(
        None, ge=1, description="Steps between checkpoints. None: one after each epoch alone."
    )
    keep: int = Field(
        2, ge=1, description="How many are kept; older ones serve if the newest is damaged."
    )


class PaperSettings(Section):
    """Which published result a recipe is for. It changes nothing in the run."""

    table: str | None = Field(None, description="Paper and table.")
    row: str | None = Field(None, description="The row, and the column where there are several.")
    top1: float | None = Field(None, ge=0, le=100, description="Published top-1, %.")
    top1_std: float | None = Field(
        None, ge=0, le=100, description="Published standard deviation over runs, points."
    )
    top5: float | None = Field(None, ge=0, le=100, description="Published top-5, %.")
    gain: float | None = Field(
        None, ge=-100, le=100, description="Published gain over the baseline, points."
    )
    reported: Literal["last", "best"] = Field("last", description="The epoch that was published.")
    baseline: str | None = Field(None, description="Recipe of the row that it is compared with.")
    hardware: str | None = Field(None, description="What the published run was meant for.")


class Config(Section):
    """Settings of a run."""

    data: DataSettings = Field(DataSettings(), description="What is learned from.")
    student: StudentSettings = Field(StudentSettings(), description="What is trained.")
    teacher: TeacherSettings = Field(TeacherSettings(), description="What may teach.")
    method: Annotated[
        Union[tuple(METHOD_SETTINGS.values())],  # type: ignore[valid-type]  # made above  # noqa: UP007
        Field(discriminator="kind"),
    ] = Field(NoMethod(), description="What is added to the task's loss.")
    method_weight: float | None = Field(
        None,
        ge=0,
        le=_LARGEST_FACTOR,
        description="Weight of the method's loss. None: what its paper uses most.",
    )
    task: TaskSettings = Field(TaskSettings(), description="The task's own loss.")
    optimizer: OptimizerSettings = Field(OptimizerSettings(), description="The optimiser.")
    schedule: ScheduleSettings = Field(ScheduleSettings(), description="The learning rate.")
    mix: MixSettings = Field(MixSettings(), description="Mixing of images.")
    taps: dict[str, str] = Field(
        {}, description="Paths to read features from, in place of what is found: middle, last."
    )
    epochs: int = Field(20, ge=1, le=_MOST, description="Passes over the training set.")
    batch_size: int = Field(128, ge=1, le=_MOST, description="Images per step, over all processes.")
    accumulation: int = Field(1, ge=1, description="Parts that a process cuts its batch into.")
    clip_norm: float | None = Field(None, gt=0, description="Largest norm of the gradient.")
    ema_decay: float | None = Field(None, gt=0, lt=1, description="Decay of averaged weights.")
    precise_bn: int | None = Field(
        None,
        ge=1,
        description="Training images over which BatchNorm's statistics are averaged anew before "
        "each evaluation. None: the running ones.",
    )
    precision: Literal["no", "bf16", "fp16"] = Field("no", description="Mixed precision.")
    compile: bool = Field(False, description="Compile the trained module.")
    channels_last: bool = Field(False, description="Memory format of images and weights.")
    seed: int = Field(0, ge=0, lt=2**63, description="Of everything random.")
    eval_batch_size: int = Field(
        256, ge=1, le=_MOST, description="Images per step of an evaluation."
    )
    log_every: int = Field(50, ge=1, description="Steps between log lines.")
    checkpoint: CheckpointSettings = Field(
        CheckpointSettings(), description="What is kept for going on."
    )
    max_skipped_steps: int = Field(
        50,
        ge=0,
        description="Mixed precision: steps in a row that are skipped because the loss or the "
        "gradient is not finite; one more stops the run.",
    )
    process_timeout: float = Field(
        600.0,
        gt=0,
        le=1e7,
        description="Seconds that a process waits for the others before it gives up.",
    )
    gallery: int = Field(12, ge=0, le=1000, description="Test images whose soft labels are stored.")
    device: Literal["auto", "cpu"] = Field("auto", description="Where to train.")
    threads: int | None = Field(
        None, ge=1, le=1024, description="CPU threads; None: torch's choice."
    )
    output: str | None = Field(
        None, description="Folder of the run. None: runs/DATA-STUDENT-METHOD-SEED."
    )
    assumed: dict[str, str] = Field(
        {}, description="Settings that no source gives, each with the reason for its value."
    )
    paper: PaperSettings = Field(PaperSettings(), description="The published result.")

    @property
    def label(self) -> str:
        """What a plot calls this run."""
        if self.method.kind != "none":
            return str(self.method.kind)
        return "label_smoothing" if self.task.label_smoothing else "cross_entropy"


def build_method(settings: MethodSettings) -> nn.Module | None:
    """The method's module; None for `"none"`.

    Raises:
        ValueError: A value that the method does not take.
    """
    if settings.kind == "none":
        return None
    return METHODS[settings.kind](**settings.model_dump(exclude={"kind"}))


def method_reads_teacher(settings: MethodSettings) -> bool:
    """Whether a method with these settings reads from a teacher."""
    reads: Mapping[str, Signal] = getattr(build_method(settings), "reads", {})
    return any(reads_teacher(signal) for signal in reads.values())


def describe_method(kind: str) -> str:
    """What a method reads and its settings, as lines of text."""
    if kind == "none":
        return f"none\n  {inspect.getdoc(NoMethod)}"
    method = METHODS[kind]
    summary = (inspect.getdoc(inspect.getmodule(method)) or "").partition("\n")[0]
    reads: Mapping[str, Signal] = getattr(method(), "reads", {})
    weight = float(getattr(method, "recommended_weight", 1.0))
    lines = [kind, f"  {summary}", f"  reads: {', '.join(map(str, reads.values()))}"]
    lines.append(f"  method_weight: {weight:g} unless set")
    for name, field in METHOD_SETTINGS[kind].model_fields.items():
        if name != "kind":
            lines.append(f"  {name} = {field.default!r}: {field.description}")
    return "\n".join(lines)


def with_method(values: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """Choose the method's kind; settings of another kind are dropped.

    Raises:
        ConfigError: No such method.
    """
    if kind not in METHOD_SETTINGS:
        near = difflib.get_close_matches(kind[:_LONGEST_MESSAGE], METHOD_SETTINGS, n=3)
        raise ConfigError(
            f"no method {kind!r:.80}: expected one of {', '.join(METHOD_SETTINGS)}"
            + (f"; near: {', '.join(near)}" if near else "")
        )
    method = values.get("method")
    if isinstance(method, Mapping) and method.get("kind") == kind:
        return dict(values)
    return {**values, "method": {"kind": kind}}


def parse(values: Mapping[str, Any]) -> Config:
    """Check a mapping of settings against the schema, each by itself.

    Raises:
        ConfigError: The first thing that does not fit, with its path and near names.
    """
    method = values.get("method")
    if isinstance(method, str):
        values = with_method({k: v for k, v in values.items() if k != "method"}, method)
    elif isinstance(method, Mapping) and "kind" in method:
        with_method({}, str(method["kind"]))
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise ConfigError(explain(error)) from error


def checked(config: Config) -> Config:
    """Check that the settings fit each other.

    Raises:
        ConfigError: They do not.
    """
    try:
        build_method(config.method)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"method: {error}") from error
    teacher = config.teacher
    if method_reads_teacher(config.method) and teacher.name is None and teacher.cache is None:
        raise ConfigError(
            f"method {config.method.kind!r} reads from a teacher: give teacher.name and "
            "teacher.weights, or teacher.cache"
        )
    if teacher.cache is not None and (config.mix.mixup or config.mix.cutmix):
        raise ConfigError(
            f"teacher.cache holds answers to unmixed images: mix.mixup and mix.cutmix must be 0, "
            f"got {config.mix.mixup:g} and {config.mix.cutmix:g}"
        )
    if (config.teacher.mean is None) != (config.teacher.std is None):
        raise ConfigError("teacher.mean and teacher.std go together, got one of them")
    if config.teacher.class_names is not None and config.teacher.class_map != "names":
        raise ConfigError(
            "teacher.class_names is read for teacher.class_map names, got "
            f"{config.teacher.class_map!r:.80}"
        )
    if config.batch_size % config.accumulation:
        raise ConfigError(
            f"batch_size {config.batch_size} must be a multiple of accumulation "
            f"{config.accumulation}"
        )
    schedule = config.schedule
    if schedule.warmup_epochs and schedule.warmup_steps:
        raise ConfigError(
            "schedule.warmup_epochs and schedule.warmup_steps exclude each other, got "
            f"{schedule.warmup_epochs:g} and {schedule.warmup_steps}"
        )
    wanted = {"step": "one number", "multistep": "one or more numbers"}.get(schedule.name)
    fits = {"step": len(schedule.decay_epochs) == 1, "multistep": len(schedule.decay_epochs) >= 1}
    if wanted and not fits[schedule.name]:
        raise ConfigError(
            f"schedule {schedule.name} takes {wanted} in decay_epochs, got {schedule.decay_epochs}"
        )
    return config


def resolve(values: Mapping[str, Any]) -> Config:
    """`parse`, then `checked`."""
    return checked(parse(values))


def explain(error: ValidationError) -> str:
    """One line about the first thing that does not fit the schema."""
    return _explain(error)[:_LONGEST_MESSAGE]


def _explain(error: ValidationError) -> str:
    first = error.errors(include_url=False, include_context=False)[0]
    path = [str(part) for part in first["loc"]]
    if len(path) > 1 and path[0] == "method" and path[1] in METHOD_SETTINGS:
        del path[1]  # pydantic's tag of the union
    path = [part for part in path if not part.startswith(("tuple[", "literal["))]  # likewise
    where = ".".join(path)
    if first["type"] == "extra_forbidden":
        known = _keys_at(first["loc"][:-1])
        near = difflib.get_close_matches(path[-1][:_LONGEST_MESSAGE], known, n=3)
        return f"unknown setting {where!r:.200}: expected {', '.join(near or known)}"
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] in ("value_error", "assertion_error"):
        return f"{where}: {message}" if where else message
    return f"{where:.200}: {message}, got {first.get('input')!r:.80}"


def _keys_at(location: tuple[int | str, ...]) -> list[str]:
    """Names of the settings of the section at this place."""
    model: Any = Config
    for part in location:
        if part in METHOD_SETTINGS:
            model = METHOD_SETTINGS[str(part)]
            continue
        annotation = model.model_fields[str(part)].annotation
        inner = [a for a in (annotation, *get_args(annotation)) if inspect.isclass(a)]
        model = next((a for a in inner if issubclass(a, BaseModel)), model)
    return list(model.model_fields)


def dump(config: Config) -> str:
    """The YAML record of a run: every setting, resolved; training it repeats the run."""
    values = config.model_dump(mode="json")
    values["data"] = {key: value for key, value in values["data"].items() if value is not None}
    text: str = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    return text
