"""Feature maps for tests, and a method run on them as the distiller runs it."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def levels(case: dict[str, Tensor], name: str, *, gradient: bool = False) -> list[Tensor]:
    """The numbered tensors of a golden case, in order."""
    found = []
    while f"{name}_{len(found)}" in case:
        found.append(case[f"{name}_{len(found)}"].clone().requires_grad_(gradient))
    return found


def drawn(*shapes: tuple[int, ...], seed: int = 0, gradient: bool = False) -> list[Tensor]:
    """Float64 maps of these shapes."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_(gradient)
        for shape in shapes
    ]


def shapes_of(values: dict[str, list[Tensor]]) -> dict[str, list[tuple[int, ...]]]:
    return {name: [tuple(tensor.shape) for tensor in value] for name, value in values.items()}


def heads_of(
    method: nn.Module, values: dict[str, list[Tensor]], dtype: torch.dtype = torch.float64
) -> nn.Module:
    """Fresh heads for these values, in training mode."""
    torch.manual_seed(0)
    return method.build_adapters(shapes_of(values)).to(dtype)


def through(heads: nn.Module | None, values: dict[str, list[Tensor]]) -> dict[str, list[Tensor]]:
    """The values that the method's forward gets."""
    return values if heads is None else {**values, **heads(values)}
