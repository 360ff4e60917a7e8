"""Mixup and CutMix of batches, with draws that belong to the step."""

from __future__ import annotations

from timm.data.mixup import Mixup

from softlabels.data.batch import Batch
from softlabels.data.randomness import seeded


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
            batch: Images with class indices [B], B even; not changed.
            seed: The run's seed.
            epoch: The epoch, from 0.
            step: The step within the epoch, from 0.

        Returns:
            The mixed images with unsmoothed probabilities [B, C] float32.

        Raises:
            ValueError: If B is odd, or the target is not class indices.
        """
        if len(batch.images) % 2:
            raise ValueError(
                "mixing pairs images, so each process needs a batch of even size,"
                f" got {len(batch.images)} images"
            )
        if batch.target.ndim != 1:
            raise ValueError(
                f"mixing needs class indices [B], got a target of {tuple(batch.target.shape)}"
            )
        with seeded(seed, epoch, step, "mixup"):
            # timm mixes in place.
            images, target = self._mixup(batch.images.clone(), batch.target)
        return Batch(images, target, batch.index, batch.draw)
