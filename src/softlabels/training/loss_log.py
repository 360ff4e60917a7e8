"""The losses of the steps since the last log line, and what to do if one is not finite."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from softlabels.training.errors import NonFiniteLossError

__all__ = ["GRADIENT", "LossLog"]

GRADIENT = "gradient"
_SHOWN = 8

Gather = Callable[[Any], list[Any]]


@dataclass
class _Row:
    """A step whose numbers have not been looked at yet."""

    step: int
    names: tuple[str, ...]
    values: Tensor
    index: Tensor
    finite: Tensor


class LossLog:
    """Collects the parts of the loss, and reads them together: one wait for the device.

    A step with a part or a gradient that is not finite stops the run, or is skipped and counted.

    Args:
        eager: Look at every step at once: free on a CPU, a wait on an accelerator.
        most_skipped: How many steps in a row may be skipped; 0: the first stops the run. If more,
            it must be eager.
        gather: Collects an object of each process, for the error: (object) -> list by rank.

    Attributes:
        skipped: Steps that were skipped so far.
    """

    def __init__(self, *, eager: bool, most_skipped: int, gather: Gather) -> None:
        assert eager or not most_skipped, "a step can be skipped only before the next one"
        self._eager = eager
        self._most_skipped = most_skipped
        self._gather = gather
        self._unread: list[_Row] = []
        self._names: tuple[str, ...] = ()
        self._read: list[list[float]] = []
        self.skipped = 0
        self._in_a_row = 0

    def add(
        self,
        step: int,
        parts: Mapping[str, Tensor],
        *,
        index: Tensor,
        finite: Tensor,
    ) -> bool:
        """Take in a step, before its update of the weights.

        Args:
            step: From 0.
            parts: Scalars that are the same on every process: the loss, its parts, and
                `"gradient"`, the largest absolute value of the gradient.
            index: Indices of this process' images, [B], on the CPU.
            finite: [B] bool, whether an image's logits are finite.

        Returns:
            Whether the weights may be updated.

        Raises:
            NonFiniteLossError: A part is not finite (looked at once if eager), and it is not to
                be skipped or too many in a row were.
        """
        values = torch.stack([value.detach().float() for value in parts.values()])
        self._unread.append(_Row(step, tuple(parts), values, index, finite))
        return self._look() if self._eager else True

    def means(self) -> dict[str, float]:
        """Mean of each part of the loss since the last call, which it forgets.

        Raises:
            NonFiniteLossError: One of them was not finite.
        """
        self._look()
        rows, self._read = self._read, []
        return {
            name: math.fsum(row[column] for row in rows) / len(rows)
            for column, name in enumerate(self._names)
            if rows and name != GRADIENT
        }

    def state_dict(self) -> dict[str, Any]:
        """The steps since the last log line, and the counts.

        Raises:
            NonFiniteLossError: One of the steps was not finite: there is no state worth keeping.
        """
        self._look()
        return {
            "names": list(self._names),
            "rows": self._read,
            "skipped": self.skipped,
            "in_a_row": self._in_a_row,
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take the state back.

        Raises:
            ValueError: It is none of a log.
        """
        self._names = tuple(map(str, state_dict["names"]))
        self._read = [list(map(float, row)) for row in state_dict["rows"]]
        if any(len(row) != len(self._names) for row in self._read):
            raise ValueError(f"each row must have a number for each of {self._names}")
        self.skipped = int(state_dict["skipped"])
        self._in_a_row = int(state_dict["in_a_row"])

    def _look(self) -> bool:
        """Read the new steps; whether the last one is healthy."""
        rows, self._unread = self._unread, []
        if not rows:
            return True
        for row, values in zip(rows, torch.stack([r.values for r in rows]).tolist(), strict=True):
            self._names = row.names
            bad = [
                n for n, value in zip(row.names, values, strict=True) if not math.isfinite(value)
            ]
            if not bad:
                self._in_a_row = 0
                self._read.append(values)
                continue
            self.skipped += 1
            self._in_a_row += 1
            if self._in_a_row > self._most_skipped:
                raise self._error(row, values, bad)
        return not self._in_a_row

    def _error(self, row: _Row, values: Sequence[float], bad: Sequence[str]) -> NonFiniteLossError:
        suspects = row.index[~row.finite.cpu()].tolist()
        by_process: list[tuple[list[int], list[int]]] = self._gather((suspects, row.index.tolist()))
        images = sorted(i for found, _ in by_process for i in found)
        whole = not images  # no image alone: the loss itself, or its gradient
        if whole:
            images = sorted(i for _, batch in by_process for i in batch)
        of_loss = [name for name in bad if name not in ("loss", GRADIENT)]
        named = of_loss or [name for name in bad if name != GRADIENT] or list(bad)
        what = "gradient" if named == [GRADIENT] else "loss"
        source = "" if what == "gradient" else f", from its part {' and '.join(map(repr, named))}"
        shown = ", ".join(f"{n} {v:g}" for n, v in zip(row.names, values, strict=True))
        more = f" and {len(images) - _SHOWN} more" if len(images) > _SHOWN else ""
        listed = ", ".join(map(str, images[:_SHOWN])) + more
        skipped = f" after {self._in_a_row - 1} skipped steps" if self._most_skipped else ""
        return NonFiniteLossError(
            f"the {what} is not finite at step {row.step}{skipped}{source} ({shown}); training "
            f"images by index{' (the whole batch)' if whole else ''}: {listed}; try a smaller "
            "learning rate or a max_grad_norm. The last checkpoint is from before this step",
            row.step,
            named,
            images,
        )
