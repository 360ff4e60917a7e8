"""Which images of a training set stay in it, and which are held out for choosing settings."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from softlabels.data.randomness import permutation

__all__ = ["LARGEST_VALIDATION", "check_shares", "divide", "part_of"]

LARGEST_VALIDATION = 0.9
_ORDER_SEED = 1000  # of the order within the classes, the same for everybody and every run


def check_shares(validation: float | None, train_share: float | None) -> None:
    """Raise unless both shares, as of `divide`, are in their range.

    Raises:
        ValueError: One of them is not.
    """
    if validation is not None and not 0 < validation < LARGEST_VALIDATION:
        raise ValueError(
            f"validation must be above 0 and below {LARGEST_VALIDATION:g}, got {validation}"
        )
    if train_share is not None and not 0 < train_share <= 1:
        raise ValueError(f"train_share must be above 0, at most 1, got {train_share}")


def part_of(count: int, share: float | None) -> int:
    """A share of a number of things, 0 < share <= 1, as a whole number of at least 1; None: all."""
    return count if share is None else max(1, round(share * count))


def divide(
    targets: NDArray[np.int64], *, validation: float | None, train_share: float | None
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Divide a training set class by class, by nothing but its size and its labels.

    Each class has a fixed random order. Its end is held out and its front is trained on, so smaller
    shares are parts of larger ones.

    Args:
        targets: [N] class indices.
        validation: Share of each class that is held out, at least one image of it, but never its
            last one; 0 < v < 0.9. None: none is.
        train_share: Share of what is left of each class that is trained on, at least one image;
            0 < s <= 1. None: all.

    Returns:
        Indices of the images that are trained on, and of those that are held out, both [M] int64
        and ascending.

    Raises:
        ValueError: A share is out of its range, or no class has a second image to hold out.
    """
    check_shares(validation, train_share)
    order = permutation(_ORDER_SEED, 0, len(targets)).numpy()
    by_class = order[np.argsort(targets[order], kind="stable")]
    kept, held_out = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for members in np.split(by_class, np.cumsum(np.bincount(targets))[:-1]):
        if not len(members):
            continue
        left = len(members)
        if validation is not None:
            left -= min(part_of(left, validation), left - 1)
        kept.append(members[: part_of(left, train_share)])
        held_out.append(members[left:])
    held = np.sort(np.concatenate(held_out))
    if validation is not None and not len(held):
        raise ValueError(
            f"validation {validation}: no class has a second image that could be held out of "
            f"{len(targets)} training images"
        )
    return np.sort(np.concatenate(kept)), held
