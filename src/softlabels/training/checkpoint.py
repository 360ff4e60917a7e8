"""Checkpoints: all that a run needs to go on, read back without running any code of the file."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

__all__ = ["Stateful", "load_checkpoint", "save_checkpoint"]


class Stateful(Protocol):
    """Anything whose state goes into a checkpoint."""

    def state_dict(self) -> dict[str, Any]:
        """All that is needed to go on."""
        ...

    def load_state_dict(self, state_dict: Any) -> Any:
        """Take the state back."""
        ...


def save_checkpoint(
    path: Path, progress: Mapping[str, Any], parts: Mapping[str, Stateful | None]
) -> None:
    """Write a checkpoint whole or not at all.

    Args:
        path: The file; an older one is replaced at the end.
        progress: Plain values: the place in the run, the best so far.
        parts: Objects with state, by name; None is left out.
    """
    state = {name: part.state_dict() for name, part in parts.items() if part is not None}
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            torch.save({"progress": dict(progress), "parts": state}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def load_checkpoint(
    path: Path, parts: Mapping[str, Stateful | None], device: torch.device
) -> dict[str, Any]:
    """Read a checkpoint into the objects that it came from.

    Args:
        path: A file of `save_checkpoint`.
        parts: As they were saved.
        device: Where tensors are read to.

    Returns:
        The plain values.

    Raises:
        ValueError: The file is damaged, would run code, or is of a run with other parts.
    """
    try:
        # weights_only: a checkpoint from a stranger cannot run code.
        content = torch.load(path, map_location=device, weights_only=True)
        progress, state = content["progress"], content["parts"]
    except Exception as error:
        raise ValueError(f"{path} is no readable checkpoint: {error}") from error
    expected = {name for name, part in parts.items() if part is not None}
    if set(state) != expected:
        raise ValueError(
            f"{path} holds {sorted(state)}, this run needs {sorted(expected)}: it is of a run "
            "with other settings"
        )
    for name, part in parts.items():
        if part is not None:
            part.load_state_dict(state[name])
    return dict(progress)
