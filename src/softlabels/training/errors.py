"""What ends a run early: a loss that is not finite, a signal, a process that was lost."""

from __future__ import annotations

import errno
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

__all__ = [
    "InterruptGuard",
    "Interrupted",
    "LostProcessError",
    "NonFiniteLossError",
    "RunError",
    "disk_full_as_run_error",
]


class RunError(RuntimeError):
    """A run failed on its way, by no mistake in its settings."""


class NonFiniteLossError(RunError):
    """A part of the loss, or the gradient, is NaN or infinite.

    Args:
        message: Names step, parts and images.
        step: The step, from 0.
        parts: What was not finite: parts of the loss, or `"gradient"`.
        images: Indices of the images that it came from.
    """

    def __init__(
        self, message: str, step: int, parts: Sequence[str] = (), images: Sequence[int] = ()
    ) -> None:
        super().__init__(message)
        self.step = step
        self.parts = tuple(parts)
        self.images = tuple(images)


class LostProcessError(RunError):
    """Another process of the run died, or did not answer in time."""


class Interrupted(KeyboardInterrupt):
    """A signal asked the run to stop.

    Args:
        message: Where the run stands.
        number: The signal's number; the exit status that says so is 128 + number.
    """

    def __init__(self, message: str = "", number: int = signal.SIGINT) -> None:
        super().__init__(message)
        self.number = int(number)
        self.status = 128 + self.number


class InterruptGuard:
    """Turns the first SIGINT (Ctrl-C) or SIGTERM into a flag, so that a step is finished first.

    A second one does what it did before the guard: it ends the process at once.

    Attributes:
        asked: Number of the signal that came, 0 before.
    """

    def __init__(self) -> None:
        self.asked = 0
        self._before: dict[int, object] = {}

    def __enter__(self) -> InterruptGuard:
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self._before[number] = signal.signal(number, self._ask)
            except ValueError:  # not in the main thread: signals are not ours there
                break
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]  # what signal.signal gave
        self._before = {}

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = number
        self.__exit__()


@contextmanager
def disk_full_as_run_error(
    folder: Path, kept: str = "the last checkpoint is whole"
) -> Iterator[None]:
    """Tell in words that a run could not write into its folder, and what is `kept` all the same.

    Raises:
        RunError: In place of the system's error.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise RunError(
            f"there is no room for the run's files in {folder} ({error.strerror}); {kept}: make "
            "room, and the same command goes on from it"
        ) from error
