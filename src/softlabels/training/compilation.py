"""The method's part of a step as compiled code, where that is worth it and the compiler can."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException

from softlabels.losses import Method
from softlabels.training.config import Config

__all__ = ["compiled_method", "compiles_method"]


def compiles_method(config: Config, device: torch.device) -> bool:
    """Whether the settings ask for it: by default on accelerators, where a launch costs most."""
    return device.type != "cpu" if config.compile == "auto" else config.compile


@contextmanager
def compiled_method(method: Method | None, say: Callable[[str], None]) -> Iterator[None]:
    """Compile the calls of a method; where the compiler fails, say so once and go on without.

    The terms of a logged step (`Method.reduced`) are not compiled. The method is afterwards as it
    was before.

    Args:
        method: The method, or None.
        say: Gets the one line.
    """
    if method is None:
        yield
        return

    def without(error: Exception) -> None:
        method._compiled_call_impl = None
        cause = getattr(error, "inner_exception", error)  # of a backend
        reason = next(iter(str(cause).strip().splitlines()), type(cause).__name__)
        say(f"the method is not compiled, and runs as it is: {reason:.200}")

    def call(*args: Any, **inputs: Any) -> Tensor:
        try:
            found: Tensor = compiled(*args, **inputs)
        except TorchDynamoException as error:  # also those of the backend
            without(error)
            found = method(*args, **inputs)
        return found

    try:
        compiled = torch.compile(method._call_impl)
        # What `nn.Module.compile` sets: neither copied nor pickled.
        method._compiled_call_impl = call
    except RuntimeError as error:  # no compiler for this platform or this Python
        without(error)
    try:
        yield
    finally:
        method._compiled_call_impl = None
