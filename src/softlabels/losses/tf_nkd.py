"""tf-NKD: a label weighted by the network's own confidence in it, USKD's ancestor."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from softlabels.inputs import Logits, Target
from softlabels.losses._method import Method
from softlabels.losses._non_target import SoftLabels
from softlabels.losses.uskd import uskd_loss, uskd_targets

__all__ = ["TfNKDLoss"]


class TfNKDLoss(Method, name="tf_nkd"):
    r"""tf-NKD: the label counts more for a sample that is surer of it than its batch.

    Yang et al., "Rethinking Knowledge Distillation via Cross-Entropy", 2022 (arXiv 2208.10139);
    official code yzd-v/cls_KD, an early version.

    .. math:: L = -w_t \log S_t, \quad w_t = S_t + V_t - \text{mean}_B(S_t)

    ========  ==================================================================
    symbol    meaning
    ========  ==================================================================
    S         softmax of `logits`
    V         `target` as probabilities
    w_t       constant for the gradient; 0 where the label is 0
    ========  ==================================================================

    USKD's target term (`uskd_loss`) without the square. It is *added* to the task's own loss
    (cross-entropy), with weight 1.

    Args:
        sync_batch_stats: Whether the mean in w_t runs over all processes; see `uskd_targets`.

    Deviations: the mean of mixed labels' second column runs over the rows that have one; the
    published code also counts an arbitrary class of the others.
    Numerics: that of `uskd_loss`.
    Distributed: w_t holds a mean over the batch; see `sync_batch_stats`.

    Example:
        >>> import torch
        >>> logits = torch.tensor([[2.0, 1.0, 0.5, -1.0, 0.0]])
        >>> TfNKDLoss()(logits, torch.tensor([0]))
        tensor(0.5744)
    """

    sync_batch_stats: bool = False

    inputs: ClassVar = {"logits": Logits(), "target": Target()}

    def terms(
        self, logits: Tensor, target: Tensor, *, kept: Tensor | None = None
    ) -> dict[str, Tensor]:
        """`"target"`.

        Args:
            logits: [B, C], raw logits. Gets the gradient.
            target: [B] class indices, or [B, C] probabilities with one or two labeled classes,
                never smoothed; the loss is summed over these classes.
            kept: [B] boolean, the samples that count; None: all.
        """
        if kept is not None and self.ignore_index is not None:
            target = torch.where(kept, target, self.ignore_index)
        loss = uskd_loss(
            logits,
            None,
            target,
            non_target_weight=0.0,
            weak_weight=0.0,
            squared=False,
            sync_batch_stats=self.sync_batch_stats,
            ignore_index=self.ignore_index,
            reduction="none",
        )
        return {"target": loss}

    def soft_labels(self, logits: Tensor, target: Tensor) -> SoftLabels:
        """w_t at the labels, and zeros for the other classes, of which nothing is learned."""
        # Never synchronized: a gallery is drawn on one process alone.
        soft = uskd_targets(
            logits, None, target, squared=False, rank_from="final", ignore_index=self.ignore_index
        )
        return SoftLabels(soft.target, torch.zeros_like(soft.target))
