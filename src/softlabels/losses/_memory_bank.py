"""What a method remembers from one step to the next."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

__all__ = ["MemoryBank"]


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
