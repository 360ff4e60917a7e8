"""Provides the signals that come from outside the trained module: labels, extras, teachers."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from softlabels.distill.teacher import Teacher, Teachers, ensembled
from softlabels.distill.teacher_cache import TeacherCache
from softlabels.inputs import (
    Again,
    Classifier,
    Features,
    FromBatch,
    NormParameters,
    Signal,
    Target,
    TeacherLogits,
)
from softlabels.inputs.provider import Value
from softlabels.inputs.tap_points import in_form, points_of
from softlabels.taps import FeatureTap, Layout, TapPoint

__all__ = [
    "CacheReader",
    "TeacherReader",
    "checked_reads",
    "given_values",
    "images_key",
    "reads_teacher",
    "teachers_of",
]


class TeacherReader:
    """Runs the teachers once a batch, for all the signals that are read from them.

    Args:
        teacher: One frozen network, or several.
        signals: What a method reads; those of teachers are picked.
        layout: Gives the layout of the K-th teacher; called only if an inner feature is read.

    Raises:
        ValueError: A signal of a teacher that is not there, or of a layer that it has not.
    """

    def __init__(
        self,
        teacher: Teacher | Teachers,
        signals: Sequence[Signal],
        layout: Callable[[int], Layout],
    ) -> None:
        self.teacher = teacher
        self._teachers = teachers_of(teacher)
        self._signals = [signal for signal in dict.fromkeys(signals) if reads_teacher(signal)]
        self._points: dict[Signal, list[TapPoint]] = {}
        self._norms: dict[Signal, list[nn.BatchNorm2d]] = {}
        self._classifiers: dict[Signal, nn.Linear] = {}
        for signal in self._signals:
            number = _number_of(signal)
            if number is not None and number >= len(self._teachers):
                raise ValueError(
                    f"the method reads teacher {number}, counted from 0, got "
                    f"{len(self._teachers)} teachers"
                )
            if isinstance(signal, Features):
                self._points[signal] = points_of(signal, layout(signal.teacher))
            elif isinstance(signal, NormParameters):
                found = layout(signal.teacher)
                self._norms[signal] = [found.norm(s) for s in found.expanded(signal.stages)]
            elif isinstance(signal, Classifier):
                self._classifiers[signal] = layout(signal.teacher).classifier()
        self._taps = [
            FeatureTap(
                each.model,
                sorted(
                    {
                        point.key
                        for signal, points in self._points.items()
                        for point in points
                        if _number_of(signal) == number
                    }
                ),
            )
            for number, each in enumerate(self._teachers)
        ]
        for tap in self._taps:
            tap.enabled = False

    def example(self, images: Tensor) -> dict[Signal, Value]:
        """Values as those of `read`, for images that are in no data set."""
        return self.read(images, {})

    def read(self, images: Tensor, extras: Mapping[str, Tensor]) -> dict[Signal, Value]:
        """Logits and features of the teachers for a batch, without gradient."""
        answers = [
            self._answer(teacher, tap, images)
            for teacher, tap in zip(self._teachers, self._taps, strict=True)
        ]
        values: dict[Signal, Value] = {}
        for signal in self._signals:
            if isinstance(signal, TeacherLogits):
                logits = [of_one for of_one, _ in answers]
                number = signal.teacher
                values[signal] = ensembled(logits) if number is None else logits[number]
            elif isinstance(signal, Features):
                features = answers[signal.teacher][1]
                values[signal] = [
                    in_form(point, features[point.key], signal.form).detach()
                    for point in self._points[signal]
                ]
            elif isinstance(signal, NormParameters):
                values[signal] = [
                    torch.stack([norm.weight.detach(), norm.bias.detach()])
                    for norm in self._norms[signal]
                ]
            elif isinstance(signal, Classifier):
                values[signal] = self._classifier(signal)
        return values

    def _answer(
        self, teacher: Teacher, tap: FeatureTap, images: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        tap.enabled = True
        try:
            return teacher(images), tap.pop()
        finally:
            tap.enabled = False
            tap.clear()

    def _classifier(self, signal: Classifier) -> list[Tensor]:
        layer, teacher = self._classifiers[signal], self._teachers[signal.teacher]
        weight = layer.weight.detach()
        bias = weight.new_zeros(len(weight)) if layer.bias is None else layer.bias.detach()
        if teacher.maps_classes:
            weight, bias = weight[teacher.class_index], bias[teacher.class_index]
        return [weight, bias]


def _number_of(signal: Signal) -> int | None:
    number: int | None = getattr(signal, "teacher", None)
    return number


class CacheReader:
    """Looks the teacher's logits up, by `index` and `draw` of the batch.

    Args:
        cache: The stored answers.
        signals: What a method reads.

    Raises:
        ValueError: A signal of the teacher that is not stored.
    """

    def __init__(self, cache: TeacherCache, signals: Sequence[Signal]) -> None:
        self.cache = cache
        for signal in signals:
            if reads_teacher(signal) and not (
                isinstance(signal, TeacherLogits) and signal.teacher in (None, 0)
            ):
                raise ValueError(
                    f"the method reads {signal}, but a teacher cache holds logits alone: pass the "
                    "teacher itself"
                )

    def example(self, images: Tensor) -> dict[Signal, Value]:
        """Values as those of `read`, for images that are in no data set."""
        return _of_one(images.new_zeros(len(images), self.cache.num_classes))

    def read(self, images: Tensor, extras: Mapping[str, Tensor]) -> dict[Signal, Value]:
        """The stored logits for a batch, on the device of its images.

        Raises:
            ValueError: The extras do not say which views the images are.
        """
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


def _of_one(logits: Tensor) -> dict[Signal, Value]:
    return {TeacherLogits(): logits, TeacherLogits(0): logits}


def checked_reads(method: nn.Module | None) -> dict[str, Signal]:
    """What a method reads, by argument, checked against the arguments of its forward.

    Raises:
        TypeError: The method is no module.
        ValueError: Its `reads` does not fit its forward.
    """
    if method is None:
        return {}
    if not isinstance(method, nn.Module):
        raise TypeError(f"method must be an nn.Module or None, got {type(method).__name__}")
    name = type(method).__name__
    reads = getattr(method, "reads", None)
    if not isinstance(reads, Mapping) or not all(isinstance(s, Signal) for s in reads.values()):
        raise ValueError(f"{name} must declare `reads`, a mapping from argument to signal")
    parameters = inspect.signature(method.forward).parameters
    missing = [
        argument
        for argument, parameter in parameters.items()
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        and argument not in reads
    ]
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    unknown = [a for a in reads if a not in parameters and not takes_any]
    if missing or unknown:
        raise ValueError(
            f"{name}.reads must name the arguments of its forward ({', '.join(parameters)}): "
            f"missing {missing}, unknown {unknown}"
        )
    return dict(reads)


def given_values(
    reads: Mapping[str, Signal],
    target: Tensor,
    extras: Mapping[str, Tensor],
    from_teacher: Mapping[Signal, Value],
) -> dict[str, Value]:
    """Values of the signals that do not come from the student, by argument name.

    Extras are moved to the target's device.

    Raises:
        ValueError: An extra that the method reads is missing from the batch.
    """
    values: dict[str, Value] = {}
    for argument, signal in reads.items():
        if isinstance(signal, Target):
            values[argument] = target
        elif isinstance(signal, FromBatch):
            values[argument] = _extra(signal.name, extras, target)
        elif isinstance(signal, Again):
            values[images_key(signal.images)] = _extra(signal.images, extras, target)
        elif signal in from_teacher:
            values[argument] = from_teacher[signal]
    return values


def _extra(name: str, extras: Mapping[str, Tensor], target: Tensor) -> Tensor:
    if name not in extras:
        raise ValueError(
            f"the method reads {name!r} from the batch, got "
            f"{', '.join(sorted(extras)) or 'no extras'}: call "
            f"distiller(images, target, {name}=...)"
        )
    return extras[name].to(target.device, non_blocking=True)


def images_key(name: str) -> str:
    """The name under which further images of the batch are given to the trained module."""
    return f"images/{name}"


def teachers_of(teacher: Teacher | Teachers) -> list[Teacher]:
    """The single teachers."""
    return teacher.all if isinstance(teacher, Teachers) else [teacher]


def reads_teacher(signal: Signal) -> bool:
    """Whether a signal comes from a teacher."""
    return isinstance(signal, TeacherLogits | NormParameters | Classifier) or (
        isinstance(signal, Features) and signal.of == "teacher"
    )
