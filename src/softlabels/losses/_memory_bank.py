"""What a method remembers from one step to the next."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

__all__ = ["MemoryBank", "check_memory", "known_size"]

_GIB = 2**30


class MemoryBank(nn.Module):
    """Base of the modules that hold what a method remembers, in buffers.

    A method's adapters are one; adapters that hold several hand `after_step` and `after_epoch` on
    to them. Buffers change in these two alone, never in a forward: so a forward can be repeated, a
    skipped step leaves no trace, and every process holds the same. Their size is told before a run.

    Attributes:
        memory_inputs: Names of the values that `after_step` needs.
    """

    memory_inputs: tuple[str, ...] = ()

    def after_step(self, values: Mapping[str, Tensor | list[Tensor]]) -> None:
        """Take in a batch, after the optimizer's step.

        Args:
            values: Those named in `memory_inputs`, without gradient, of all processes together.
        """

    def after_epoch(self) -> None:
        """Close an epoch."""

    def num_bytes(self) -> int:
        """Bytes of what is held."""
        return sum(buffer.numel() * buffer.element_size() for buffer in self.buffers())


def known_size(method: str, num_samples: int | None) -> int:
    """The number of samples that a method remembers; ValueError where it is not known."""
    if num_samples is None:
        raise ValueError(
            f"{method} remembers each training sample: set num_samples to the size of the "
            "training set"
        )
    return num_samples


def check_memory(
    what: str, num_bytes: int, most_memory: float, otherwise: str = "if the device has room"
) -> None:
    """Raise ValueError if a memory takes more than `most_memory` GiB.

    The message names `what`, and tells when to raise the setting, or what to do `otherwise`.
    """
    if num_bytes > most_memory * _GIB:
        raise ValueError(
            f"{what} takes {num_bytes} bytes ({num_bytes / _GIB:.1f} GiB) on each device, "
            f"most_memory allows {most_memory:g} GiB: raise most_memory {otherwise}"
        )
