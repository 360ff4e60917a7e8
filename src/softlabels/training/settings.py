"""The sections of a run's settings: every setting, its default and its range.

The settings of methods and of data sources are declared once, by the keyword-only arguments of
their own constructors; their sections are made from those.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping
from functools import cache
from typing import Annotated, Any, Literal, TypeAlias

import docstring_parser
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializeAsAny,
    WrapValidator,
    create_model,
    model_validator,
)
from pydantic.errors import PydanticUserError
from pydantic_core import PydanticCustomError
from torch import nn

from softlabels.data.sources.by_name import SOURCES, kind_of
from softlabels.data.split import LARGEST_VALIDATION
from softlabels.io.records import UNKNOWN_SETTING
from softlabels.losses import METHODS, Method
from softlabels.losses._method import setting_fields
from softlabels.losses.label_smoothing import SmoothOver
from softlabels.models.user_code import import_method

__all__ = [
    "DATA_SETTINGS",
    "METHOD_SETTINGS",
    "OBJECT",
    "AnyData",
    "AnyMethod",
    "CheckpointSettings",
    "Count",
    "DataSettings",
    "Factor",
    "FurtherMethod",
    "MethodSettings",
    "MixSettings",
    "NoMethod",
    "OptimizerSettings",
    "PaperSettings",
    "PeerSettings",
    "ScheduleSettings",
    "Section",
    "StudentSettings",
    "TaskSettings",
    "TeacherNumber",
    "TeacherSettings",
    "UnknownMethod",
    "WarmupEpochs",
    "method_class",
    "settings_class",
    "settings_of_method",
]

# More is a mistake, or means harm: the numbers end in sizes of memory and in loops.
MOST = 1_000_000
_MOST_PIXELS = 16_384
OBJECT = "object:"
"""What the name of a part begins with that was given as an object."""
LARGEST_FACTOR = 1e30  # what float32 multiplies with, with room for products

Count = Annotated[int, Field(ge=1, le=MOST)]
Factor = Annotated[float, Field(ge=0, le=LARGEST_FACTOR)]
Share = Annotated[float, Field(ge=0, le=1)]
Percent = Annotated[float, Field(ge=0, le=100)]
UpToMost = Annotated[float, Field(ge=0, le=MOST)]
TeacherNumber: TypeAlias = Annotated[int, Field(ge=0, le=100)] | None
# A whole number beyond the limit becomes a fraction, which no depth and no width can be.
Setting: TypeAlias = bool | Annotated[int, Field(ge=-MOST, le=MOST)] | float | str
# Epochs of a rise, the whole run, or None for what the method's paper uses.
WarmupEpochs: TypeAlias = UpToMost | Literal["run"] | None


class Section(BaseModel):
    """Base of all parts of the schema: unknown keys are errors, nothing changes afterwards."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _knows_all_keys(cls, values: Any) -> Any:
        """Refuse a key that is no setting, with the names of those that are."""
        if isinstance(values, Mapping) and cls.model_config.get("extra") == "forbid":
            for name in values:
                if name not in cls.model_fields:
                    raise PydanticCustomError(
                        UNKNOWN_SETTING, "unknown", {"name": name, "known": [*cls.model_fields]}
                    )
        return values


def _documented(target: Callable[..., Any]) -> dict[str, str]:
    """The text of each argument in the docstring, of a class also in those of its bases."""
    bases = [*reversed(inspect.getmro(target))] if inspect.isclass(target) else [target]
    style = docstring_parser.DocstringStyle.GOOGLE  # not guessed: formulas look like reST's fields
    texts = [inspect.cleandoc(base.__doc__ or "") for base in bases]
    documented = [docstring_parser.parse(text, style=style) for text in texts]
    return {
        parameter.arg_name: " ".join((parameter.description or "").split())
        for doc in documented
        for parameter in doc.params
    }


_KIND = "The method, which `softlabels methods` lists; or module:Class, one of your own."


