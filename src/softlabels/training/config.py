"""A run's configuration: its sections together, checked; YAML is its record."""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Mapping
from typing import Any, Literal, TypeVar

import yaml
from pydantic import Field, ValidationError

from softlabels.distill.external_inputs import checked_inputs
from softlabels.io.records import problem_of
from softlabels.losses import Defaults, Method, WeightedSum
from softlabels.training.recipes import ConfigError, load_recipe, merged, recipe_names
from softlabels.training.settings import (
    DATA_SETTINGS,
    AnyData,
    AnyMethod,
    CheckpointSettings,
    Count,
    Factor,
    FurtherMethod,
    MethodSettings,
    MixSettings,
    NoMethod,
    OptimizerSettings,
    PaperSettings,
    PeerSettings,
    ScheduleSettings,
    Section,
    StudentSettings,
    TaskSettings,
    TeacherNumber,
    TeacherSettings,
    WarmupEpochs,
    method_class,
    settings_class,
    settings_of_method,
)

__all__ = [
    "Config",
    "ConfigError",
    "build_method",
    "check_unmixed",
    "checked",
    "defaults_of",
    "describe_method",
    "dump",
    "load_recipe",
    "method_reads_teacher",
    "parse",
    "recipe_names",
    "resolve",
    "with_chosen",
    "with_method_defaults",
    "with_object",
]


_Section = TypeVar("_Section", bound=Section)


class Config(Section):
    """Settings of a run."""

    data: AnyData = Field(
        DATA_SETTINGS["glyphs100"](source="glyphs100"), description="What is learned from."
    )
    student: StudentSettings = Field(StudentSettings(), description="What is trained.")
    teacher: TeacherSettings = Field(TeacherSettings(), description="What may teach.")
    method: AnyMethod = Field(NoMethod(), description="What is added to the task's loss.")
    method_weight: Factor | None = Field(
        None, description="Weight of the method's loss. None: what its paper uses most."
    )
    method_warmup_epochs: WarmupEpochs = Field(
        None,
        description="In epoch e, from 1, the method's weight is multiplied by min(e / this, 1); "
        "0: it is not; run: all epochs of the run. None: what its paper uses.",
    )
    method_teacher: TeacherNumber = Field(
        None,
        description="With further_teachers the number of the one that the method reads, from 0; "
        "None: all.",
    )
    further_methods: tuple[FurtherMethod, ...] = Field(
        (), description="Methods that are added to the first one."
    )
    further_teachers: tuple[TeacherSettings, ...] = Field(
        (), description="Teachers besides the first one; by default they teach by their mean."
    )
    peer: PeerSettings = Field(PeerSettings(), description="A network that is trained along.")
    generations: int = Field(
        1,
        ge=1,
        le=100,
        description="Trainings in a row; in each but the first the student of the one before is "
        "the teacher. The first is without a method.",
    )
    task: TaskSettings = Field(TaskSettings(), description="The task's own loss.")
    optimizer: OptimizerSettings = Field(OptimizerSettings(), description="The optimizer.")
    schedule: ScheduleSettings = Field(ScheduleSettings(), description="The learning rate.")
    mix: MixSettings = Field(MixSettings(), description="Mixing of images.")
    taps: dict[str, str] = Field(
        {}, description="Paths to read features from, in place of what is found: middle, last."
    )
    epochs: Count = Field(20, description="Passes over the training set.")
    batch_size: Count = Field(128, description="Images per step, over all processes.")
    grad_accum_steps: int = Field(1, ge=1, description="Parts that a process cuts its batch into.")
    max_grad_norm: float | None = Field(None, gt=0, description="Largest norm of the gradient.")
    ema_decay: float | None = Field(None, gt=0, lt=1, description="Decay of averaged weights.")
    precise_bn: int | None = Field(
        None,
        ge=1,
        description="Training images over which BatchNorm's statistics are averaged anew before "
        "each evaluation. None: the running ones.",
    )
    precision: Literal["auto", "no", "bf16", "fp16"] = Field(
        "auto",
        description="Mixed precision; no: float32. auto: bf16 where the student is faster in it.",
    )
    compile: Literal["auto"] | bool = Field(
        "auto",
        description="Compile the trained module and the method's part of a step. auto: the latter "
        "alone, and not on a CPU.",
    )
    channels_last: Literal["auto"] | bool = Field(
        "auto",
        description="Memory format of images and weights. auto: for networks of convolutions.",
    )
    seed: int = Field(0, ge=0, lt=2**63, description="Of everything random.")
    eval_batch_size: Count = Field(256, description="Images per step of an evaluation.")
    eval_every: Count = Field(1, description="Epochs between evaluations; one is at the end.")
    log_every: int = Field(50, ge=1, description="Steps between log lines.")
    checkpoint: CheckpointSettings = Field(
        CheckpointSettings(), description="What is kept for going on."
    )
    max_skipped_steps: int | None = Field(
        None,
        ge=0,
        description="Steps in a row that are skipped because the loss or the gradient is not "
        "finite; one more stops the run. None: 50 with precision fp16, else 0.",
    )
    process_timeout: float = Field(
        600.0,
        gt=0,
        le=1e7,
        description="Seconds that a process waits for the others before it gives up.",
    )
    gallery: int = Field(12, ge=0, le=1000, description="Test images whose soft labels are stored.")
    analysis: bool = Field(True, description="Write analysis.json and predictions.npz at the end.")
    report: bool = Field(True, description="Write report.html at the end.")
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
            kinds = [self.method.kind, *(further.kind for further in self.further_methods)]
            return "+".join(map(_short, kinds))
        return "label_smoothing" if self.task.label_smoothing else "cross_entropy"


