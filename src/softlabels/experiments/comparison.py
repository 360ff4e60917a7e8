"""What a comparison compares: variants of one run, over the same seeds."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, ValidationError

from softlabels.experiments.launcher import PlannedRun, RunPlan
from softlabels.io.records import problem_of
from softlabels.losses import METHODS
from softlabels.training.config import (
    Config,
    ConfigError,
    build_method,
    checked,
    defaults_of,
    load_recipe,
    method_reads_teacher,
    parse,
)
from softlabels.training.recipes import merged, parsed_text, read_recipe_text
from softlabels.training.settings import Section, TeacherSettings

__all__ = [
    "CompareOptions",
    "Comparison",
    "PlannedVariant",
    "chosen_methods",
    "planned",
    "read_comparison",
]

# What makes a method in a run's settings; the rest is the same for all variants.
_OF_METHOD = (
    "method",
    "method_weight",
    "method_warmup_epochs",
    "method_teacher",
    "further_methods",
    "further_teachers",
    "peer",
    "generations",
    "task",
)
DEFAULT_METHODS = "ce,label_smoothing,tf_kd,zipf_ls,uskd"
_NOT_COMPARED = ("seed", "output", "assumed", "paper")
_SHORT_NAMES = {"ce": "cross_entropy", "ls": "label_smoothing"}
_WITHOUT_METHOD = {"cross_entropy": 0.0, "label_smoothing": 0.1}  # smoothing of the task's labels
# Recipes whose teachers ship with the package, for the data that they learned from.
_SHIPPED_TEACHERS = {"glyphs100": "glyphs100/kd"}
_MOST_VARIANTS = 200


class Comparison(Section):
    """A comparison: a base, and what differs from it."""

    title: str | None = Field(None, description="Heading of the report.")
    base: str | None = Field(None, description="Recipe that all variants start from.")
    settings: dict[str, Any] = Field({}, description="Settings over the base, for all variants.")
    seeds: int = Field(3, ge=1, le=1000, description="Runs of each variant: seed, seed + 1, ...")
    variants: dict[str, str | dict[str, Any]] = Field(
        description="By name: a method or a recipe, or settings over the base; the first is the "
        "baseline.",
        min_length=1,
        max_length=_MOST_VARIANTS,
    )

    @property
    def values(self) -> dict[str, Any]:
        """The base's settings with those for all variants."""
        return merged({} if self.base is None else load_recipe(self.base), self.settings)

    def dump(self) -> str:
        """The YAML that `read_comparison` reads."""
        text: str = yaml.safe_dump(
            self.model_dump(mode="json", exclude_none=True), sort_keys=False, allow_unicode=True
        )
        return text


class CompareOptions(Section):
    """Settings that all compared runs share, and what is compared over which seeds."""

    methods: str | None = Field(
        None,
        description="What is compared, with commas between: ce, label_smoothing, a method's kind, "
        "or a recipe, whose method is taken with its settings. The first is the baseline. None: "
        f"what the file says, else {DEFAULT_METHODS}.",
    )
    seeds: int | None = Field(
        None, ge=1, le=1000, description="Runs of each method. None: what the file says, else 3."
    )
    jobs: int = Field(1, ge=1, le=1024, description="Runs at a time.")
    runs: str | None = Field(
        None,
        description="Folder of the runs, which several comparisons may share. None: runs, in the "
        "output's folder.",
    )

    def comparison(self, config: Config, given: Comparison | None) -> Comparison:
        """What is compared: as the options say, and else a file.

        Args:
            config: The settings that all share.
            given: The file's comparison, whose settings are in this configuration.
        """
        settings = config.model_dump(mode="json", exclude={"output"}, exclude_defaults=True)
        if config.method.kind != "none":
            settings["method"] = config.method.model_dump(mode="json")
        if self.methods is not None or given is None:
            variants = chosen_methods((self.methods or DEFAULT_METHODS).split(","))
        else:
            variants = given.variants
        return Comparison(
            title=None if given is None else given.title,
            settings=settings,
            seeds=self.seeds or (3 if given is None else given.seeds),
            variants=variants,
        )


def read_comparison(path: str) -> Comparison | None:
    """Read a comparison from a YAML file; None where the file is something else.

    Raises:
        ConfigError: It has variants, but does not fit the schema.
    """
    if not os.path.lexists(path):
        return None
    values = parsed_text(read_recipe_text(path), path)
    if "variants" not in values:
        return None
    try:
        return Comparison.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"{path}: {problem_of(error)}") from error


def chosen_methods(names: Sequence[str]) -> dict[str, str | dict[str, Any]]:
    """Variants from names as `CompareOptions.methods` has them, the baseline first.

    Raises:
        ConfigError: A name that is empty, or one twice.
    """
    full = [_SHORT_NAMES.get(name, name) for name in names]
    if not all(full):
        raise ConfigError(f"expected names with commas between them, got {','.join(names)!r}")
    for name in full:
        if full.count(name) > 1:
            raise ConfigError(f"{name!r:.80} is compared twice")
    return {name: name for name in full}


