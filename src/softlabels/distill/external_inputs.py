"""What comes from outside the trained module: labels, extras of the batch, teachers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import cast

import torch
from torch import Tensor

from softlabels.distill.teacher import Teacher, Teachers, ensembled
from softlabels.distill.teacher_cache import TeacherCache
from softlabels.inputs import (
    BatchInput,
    Input,
    Provider,
    SecondPass,
    TeacherInput,
    TeacherLogits,
    Value,
)
from softlabels.losses import Method
from softlabels.taps import FeatureTap, Layout

__all__ = ["CacheReader", "TeacherReader", "checked_inputs", "external_values"]


class TeacherReader:
    """Runs the teachers once a batch, for all the inputs that are read from them.

    Args:
        teacher: One frozen network, or several.
        kinds: What a method reads; those of teachers are picked.
        layout: Gives the layout of the K-th teacher; called only if an inner feature is read.

    Raises:
        ValueError: An input of a teacher that is not there, or of a layer that it has not.
    """

    def __init__(
        self,
        teacher: Teacher | Teachers,
        kinds: Iterable[Input],
        layout: Callable[[int], Layout],
    ) -> None:
        self.teacher = teacher
        self._teachers = teacher.all
        self._providers: dict[TeacherInput, Provider] = {}
        points: list[set[str]] = [set() for _ in self._teachers]
        for kind in dict.fromkeys(kinds):
            if not kind.reads_teacher:
                continue
            kind = cast("TeacherInput", kind)
            number = kind.teacher or 0
            if number >= len(self._teachers):
                raise ValueError(
                    f"the method reads teacher {number}, counted from 0, got "
                    f"{len(self._teachers)} teachers"
                )
            self._providers[kind] = kind.provider(partial(layout, number))
            points[number] |= {point.key for point in self._providers[kind].points}
        self._taps = [
            FeatureTap(each.model, sorted(keys), enabled=False)
            for each, keys in zip(self._teachers, points, strict=True)
        ]

    def read(self, images: Tensor, extras: Mapping[str, Tensor] | None) -> dict[Input, Value]:
        """Logits and features of the teachers for a batch, without gradient."""
        runs = [
            tap.run(teacher, images)
            for teacher, tap in zip(self._teachers, self._taps, strict=True)
        ]
        values: dict[Input, Value] = {}
        with torch.no_grad():
            for kind, provider in self._providers.items():
                number = kind.teacher or 0
                logits, features = runs[number]
                if kind.teacher is None:
                    logits = ensembled([of_one for of_one, _ in runs])
                values[kind] = provider(self._teachers[number], logits, features)
        return values


class CacheReader:
    """Looks the teacher's logits up, by `index` and `draw` of the batch.

    Args:
        cache: The stored answers.
        kinds: What a method reads.

    Raises:
        ValueError: An input from the teacher that is not stored.
    """

    def __init__(self, cache: TeacherCache, kinds: Iterable[Input]) -> None:
        self.cache = cache
        for kind in kinds:
            if kind.reads_teacher and kind not in (TeacherLogits(), TeacherLogits(0)):
                raise ValueError(
                    f"the method reads {kind}, but a teacher cache holds logits alone: pass the "
                    "teacher itself"
                )

    def read(self, images: Tensor, extras: Mapping[str, Tensor] | None) -> dict[Input, Value]:
        """The stored logits for a batch, on the device of its images.

        Args:
            images: [B, C, H, W].
            extras: What the batch brings; None for images that are in no data set, which get zeros.

        Raises:
            ValueError: The extras do not say which views the images are.
        """
        if extras is None:
            return _of_one(images.new_zeros(len(images), self.cache.num_classes))
        missing = [name for name in ("index", "draw") if name not in extras]
        if missing:
            raise ValueError(
                f"the teacher's answers are looked up by index and draw, got no {missing[0]}: call "
                "distiller(images, target, index=..., draw=...) with the training batch's own, "
                "both [B] on the CPU; other images have no stored answers"
            )
        index, draw = extras["index"], extras["draw"]
        logits = self.cache.logits(index, draw, images.device)
        if len(logits) != len(images):
            raise ValueError(f"index must be [{len(images)}] as the images, got {len(index)}")
        return _of_one(logits)


def _of_one(logits: Tensor) -> dict[Input, Value]:
    return {TeacherLogits(): logits, TeacherLogits(0): logits}


def checked_inputs(method: Method | None) -> dict[str, Input]:
    """What a method and its adapters read, by argument.

    Raises:
        TypeError: No `Method`.
        ValueError: Something read that is no `Input`, an argument of `terms` that nothing gives,
            or parameters of the method's own, which nothing would train.
    """
    if method is None:
        return {}
    name = type(method).__name__
    if not isinstance(method, Method):
        raise TypeError(f"method must be a softlabels.losses.Method or None, got {name}")
    for what, inputs in (("inputs", method.inputs), ("adapter_inputs", method.adapter_inputs)):
        if not isinstance(inputs, Mapping) or not all(
            isinstance(kind, Input) for kind in inputs.values()
        ):
            raise ValueError(f"{name}.{what} must map names to inputs of softlabels.inputs")
    parameter = next((own for own, _ in method.named_parameters()), None)
    if parameter is not None:
        raise ValueError(
            f"{name} holds the parameter {parameter!r}, which nothing would train: build learned "
            "parts in build_adapters"
        )
    unknown = method.unknown_inputs()
    if unknown:
        raise ValueError(
            f"{name}.inputs names {', '.join(unknown)}, which its terms do not take: they take "
            f"{', '.join(method.argument_names())}; what adapters alone read belongs to "
            "adapter_inputs"
        )
    both = method.inputs.keys() & method.adapter_inputs.keys()
    if both:
        raise ValueError(f"{name} has {sorted(both)} among inputs and adapter_inputs: name it once")
    return {**method.inputs, **method.adapter_inputs}


def external_values(
    inputs: Mapping[str, Input],
    target: Tensor,
    extras: Mapping[str, Tensor],
    from_teacher: Mapping[Input, Value],
) -> tuple[dict[str, Value], dict[str, Tensor]]:
    """Values of the inputs that do not come from the student, by argument name; further images.

    Extras are moved to the target's device.

    Raises:
        ValueError: An extra that the method reads is missing from the batch.
    """
    names = dict.fromkeys(name for kind in inputs.values() for name in kind.extras)
    brought = {name: _extra(name, extras, target) for name in names}
    values: dict[str, Value] = {}
    further: dict[str, Tensor] = {}
    for argument, kind in inputs.items():
        if isinstance(kind, BatchInput):
            values[argument] = kind.read(target, brought)
        elif isinstance(kind, SecondPass):
            further[kind.images] = brought[kind.images]
        elif kind in from_teacher:
            values[argument] = from_teacher[kind]
    return values, further


def _extra(name: str, extras: Mapping[str, Tensor], target: Tensor) -> Tensor:
    if name not in extras:
        raise ValueError(
            f"the method reads {name!r} from the batch, got "
            f"{', '.join(sorted(extras)) or 'no extras'}: call "
            f"distiller(images, target, {name}=...)"
        )
    return extras[name].to(target.device, non_blocking=True)