def build_method(config: Config) -> Method | None:
    """The method's module, or the sum of several; None without one.

    Raises:
        ValueError: A value that a method does not take.
    """
    if config.method.kind == "none":
        return None
    chosen = [(config.method, config.method_teacher)]
    chosen += [(_settings_of(further), further.teacher) for further in config.further_methods]
    methods, teachers = dict[str, Method](), dict[str, int]()
    for number, (settings, teacher) in enumerate(chosen, 1):
        name = _short(settings.kind)
        name = name if name not in methods else f"{name}_{number}"
        settings_class(settings.kind)  # which an unknown one has not
        methods[name] = method_class(settings.kind)(**settings.model_dump(exclude={"kind"}))
        if teacher is not None:
            teachers[name] = teacher
    if len(methods) == 1 and not teachers:
        return methods[name]
    return WeightedSum(methods, teachers=teachers)


def _short(kind: str) -> str:
    """What a method is called: its kind, or the name of the user's class."""
    return re.split(r"[:.]", kind)[-1]


def _settings_of(further: FurtherMethod) -> MethodSettings:
    method_class(further.kind)  # which "none" is not
    try:
        return settings_class(further.kind)(kind=further.kind, **further.settings)
    except ValidationError as error:
        raise ValueError(f"{further.kind}: {problem_of(error)}") from error


def method_reads_teacher(method: Method | None) -> bool:
    """Whether a method, with its settings, reads from a teacher."""
    return any(kind.reads_teacher for kind in checked_inputs(method).values())


def defaults_of(method: type[Method] | Method | None) -> Defaults:
    """What a method's paper uses for its weight, and the like."""
    return Defaults() if method is None else method.defaults


def with_method_defaults(config: Config, method: Method | None = None) -> Config:
    """Fill in the weights and warm-ups that the settings leave to the methods' papers.

    A `method` that is given stands in place of the one that they name.
    """
    kind = config.method.kind
    defaults = defaults_of(method_class(kind) if method is None and kind != "none" else method)
    further_methods = []
    for further in config.further_methods:
        own = method_class(further.kind).defaults
        further_methods.append(_filled(further, weight=own.weight, warmup_epochs=own.warmup))
    changed = {
        "task": _filled(config.task, weight=defaults.task_weight),
        "further_methods": tuple(further_methods),
    }
    weight, warmup = defaults.weight, defaults.warmup
    filled = _filled(config, method_weight=weight, method_warmup_epochs=warmup)
    return filled.model_copy(update=changed)


def _filled(section: _Section, **defaults: Any) -> _Section:
    """A section with these values where it has none."""
    missing = {key: value for key, value in defaults.items() if getattr(section, key) is None}
    return section.model_copy(update=missing)


def describe_method(kind: str) -> str:
    """What a method reads and its settings, as lines of at most 80 characters."""
    if kind == "none":
        return f"none\n  {inspect.getdoc(NoMethod)}"
    method = method_class(kind)
    summary = (inspect.getdoc(inspect.getmodule(method)) or "").partition("\n")[0]
    built, defaults = method(), method.defaults
    lines = [summary, f"reads: {', '.join([*built.inputs, *built.adapter_inputs])}"]
    lines.append(f"method_weight: {defaults.weight:g} unless set")
    if defaults.warmup:
        over = "the run" if defaults.warmup == "run" else f"{defaults.warmup:g} epochs"
        lines.append(f"it rises over {over} unless method_warmup_epochs is set")
    if defaults.task_weight != 1.0:
        rest = defaults.task_weight == "rest"
        what = "1 - method_weight" if rest else f"{defaults.task_weight:g}"
        lines.append(f"task.weight: {what} unless set")
    for name, field in settings_class(kind).model_fields.items():
        if name != "kind":
            lines.append(f"{name} = {field.default!r}: {field.description}")
    wrap = textwrap.TextWrapper(80, initial_indent="  ", subsequent_indent=" " * 6)
    return "\n".join([kind, *map(wrap.fill, lines)])


