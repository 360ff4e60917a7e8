"""Hooks that collect the outputs of inner modules."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

__all__ = ["FeatureTap", "TapPoint", "find_module"]

Kind: TypeAlias = Literal["NCHW", "NHWC", "tokens", "vector"]

_INPUT = ":input"  # no dotted name has a colon
_CHUNK_BYTES = 64 * 2**20


def find_module(model: nn.Module, path: str) -> nn.Module:
    """Return the module of `model` at the dotted `path`.

    Raises:
        ValueError: No such module; the message lists the nearest names.
    """
    modules: dict[str, nn.Module] = dict(model.named_modules())
    if path in modules:
        return modules[path]
    near = difflib.get_close_matches(path, modules, n=5, cutoff=0.4)
    if not near:
        near = [name for name, _ in model.named_children()][:8]
    raise ValueError(
        f"{type(model).__name__} has no module {path!r}; near names: {', '.join(near) or 'none'}"
    )


class _Recorder:
    """Keeps a module's output, or its input, until it is popped; its bound method is the hook."""

    def __init__(self, path: str, tap: FeatureTap) -> None:
        self.path = path
        self.tap = tap
        self.value: Tensor | None = None

    def hooked(self, module: nn.Module) -> RemovableHandle:
        """Hook the module."""
        if self.path.endswith(_INPUT):
            return module.register_forward_pre_hook(self.record_input)
        return module.register_forward_hook(self.record)

    def record(self, module: nn.Module, args: tuple[Any, ...], output: object) -> None:
        if not self.tap.enabled:
            return
        if self.value is not None:
            raise RuntimeError(
                f"module {self.path!r} ran again before its output was popped: call pop() after "
                "each forward; a module that runs twice in one forward cannot be tapped"
            )
        if not isinstance(output, Tensor):
            raise TypeError(
                f"module {self.path!r} returns {type(output).__name__}, only a tensor can be tapped"
            )
        self.value = output

    def record_input(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """The input of the last call: an activation may run more than once."""
        if self.tap.enabled and args and isinstance(args[0], Tensor):
            # What works in place would overwrite it.
            self.value = args[0].clone() if getattr(module, "inplace", False) else args[0]

    def __getstate__(self) -> dict[str, object]:
        """All but the feature: a copy or a saved file of the model has no use for it."""
        return {**self.__dict__, "value": None}


class FeatureTap:
    """Collects the outputs of inner modules by forward hooks.

    The hooks are bound to objects that this tap owns, never to the model: saving the model
    stores no feature, and a deep copy that holds both model and tap records into its own tap.
    Add a tap before the model is compiled or wrapped.

    Args:
        model: Any module; it is not edited.
        paths: Dotted names of inner modules, as in `model.named_modules()`. `PATH:input` stands for
            what goes into the module when it runs for the last time.
        enabled: Whether forwards are recorded from now on.

    Attributes:
        enabled: While False, forwards are recorded by `run` alone.

    Raises:
        ValueError: A path that the model does not have; the message lists near names.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> with FeatureTap(model, ["1"]) as tap:
        ...     logits = model(torch.ones(5, 4))
        ...     feature = tap.pop()["1"]
        >>> feature.shape
        torch.Size([5, 3])
    """

    def __init__(self, model: nn.Module, paths: Sequence[str], *, enabled: bool = True) -> None:
        if isinstance(paths, str):
            paths = [paths]
        modules = {path: find_module(model, path.removesuffix(_INPUT)) for path in paths}
        self.enabled = enabled
        self._recorders = {path: _Recorder(path, self) for path in modules}
        self._handles: list[RemovableHandle] = [
            self._recorders[path].hooked(module) for path, module in modules.items()
        ]

    @property
    def paths(self) -> tuple[str, ...]:
        """The tapped modules' dotted names."""
        return tuple(self._recorders)

    def pop(self) -> dict[str, Tensor]:
        """Return the recorded outputs by path, and forget them.

        Raises:
            RuntimeError: A tapped module did not run since the last pop.
        """
        features: dict[str, Tensor] = {}
        for path, recorder in self._recorders.items():
            if recorder.value is None:
                raise RuntimeError(f"module {path!r} did not run in the last forward")
            features[path] = recorder.value
            recorder.value = None
        return features

    def run(self, model: nn.Module, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """What a model gives for some images, and what is recorded in this forward alone."""
        before, self.enabled = self.enabled, True
        try:
            return model(images), self.pop()
        finally:
            self.enabled = before
            self.clear()

    def clear(self) -> None:
        """Forget what is recorded, for instance after a forward that failed."""
        for recorder in self._recorders.values():
            recorder.value = None

    def remove(self) -> None:
        """Take the hooks off the model."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self.clear()

    def __enter__(self) -> FeatureTap:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()


@dataclass(frozen=True)
class TapPoint:
    """A place in a model, and what its output looks like.

    Attributes:
        path: Dotted name of the module.
        kind: `"NCHW"` or `"NHWC"` map, `"tokens"` [B, N, D], or `"vector"` [B, D].
        channels: Width of the feature.
        height: Of the map, or of the grid of patch tokens; 1 for a vector.
        width: Likewise.
        prefix_tokens: Tokens before the patch tokens.
        class_token: Whether the first token is a class token.
        layer_norm: Whether a head on it begins with a LayerNorm over the channels, as in the
            published runs of Swin.
        of_input: Whether the feature is what goes into the module.
    """

    path: str
    kind: Kind
    channels: int
    height: int = 1
    width: int = 1
    prefix_tokens: int = 0
    class_token: bool = False
    layer_norm: bool = False
    of_input: bool = False

    @property
    def key(self) -> str:
        """What a `FeatureTap` calls the feature."""
        return f"{self.path}{_INPUT}" if self.of_input else self.path

    @property
    def has_grid(self) -> bool:
        """Whether the feature has positions in rows and columns."""
        positions = self.height * self.width
        # Patch tokens whose number fits no grid are in one row.
        return self.kind in ("NCHW", "NHWC") or (
            self.kind == "tokens" and positions > 0 and (self.height > 1 or positions == 1)
        )

    def pooled(self, feature: Tensor) -> Tensor:
        """[B, D]: mean over a map's positions; the class token, or the mean of the tokens."""
        if self.kind == "NCHW":
            return feature.mean((2, 3))
        if self.kind == "NHWC":
            return feature.mean((1, 2))
        if self.kind == "tokens":
            return feature[:, 0] if self.class_token else feature[:, self.prefix_tokens :].mean(1)
        return feature

    def as_map(self, feature: Tensor) -> Tensor:
        """[B, D, H, W]: the map, or the patch tokens on their grid."""
        if self.kind == "NCHW":
            return feature
        if self.kind == "NHWC":
            return feature.permute(0, 3, 1, 2)
        patches = feature[:, self.prefix_tokens :] if self.kind == "tokens" else feature[:, None]
        return patches.transpose(1, 2).reshape(len(patches), self.channels, self.height, self.width)

    @staticmethod
    def votes_of(maps: Tensor, num_classes: int, classify: Callable[[Tensor], Tensor]) -> Tensor:
        """The class with the largest logit at each position of [B, D, H, W] maps, [B, H * W].

        Args:
            maps: Without gradient.
            num_classes: Width of what `classify` gives.
            classify: [n, D] -> [n, num_classes]; called with as many positions at a time as fit
                in 64 MB with their logits.
        """
        positions = maps.flatten(2).transpose(1, 2)
        num_positions = positions.shape[1]
        # A position, its copy and what the head makes of it, and its logits.
        per_position = (3 * maps.shape[1] + num_classes) * maps.element_size()
        at_once = max(1, _CHUNK_BYTES // per_position)
        votes = [
            classify(part).argmax(1)
            for samples in torch.split(positions, max(1, at_once // num_positions))
            for part in torch.split(samples.flatten(0, 1), at_once)
        ]
        return torch.cat(votes).view(-1, num_positions)
