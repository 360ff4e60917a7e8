"""What is read of a data set, further images for some methods too, and what draws belong to."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from softlabels.data.randomness import derive_seed, uniform

__all__ = ["PARTNER", "SECOND_VIEW", "Partners", "Reading", "check_further_images"]

SECOND_VIEW = "second_view"
PARTNER = "partner"
_KNOWN = (SECOND_VIEW, PARTNER)


@dataclass(frozen=True)
class Reading:
    """What is read, and what its draws belong to.

    Attributes:
        what: `"train"`: training batches, which keep their size where an image cannot be read: the
            next good one stands in. `"views"`: training images in their own order. `"test"`.
        draw: (seed, number) of the augmentation's draw.
        extras: Further images that each batch carries: `"second_view"`, `"partner"`, both or none.
        seed: The run's seed.
        epoch: The epoch, from 0.
    """

    what: Literal["train", "views", "test"]
    draw: tuple[int, int] = (0, 0)
    extras: tuple[str, ...] = ()
    seed: int = 0
    epoch: int = 0

    def key(self, name: str) -> tuple[int | str, ...]:
        """What the augmentation's draws for further images belong to, besides the sample's index.

        Where the draw that the images themselves show returns in later epochs, as with stored
        answers of a teacher, the further images are still new ones.
        """
        return (*self.draw, self.seed, self.epoch, name)


class Partners:
    """Draws for each sample another one of its class, uniformly among the others.

    Args:
        targets: [N] int64, the class index of each sample; every class has none, or at least two.
    """

    def __init__(self, targets: NDArray[np.int64]) -> None:
        self._targets = targets
        # The samples class by class, ascending within each, and where each class starts.
        self._members = np.argsort(targets, kind="stable")
        self._counts = np.bincount(targets)
        self._starts = np.cumsum(self._counts) - self._counts

    def of(self, index: Tensor, *, seed: int, epoch: int, skip: int = 0) -> Tensor:
        """The partners of samples, given by their indices [B] on the CPU; [B] likewise.

        `skip` of the others are passed over, in a circle that starts at the partner. The draws
        belong to the run's seed and the epoch.
        """
        rows = index.numpy()
        target = self._targets[rows]
        others = self._counts[target] - 1
        draws = uniform(derive_seed(seed, epoch, PARTNER), index, 1)[:, 0].double().numpy()
        place = self._starts[target] + ((draws * others).astype(np.int64) + skip) % others
        # The others are the members without the sample itself: from it on, they are one further.
        found = self._members[place]
        return torch.from_numpy(np.where(found < rows, found, self._members[place + 1]))

    def num_others(self, index: int) -> int:
        """How many other samples the class of one has."""
        return int(self._counts[self._targets[index]]) - 1


def check_further_images(
    names: Collection[str], targets: NDArray[np.int64], class_names: Sequence[str]
) -> None:
    """Raise unless a training set can give what is asked for.

    Args:
        names: Of the further images.
        targets: [N] int64, the class index of each training image.
        class_names: Names of the classes, for the message.

    Raises:
        ValueError: If a name is unknown, or partners are wanted where a class has one image alone.
    """
    for name in names:
        if name not in _KNOWN:
            raise ValueError(
                f"unknown further images {name!r}, a data source gives {', '.join(_KNOWN)}"
            )
    if PARTNER not in names:
        return
    alone = np.flatnonzero(np.bincount(targets) == 1)
    if len(alone):
        more = f", and so have {len(alone) - 1} more" if len(alone) > 1 else ""
        raise ValueError(
            "a partner needs two training images of each class, class "
            f"{class_names[alone[0]]!r} has 1{more}"
        )