class MethodSettings(Section):
    """Base of the methods' settings; `kind` tells them apart."""

    kind: str = Field(description=_KIND)


def _method_settings(kind: str, method: type[Method]) -> type[MethodSettings]:
    fields: dict[str, Any] = {"kind": (Literal[kind], Field(kind, description=_KIND))}
    texts = _documented(method)
    left_out = {"reduction"}  # a step's loss is a batch mean
    if not method.can_ignore():
        left_out.add("ignore_index")
    for name, field in setting_fields(method).items():
        if name not in left_out:
            fields[name] = (field.annotation, Field(field.default, description=texts.get(name, "")))
    return create_model(f"{kind}_settings", __base__=MethodSettings, **fields)


class NoMethod(MethodSettings):
    """Train with the task's own loss alone."""

    kind: Literal["none"] = Field("none", description=_KIND)


METHOD_SETTINGS: dict[str, type[MethodSettings]] = {
    "none": NoMethod,
    **{kind: _method_settings(kind, method) for kind, method in METHODS.items()},
}


class UnknownMethod(MethodSettings):
    """What is recorded of a method that the settings alone do not build."""

    model_config = ConfigDict(extra="allow")


def method_class(kind: str) -> type[Method]:
    """The class of a method: one of the package's by name, or `module:Class` of the user's.

    Raises:
        ValueError: There is none.
    """
    if kind in METHODS:
        return METHODS[kind]
    if kind.startswith(OBJECT):
        raise ValueError(
            f"the run's method was an object, {kind.removeprefix(OBJECT):.200}, which its settings "
            "do not build: give it again, softlabels.train(method=...)"
        )
    if ":" in kind:
        return import_method(kind)
    near = difflib.get_close_matches(kind[:80], METHOD_SETTINGS, n=3)
    raise ValueError(
        f"no method {kind!r:.80}: expected one of {', '.join(METHOD_SETTINGS)}, or "
        f"module:Class{'; near: ' if near else ''}{', '.join(near)}"
    )


@cache
def settings_class(kind: str) -> type[MethodSettings]:
    """The settings of a method.

    Raises:
        ValueError: There is no such method, or it has a setting that no command line can hold.
    """
    if kind in METHOD_SETTINGS:
        return METHOD_SETTINGS[kind]
    cls = method_class(kind)
    if cls.__init__ is not Method.__init__:
        raise ValueError(
            f"{kind:.200} has a constructor of its own: its settings are known only where they are "
            "annotated fields of the class"
        )
    try:
        return _method_settings(kind, cls)
    except PydanticUserError as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"{kind:.200}: its settings must be numbers, texts, truth values, or tuples of them, "
            f"by keyword and with annotations: {reason:.300}"
        ) from error


def settings_of_method(method: Method) -> MethodSettings:
    """What is recorded of a method that was given as an object: its class and its settings.

    Where those build it again it is recorded as if it had been named; else by the name of its
    class, after `OBJECT`, with what can be told of it.
    """
    cls = type(method)
    named = {of_package: kind for kind, of_package in METHODS.items()}
    kind = named.get(cls, f"{cls.__module__}:{cls.__qualname__}")
    given = method.settings()
    try:
        fields = settings_class(kind)
        by_fields = cls.__init__ is Method.__init__ and not method.state_dict()
        if by_fields and method.reduction == "mean" and method_class(kind) is cls:
            names = [name for name in fields.model_fields if name != "kind"]
            return fields.model_validate({"kind": kind, **{name: given[name] for name in names}})
    except (ValueError, ModuleNotFoundError):
        pass
    # What a constructor of its own takes besides, as far as it is kept under that name.
    taken = inspect.signature(cls.__init__).parameters
    others = {name: getattr(method, name) for name in taken if name in vars(method)}
    parts = {name: part for name, part in method.named_children() if name not in others}
    told = {name: _told(value) for name, value in {**parts, **others, **given}.items()}
    return UnknownMethod.model_validate({**told, "kind": f"{OBJECT}{kind}"})


