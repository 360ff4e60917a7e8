"""The signals that methods read, and how each is provided.

Signals of the student are provided inside the trained module, by a `Provider` each, which may
have learned parts. The others are given to it: labels, extras of the batch, the teacher or
its stored answers.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor, nn

from softlabels.losses.reads import (
    Exits,
    Features,
    FromBatch,
    Logits,
    Signal,
    Target,
    TeacherLogits,
    Votes,
    WeakLogits,
)
from softlabels.taps import FeatureTap, Layout, PositionHead, TapPoint, votes_of
from softlabels.teacher import Teacher
from softlabels.teacher_cache import TeacherCache

__all__ = [
    "CacheReader",
    "Exits",
    "Features",
    "FromBatch",
    "Logits",
    "Provider",
    "Signal",
    "Target",
    "TeacherLogits",
    "TeacherReader",
    "Value",
    "Votes",
    "WeakLogits",
    "checked_reads",
    "given_values",
    "provider_for",
    "reads_teacher",
]

Value: TypeAlias = "Tensor | list[Tensor]"


class Provider(nn.Module):
    """Provides one signal of the student inside the trained module's forward.

    Attributes:
        points: Where it reads features.
    """

    def __init__(self, points: Sequence[TapPoint] = ()) -> None:
        super().__init__()
        self.points = tuple(points)

    def forward(self, student: nn.Module, logits: Tensor, features: Mapping[str, Tensor]) -> Value:
        """The signal's value, from the student's logits and its tapped features by path."""
        raise NotImplementedError

    def monitored(self, value: Value, logits: Tensor) -> dict[str, Tensor]:
        """Scalars about the value that are worth a log line, without gradient."""
        return {}


class _LogitsProvider(Provider):
    def forward(self, student: nn.Module, logits: Tensor, features: Mapping[str, Tensor]) -> Value:
        return logits


class _WeakLogitsProvider(Provider):
    """A linear head on the pooled feature, normalised first where the point says so.

    Default PyTorch initialisation.
    """

    def __init__(self, point: TapPoint, num_classes: int) -> None:
        super().__init__([point])
        self.norm = nn.LayerNorm(point.channels) if point.layer_norm else nn.Identity()
        self.fc = nn.Linear(point.channels, num_classes)

    def forward(self, student: nn.Module, logits: Tensor, features: Mapping[str, Tensor]) -> Value:
        point = self.points[0]
        weak_logits: Tensor = self.fc(point.pooled(self.norm(features[point.path])))
        return weak_logits


class _VotesProvider(Provider):
    def __init__(self, head: PositionHead, signal: Votes) -> None:
        super().__init__([head.point])
        self.head = head
        self.signal = signal

    def forward(self, student: nn.Module, logits: Tensor, features: Mapping[str, Tensor]) -> Value:
        feature = features[self.head.point.path]
        return self.head.votes(student, feature, self.signal.upsample, self.signal.mode)

    def monitored(self, value: Value, logits: Tensor) -> dict[str, Tensor]:
        """Share of samples whose majority vote is their prediction.

        Only where a class token predicts: no task loss trains the patch tokens then, and the
        votes may mean nothing.
        """
        if not self.head.point.class_token or not isinstance(value, Tensor):
            return {}
        counts = torch.zeros_like(logits).scatter_add(
            1, value, torch.ones_like(value, dtype=logits.dtype)
        )
        agrees = counts.argmax(1) == logits.argmax(1)
        return {"votes_agree": agrees.float().mean()}


class _ExitsProvider(Provider):
    """A linear head at each place: logits of the pooled feature, and votes of its positions."""

    def __init__(self, points: Sequence[TapPoint], num_classes: int) -> None:
        super().__init__(points)
        self.fcs = nn.ModuleList(nn.Linear(point.channels, num_classes) for point in points)

    def forward(self, student: nn.Module, logits: Tensor, features: Mapping[str, Tensor]) -> Value:
        values: list[Tensor] = []
        for point, fc in zip(self.points, self.fcs, strict=True):
            feature = features[point.path]
            values.append(fc(point.pooled(feature)))
            with torch.no_grad():
                values.append(votes_of(point.as_map(feature.detach()), logits.shape[1], fc))
        return values


class _FeaturesProvider(Provider):
    def forward(self, student: nn.Module, logits: Tensor, features: Mapping[str, Tensor]) -> Value:
        return [features[point.path] for point in self.points]


def provider_for(signal: Signal, layout: Callable[[], Layout]) -> Provider | None:
    """The provider of a signal of the student; None for a signal that is given from outside.

    Args:
        signal: What a method reads.
        layout: Gives the student's layout; called only if the signal needs it.

    Raises:
        ValueError: The student has no such layer.
    """
    if isinstance(signal, Logits):
        return _LogitsProvider()
    if isinstance(signal, WeakLogits):
        found = layout()
        return _WeakLogitsProvider(found.point(signal.tap), found.num_classes)
    if isinstance(signal, Votes):
        return _VotesProvider(layout().head(), signal)
    if isinstance(signal, Exits):
        found = layout()
        return _ExitsProvider([found.point(tap) for tap in signal.taps], found.num_classes)
    if isinstance(signal, Features) and signal.of == "student":
        found = layout()
        return _FeaturesProvider([found.point(stage) for stage in signal.stages])
    return None


class TeacherReader:
    """Runs the teacher once a batch, for all the signals that are read from it.

    Args:
        teacher: The frozen network.
        signals: What a method reads; those of the teacher are picked.
        layout: Gives the teacher's layout; called only if an inner feature is read.
    """

    def __init__(
        self, teacher: Teacher, signals: Sequence[Signal], layout: Callable[[], Layout]
    ) -> None:
        self.teacher = teacher
        self._paths = {
            signal: tuple(layout().point(stage).path for stage in signal.stages)
            for signal in signals
            if isinstance(signal, Features) and signal.of == "teacher"
        }
        paths = sorted({path for group in self._paths.values() for path in group})
        self._tap = FeatureTap(teacher.model, paths)
        self._tap.enabled = False

    def example(self, images: Tensor) -> dict[Signal, Value]:
        """Values as those of `read`, for images that are in no data set."""
        return self.read(images, {})

    def read(self, images: Tensor, extras: Mapping[str, Tensor]) -> dict[Signal, Value]:
        """Logits and features of the teacher for a batch, without gradient."""
        self._tap.enabled = True
        try:
            logits = self.teacher(images)
            features = self._tap.pop()
        finally:
            self._tap.enabled = False
            self._tap.clear()
        values: dict[Signal, Value] = {TeacherLogits(): logits}
        for signal, paths in self._paths.items():
            values[signal] = [features[path].detach() for path in paths]
        return values


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
            if reads_teacher(signal) and not isinstance(signal, TeacherLogits):
                raise ValueError(
                    f"the method reads {signal}, but a teacher cache holds logits alone: pass the "
                    "teacher itself"
                )

    def example(self, images: Tensor) -> dict[Signal, Value]:
        """Values as those of `read`, for images that are in no data set."""
        return {TeacherLogits(): images.new_zeros(len(images), self.cache.num_classes)}

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
        return {TeacherLogits(): logits}


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
    unknown = [argument for argument in reads if argument not in parameters]
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
            if signal.name not in extras:
                raise ValueError(
                    f"the method reads {signal.name!r} from the batch, got "
                    f"{', '.join(sorted(extras)) or 'no extras'}: call "
                    f"distiller(images, target, {signal.name}=...)"
                )
            values[argument] = extras[signal.name].to(target.device, non_blocking=True)
        elif signal in from_teacher:
            values[argument] = from_teacher[signal]
    return values


def reads_teacher(signal: Signal) -> bool:
    """Whether a signal comes from the teacher."""
    return isinstance(signal, TeacherLogits) or (
        isinstance(signal, Features) and signal.of == "teacher"
    )
