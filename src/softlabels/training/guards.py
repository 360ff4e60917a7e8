"""What ends a run early: a loss that is not finite, and a signal of the user."""

from __future__ import annotations

import math
import signal
from collections.abc import Mapping
from types import FrameType, TracebackType

import torch
from torch import Tensor

__all__ = ["InterruptGuard", "Interrupted", "LossLog", "NonFiniteLossError"]


class RunError(RuntimeError):
    """A run failed on its way, by no mistake in its settings."""


class NonFiniteLossError(RunError):
    """A part of the loss is NaN or infinite; the message names step and part."""


class Interrupted(KeyboardInterrupt):
    """The user asked the run to stop."""


class LossLog:
    """Collects the parts of the loss, and reads them together: one wait for the device.

    Args:
        eager: Look at every step at once: free on a CPU.
    """

    def __init__(self, *, eager: bool) -> None:
        self._eager = eager
        self._steps: list[int] = []
        self._names: list[str] = []
        self._values: list[Tensor] = []

    def add(self, step: int, loss: Tensor, parts: Mapping[str, Tensor]) -> None:
        """Take in a step.

        Raises:
            NonFiniteLossError: The loss is not finite (looked at once if eager).
        """
        self._names = ["loss", *parts]
        self._steps.append(step)
        self._values.append(
            torch.stack([loss.detach().float(), *(p.float() for p in parts.values())])
        )
        if self._eager:
            self._check([self._values[-1].tolist()], [step])

    def means(self) -> dict[str, float]:
        """Mean of each part since the last call, which it forgets.

        Raises:
            NonFiniteLossError: One of them was not finite.
        """
        if not self._values:
            return {}
        rows: list[list[float]] = torch.stack(self._values).tolist()
        steps, self._steps, self._values = self._steps, [], []
        self._check(rows, steps)
        return {
            name: math.fsum(row[column] for row in rows) / len(rows)
            for column, name in enumerate(self._names)
        }

    def _check(self, rows: list[list[float]], steps: list[int]) -> None:
        for row, step in zip(rows, steps, strict=True):
            bad = [n for n, value in zip(self._names, row, strict=True) if not math.isfinite(value)]
            if bad:
                named = [name for name in bad if name != "loss"] or bad
                values = ", ".join(
                    f"{name} {value:g}" for name, value in zip(self._names, row, strict=True)
                )
                raise NonFiniteLossError(
                    f"the loss is not finite at step {step}, from its part "
                    f"{' and '.join(map(repr, named))} ({values}); try a smaller learning rate "
                    "or a clip_norm. The last checkpoint is from before this step"
                )


class InterruptGuard:
    """Turns the first Ctrl-C or SIGTERM into a flag, so that a step is finished first."""

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[int, object] = {}

    def __enter__(self) -> InterruptGuard:
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self._before[number] = signal.signal(number, self._ask)
            except ValueError:  # not in the main thread: signals are not ours there
                break
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]  # what signal.signal gave

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    def check(self) -> None:
        """Raise `Interrupted` if the user asked to stop."""
        if self.asked:
            raise Interrupted