def _told(value: Any) -> Any:
    """A value of a setting as plain data; of an object its class, and of a module its settings."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping) and not isinstance(value, nn.Module):
        return {str(key): _told(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_told(item) for item in value]
    if isinstance(value, Method):
        return settings_of_method(value).model_dump(mode="json")
    of = value if hasattr(value, "__qualname__") else type(value)
    return f"{of.__module__}:{of.__qualname__}"


def _chosen_method(values: Any, of_base: Callable[[Any], Any]) -> Any:
    """Settings of the method that they name; what cannot be found stays as it is recorded."""
    if isinstance(values, str):
        values = {"kind": values}
    if not isinstance(values, Mapping):
        return of_base(values)
    kind = values.get("kind")
    if not isinstance(kind, str):
        return of_base({key: values[key] for key in ("kind",) if key in values})
    try:
        fields = settings_class(kind)
    except (ValueError, ModuleNotFoundError):
        if ":" not in kind:
            raise
        fields = UnknownMethod
    return fields.model_validate(values)


AnyMethod: TypeAlias = Annotated[SerializeAsAny[MethodSettings], WrapValidator(_chosen_method)]


class DataSettings(Section):
    """Base of the data sources' settings; `source` tells them apart."""

    source: str = Field(
        description=f"Kind of data: {', '.join(SOURCES)}. Left out: by what `path` holds."
    )
    validation: float | None = Field(
        None,
        gt=0,
        lt=LARGEST_VALIDATION,
        description="Share of the training set, of each class (glyphs100: of the fonts), that is "
        "held out of it and takes the place of the test set: for choosing settings. The test set "
        "is not read then. None: none.",
    )
    train_share: float | None = Field(
        None,
        gt=0,
        le=1,
        description="Share of the training set that is trained on, after the validation split. "
        "None: all.",
    )


def _data_settings(source: str) -> type[DataSettings]:
    """The settings of a source: the keyword-only arguments of what opens it."""
    texts = _documented(SOURCES[source].open)
    described = DataSettings.model_fields["source"].description
    fields: dict[str, Any] = {"source": (Literal[source], Field(description=described))}
    for name, given in inspect.signature(SOURCES[source].open, eval_str=True).parameters.items():
        if given.kind is given.KEYWORD_ONLY:
            fields[name] = (given.annotation, Field(given.default, description=texts.get(name, "")))
        elif name == "path":
            fields[name] = (str | None, Field(None, description="Folder of the data."))
    return create_model(f"{source}_settings", __base__=DataSettings, **fields)


DATA_SETTINGS: dict[str, type[DataSettings]] = {
    source: _data_settings(source) for source in SOURCES
}


class ObjectData(DataSettings):
    """A data source that was given as an object: what is recorded of it is its class."""


def _chosen_data(values: Any, of_base: Callable[[Any], Any]) -> Any:
    """Settings of the source that they name, or that their path holds."""
    if not isinstance(values, Mapping):
        return of_base(values)
    source, path = values.get("source"), values.get("path")
    if not isinstance(source, str | None) or not isinstance(path, str | None):
        return of_base({key: values[key] for key in ("source", "path") if key in values})
    if source is not None and source.startswith(OBJECT):
        return ObjectData.model_validate(values)
    source = kind_of(source, path)
    return DATA_SETTINGS[source].model_validate({**values, "source": source})


