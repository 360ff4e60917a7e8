"""Student + teacher + method -> one forward -> a loss."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from softlabels.losses.checks import check_logits, check_target
from softlabels.losses.nontarget import SoftLabels, in_float32, label_probabilities
from softlabels.signals import (
    CacheReader,
    Signal,
    TeacherLogits,
    TeacherReader,
    Value,
    checked_reads,
    given_values,
    provider_for,
    reads_teacher,
)
from softlabels.taps import Layout, undisturbed
from softlabels.teacher import Teacher
from softlabels.teacher_cache import TeacherCache
from softlabels.trainable import Trainable

__all__ = ["Distiller", "StepOutput"]

Loss = Callable[[Tensor, Tensor], Tensor]

_MOST_KEPT = 256  # batches between two optimiser steps; more means that nobody calls after_step


@dataclass
class StepOutput:
    """What one forward of a `Distiller` gives.

    Attributes:
        loss: Scalar to call `backward()` on.
        logits: [B, C], the student's.
        parts: Detached scalars: `"task"` and `"method"`, each before its weight, and what the
            signals report.
        terms: The summands of `loss`, after their weights, with their gradient: `"task"` and
            `"method"`, or, from a detailed distiller, `"method/NAME"` for each part of the method.
        heads: The student's logits, and those of other heads that the method reads: what the
            terms pull at.
    """

    loss: Tensor
    logits: Tensor
    parts: dict[str, Tensor] = field(default_factory=dict)
    terms: dict[str, Tensor] = field(default_factory=dict)
    heads: tuple[Tensor, ...] = ()

    def gradient_shares(self) -> dict[str, Tensor]:
        """Each term's share of the gradient norms on the logits, detached scalars in [0, 1].

        The norm of a term is that of its gradient with respect to all of `heads` together; a
        share is that norm over the sum of all terms' norms. So weights can be set by looking.
        Call it before `loss.backward()`.
        """
        norms: dict[str, Tensor] = {}
        for name, term in self.terms.items():
            found: Sequence[Tensor | None] = (None,)
            if term.requires_grad:
                found = torch.autograd.grad(term, self.heads, retain_graph=True, allow_unused=True)
            squares = [
                gradient.float().square().sum() for gradient in found if gradient is not None
            ]
            norms[name] = torch.stack(squares).sum().sqrt() if squares else term.new_zeros(())
        total = torch.stack(list(norms.values())).sum()
        tiny = torch.finfo(total.dtype).tiny
        return {name: norm / total.clamp(min=tiny) for name, norm in norms.items()}


class Distiller(nn.Module):
    """Wires an unedited student, a method and an optional frozen teacher together.

    The loss is `task_weight * task_loss + method_weight * method`: a method is added to the
    task's own loss and never replaces it.

    `distiller.trainable` holds the student and the learned parts beside it. It is what to
    compile and to wrap (`distiller.trainable = DistributedDataParallel(distiller.trainable)`),
    and the only content of `parameters()` and `state_dict()`; the teacher is in neither.

    Args:
        student: Any classifier, [B, C, H, W] -> [B, classes]; it gets forward hooks, and is not
            edited otherwise.
        method: A module of `softlabels.losses`, or any module that declares `reads`. None
            trains with the task's loss alone.
        teacher: Needed if the method reads from one. A plain module is wrapped in a `Teacher`.
            It is moved to the student's device. Or a `TeacherCache`, whose answers are looked up:
            `distiller(images, target, index=batch.index, draw=batch.draw)`.
        task_loss: (logits, target) -> scalar; cross-entropy if None, which leaves out the samples
            of the method's `ignore_index`.
        task_weight: Weight of the task's loss.
        method_weight: Weight of the method's loss.
        taps: Dotted paths to use in place of what is found: `{"middle": ..., "last": ...}`;
            for the teacher `"teacher.middle"`, `"teacher.last"`.
        example_shape: (C, H, W) of the images, for the dry run that finds layers and widths.
            None: from the first convolution and the student's own configuration, or 224.

    Attributes:
        trainable: The module to compile, wrap and optimise.
        method: The method's module.
        teacher: The `Teacher` or `TeacherCache`, or None.
        detailed: Whether `terms` of a step take the method apart (with `return_parts=True`, where
            its forward has that). It costs a second run of the method, and changes nothing of the
            loss; False at first.

    Raises:
        TypeError: The student or the method is no module.
        ValueError: A teacher is missing or does not give what the method reads, the class counts
            differ, a layer is not found, or the method's `reads` does not fit its forward.

    Example:
        >>> from softlabels import Distiller, ZipfLSLoss
        >>> student = nn.Sequential(
        ...     nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)
        ... )
        >>> distiller = Distiller(student, ZipfLSLoss(), example_shape=(3, 16, 16))
        >>> step = distiller(torch.randn(2, 3, 16, 16), torch.tensor([1, 4]))
        >>> step.loss.backward()
    """

    trainable: nn.Module
    teacher: Teacher | TeacherCache | None
    method: nn.Module | None
    task_loss: Loss

    def __init__(
        self,
        student: nn.Module,
        method: nn.Module | None = None,
        *,
        teacher: Teacher | TeacherCache | nn.Module | None = None,
        task_loss: Loss | None = None,
        task_weight: float = 1.0,
        method_weight: float = 1.0,
        taps: Mapping[str, str] | None = None,
        example_shape: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(student, nn.Module):
            raise TypeError(f"student must be an nn.Module, got {type(student).__name__}")
        reads = checked_reads(method)
        if teacher is not None and not isinstance(teacher, Teacher | TeacherCache):
            teacher = Teacher(teacher)
        reads_a_teacher = any(reads_teacher(signal) for signal in reads.values())
        if reads_a_teacher and teacher is None:
            raise ValueError(
                f"{type(method).__name__} reads from a teacher: pass teacher=Teacher(model)"
            )
        network = teacher if isinstance(teacher, Teacher) else None
        if network is not None and {*map(id, network.parameters())} & {
            *map(id, student.parameters())
        }:
            raise ValueError("teacher and student share parameters: pass a copy as teacher")
        parameter = next(student.parameters(), None)
        if network is not None and parameter is not None:
            network.to(parameter.device)
        student_taps, teacher_taps = _split_taps(taps or {}, network)
        layouts: dict[str, Layout] = {}

        def student_layout() -> Layout:
            if "student" not in layouts:
                layouts["student"] = Layout(student, example_shape, student_taps)
            return layouts["student"]

        def teacher_layout() -> Layout:
            assert network is not None
            if "teacher" not in layouts:
                example = network.prepared(student_layout().example())
                layouts["teacher"] = Layout(network.model, example.shape[1:], teacher_taps)
            return layouts["teacher"]

        # Paths that the user names are checked, whether or not the method reads there.
        if student_taps:
            student_layout()
        if teacher_taps:
            teacher_layout()
        # A fork: the learned parts take their own draws, and the caller's stream is unchanged.
        with torch.random.fork_rng(devices=[]):
            providers = {
                argument: provider
                for argument, signal in reads.items()
                if (provider := provider_for(signal, student_layout)) is not None
            }
            self.trainable = Trainable(student, providers)
            # Unregistered: neither trained nor stored. `_apply` moves them along.
            self.__dict__["teacher"] = teacher
            self.__dict__["method"] = method
            ignored = getattr(method, "ignore_index", None)
            self.__dict__["task_loss"] = task_loss or partial(_cross_entropy, ignore_index=ignored)
            self.task_weight = float(task_weight)
            self.method_weight = float(method_weight)
            self.detailed = False
            self._gives_parts = method is not None and "return_parts" in (
                inspect.signature(method.forward).parameters
            )
            self._reads = reads
            self._reader: TeacherReader | CacheReader | None = None
            if reads_a_teacher and isinstance(teacher, TeacherCache):
                self._reader = CacheReader(teacher, list(reads.values()))
            elif reads_a_teacher and network is not None:
                self._reader = TeacherReader(network, list(reads.values()), teacher_layout)
            self._kept: list[dict[str, Value]] = []
            self._add_heads(student_layout, needed=example_shape is not None)
        # Not `self.train`, which would thaw parts of the student that are kept in eval mode.
        self.training = self._core.training = student.training
        for part in (self._core.providers, self._core.heads):
            if part is not None:
                part.train(student.training)

    def _add_heads(self, layout: Callable[[], Layout], *, needed: bool) -> None:
        """Build the method's learned parts, and check the teacher where images are known."""
        core = self._core
        build_heads = getattr(self.method, "build_heads", None)
        if build_heads is not None or (self._reader is not None and needed):
            example = layout().example()
            models = [core, *([self.teacher] if isinstance(self.teacher, Teacher) else [])]
            with undisturbed(*models):
                from_teacher = self._reader.example(example) if self._reader is not None else {}
                given = given_values(self._from_teacher_alone(), example, {}, from_teacher)
                outputs = core(example, given)
            self._check_classes(outputs["logits"], given)
            if build_heads is not None:
                values = {**given, **_read_values(outputs)}
                core.heads = build_heads({name: _shape(value) for name, value in values.items()})
        parameter = next(core.student.parameters(), None)
        if parameter is not None:
            for part in (core.providers, core.heads):
                if part is not None:
                    part.to(parameter)

    def _from_teacher_alone(self) -> dict[str, Signal]:
        return {name: signal for name, signal in self._reads.items() if reads_teacher(signal)}

    @property
    def _core(self) -> Trainable:
        module = self.trainable
        while not isinstance(module, Trainable):
            inner = getattr(module, "module", None)
            if inner is None:
                inner = getattr(module, "_orig_mod", None)
            if not isinstance(inner, nn.Module):
                raise TypeError(
                    "trainable must be the distiller's own module or a wrapper around it, "
                    f"got {type(self.trainable).__name__}"
                )
            module = inner
        return module

    @property
    def student(self) -> nn.Module:
        """The plain network, unwrapped."""
        return self._core.student

    def forward(self, images: Tensor, target: Tensor, **extras: Tensor) -> StepOutput:
        """One forward of student and teacher, and the loss.

        Args:
            images: [B, C, H, W], normalised for the student.
            target: [B] class indices or [B, C] probabilities, never smoothed.
            **extras: Further tensors of the batch that the method reads, as `index=...`, on any
                device; with a `TeacherCache` `index` and `draw`, [B] on the CPU.

        Returns:
            The loss, the student's logits, and the parts of the loss.

        Raises:
            ValueError: A missing extra, labels that do not fit the logits, or a teacher with
                another number of classes and no class map.
        """
        given = self._given(images, target, extras)
        outputs = self.trainable(images, given if self._core.heads is not None else None)
        logits: Tensor = outputs["logits"]
        self._check_classes(logits, given)
        task = self.task_loss(logits, target)
        loss = self.task_weight * task
        parts = {"task": task.detach()}
        terms = {"task": loss}
        heads = [logits]
        if self.method is not None:
            read = _read_values(outputs)
            values = {**given, **read}
            distilled = self.method(**values)
            if self.detailed and self._gives_parts:
                # Beside the loss itself, so that a look at its parts changes not one bit of it.
                device = logits.device
                devices = [] if device.type == "cpu" else [device]
                with torch.random.fork_rng(devices, device_type=device.type):
                    _, of_method = self.method(**values, return_parts=True)
                for name, part in of_method.items():
                    terms[f"method/{name}"] = self.method_weight * part
            else:
                terms["method"] = self.method_weight * distilled
            loss = loss + self.method_weight * distilled
            parts["method"] = distilled.detach()
            heads += [value for value in _logits_among(read) if value is not logits]
            if hasattr(self._core.heads, "after_step"):
                self._keep(values)
        if loss.dim() != 0:
            raise ValueError(
                f"the loss must be a scalar, got {tuple(loss.shape)}: use reduction='mean' or "
                "'sum' for the task's loss and the method"
            )
        for name, value in outputs.items():
            if name.startswith("monitored/"):
                parts[name.removeprefix("monitored/")] = value
        return StepOutput(loss, logits, parts, terms, tuple(heads))

    def _given(
        self, images: Tensor, target: Tensor, extras: Mapping[str, Tensor]
    ) -> dict[str, Value]:
        from_teacher = self._reader.read(images, extras) if self._reader is not None else {}
        return given_values(self._reads, target, extras, from_teacher)

    def _check_classes(self, logits: Tensor, given: Mapping[str, Value]) -> None:
        for argument, signal in self._reads.items():
            value = given.get(argument)
            if not (isinstance(signal, TeacherLogits) and isinstance(value, Tensor)):
                continue
            if value.shape[1] != logits.shape[1]:
                raise ValueError(
                    f"the teacher has {value.shape[1]} classes, the student {logits.shape[1]}: "
                    "pass Teacher(model, class_map=[...]) with the teacher's index of each of the "
                    "student's classes, or a cache of such a teacher"
                )

    def _keep(self, values: Mapping[str, Value]) -> None:
        """Keep a training batch for the method's memory, until `after_step`."""
        if not (self.training and torch.is_grad_enabled()):
            return
        if len(self._kept) == _MOST_KEPT:
            raise RuntimeError(
                f"{type(self.method).__name__} has a memory, and {_MOST_KEPT} batches wait for it: "
                "call distiller.after_step() after each optimizer.step()"
            )
        self._kept.append({name: _detached(value) for name, value in values.items()})

    def after_step(self) -> None:
        """Let the method's memory take in the batches since the last call.

        Call it after `optimizer.step()`; only methods with a memory need it.
        """
        update = getattr(self._core.heads, "after_step", None)
        if update is not None:
            with torch.no_grad():
                for values in self._kept:
                    update(values)
        self._kept = []

    def forget_step(self) -> None:
        """Keep the batches since the last `after_step` from the method's memory.

        Call it in place of `optimizer.step()` for a step that is skipped.
        """
        self._kept = []

    def after_epoch(self) -> None:
        """Let the method's memory close an epoch."""
        update = getattr(self._core.heads, "after_epoch", None)
        if update is not None:
            with torch.no_grad():
                update()

    def soft_labels(self, images: Tensor, target: Tensor, **extras: Tensor) -> SoftLabels:
        """The soft labels that this batch is trained towards, without gradient.

        Those of the method; without a method that has any, those of the task's own loss; else
        the labels themselves.

        Args:
            images: [B, C, H, W], normalised for the student.
            target: [B] class indices or [B, C] probabilities.
            **extras: As in `forward`.
        """
        with torch.no_grad():
            given = self._given(images, target, extras)
            outputs = self._core(images, given)
            logits = outputs["logits"]
            assert isinstance(logits, Tensor)
            of_method = getattr(self.method, "soft_labels", None)
            if of_method is not None:
                values = {**given, **_read_values(outputs), "target": target}
                return cast("SoftLabels", of_method(**values))
            of_task = getattr(self.task_loss, "soft_labels", None)
            if of_task is not None:
                return cast("SoftLabels", of_task(logits, target))
            return SoftLabels(label_probabilities(target, logits), torch.zeros_like(logits))

    def export(self) -> nn.Module:
        """A copy of the student alone, without hooks and gradients."""
        copied = copy.deepcopy(self._core)
        copied.tap.remove()
        return copied.student

    def state_dict(  # type: ignore[override]  # the base's overloads differ in their type variable
        self,
        *,
        destination: dict[str, Any] | None = None,
        prefix: str = "",
        keep_vars: bool = False,
    ) -> dict[str, Any]:
        """The trained module's state, the same whether it is wrapped or not."""
        destination = {} if destination is None else destination
        prefix = f"{prefix}trainable."
        return self._core.state_dict(destination=destination, prefix=prefix, keep_vars=keep_vars)

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Load what `state_dict` gave, into the trained module."""
        own = {name.removeprefix("trainable."): value for name, value in state_dict.items()}
        return self._core.load_state_dict(own, strict=strict, assign=assign)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Distiller:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # untyped in torch
        for module in (self.teacher, self.method, self.task_loss):
            if isinstance(module, nn.Module):
                module._apply(fn)
        return self


def _cross_entropy(logits: Tensor, target: Tensor, ignore_index: int | None = None) -> Tensor:
    check_logits(logits)
    check_target(target, logits, ignore_index)
    logits = in_float32(logits)
    if target.dim() == 2:
        return functional.cross_entropy(logits, target.to(logits.dtype))
    target = target.long()
    if ignore_index is None:
        return functional.cross_entropy(logits, target)
    # torch's own mean over no sample at all is 0 / 0.
    kept = (target != ignore_index).sum().clamp(min=1)
    summed = functional.cross_entropy(logits, target, ignore_index=ignore_index, reduction="sum")
    return summed / kept


def _logits_among(read: Mapping[str, Value]) -> list[Tensor]:
    """What the method reads from the student that is [B, C] and has a gradient."""
    logits = cast("Tensor | None", read.get("logits"))
    flat = [
        tensor
        for value in read.values()
        for tensor in ([value] if isinstance(value, Tensor) else value)
    ]
    return [
        tensor
        for tensor in flat
        if tensor.requires_grad and logits is not None and tensor.shape == logits.shape
    ]


def _split_taps(
    taps: Mapping[str, str], network: Teacher | None
) -> tuple[dict[str, str], dict[str, str]]:
    of_student = {k: v for k, v in taps.items() if not k.startswith("teacher.")}
    of_teacher = {k.removeprefix("teacher."): v for k, v in taps.items() if k not in of_student}
    if of_teacher and network is None:
        raise ValueError(f"taps names {sorted(taps)}, but there is no teacher's network")
    return of_student, of_teacher


def _read_values(outputs: Mapping[str, Value]) -> dict[str, Value]:
    return {
        name.removeprefix("read/"): value
        for name, value in outputs.items()
        if name.startswith("read/")
    }


def _detached(value: Value) -> Value:
    return value.detach() if isinstance(value, Tensor) else [tensor.detach() for tensor in value]


def _shape(value: Value) -> tuple[int, ...] | list[tuple[int, ...]]:
    if isinstance(value, Tensor):
        return tuple(value.shape)
    return [tuple(tensor.shape) for tensor in value]