def with_chosen(
    values: Mapping[str, Any],
    kind: str | None,
    source: str | None = None,
    path: str | None = None,
) -> dict[str, Any]:
    """Choose the method's kind, the data's source and path; settings of others are dropped.

    Raises:
        ConfigError: No such method.
    """
    try:
        settings_class("none" if kind is None else kind)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    given = {"method": {"kind": kind}, "data": {"source": source, "path": path}}
    for part, chosen in given.items():
        chosen = {key: value for key, value in chosen.items() if value is not None}
        values = merged(values, {part: chosen}) if chosen else values
    return dict(values)


def parse(values: Mapping[str, Any]) -> Config:
    """Check a mapping of settings against the schema, each by itself.

    Raises:
        ConfigError: The first thing that does not fit, with its path and near names.
    """
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise ConfigError(problem_of(error)) from error


def checked(config: Config, method: Method | None = None) -> Config:
    """Check that the settings fit each other.

    A `method` that is given stands in place of the one that they name.

    Raises:
        ConfigError: They do not.
    """
    try:
        reads = method_reads_teacher(build_method(config) if method is None else method)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"method: {error}") from error
    if config.method.kind == "none" and config.further_methods:
        raise ConfigError("further_methods are added to a method, and there is none")
    numbers = [config.method_teacher, *(further.teacher for further in config.further_methods)]
    most = max((number for number in numbers if number is not None), default=0)
    if most > len(config.further_teachers):
        raise ConfigError(
            f"a method reads teacher {most}, counted from 0, got {1 + len(config.further_teachers)}"
        )
    _check_teachers(config, reads)
    if config.teacher.cache is not None:
        check_unmixed(config)
    if (config.teacher.mean is None) != (config.teacher.std is None):
        raise ConfigError("teacher.mean and teacher.std go together, got one of them")
    if config.teacher.class_names is not None and config.teacher.class_map != "names":
        raise ConfigError(
            "teacher.class_names is read for teacher.class_map names, got "
            f"{config.teacher.class_map!r:.80}"
        )
    if config.batch_size % config.grad_accum_steps:
        raise ConfigError(
            f"batch_size {config.batch_size} must be a multiple of grad_accum_steps "
            f"{config.grad_accum_steps}"
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


def check_unmixed(config: Config) -> None:
    """Check that a teacher cache can serve a run: it holds no answers to mixed images."""
    if config.mix.mixup or config.mix.cutmix:
        raise ConfigError(
            "a teacher cache holds answers to unmixed images: mix.mixup and mix.cutmix must be 0, "
            f"got {config.mix.mixup:g} and {config.mix.cutmix:g}"
        )


def _check_teachers(config: Config, needed: bool) -> None:
    """Check that the teachers are those that the method needs, no more and no fewer."""
    teacher = config.teacher
    given = teacher.name is not None or teacher.cache is not None
    if config.generations > 1:
        if not needed:
            raise ConfigError(
                f"generations {config.generations}: each teaches the next, but method "
                f"{config.method.kind!r} reads from no teacher"
            )
        if given or config.further_teachers:
            raise ConfigError(
                f"generations {config.generations}: each is taught by the one before, leave the "
                "teacher out"
            )
    elif needed and not given:
        raise ConfigError(
            f"method {config.method.kind!r} reads from a teacher: give teacher.name and "
            "teacher.weights, or teacher.cache"
        )
    if config.further_teachers and (teacher.name is None or teacher.cache is not None):
        raise ConfigError("further_teachers stand beside teacher.name, and there is none")


def resolve(values: Mapping[str, Any], method: Method | None = None) -> Config:
    """`parse`, then `checked`, with a method that was given as an object if there is one."""
    config = parse(values)
    if method is not None:
        config = with_object(config, method)
    return checked(config, method)


def with_object(config: Config, method: Method) -> Config:
    """The settings with the record of a method that was given as an object.

    Raises:
        ConfigError: There are methods besides it.
    """
    if config.further_methods or config.method_teacher is not None:
        raise ConfigError(
            f"further_methods and method_teacher stand beside a method's name, and the method is "
            f"an object, {type(method).__name__}: give a WeightedSum of all"
        )
    return config.model_copy(update={"method": settings_of_method(method)})


def dump(config: Config) -> str:
    """The YAML record of a run: every setting, resolved; training it repeats the run."""
    values = config.model_dump(mode="json")
    return str(yaml.safe_dump(values, sort_keys=False, allow_unicode=True))
