"""Finds the middle feature, the last map and the head of a model by one dry run."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle

from softlabels.taps.feature_tap import FeatureTap, Kind, TapPoint, find_module
from softlabels.taps.position_head import PositionHead, TwoHalves

__all__ = ["Layout", "undisturbed"]


@dataclass(frozen=True)
class _Record:
    """One call of one module in the dry run; `started` and `finished` count events."""

    path: str
    shape: tuple[int, ...]
    input_dims: int
    has_parameters: bool
    started: int
    finished: int


# Where the published USKD runs tapped another place than the rule finds: there, the last block
# before the final 1x1 convolution, already at the final resolution (yzd-v/cls_KD, its
# configs of MobileNetV2 and ShuffleNetV2).
_PUBLISHED_TAPS: tuple[tuple[Callable[[nn.Module], bool], str], ...] = (
    (lambda model: _timm_architecture(model).startswith("mobilenetv2"), "blocks.6"),
    (lambda model: _torchvision_class(model) == "MobileNetV2", "features.17"),
    (lambda model: _torchvision_class(model) == "ShuffleNetV2", "stage4"),
)


def _timm_architecture(model: nn.Module) -> str:
    config = getattr(model, "pretrained_cfg", None)
    return str(config.get("architecture", "")) if isinstance(config, Mapping) else ""


def _torchvision_class(model: nn.Module) -> str:
    from_torchvision = type(model).__module__.startswith("torchvision.models")
    return type(model).__name__ if from_torchvision else ""


class Layout:
    """What a dry run tells of a model: where its features are, and how wide.

    The dry run is in eval mode without gradient; it leaves the model's mode and buffers and the
    random state as they were.

    Args:
        model: Any image classifier, [B, C, H, W] -> [B, classes].
        example_shape: (C, H, W) of an image. None: the channels of the first convolution, and
            the size in the model's own configuration or 224.
        overrides: Paths to use for `"middle"` and `"last"` in place of those found.

    Attributes:
        example_shape: (C, H, W), as used.
        num_classes: Width of the model's logits.

    Raises:
        ValueError: The dry run fails, or the model gives no [B, classes] logits.
    """

    def __init__(
        self,
        model: nn.Module,
        example_shape: Sequence[int] | None = None,
        overrides: Mapping[str, str] | None = None,
    ) -> None:
        self._model = model
        self._overrides = dict(overrides or {})
        for stage, path in self._overrides.items():
            if stage not in ("middle", "last"):
                raise ValueError(f"taps must name 'middle' or 'last', got {stage!r}")
            find_module(model, path)
        self.example_shape = _example_shape(model, example_shape)
        self._records: list[_Record] = []
        self._last_path: str | None = None
        self.num_classes = self._dry_run()

    def example(self) -> Tensor:
        """Two images of noise on the model's device, in its dtype."""
        parameter = next(self._model.parameters(), torch.zeros(()))
        generator = torch.Generator().manual_seed(0)
        return torch.randn(2, *self.example_shape, generator=generator).to(parameter)

    def _dry_run(self) -> int:
        outputs: dict[int, Tensor] = {}
        started: dict[str, list[int]] = {}
        num_events = 0
        handles: list[RemovableHandle] = []

        def before(path: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
            def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
                nonlocal num_events
                num_events += 1
                started.setdefault(path, []).append(num_events)

            return hook

        def after(path: str) -> Callable[[nn.Module, tuple[Any, ...], object], None]:
            def hook(module: nn.Module, args: tuple[Any, ...], output: object) -> None:
                nonlocal num_events
                num_events += 1
                start = started[path].pop()
                if isinstance(output, Tensor):
                    first = args[0] if args else None
                    outputs[len(self._records)] = output
                    self._records.append(
                        _Record(
                            path,
                            tuple(output.shape),
                            first.dim() if isinstance(first, Tensor) else 0,
                            next(module.parameters(), None) is not None,
                            start,
                            num_events,
                        )
                    )

            return hook

        model = self._model
        with undisturbed(model):
            logits = self._forward(model)
            for path, module in model.named_modules():
                handles.append(module.register_forward_pre_hook(before(path)))
                handles.append(module.register_forward_hook(after(path)))
            try:
                features = self._forward_in_two(logits)
                if features is None:
                    outputs.clear()
                    self._records.clear()
                    model(self.example())
            finally:
                for handle in handles:
                    handle.remove()
        self._in_two_halves = features is not None
        self._last_path = self._find_last(features, outputs)
        return int(logits.shape[1])

    def _forward(self, model: nn.Module) -> Tensor:
        shape = (2, *self.example_shape)
        try:
            logits = model(self.example())
        except Exception as error:
            raise ValueError(
                f"a dry run of {type(model).__name__} with images of shape {shape} failed: "
                f"{type(error).__name__}: {error}; pass example_shape=(channels, height, width)"
            ) from error
        if not isinstance(logits, Tensor) or logits.dim() != 2 or logits.shape[0] != 2:
            got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise ValueError(
                f"{type(model).__name__} must return logits [B, classes] for images {shape}, "
                f"got {got}"
            )
        return logits

    def _forward_in_two(self, logits: Tensor) -> Tensor | None:
        """The output of `forward_features`, if timm's two halves give this model's logits."""
        if not isinstance(self._model, TwoHalves):
            return None
        features = self._model.forward_features(self.example())
        if not isinstance(features, Tensor):
            return None
        again = self._model.forward_head(features)
        same = isinstance(again, Tensor) and again.shape == logits.shape
        return features if same and torch.allclose(again, logits, rtol=1e-3, atol=1e-4) else None

    def _find_last(self, features: Tensor | None, outputs: Mapping[int, Tensor]) -> str | None:
        """Path of the module that gives the last map or tokens before the head."""
        for index in reversed(range(len(self._records))):
            record = self._records[index]
            if features is not None:
                if outputs[index] is features or (
                    outputs[index].data_ptr() == features.data_ptr()
                    and record.shape == tuple(features.shape)
                ):
                    return record.path
            elif record.path and self._is_last_candidate(record):
                return record.path
        return None

    def _is_last_candidate(self, record: _Record) -> bool:
        size = self._size(record)
        if size is not None:
            return size[0] * size[1] > 1
        return len(record.shape) == 3 and record.shape[1] > 1

    def _kind(self, record: _Record) -> Kind | None:
        shape = record.shape
        if len(shape) == 4:
            height, width = self.example_shape[1:]

            def fits(rows: int, columns: int) -> bool:
                return abs(rows * width - columns * height) <= max(height, width) * (
                    height != width
                )

            if fits(shape[2], shape[3]):
                return "NCHW"
            return "NHWC" if fits(shape[1], shape[2]) else None
        if len(shape) == 3:
            return "tokens"
        return "vector" if len(shape) == 2 else None

    def _size(self, record: _Record) -> tuple[int, int] | None:
        """Height and width of a record that is a map."""
        kind = self._kind(record)
        if kind == "NCHW":
            return record.shape[2], record.shape[3]
        return (record.shape[1], record.shape[2]) if kind == "NHWC" else None

    def _record(self, path: str) -> _Record | None:
        return next((r for r in reversed(self._records) if r.path == path), None)

    def point(self, stage: str) -> TapPoint:
        """The tap for `"middle"`, `"last"`, or a dotted path.

        Raises:
            ValueError: No such module, it gives no feature, or no rule finds the stage.
        """
        path = self._overrides.get(stage, stage)
        if path == "middle":
            path = self._middle_path()
        elif path == "last":
            path = self._require_last().path
        find_module(self._model, path)
        record = self._record(path)
        kind = self._kind(record) if record else None
        if record is None or kind is None:
            raise ValueError(f"module {path!r} returns no map, tokens or vector in a forward")
        return self._described(record, kind)

    def _described(self, record: _Record, kind: Kind) -> TapPoint:
        shape = record.shape
        size = self._size(record)
        if size is not None:
            return TapPoint(record.path, kind, shape[1 if kind == "NCHW" else 3], *size)
        if kind == "vector":
            return TapPoint(record.path, kind, shape[1])
        class_token = any(
            name.rpartition(".")[2] in ("cls_token", "class_token")
            for name, _ in self._model.named_parameters()
        )
        prefix = getattr(self._model, "num_prefix_tokens", int(class_token))
        prefix = prefix if isinstance(prefix, int) and prefix < shape[1] else int(class_token)
        last = self._last_record()
        if last is not None and shape[1] + prefix == last.shape[1]:
            prefix, class_token = 0, False  # it joins later, as in CaiT and XCiT
        num_patches = shape[1] - prefix
        image_height, image_width = self.example_shape[1:]
        rows = round(math.sqrt(num_patches * image_height / image_width))
        columns = num_patches // max(rows, 1)
        grid = (rows, columns) if rows * columns == num_patches else (1, num_patches)
        return TapPoint(record.path, kind, shape[2], *grid, prefix, class_token)

    def _last_record(self) -> _Record | None:
        return self._record(self._last_path) if self._last_path is not None else None

    def _require_last(self) -> _Record:
        record = self._last_record()
        if record is None:
            raise ValueError(
                f"found no last map or tokens in {type(self._model).__name__}; name one with "
                "taps={'last': 'path.of.module'}"
            )
        return record

    def _middle_path(self) -> str:
        for applies, path in _PUBLISHED_TAPS:
            if applies(self._model):
                return path
        last = self._require_last()
        size = self._size(last)
        if size is None:
            return self._middle_block()
        child = self._child_of_size((2 * size[0], 2 * size[1]))
        return self._middle_without_halving(last, size) if child is None else child

    def _children(self, path: str) -> list[str]:
        """Paths of the direct children, in the order in which they finish."""
        names = [name for name, _ in find_module(self._model, path).named_children()]
        paths = [f"{path}.{name}" if path else name for name in names]

        def finished(child: str) -> int:
            return max(
                (r.finished for r in self._records if r.path == child or _inside(r.path, child)),
                default=0,
            )

        return sorted(paths, key=finished)

    def _child_of_size(self, size: tuple[int, int]) -> str | None:
        """The last child with a map of this size, at the first level that has one."""
        level = ""
        while True:
            children = self._children(level)
            for child in reversed(children):
                record = self._record(child)
                if record is not None and self._size(record) == size:
                    return child
            for child in reversed(children):
                if any(_inside(r.path, child) and self._size(r) == size for r in self._records):
                    level = child
                    break
            else:
                return None

    def _middle_without_halving(self, last: _Record, final: tuple[int, int]) -> str:
        """The last child above the final resolution, or the stage before the last."""
        above = next(
            (
                size
                for r in reversed(self._records)
                if (size := self._size(r)) is not None and size[0] * size[1] > final[0] * final[1]
            ),
            None,
        )
        path = None if above is None else self._child_of_size(above)
        path = path or self._second_to_last_stage(last)
        warnings.warn(
            f"{type(self._model).__name__} has no map at twice the final resolution {final}: "
            f"taking {path!r} as its middle; choose another with "
            "taps={'middle': 'path.of.module'}",
            stacklevel=2,
        )
        return path

    def _second_to_last_stage(self, last: _Record) -> str:
        level = ""
        while True:
            children = self._children(level)
            stages = [
                child
                for child in children
                if (record := self._record(child)) is not None
                and record.has_parameters
                and record.finished <= last.finished
                and self._size(record) is not None
            ]
            if len(stages) > 1:
                return stages[-2]
            inner = [child for child in children if self._children(child)]
            if not inner:
                raise ValueError(
                    f"found no middle feature in {type(self._model).__name__}; name one with "
                    "taps={'middle': 'path.of.module'}"
                )
            level = stages[0] if stages and stages[0] in inner else inner[0]

    def _middle_block(self) -> str:
        """Block L/2 - 1 of the longest run of L blocks of one class that return tokens."""
        best: list[str] = []
        for path, module in self._model.named_modules():
            run: list[str] = []
            previous: type[nn.Module] | None = None
            for name, child in module.named_children():
                child_path = f"{path}.{name}" if path else name
                record = self._record(child_path)
                is_block = next(child.children(), None) is not None
                if not is_block or record is None or self._kind(record) != "tokens":
                    run, previous = [], None
                    continue
                run = [*run, child_path] if type(child) is previous else [child_path]
                previous = type(child)
                if len(run) > len(best):
                    best = run
        if len(best) < 2:
            raise ValueError(
                f"found no run of blocks in {type(self._model).__name__}; name a middle with "
                "taps={'middle': 'path.of.module'}"
            )
        return best[len(best) // 2 - 1]

    def _depends_on_mode(self, path: str) -> bool:
        module = find_module(self._model, path)
        if isinstance(module, nn.Dropout | nn.Dropout2d | nn.AlphaDropout):
            return module.p > 0
        return isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.SyncBatchNorm)

    def head(self) -> PositionHead:
        """The model's own classifier, to be applied at each position of the last map.

        Raises:
            ValueError: The last feature has no positions, or the modules after it cannot work at
                a single one.
        """
        point = self.point("last")
        if point.height * point.width == 0:
            raise ValueError(
                f"{point.path!r} gives no patch tokens to vote; choose a map with "
                "taps={'last': 'path.of.module'}"
            )
        record = self._record(point.path)
        assert record is not None
        later = [r for r in self._records if r.started > record.finished]
        mode_dependent = tuple(r.path for r in later if self._depends_on_mode(r.path))
        if point.path == self._last_path and self._in_two_halves:
            if getattr(self._model, "drop_rate", 0):
                mode_dependent = ("", *mode_dependent)
            return PositionHead(point, mode_dependent=mode_dependent, num_classes=self.num_classes)
        steps = tuple(
            (r.path, r.input_dims)
            for r in later
            if not any(_inside(r.path, other.path) for other in later)
        )
        with undisturbed(self._model), FeatureTap(self._model, [point.path]) as tap:
            logits = self._forward(self._model)
            feature = tap.pop()[point.path]
            tap.enabled = False
            for activation in (False, True):
                head = PositionHead(point, steps, activation, mode_dependent, self.num_classes)
                values = functional.relu(feature) if activation else feature
                try:
                    pooled = head.logits(self._model, point.pooled(values))
                except (RuntimeError, ValueError, TypeError):
                    continue
                if pooled.shape == logits.shape and torch.allclose(
                    pooled, logits, rtol=1e-3, atol=1e-4
                ):
                    return head
        raise ValueError(
            f"votes need a classifier that works at a single position of the last map "
            f"({point.path!r}, {point.height}x{point.width}): the modules after it "
            f"({', '.join(path for path, _ in steps) or 'none'}) do not give the model's logits "
            "from the pooled map; choose another map with taps={'last': 'path.of.module'}"
        )


def _inside(path: str, other: str) -> bool:
    return path.startswith(f"{other}.") if other else bool(path)


@contextmanager
def undisturbed(*models: nn.Module) -> Iterator[None]:
    """Eval mode without gradient; mode, buffers and random state are put back afterwards."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    buffers = [(buffer, buffer.clone()) for model in models for buffer in model.buffers()]
    devices = {
        p.device.index for model in models for p in model.parameters() if p.device.type == "cuda"
    }
    with torch.random.fork_rng(devices=sorted(devices)), torch.no_grad():
        for model in models:
            model.eval()
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training
            for buffer, before in buffers:
                buffer.copy_(before)


def _example_shape(model: nn.Module, given: Sequence[int] | None) -> tuple[int, int, int]:
    if given is not None:
        shape = tuple(given)
        if len(shape) != 3 or not all(isinstance(n, int) and n > 0 for n in shape):
            raise ValueError(f"example_shape must be (channels, height, width), got {given!r}")
        return shape[0], shape[1], shape[2]
    first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    channels = 3 if first is None else first.in_channels
    config = getattr(model, "pretrained_cfg", None)
    configured = config.get("input_size") if isinstance(config, Mapping) else None
    sizes = (
        getattr(getattr(model, "patch_embed", None), "img_size", None),
        getattr(model, "image_size", None),
        configured[1:] if configured else None,
        224,
    )
    size = next(size for size in sizes if size is not None)
    height, width = (size, size) if isinstance(size, int) else size
    return channels, int(height), int(width)
