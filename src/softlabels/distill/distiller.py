"""Student + teacher + method -> one forward -> a loss."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from itertools import chain
from typing import Any, cast

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional

from softlabels.distill.external_inputs import (
    CacheReader,
    TeacherReader,
    checked_inputs,
    external_values,
)
from softlabels.distill.output import StepOutput
from softlabels.distill.teacher import Teacher, Teachers
from softlabels.distill.teacher_cache import TeacherCache
from softlabels.distill.trainable import Outputs, Trainable, provided
from softlabels.inputs import PeerLogits, TeacherLogits, Value
from softlabels.losses import MemoryBank, Method, SoftLabels
from softlabels.losses._checks import check_logits, check_target
from softlabels.losses._non_target import in_float32, label_probabilities
from softlabels.taps import Layout, undisturbed

__all__ = ["Distiller", "StepOutput"]

Loss = Callable[[Tensor, Tensor], Tensor]

_MOST_KEPT = 256  # batches between two optimizer steps; more means that nobody calls after_step


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
        method: A method of `softlabels.losses`, or one of your own, a subclass of its `Method`.
            None trains with the task's loss alone.
        teacher: Needed if the method reads from one. A plain module is wrapped in a `Teacher`.
            It is moved to the student's device. Or a `TeacherCache`, whose answers are looked up:
            `distiller(images, target, index=batch.index, draw=batch.draw)`. Several networks, as a
            sequence or `Teachers`, teach by their mean prediction, unless the method reads them
            one by one.
        task_loss: (logits, target) -> scalar; cross-entropy if None, which leaves out the samples
            of the method's `ignore_index`.
        task_weight: Weight of the task's loss.
        method_weight: Weight of the method's loss.
        taps: Dotted paths to use in place of what is found: `{"middle": ..., "last": ...}`;
            for the (first) teacher `"teacher.middle"`, `"teacher.last"`.
        peer: A second network that is trained along with the student, for a method that reads its
            logits. It is part of `trainable`, and no part of `export()`.
        example_shape: (C, H, W) of the images, for the dry run that finds layers and widths.
            None: from the first convolution and the student's own configuration, or 224.

    Attributes:
        trainable: The module to compile, wrap and optimize.
        method: The method's module.
        teacher: The `Teacher`, `Teachers` or `TeacherCache`, or None.
        detailed: Whether `terms` of a step take the method apart. It costs a second run of the
            method, and changes nothing of the loss; False at first.

    Raises:
        TypeError: The student is no module, or the method no `Method`.
        ValueError: A teacher or peer is missing, superfluous or does not give what the method
            reads, the class counts differ, a layer is not found, or the method's `inputs` do
            not fit its `terms`.

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
    teacher: Teacher | Teachers | TeacherCache | None
    method: Method | None
    task_loss: Loss

    def __init__(
        self,
        student: nn.Module,
        method: Method | None = None,
        *,
        teacher: TeacherCache | nn.Module | Sequence[nn.Module] | None = None,
        task_loss: Loss | None = None,
        task_weight: float = 1.0,
        method_weight: float = 1.0,
        taps: Mapping[str, str] | None = None,
        peer: nn.Module | None = None,
        example_shape: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(student, nn.Module):
            raise TypeError(f"student must be an nn.Module, got {type(student).__name__}")
        inputs = checked_inputs(method)
        if isinstance(teacher, Sequence):
            teacher = Teachers(teacher)
        elif teacher is not None and not isinstance(teacher, Teacher | Teachers | TeacherCache):
            teacher = Teacher(teacher)
        reads_a_teacher = any(kind.reads_teacher for kind in inputs.values())
        # A cache may stand by: it says which draws of the augmentation are shown.
        teacher_unused = isinstance(teacher, TeacherCache) and not reads_a_teacher
        taught = None if teacher_unused else teacher
        _check_needed(method, "teacher", taught, reads_a_teacher, "teacher=Teacher(model)")
        peer_arguments = tuple(name for name, s in inputs.items() if isinstance(s, PeerLogits))
        _check_needed(method, "peer", peer, bool(peer_arguments), "peer=network")
        network = teacher if isinstance(teacher, Teacher | Teachers) else None
        for name, other in (("teacher", network), ("peer", peer)):
            if other is not None and {*map(id, other.parameters())} & {
                *map(id, student.parameters())
            }:
                raise ValueError(f"{name} and student share parameters: pass a copy as {name}")
        parameter = next(student.parameters(), None)
        for other in (network, peer):
            if other is not None and parameter is not None:
                other.to(parameter.device)
        student_taps, teacher_taps = _split_taps(taps or {}, network)

        @cache
        def student_layout() -> Layout:
            return Layout(student, example_shape, student_taps)

        @cache
        def teacher_layout(number: int) -> Layout:
            assert network is not None
            one = network.all[number]
            example = one.prepared(student_layout().example())
            return Layout(one.model, example.shape[1:], {} if number else teacher_taps)

        # Paths that the user names are checked, whether or not the method reads there.
        if student_taps:
            student_layout()
        if teacher_taps:
            teacher_layout(0)
        # A fork: the learned parts take their own draws, and the caller's stream is unchanged.
        with torch.random.fork_rng(devices=[]):
            providers, passes = provided(inputs, student_layout)
            self.trainable = Trainable(
                student, providers, passes, peer=peer, peer_arguments=peer_arguments
            )
            # Unregistered: neither trained nor stored. `_apply` moves them along.
            self.__dict__["teacher"] = teacher
            self.__dict__["method"] = method
            ignored = None if method is None else method.ignore_index
            self.__dict__["task_loss"] = task_loss or partial(_cross_entropy, ignore_index=ignored)
            self.task_weight = float(task_weight)
            self.method_weight = float(method_weight)
            self.detailed = False
            self._inputs = inputs
            self._reader: TeacherReader | CacheReader | None = None
            if reads_a_teacher and isinstance(teacher, TeacherCache):
                self._reader = CacheReader(teacher, inputs.values())
            elif reads_a_teacher and network is not None:
                self._reader = TeacherReader(network, inputs.values(), teacher_layout)
            self._kept: list[dict[str, Value]] = []
            self._add_adapters(student_layout, needed=example_shape is not None)
        # Not `self.train`, which would thaw parts of the student that are kept in eval mode.
        self.training = self._core.training = student.training
        for part in (self._core.providers, self._core.adapters, peer):
            if part is not None:
                part.train(student.training)

    def _add_adapters(self, layout: Callable[[], Layout], *, needed: bool) -> None:
        """Build the method's learned parts, and check the teacher where images are known."""
        core = self._core
        method = self.method
        has_adapters = method is not None and method.has_adapters()
        if has_adapters or (self._reader is not None and needed):
            example = layout().example()
            models = [core, *([self.teacher] if isinstance(self.teacher, nn.Module) else [])]
            with undisturbed(*models):
                from_teacher = self._reader.read(example, None) if self._reader is not None else {}
                given = {n: from_teacher[s] for n, s in self._inputs.items() if s in from_teacher}
                images = {run.images: example for run in core.passes if run.images is not None}
                outputs = core(example, given, images)
            self._check_classes(outputs.logits, given)
            if method is not None and has_adapters:
                values = {**given, **outputs.read}
                shapes = {n: _each(lambda x: tuple(x.shape), value) for n, value in values.items()}
                core.adapters = method.build_adapters(shapes)
        parameter = next(core.student.parameters(), None)
        if parameter is not None:
            for part in (core.providers, core.adapters):
                if part is not None:
                    part.to(parameter)

    @property
    def extras(self) -> tuple[str, ...]:
        """Names of what the batch must bring besides images and labels, for `forward`."""
        named = [name for kind in self._inputs.values() for name in kind.extras]
        stored = ["index", "draw"] if isinstance(self._reader, CacheReader) else []
        return (*dict.fromkeys([*named, *stored]),)

    @property
    def _core(self) -> Trainable:
        module = self.trainable
        while not isinstance(module, Trainable):
            inner = getattr(module, "module", getattr(module, "_orig_mod", None))
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
            images: [B, C, H, W], normalized for the student.
            target: [B] class indices or [B, C] probabilities, never smoothed.
            **extras: Further tensors of the batch that the method reads, as `index=...`, on any
                device; with a `TeacherCache` `index` and `draw`, [B] on the CPU.

        Returns:
            The loss, the student's logits, and the terms of the loss.

        Raises:
            ValueError: A missing extra, labels that do not fit the logits, or a teacher with
                another number of classes and no class map.
        """
        given, further = self._given(images, target, extras)
        for_adapters = None if self._core.adapters is None else given
        outputs: Outputs = self.trainable(images, for_adapters, further or None)
        logits = outputs.logits
        self._check_classes(logits, given)
        task = self.task_loss(logits, target)
        loss = self.task_weight * task
        terms = {"task": loss}
        heads = [logits]
        if self.method is not None:
            values = {**given, **outputs.read}
            arguments = self.method.arguments_of(values)
            distilled = self.method(**arguments)
            if self.detailed:
                # Beside the loss itself, so that a look at its terms changes not one bit of it.
                device = logits.device
                devices = [] if device.type == "cpu" else [device]
                with torch.random.fork_rng(devices, device_type=device.type):
                    of_method = self.method.reduced(**arguments)
                for name, term in of_method.items():
                    terms[f"method/{name}"] = self.method_weight * term
            else:
                terms["method"] = self.method_weight * distilled
            loss = loss + self.method_weight * distilled
            heads += [value for value in _logits_among(outputs.read) if value is not logits]
            if hasattr(self._core.adapters, "after_step"):
                self._keep(values)
        if loss.dim() != 0:
            raise ValueError(
                f"the loss must be a scalar, got {tuple(loss.shape)}: use reduction='mean' or "
                "'sum' for the task's loss and the method"
            )
        return StepOutput(loss, logits, terms, outputs.monitored, tuple(heads))

    def _given(
        self, images: Tensor, target: Tensor, extras: Mapping[str, Tensor]
    ) -> tuple[dict[str, Value], dict[str, Tensor]]:
        from_teacher = self._reader.read(images, extras) if self._reader is not None else {}
        return external_values(self._inputs, target, extras, from_teacher)

    def _check_classes(self, logits: Tensor, given: Mapping[str, Value]) -> None:
        for argument, kind in self._inputs.items():
            if isinstance(kind, TeacherLogits) and argument in given:
                found, expected = cast("Tensor", given[argument]).shape[1], logits.shape[1]
                if found != expected:
                    raise ValueError(
                        f"the teacher has {found} classes, the student {expected}: pass "
                        "Teacher(model, class_map=[...]) with the teacher's index of each of the "
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
        names = getattr(self._core.adapters, "memory_inputs", None) or values
        self._kept.append({name: _each(Tensor.detach, values[name]) for name in names})

    def memories(self) -> list[MemoryBank]:
        """What the method remembers from one step to the next."""
        adapters = self._core.adapters
        modules = [] if adapters is None else adapters.modules()
        return [module for module in modules if isinstance(module, MemoryBank)]

    def after_step(self) -> None:
        """Let the method's memory take in the batches since the last call.

        Call it after `optimizer.step()`; only methods with a memory need it. On several processes,
        whose batches must be of one size then, it takes in those of all.
        """
        update = getattr(self._core.adapters, "after_step", None)
        if update is not None:
            with torch.no_grad():
                for values in self._kept:
                    update(_of_all_processes(values))
        self._kept = []

    def forget_step(self) -> None:
        """Keep the batches since the last `after_step` from the method's memory.

        Call it in place of `optimizer.step()` for a step that is skipped.
        """
        self._kept = []

    def after_epoch(self) -> None:
        """Let the method's memory close an epoch."""
        update = getattr(self._core.adapters, "after_epoch", None)
        if update is not None:
            with torch.no_grad():
                update()

    def soft_labels(self, images: Tensor, target: Tensor, **extras: Tensor) -> SoftLabels:
        """The soft labels that this batch is trained towards, without gradient.

        Those of the method; without a method that has any, those of the task's own loss; else
        the labels themselves.

        Args:
            images: [B, C, H, W], normalized for the student.
            target: [B] class indices or [B, C] probabilities.
            **extras: As in `forward`.
        """
        with torch.no_grad():
            if self.method is not None and self.method.has_soft_labels():
                given, further = self._given(images, target, extras)
                values = {**given, **self._core(images, given, further).read}
                arguments = {**self.method.arguments_of(values), "target": target}
                found = self.method.soft_labels(**arguments)
                if found is not None:
                    return found
            logits = self.student(images)
            if isinstance(self.task_loss, Method):
                found = self.task_loss.soft_labels(logits, target)
                if found is not None:
                    return found
            return SoftLabels(label_probabilities(target, logits), torch.zeros_like(logits))

    def export(self) -> nn.Module:
        """A copy of the student alone, without hooks and gradients."""
        # Together: the copied tap holds the hooks of the copied student.
        student, tap = copy.deepcopy((self._core.student, self._core.tap))
        tap.remove()
        return student

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


