"""Checkpoints: all that a run needs to go on, read back without running any code of the file."""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, BinaryIO, NamedTuple, Protocol, cast

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor
from torch.utils._pytree import tree_leaves

from softlabels.io.files import remove_leftovers, replace_file
from softlabels.io.records import problem_of
from softlabels.io.weights import UNREADABLE, read_plain

__all__ = ["CheckpointFolder", "OptimizerState", "Progress", "Stateful", "restore", "state_of"]

_NAME = re.compile(r"step-\d{8,}-[0-9a-f]{16}\.pt")
_UNFINISHED = re.compile(r"step-\d{8,}\.pt")
_DIGEST_BYTES = 8
_BLOCK = 1 << 20


class Stateful(Protocol):
    """Anything whose state goes into a checkpoint."""

    def state_dict(self) -> dict[str, Any]:
        """All that is needed to go on."""

    def load_state_dict(self, state_dict: Any) -> Any:
        """Take the state back."""


_Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Progress(BaseModel):
    """The plain values of a checkpoint.

    Attributes:
        step: Optimizer steps so far.
        finished_epochs: Epochs that are trained and evaluated.
        final: Metrics of the last of them.
        best: Metrics of the best of them, and its number.
        seconds: Spent in training during them.
        of_epoch: Seconds and images of the epoch that is not finished.
        lengths: Bytes of the files that are written on and on.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    step: int = Field(0, ge=0)
    finished_epochs: int = Field(0, ge=0)
    final: dict[str, int | float] = {}
    best: dict[str, int | float] = {}
    seconds: _Seconds = 0.0
    of_epoch: tuple[_Seconds, Annotated[int, Field(ge=0)]] = (0.0, 0)
    lengths: dict[str, int] = {}

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Progress:
        """That of a checkpoint; a ValueError if it is none."""
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise ValueError(
                f"the checkpoint's progress does not fit: {problem_of(error)}"
            ) from error


class OptimizerState:
    """An optimizer's state, checked before it is taken back: torch itself takes any.

    Args:
        optimizer: The optimizer, perhaps wrapped.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer

    def state_dict(self) -> dict[str, Any]:
        """All that is needed to go on."""
        return self._optimizer.state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take the state back.

        Raises:
            ValueError: It is of other parameters, or its settings are no settings of this kind.
        """
        groups, own_groups = state_dict["param_groups"], self._optimizer.param_groups
        for group, own in zip(groups, own_groups, strict=True):
            for name, value in own.items():
                if name != "params" and not _is_like(group[name], value):
                    raise ValueError(f"{name} must be like {value!r:.80}, got {group[name]!r:.80}")
        parameters = [parameter for group in own_groups for parameter in group["params"]]
        # Others keep factors of their state, whose shapes only they know.
        kind = type(getattr(self._optimizer, "optimizer", self._optimizer))
        plain = kind in _OF_EQUAL_SHAPES
        if plain and len({frozenset(values) for values in state_dict["state"].values()}) > 1:
            raise ValueError("what is kept for one parameter is missing for another")
        for number, values in state_dict["state"].items():
            shape = parameters[number].shape
            for name, value in values.items():
                if kind is torch.optim.SGD and value is None:
                    continue  # no momentum
                if plain and not _is_state_of(value, torch.Size() if name == "step" else shape):
                    raise ValueError(
                        f"{name} of parameter {number} must be a finite tensor of {tuple(shape)}, "
                        f"got {value!r:.80}"
                    )
        self._optimizer.load_state_dict(dict(state_dict))


_OF_EQUAL_SHAPES = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop)


def _is_state_of(value: object, shape: torch.Size) -> bool:
    """Whether a value can be what an optimizer keeps for a parameter."""
    return (
        isinstance(value, Tensor)
        and value.layout == torch.strided
        and value.is_floating_point()
        and value.shape == shape
        and bool(value.isfinite().all())
    )


def _is_like(value: object, own: object) -> bool:
    """Whether a setting from a file can stand where our own does."""
    if isinstance(own, bool) or own is None:
        return value is None or isinstance(value, bool)
    if isinstance(own, int | float):
        return (
            isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        )
    if isinstance(own, list | tuple):
        return (
            isinstance(value, list | tuple)
            and len(value) == len(own)
            and all(map(_is_like, value, own))
        )
    return isinstance(value, type(own))


def state_of(
    progress: Mapping[str, Any], parts: Mapping[str, Stateful | None]
) -> dict[str, dict[str, Any]]:
    """What a checkpoint holds: plain values, and the state of each part that is not None."""
    state = {name: part.state_dict() for name, part in parts.items() if part is not None}
    return {"progress": dict(progress), "parts": state}


def restore(
    content: Mapping[str, Mapping[str, Any]], parts: Mapping[str, Stateful | None]
) -> dict[str, Any]:
    """Put what `state_of` gave back into the parts that it came from, and return the plain values.

    Raises:
        ValueError: It is of a run with other parts.
    """
    state = content["parts"]
    expected = {name for name, part in parts.items() if part is not None}
    if set(state) != expected:
        raise ValueError(
            f"the checkpoint holds {sorted(state)}, this run needs {sorted(expected)}: it is of a "
            "run with other settings"
        )
    for name, part in parts.items():
        if part is None:
            continue
        try:
            # No healthy run stores it, and it would come back in the trained weights.
            if any(
                isinstance(v, Tensor) and bool(v.isnan().any()) for v in tree_leaves(state[name])
            ):
                raise ValueError("it holds NaN")
            part.load_state_dict(state[name])
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise ValueError(f"the checkpoint's {name!r} does not fit this run: {error}") from error
    return dict(content["progress"])


class Found(NamedTuple):
    """What `CheckpointFolder.newest` found.

    Attributes:
        content: Of the newest valid checkpoint; None if there is no checkpoint.
        name: Its file.
        damaged: What is wrong with each newer one.
    """

    content: dict[str, Any] | None
    name: str
    damaged: Sequence[str]


class CheckpointFolder:
    """The newest checkpoints of a run, `step-STEP-DIGEST.pt`.

    The digest of the content stands in the name, and the name appears last. So a file is whole and
    unchanged, or it is known not to be.

    Args:
        path: The folder; made when it is needed.
        keep: How many are kept, 1 or more.
    """

    def __init__(self, path: Path, keep: int) -> None:
        self.path = path
        self.keep = keep

    def files(self) -> list[Path]:
        """The checkpoints, newest first; none of them is looked into."""
        if not self.path.is_dir():
            return []
        found = [path for path in self.path.iterdir() if _NAME.fullmatch(path.name)]
        return sorted(found, key=_step, reverse=True)

    def save(self, step: int, content: Mapping[str, Any]) -> Path:
        """Write what `state_of` gave whole or not at all, remove the oldest ones; the new file.

        Raises:
            OSError: It cannot be written; the older ones are as they were.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        unfinished = self.path / f"step-{step:08d}.pt"
        with replace_file(unfinished) as file:
            torch.save(dict(content), file)
        with unfinished.open("rb") as written:
            path = self.path / f"step-{step:08d}-{_digest_of(written)}.pt"
        os.replace(unfinished, path)
        # What claims to be of this step or a later one is not of this run's past.
        past = [other for other in self.files() if _step(other) < step]
        kept = {path, *past[: self.keep - 1]}
        for other in self.files():
            if other not in kept:
                other.unlink(missing_ok=True)
        return path

    def clean(self) -> None:
        """Remove what killed writers left behind; no other process may be writing."""
        if self.path.is_dir():
            remove_leftovers(self.path)
            for path in self.path.iterdir():
                if _UNFINISHED.fullmatch(path.name):
                    path.unlink(missing_ok=True)

    def newest(self) -> Found:
        """Read the newest checkpoint that is whole.

        Tensors come back on the CPU.

        Raises:
            ValueError: There are checkpoints, and none of them is whole.
        """
        damaged: list[str] = []
        for path in self.files():
            try:
                return Found(_read(path), path.name, damaged)
            except ValueError as error:
                damaged.append(f"{path.name}: {error}")
        if damaged:
            raise ValueError(
                f"no checkpoint in {self.path} is readable ({'; '.join(damaged)}); to start anew, "
                "choose another --output or remove that folder"
            )
        return Found(None, "", damaged)


def _step(path: Path) -> int:
    return int(path.stem.split("-")[1])


def _digest_of(file: BinaryIO) -> str:
    digest = hashlib.blake2b(digest_size=_DIGEST_BYTES)
    while block := file.read(_BLOCK):
        digest.update(block)
    return digest.hexdigest()


def _read(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            if _digest_of(file) != path.stem.split("-")[2]:
                raise ValueError("damaged, its content does not agree with the digest in its name")
            file.seek(0)
            content = read_plain(file)  # a checkpoint from a stranger cannot run code
    except UNREADABLE as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"no readable checkpoint: {reason:.300}") from error
    kinds = {key: type(v) for key, v in content.items()} if isinstance(content, dict) else {}
    if kinds != {"progress": dict, "parts": dict}:
        raise ValueError("no checkpoint of a run: it must hold two mappings, progress and parts")
    return cast("dict[str, Any]", content)
