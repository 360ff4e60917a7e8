"""One forward of a model, in which every module tells what it returned."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from softlabels.taps.feature_tap import Kind
from softlabels.taps.position_head import TwoHalves

__all__ = ["DryRun", "Record", "example_shape_of", "inside", "undisturbed", "within"]

Result = TypeVar("Result")


@dataclass(frozen=True)
class Record:
    """One call of one module in the dry run; `started` and `finished` count events.

    Outputs with the same `address` are one tensor, or views of it.
    """

    path: str
    shape: tuple[int, ...]
    input_dims: int
    has_parameters: bool
    started: int
    finished: int
    address: int


_Call: TypeAlias = tuple[Record, Tensor]


class DryRun:
    """What every module of a model returned for two images of noise.

    Args:
        model: Any image classifier; it is left as it was.
        example_shape: (C, H, W) of an image.

    Attributes:
        records: Of all calls that returned a tensor, in the order in which they ended.
        places: Those of modules that ran once: only they can be tapped.
        num_classes: Width of the logits.
        in_two_halves: Whether `forward_head(forward_features(images))` are the model's logits,
            and `last` is what `forward_features` returns.
        last: The record of the last map or tokens before the head, or None.

    Raises:
        ValueError: The forward fails, or the model gives no [B, classes] logits.
    """

    def __init__(self, model: nn.Module, example_shape: tuple[int, int, int]) -> None:
        self._model = model
        self.example_shape = example_shape
        self.last: Record | None = None
        with undisturbed(model):
            logits, calls = self._recorded(self.forward)
            self._take(calls)
            if isinstance(model, TwoHalves):
                features, calls_in_two = self._recorded(lambda: self._forward_in_two(model, logits))
                if features is not None:
                    self._take(calls_in_two)
                    self.last = self._giving(features, calls_in_two)
                    if self.last is None:
                        self._take(calls)
        self.num_classes = int(logits.shape[1])
        self.in_two_halves = self.last is not None
        if self.last is None:
            shown = (r for r in reversed(self.places) if r.path and self._has_positions(r))
            self.last = next(shown, None)

    def _take(self, calls: Sequence[_Call]) -> None:
        self.records = [record for record, _ in calls]
        self._num_calls = Counter(record.path for record in self.records)
        self.places = [r for r in self.records if self.num_calls(r.path) == 1]

    def example(self) -> Tensor:
        """Two images of noise on the model's device, in its dtype."""
        parameter = next(self._model.parameters(), torch.zeros(()))
        generator = torch.Generator().manual_seed(0)
        return torch.randn(2, *self.example_shape, generator=generator).to(parameter)

    def forward(self) -> Tensor:
        """The model's logits for the example, [2, classes].

        Raises:
            ValueError: The forward fails, or gives something else.
        """
        shape = (2, *self.example_shape)
        name = type(self._model).__name__
        try:
            logits = self._model(self.example())
        except Exception as error:
            raise ValueError(
                f"a dry run of {name} with images of shape {shape} failed: "
                f"{type(error).__name__}: {error}; pass example_shape=(channels, height, width)"
            ) from error
        if not isinstance(logits, Tensor) or logits.dim() != 2 or logits.shape[0] != 2:
            got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise ValueError(
                f"{name} must return logits [B, classes] for images {shape}, got {got}"
            )
        return logits

    def _recorded(self, run: Callable[[], Result]) -> tuple[Result, list[_Call]]:
        """What `run` returns, and the calls of modules in it."""
        calls: list[_Call] = []
        started: defaultdict[str, list[int]] = defaultdict(list)
        events = count(1)
        handles: list[RemovableHandle] = []

        def before(path: str, module: nn.Module, args: tuple[Any, ...]) -> None:
            started[path].append(next(events))

        def after(path: str, module: nn.Module, args: tuple[Any, ...], output: object) -> None:
            start, finish = started[path].pop(), next(events)
            if isinstance(output, Tensor):
                first = args[0] if args else None
                record = Record(
                    path,
                    tuple(output.shape),
                    first.dim() if isinstance(first, Tensor) else 0,
                    next(module.parameters(), None) is not None,
                    start,
                    finish,
                    output.data_ptr(),
                )
                calls.append((record, output))

        for path, module in self._model.named_modules():
            handles.append(module.register_forward_pre_hook(partial(before, path)))
            handles.append(module.register_forward_hook(partial(after, path)))
        try:
            return run(), calls
        finally:
            for handle in handles:
                handle.remove()

    def _forward_in_two(self, model: TwoHalves, logits: Tensor) -> Tensor | None:
        """The output of `forward_features`, if timm's two halves give this model's logits."""
        try:
            features = model.forward_features(self.example())
            if not isinstance(features, Tensor):
                return None
            again = model.forward_head(features)
        except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):
            return None  # other methods of these names
        same = isinstance(again, Tensor) and again.shape == logits.shape
        return features if same and torch.allclose(again, logits, rtol=1e-3, atol=1e-4) else None

    def _giving(self, features: Tensor, calls: Sequence[_Call]) -> Record | None:
        """The record of the last place whose output is `features`, or a view of all of it."""
        for record, output in reversed(calls):
            same = output.data_ptr() == features.data_ptr() and output.shape == features.shape
            if same and self.num_calls(record.path) == 1:
                return record
        return None

    def _has_positions(self, record: Record) -> bool:
        size = self.size(record)
        if size is not None:
            return size[0] * size[1] > 1
        return len(record.shape) == 3 and record.shape[1] > 1

    def num_calls(self, path: str) -> int:
        """How often the module at this path ran and returned a tensor."""
        return self._num_calls[path]

    def place(self, path: str) -> Record | None:
        """What the module at this path returned, if it ran once and returned a tensor."""
        return next((record for record in self.places if record.path == path), None)

    def kind(self, record: Record) -> Kind | None:
        """Which kind of feature a record is; a map's axes are told by the images' proportions."""
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

    def size(self, record: Record) -> tuple[int, int] | None:
        """Height and width of a record that is a map."""
        kind = self.kind(record)
        if kind == "NCHW":
            return record.shape[2], record.shape[3]
        return (record.shape[1], record.shape[2]) if kind == "NHWC" else None


def inside(path: str, other: str) -> bool:
    """Whether the module at `path` is a part of the one at `other`."""
    return path.startswith(f"{other}.") if other else bool(path)


def within(path: str, other: str) -> bool:
    """Whether the module at `path` is the one at `other`, or a part of it."""
    return path == other or inside(path, other)


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


def example_shape_of(model: nn.Module, given: Sequence[int] | None) -> tuple[int, int, int]:
    """(C, H, W) of an image: as given, or what the model says of itself, or 224.

    Raises:
        ValueError: What is given are not three counts.
    """
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
