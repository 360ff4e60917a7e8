"""tf-NKD: a label weighted by the network's own confidence in it, USKD's ancestor."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from softlabels.inputs import Logits, Target
from softlabels.losses._method import Method
from softlabels.losses._non_target import SoftLabels, in_float32, spread, without_ignored
from softlabels.losses._soft_target import log_softened
from softlabels.losses.uskd import target_labels

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

        Mixed labels have one or two labeled classes and are never smoothed; the loss is summed over
        these classes.
        """
        sync = self.sync_batch_stats
        labels, weights = target_labels(
            logits, target, squared=False, sync_batch_stats=sync, kept=kept
        )
        log_probabilities = log_softened(logits).gather(1, labels.classes)
        return {"target": -(weights * log_probabilities).sum(1)}

    def soft_labels(self, logits: Tensor, target: Tensor) -> SoftLabels:
        """w_t at the labels, and zeros for the other classes, of which nothing is learned."""
        target, kept = without_ignored(target, self.ignore_index)
        # Never synchronized: a gallery is drawn on one process alone.
        labels, weights = target_labels(
            logits, target, squared=False, sync_batch_stats=False, kept=kept
        )
        at_labels = spread(labels, weights, in_float32(logits))
        return SoftLabels(at_labels, torch.zeros_like(at_labels))