def _check_needed(
    method: Method | None, what: str, given: object, needed: bool, remedy: str
) -> None:
    name = "training without a method" if method is None else type(method).__name__
    if needed and given is None:
        raise ValueError(f"{name} reads from a {what}: pass {remedy}")
    if given is not None and not needed:
        raise ValueError(f"{name} reads from no {what}, but one is given: leave it out")


def _of_all_processes(values: Mapping[str, Value]) -> dict[str, Value]:
    """Values of the batches of all processes together, in the order of the processes."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return dict(values)

    def gathered(tensor: Tensor) -> Tensor:
        tensor = tensor.contiguous()
        parts = [torch.empty_like(tensor) for _ in range(distributed.get_world_size())]
        distributed.all_gather(parts, tensor)
        return torch.cat(parts)

    return {name: _each(gathered, value) for name, value in values.items()}


def _logits_among(read: Mapping[str, Value]) -> list[Tensor]:
    """What the method reads from the student that is [B, C] and has a gradient."""
    logits = cast("Tensor | None", read.get("logits"))
    if logits is None:
        return []
    values = chain.from_iterable([v] if isinstance(v, Tensor) else v for v in read.values())
    return [value for value in values if value.requires_grad and value.shape == logits.shape]


def _split_taps(
    taps: Mapping[str, str], network: Teacher | Teachers | None
) -> tuple[dict[str, str], dict[str, str]]:
    of_student = {k: v for k, v in taps.items() if not k.startswith("teacher.")}
    of_teacher = {k.removeprefix("teacher."): v for k, v in taps.items() if k not in of_student}
    if of_teacher and network is None:
        raise ValueError(f"taps names {sorted(taps)}, but there is no teacher's network")
    return of_student, of_teacher


def _each(change: Callable[[Tensor], Any], value: Value) -> Any:
    """A value with all its tensors changed."""
    return change(value) if isinstance(value, Tensor) else [change(tensor) for tensor in value]
