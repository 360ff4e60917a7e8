"""Random lighting: one color, along the main directions of ImageNet's colors, added to an image.

Source: Krizhevsky, Sutskever and Hinton, "ImageNet Classification with Deep Convolutional Neural
Networks", NeurIPS 2012, section 4.1. The eigenvalues and eigenvectors of the covariance of RGB
values are those that the published RegNet recipes use, for values in 0..1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_EIGENVALUES = (0.2175, 0.0188, 0.0045)
_EIGENVECTORS = (  # a row for red, green, blue; a column for each eigenvalue
    (-0.5675, 0.7192, 0.4009),
    (-0.5808, -0.0045, -0.8140),
    (-0.5836, -0.6948, 0.4203),
)


@dataclass(frozen=True)
class Lighting:
    """Adds sum_i a_i * eigenvalue_i * eigenvector_i to every pixel, a_i ~ N(0, std).

    What leaves the range 0..1 is not cut off.

    Args:
        std: Standard deviation of the three draws; 0.1 for images in 0..1, as published (25.5 in
            recipes whose images are in 0..255).

    Raises:
        ValueError: If `std` is negative or not finite.
    """

    std: float = 0.1

    def __post_init__(self) -> None:
        if not 0 <= self.std < math.inf:
            raise ValueError(f"lighting must be at least 0, got {self.std}")

    def __call__(self, image: Tensor) -> Tensor:
        """Draw from torch's running generator and light an image.

        Args:
            image: [3, H, W] float in 0..1, red first; not changed.

        Returns:
            [3, H, W].
        """
        draws = torch.randn(3).mul_(self.std)
        color = torch.tensor(_EIGENVECTORS) @ (draws * torch.tensor(_EIGENVALUES))
        return image + color[:, None, None]
