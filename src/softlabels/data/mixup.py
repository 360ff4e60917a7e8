"""Mixup and CutMix of batches, with draws that belong to the step."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import torch
from timm.data.mixup import Mixup
from torch import Tensor

from softlabels.data.batch import Batch
from softlabels.data.extra_views import PARTNER, SECOND_VIEW
from softlabels.data.randomness import derive_seed, seeded

_MIXUP = "mixup"
MIXUP_EXTRAS = frozenset({_MIXUP, "mixup_index", "mixup_weight"})  # what `mixup_extras` adds


class MixupCutmix:
    """Mixes each image of a batch with its mirror image in the batch's order.

    One draw is made for the whole batch, as a function of (seed, epoch, step): every process makes
    the same, and with the order of `rank_positions` the processes
    together give what one process gives on the global batch.

    mixup: Zhang et al., "mixup: Beyond Empirical Risk Minimization", ICLR 2018. CutMix: Yun et al.,
    "CutMix: Regularization Strategy to Train Strong Classifiers with Localizable Features", ICCV
    2019.

    Args:
        mixup_alpha: Parameter of the Beta distribution of mixup's share; 0 turns mixup off.
        cutmix_alpha: Parameter of the Beta distribution of CutMix's share; 0 turns CutMix off.
        probability: Probability that a batch is mixed at all, 0..1.
        switch_probability: Probability that CutMix is taken if both are on, 0..1.
        num_classes: Number of classes, C.

    Raises:
        ValueError: If a setting is out of its range, or both alphas are 0.
    """

    def __init__(
        self,
        *,
        mixup_alpha: float = 0.8,
        cutmix_alpha: float = 1.0,
        probability: float = 1.0,
        switch_probability: float = 0.5,
        num_classes: int,
    ) -> None:
        if min(mixup_alpha, cutmix_alpha) < 0 or max(mixup_alpha, cutmix_alpha) == 0:
            raise ValueError(
                "mixup_alpha and cutmix_alpha must be at least 0 and not both 0,"
                f" got {mixup_alpha} and {cutmix_alpha}"
            )
        if not (0 <= probability <= 1 and 0 <= switch_probability <= 1):
            raise ValueError(
                "probability and switch_probability must be in 0..1,"
                f" got {probability} and {switch_probability}"
            )
        if num_classes < 2:
            raise ValueError(f"num_classes must be at least 2, got {num_classes}")
        self._mixup = Mixup(
            mixup_alpha=mixup_alpha,
            cutmix_alpha=cutmix_alpha,
            prob=probability,
            switch_prob=switch_probability,
            label_smoothing=0.0,
            num_classes=num_classes,
        )

    def __call__(self, batch: Batch, *, seed: int, epoch: int, step: int) -> Batch:
        """Mix a batch.

        Args:
            batch: Images with class indices [B], B even; not changed. Second views are mixed as
                the images are; the batch's other further tensors stay as they are.
            seed: The run's seed.
            epoch: The epoch, from 0.
            step: The step within the epoch, from 0.

        Returns:
            The mixed images with unsmoothed probabilities [B, C] float32.

        Raises:
            ValueError: If B is odd, the target is not class indices, or the batch carries partners
                or what `mixup_extras` makes.
        """
        _check_even(batch)
        if batch.target.ndim != 1:
            raise ValueError(
                f"mixing needs class indices [B], got a target of {tuple(batch.target.shape)}"
            )
        if PARTNER in batch.extras:
            raise ValueError(
                "a partner needs images of one class each, mixed images have two: a method that "
                "reads partners goes without mixup and CutMix"
            )
        if _MIXUP in batch.extras:
            raise ValueError("expected mixup_extras after this mixing, got a batch that has them")

        def mixed(images: Tensor) -> tuple[Tensor, Tensor]:
            with seeded(seed, epoch, step, "mixup"):
                # timm mixes in place.
                images, target = self._mixup(images.clone(), batch.target)
            return images, target

        images, target = mixed(batch.images)
        extras = dict(batch.extras)
        if SECOND_VIEW in extras:
            extras[SECOND_VIEW], _ = mixed(extras[SECOND_VIEW])
        return replace(batch, images=images, target=target, extras=extras)


def mixup_extras(batch: Batch, *, alpha: float, seed: int, epoch: int, step: int) -> Batch:
    """Add a mixed copy of a batch to its further tensors, for methods that learn from both.

    One share is drawn for the whole global batch, as a function of (seed, epoch, step), and images
    are paired as by `MixupCutmix`: the processes together give what one process gives.

    Args:
        batch: B images, B even; not changed.
        alpha: Parameter of the Beta distribution of the share, above 0.
        seed: As of `MixupCutmix`, and so the others.
        epoch: The epoch.
        step: The step within it.

    Returns:
        The batch with further tensors. `"mixup"`: [B, C, H, W], `weight * images +
        (1 - weight) * images[mixup_index]`. `"mixup_index"`: [B] int64, positions in this batch.
        `"mixup_weight"`: [B] float32, the weight, which is the same for all.

    Raises:
        ValueError: If B is odd, or alpha is not above 0.
    """
    if not 0 < alpha < math.inf:
        raise ValueError(f"alpha must be above 0, got {alpha}")
    _check_even(batch)
    generator = np.random.default_rng(derive_seed(seed, epoch, step, "mixup extras"))
    weight = float(np.float32(generator.beta(alpha, alpha)))
    images = batch.images
    count, device = len(images), images.device
    made = {
        _MIXUP: images.mul(weight).add_(images.flip(0).mul_(1 - weight)),
        "mixup_index": torch.arange(count - 1, -1, -1, device=device),
        "mixup_weight": torch.full((count,), weight, device=device),
    }
    return replace(batch, extras={**batch.extras, **made})


def _check_even(batch: Batch) -> None:
    """Raise unless the images can be paired."""
    if len(batch.images) % 2:
        raise ValueError(
            "mixing pairs images, so each process needs a batch of even size,"
            f" got {len(batch.images)} images"
        )
