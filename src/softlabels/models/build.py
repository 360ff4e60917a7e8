"""Any classifier by its name, and what its weights expect to see."""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import timm
import torchvision
from pydantic_core import PydanticSerializationError
from timm.models import adapt_input_conv
from torch import nn

from softlabels.io.weights import UNREADABLE, count_stored, load_weights
from softlabels.models.record import (
    METADATA_KEY,
    FileRecord,
    SizeLimit,
    read_record,
    weights_file,
)
from softlabels.models.user_code import MODEL_NAMES, import_builder

__all__ = ["InputSpec", "build_model", "model_input", "model_metadata"]

# Settings of timm's factory that name files to read, or say what to fetch.
_NOT_OF_A_NETWORK = {"cache_dir", "checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay"}


@dataclass(frozen=True)
class InputSpec:
    """What a model's weights expect to see; a field is None where nothing is known.

    Attributes:
        mean: Mean of each channel that images are normalized with, for pixels in 0 to 1.
        std: Standard deviation of each channel, likewise.
        image_size: Height and width in pixels.
    """

    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    image_size: tuple[int, int] | None = None


@dataclass(frozen=True)
class _Wanted:
    """What `build_model` is asked for."""

    num_classes: int | None
    in_channels: int
    image_size: tuple[int, int] | None
    settings: dict[str, Any]
    pretrained: bool


def build_model(
    name: str,
    *,
    num_classes: int | None,
    in_channels: int = 3,
    image_size: int | tuple[int, int] | None = None,
    settings: Mapping[str, Any] | None = None,
    pretrained: bool = False,
) -> nn.Module:
    """Build a classifier by its name.

    Args:
        name: One of

            * `timm:NAME`, or just `NAME`: a model of timm's registry, which holds the small-image
              networks of this package too, with a tag of weights or without;
            * `torchvision:NAME`: a classifier of torchvision;
            * `file:PATH`: a `.safetensors` file with `model_metadata` in its header; the model is
              built and the weights are loaded. PATH may be the folder of a run, too, for the
              student in it;
            * `package.module:function`: a function of your own that returns a module, or a class
              that is one (`import_builder` says which are taken). It gets `num_classes`,
              `in_channels`, `image_size` and `pretrained` where it has arguments of these names.
        num_classes: Number of classes. None: as many as the model has by itself.
        in_channels: Channels of the images. A torchvision model for other than 3 gets its first
            convolution adapted: for 1 channel it sees what it saw of a gray RGB image.
        image_size: Side, or height and width, in pixels, for models whose parameters depend on
            it (a ViT's position embedding); others take any size and ignore it.
        settings: Further keyword arguments of the model; they win over those that a file names.
        pretrained: Whether timm or torchvision loads its own weights, from the network if need
            be. A file always loads its weights, and from nowhere else.

    Returns:
        The model, on the CPU, in training mode (from a file too).

    Raises:
        FileNotFoundError: If the file of `file:PATH` does not exist.
        TypeError: If the function returns no module.
        ValueError: If the name is unknown, a setting is not taken by the model, or the file does
            not fit what is asked for.
    """
    kind, target = _parse_name(name)
    wanted = _Wanted(num_classes, in_channels, _pair(image_size), dict(settings or {}), pretrained)
    builders = {"file": _build_from_file, "timm": _build_timm, "torchvision": _build_torchvision}
    if kind in builders:
        return builders[kind](target, wanted)
    return _build_by_function(name, import_builder(kind, target), wanted)


def model_input(model: str | nn.Module) -> InputSpec:
    """Return what a model's own weights expect to see; nothing for one without published weights.

    A name, as for `build_model`, says more than a built model: torchvision's models do not remember
    it, and timm's remember the weights published for them, whatever they were loaded with since.

    Raises:
        FileNotFoundError: If the file of `file:PATH` does not exist.
        ValueError: If the name is unknown.
    """
    if isinstance(model, nn.Module):
        return _timm_input(getattr(model, "pretrained_cfg", None))
    kind, target = _parse_name(model)
    if kind == "timm":
        return _timm_input(_timm_cfg(target))
    if kind == "torchvision":
        _check_torchvision_name(target)
        preset = torchvision.models.get_model_weights(target).DEFAULT.transforms()
        return InputSpec(tuple(preset.mean), tuple(preset.std), _pair(preset.crop_size[0]))
    if kind == "file":
        record = read_record(target)
        return InputSpec(record.mean, record.std, record.image_size)
    return InputSpec()