AnyData: TypeAlias = Annotated[SerializeAsAny[DataSettings], WrapValidator(_chosen_data)]


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
        None, ge=2, le=MOST, description="Classes of its logits, if others."
    )
    class_map: tuple[Annotated[int, Field(ge=0, le=MOST)], ...] | Literal["names"] | None = Field(
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

    weight: Factor | Literal["rest"] | None = Field(
        None,
        description="Weight of the task's loss; rest: 1 minus the method's weight in that epoch. "
        "None: what the method's paper uses.",
    )
    label_smoothing: Share = Field(0.0, description="0: plain cross-entropy.")
    smooth_over: SmoothOver = Field("all", description="Classes that share the smoothing.")


class OptimizerSettings(Section):
    """The optimizer, built by timm's factory."""

    name: str = Field("sgd", description="sgd, adamw, or another name of timm's factory.")
    lr: float = Field(
        0.1,
        gt=0,
        le=LARGEST_FACTOR,
        description="Peak learning rate, for the global batch as it is.",
    )
    momentum: float = Field(0.9, ge=0, lt=1, description="Momentum, or the first beta.")
    nesterov: bool = Field(False, description="Nesterov momentum, for sgd.")
    weight_decay: UpToMost = Field(5e-4, description="Weight decay.")
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
    warmup_epochs: UpToMost = Field(0.0, description="Epochs of warm-up.")
    warmup_steps: int = Field(0, ge=0, le=2**31, description="In place of warmup_epochs: steps.")
    warmup_lr: Factor = Field(1e-6, description="Learning rate at the first step of a warm-up.")
    min_lr: Factor = Field(
        0.0, description="Lowest learning rate of the cosine and of the linear fall."
    )
    decay_epochs: tuple[UpToMost, ...] = Field(
        (), description="multistep: epochs of the drops; step: one number, epochs per drop."
    )
    decay_rate: float = Field(0.1, gt=0, le=1, description="Factor of a drop.")


class MixSettings(Section):
    """Mixup and cutmix, by timm."""

    mixup: UpToMost = Field(0.0, description="Alpha of mixup; 0: off.")
    cutmix: UpToMost = Field(0.0, description="Alpha of cutmix; 0: off.")
    probability: Share = Field(1.0, description="Share of batches that are mixed.")
    switch_probability: Share = Field(0.5, description="Cutmix's share if both are on.")
    further_alpha: float = Field(
        0.4,
        gt=0,
        le=MOST,
        description="Alpha of the mixup that a method reads besides the batch's own images.",
    )


class CheckpointSettings(Section):
    """What is kept for going on after a stop."""

    every: int | None = Field(
        None, ge=1, description="Steps between checkpoints. None: one after each epoch alone."
    )
    keep: int = Field(
        2, ge=1, description="How many are kept; older ones serve if the newest is damaged."
    )


class FurtherMethod(Section):
    """A method that is added to the first one, with a weight of its own."""

    kind: str = Field("nkd", description="The method.")
    weight: Factor | None = Field(None, description="As method_weight, for this method.")
    warmup_epochs: WarmupEpochs = Field(None, description="As method_warmup_epochs, for it.")
    teacher: TeacherNumber = Field(
        None, description="Number of the teacher that it reads, from 0; None: all."
    )
    settings: dict[str, Setting | tuple[str, ...]] = Field(
        {}, description="The method's own settings."
    )


class PeerSettings(Section):
    """A second network that is trained along, for methods that read its logits."""

    name: str | None = Field(None, description="As the student's name. None: the student's own.")
    settings: dict[str, Setting] = Field({}, description="Further arguments of the model.")


class PaperSettings(Section):
    """Which published result a recipe is for. It changes nothing in the run."""

    table: str | None = Field(None, description="Paper and table.")
    row: str | None = Field(None, description="The row, and the column where there are several.")
    top1: Percent | None = Field(None, description="Published top-1, %.")
    top1_std: Percent | None = Field(None, description="Its published deviation over runs, points.")
    top5: Percent | None = Field(None, description="Published top-5, %.")
    gain: float | None = Field(
        None, ge=-100, le=100, description="Published gain over the baseline, points."
    )
    reported: Literal["last", "best"] = Field("last", description="The epoch that was published.")
    baseline: str | None = Field(None, description="Recipe of the row that it is compared with.")
    hardware: str | None = Field(None, description="What the published run was meant for.")