def _of_name(name: str, base: Mapping[str, Any]) -> dict[str, Any]:
    """A variant's whole settings, from the name of a method or of a recipe."""
    plain = {key: value for key, value in base.items() if key not in _OF_METHOD}
    name = _SHORT_NAMES.get(name, name)
    if name in _WITHOUT_METHOD:
        task = dict(base.get("task") or {})
        task["weight"] = None
        if name == "cross_entropy" or not task.get("label_smoothing"):
            task["label_smoothing"] = _WITHOUT_METHOD[name]
        return {**plain, "task": task}
    if name in METHODS or (":" in name and not os.path.lexists(name)):
        own = base.get("method")
        if isinstance(own, Mapping) and own.get("kind") == name:
            return dict(base)  # with the settings that the caller gave to it
        return {**plain, "method": {"kind": name}}
    try:
        recipe = load_recipe(name)
    except ConfigError as error:
        known = ", ".join([*_WITHOUT_METHOD, *METHODS])
        raise ConfigError(
            f"no method {name!r:.80}: expected {known}, or the name of a recipe"
        ) from error
    part = {key: recipe[key] for key in _OF_METHOD if key in recipe}
    if "teacher" in recipe and not (plain.get("teacher") or {}).get("name"):
        part["teacher"] = recipe["teacher"]
    return {**plain, **part}


@dataclass(frozen=True)
class PlannedVariant:
    """A variant with its settings, without seed and output, and its runs, one a seed."""

    name: str
    config: Config
    runs: tuple[PlannedRun, ...]


def planned(comparison: Comparison, folder: Path) -> tuple[list[PlannedVariant], RunPlan]:
    """Plan all runs: of the variants, and of the teachers that are trained for them.

    A method that reads a teacher gets the base's; those that read none get none. A teacher that is
    named without weights is trained once, by its recipe or else as the base with cross-entropy. A
    method that is taught by the student itself gets the baseline's run of the same seed.

    Raises:
        ConfigError: A variant that does not fit, by its name.
    """
    base = {k: v for k, v in comparison.values.items() if k not in _NOT_COMPARED}
    first_seed = int(comparison.values.get("seed", 0))
    seeds = range(first_seed, first_seed + comparison.seeds)
    plan = RunPlan(folder)
    variants: list[PlannedVariant] = []
    for name, given in comparison.variants.items():
        try:
            values = _of_name(given, base) if isinstance(given, str) else merged(base, given)
            own_teacher = isinstance(given, Mapping) and "teacher" in given
            config = _with_teacher(parse(values), own_teacher)
            taught_by = _teachers(config, base, plan, variants, seeds)
        except ConfigError as error:
            raise ConfigError(f"{name}: {error}") from error
        runs = (
            plan.add(f"{name}, seed {seed}", config, seed, taught_by=teacher)
            for seed, teacher in zip(seeds, taught_by, strict=True)
        )
        variants.append(PlannedVariant(name, config, tuple(runs)))
    return variants, plan


def _with_teacher(config: Config, own_teacher: bool) -> Config:
    """With the teacher that its method reads, and no other."""
    teacher = config.teacher
    if config.generations > 1 or not method_reads_teacher(build_method(config)):
        return checked(
            config.model_copy(update={"teacher": TeacherSettings(), "further_teachers": ()})
        )
    if defaults_of(build_method(config)).taught_by_itself and not own_teacher:
        student = config.student
        teacher = TeacherSettings(name=student.name, settings=student.settings)
    elif teacher.name is None and teacher.cache is None:
        recipe = _SHIPPED_TEACHERS.get(config.data.source)
        if recipe is None or getattr(config.data, "path", None) is not None:
            raise ConfigError(
                f"method {config.method.kind!r} reads from a teacher: give teacher.name, with "
                "teacher.weights or to be trained here first"
            )
        teacher = parse(load_recipe(recipe)).teacher
    return checked(config.model_copy(update={"teacher": teacher}))


def _teachers(
    config: Config,
    base: Mapping[str, Any],
    plan: RunPlan,
    variants: Sequence[PlannedVariant],
    seeds: Sequence[int],
) -> Sequence[PlannedRun | None]:
    """For each seed the planned run whose student teaches; None where there are weights."""
    teacher = config.teacher
    ready = teacher.weights is not None or teacher.pretrained or teacher.cache is not None
    if teacher.name is None or ready:
        return [None] * len(seeds)
    if not defaults_of(build_method(config)).taught_by_itself:
        return [plan.add("teacher", _of_teacher(teacher, base), seeds[0])] * len(seeds)
    if not variants:
        raise ConfigError("its teacher is the baseline's run, so it cannot be the baseline")
    return variants[0].runs


def _of_teacher(teacher: TeacherSettings, base: Mapping[str, Any]) -> Config:
    """The run that trains a teacher: its recipe on the same data, or the base itself."""
    if teacher.recipe is not None:
        values = merged(load_recipe(teacher.recipe), {"data": base.get("data") or {}})
    else:
        values = {k: v for k, v in base.items() if k not in (*_OF_METHOD, "teacher")}
        values["student"] = {"name": teacher.name, "settings": teacher.settings}
    return checked(parse({k: v for k, v in values.items() if k not in _NOT_COMPARED}))