def model_metadata(record: FileRecord) -> dict[str, str]:
    """Return the header with which `save_weights` makes a file that `file:PATH` builds.

    Args:
        record: What the model was built with, of types that JSON has, and how its images look. For
            the name `file:PATH`, that of the file's model and its settings are taken over.

    Returns:
        Texts for the header: one, because the order of several would differ from run to run.

    Raises:
        FileNotFoundError: If the file of `file:PATH` does not exist.
        ValueError: If the name has an unknown form, or JSON lacks the type of a setting.
    """
    kind, target = _parse_name(record.model)
    changes: dict[str, Any] = {}
    if kind == "file":
        origin = read_record(target)
        changes = {"model": origin.model, "settings": origin.settings | record.settings}
    elif kind == "timm":
        changes = {"model": f"timm:{target}"}
    record = record.model_copy(update=changes)
    try:
        return {METADATA_KEY: record.model_dump_json(exclude_defaults=True)}
    except PydanticSerializationError as error:
        raise ValueError(
            f"settings must be of types that JSON has, got {record.settings}"
        ) from error


def _parse_name(name: str) -> tuple[str, str]:
    """Split a name at its first colon; a bare name is timm's."""
    kind, colon, target = name.partition(":")
    if not colon:
        kind, target = "timm", name
    if not kind or not target:
        raise ValueError(f"expected a model name like {MODEL_NAMES}, got {name!r}")
    return kind, target


def _pair(image_size: int | tuple[int, int] | None) -> tuple[int, int] | None:
    return (image_size, image_size) if isinstance(image_size, int) else image_size


def _unknown(what: str, name: str, known: Iterable[str]) -> ValueError:
    near = difflib.get_close_matches(name, list(known), n=5)
    return ValueError(f"unknown {what} {name!r}" + (f"; near: {', '.join(near)}" if near else ""))


def _call(
    name: str,
    build: Callable[..., nn.Module],
    arguments: dict[str, Any],
    settings: dict[str, Any],
    is_right: bool = False,
) -> nn.Module:
    """Call `build` with both; a setting that it does not take is the user's error.

    So is any error of code that is known to be right: settings make no sense, such as a width of 0.
    """
    clash = sorted(arguments.keys() & settings.keys())
    if clash:
        raise ValueError(
            f"settings of {name!r} must not hold {', '.join(clash)}: set by the caller"
        )
    given = {**arguments, **settings}
    try:
        return build(**given)
    except TypeError as error:
        refused = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        if refused and refused[1] in settings:
            raise ValueError(
                f"model {name!r} does not take the setting {refused[1]!r} ({error})"
            ) from error
        raise
    except UNREADABLE as error:
        if not is_right:
            raise
        raise ValueError(
            f"model {name!r} cannot be built with {given!r:.200}: "
            f"{type(error).__name__}: {error!s:.300}"
        ) from error


def _timm_cfg(name: str) -> dict[str, Any] | None:
    """Return timm's facts about a model, None if it was registered without; check the name."""
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        raise _unknown("timm model", architecture, timm.list_models())
    tags = timm.list_models(f"{architecture}.*", pretrained=True) if tag else []
    if tag and name not in tags:
        raise ValueError(f"timm model {architecture!r} has no weights {tag!r}, only: {tags}")
    cfg = timm.get_pretrained_cfg(name)
    return None if cfg is None else asdict(cfg)


def _has_weights(cfg: Mapping[str, Any]) -> bool:
    return any(cfg.get(source) for source in ("url", "file", "hf_hub_id"))


def _timm_input(cfg: Mapping[str, Any] | None) -> InputSpec:
    if not cfg or not _has_weights(cfg):
        return InputSpec()
    _, height, width = cfg["input_size"]
    return InputSpec(tuple(cfg["mean"]), tuple(cfg["std"]), (height, width))


