from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest
import torch


@pytest.fixture(autouse=True)
def device() -> torch.device:
    """The accelerator that all tests of this folder are about."""
    if not torch.cuda.is_available():
        pytest.fail("make test-gpu needs a CUDA device, and torch finds none")
    return torch.device("cuda", torch.cuda.current_device())


@contextmanager
def _no_waits() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.fixture
def no_waits() -> Callable[[], AbstractContextManager[None]]:
    """Within it, an operation that makes the host wait for the device is an error."""
    return _no_waits