def _build_timm(name: str, wanted: _Wanted) -> nn.Module:
    cfg = _timm_cfg(name) or {}
    if wanted.pretrained and not _has_weights(cfg):
        raise ValueError(f"timm has no weights for {name!r}; expected pretrained=False")
    arguments: dict[str, Any] = {"in_chans": wanted.in_channels, "pretrained": wanted.pretrained}
    if wanted.num_classes is not None:
        arguments["num_classes"] = wanted.num_classes
    if wanted.image_size is not None and cfg.get("fixed_input_size"):
        arguments["img_size"] = wanted.image_size
    named = sorted(_NOT_OF_A_NETWORK & wanted.settings.keys())
    if named:
        raise ValueError(
            f"the setting {named[0]!r} of {name!r} is not taken: weights come from a file of "
            "their own, given as weights, or with pretrained"
        )
    build = partial(timm.create_model, name)
    return _call(f"timm:{name}", build, arguments, wanted.settings, is_right=True)


def _check_torchvision_name(name: str) -> None:
    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known:
        raise _unknown("torchvision classifier", name, known)


def _build_torchvision(name: str, wanted: _Wanted) -> nn.Module:
    _check_torchvision_name(name)
    arguments: dict[str, Any] = {"weights": "DEFAULT" if wanted.pretrained else None}
    if wanted.num_classes is not None:
        arguments["num_classes"] = wanted.num_classes
    size, family = wanted.image_size, name.partition("_")[0]
    if size is not None and family == "vit":
        if size[0] != size[1]:
            raise ValueError(f"torchvision:{name} takes square images only, got {size}")
        arguments["image_size"] = size[0]
    elif size is not None and family == "maxvit":
        arguments["input_size"] = size
    build = partial(torchvision.models.get_model, name)
    model = _call(f"torchvision:{name}", build, arguments, wanted.settings, is_right=True)
    if wanted.in_channels != 3:
        _adapt_first_convolution(model, name, wanted.in_channels)
    return model


def _adapt_first_convolution(model: nn.Module, name: str, in_channels: int) -> None:
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            if module.in_channels != 3 or module.groups != 1:
                break
            module.weight = nn.Parameter(adapt_input_conv(in_channels, module.weight.detach()))
            module.in_channels = in_channels
            return
    raise ValueError(
        f"torchvision:{name} has no first convolution over 3 channels to adapt, "
        f"so in_channels must be 3, got {in_channels}"
    )


def _build_from_file(path: str, wanted: _Wanted) -> nn.Module:
    path = str(weights_file(path))
    record = read_record(path)
    if wanted.num_classes not in (None, record.num_classes):
        raise ValueError(
            f"the model in {path} has {record.num_classes} classes, "
            f"got num_classes={wanted.num_classes}"
        )
    if wanted.in_channels != record.in_channels:
        raise ValueError(
            f"the model in {path} takes images of {record.in_channels} channels, "
            f"got in_channels={wanted.in_channels}"
        )
    if _parse_name(record.model)[0] not in ("timm", "torchvision"):
        # A file of weights is data: it must not choose which code to import and call.
        raise ValueError(
            f"{path} is for {record.model!r}, which is code of its own; expected a model of timm "
            "or torchvision. Build it by that name and use load_weights"
        )
    with SizeLimit(count_stored(path)):
        model = build_model(
            record.model,
            num_classes=record.num_classes,
            in_channels=record.in_channels,
            image_size=wanted.image_size or record.image_size,
            settings=record.settings | wanted.settings,
        )
    load_weights(model, path)
    return model


def _build_by_function(name: str, function: Callable[..., nn.Module], wanted: _Wanted) -> nn.Module:
    taken = inspect.signature(function).parameters
    if wanted.pretrained and "pretrained" not in taken:
        raise ValueError(f"{name!r} has no argument 'pretrained'; expected pretrained=False")
    offered = {key: value for key, value in vars(wanted).items() if key != "settings"}
    arguments = {key: value for key, value in offered.items() if key in taken and value is not None}
    model = _call(name, function, arguments, wanted.settings)
    if not isinstance(model, nn.Module):
        raise TypeError(f"{name!r} must return an nn.Module, got {type(model).__name__}")
    return model
