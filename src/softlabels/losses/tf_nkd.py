"""tf-NKD: the ancestor of USKD's target term, no teacher."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from softlabels.inputs import Input, Logits, Target
from softlabels.losses._checks import check_choice, check_flag, check_ignore_index
from softlabels.losses._non_target import Reduction, SoftLabels
from softlabels.losses.uskd import uskd_loss, uskd_targets

__all__ = ["TfNKDLoss", "tf_nkd_loss"]


def tf_nkd_loss(
    logits: Tensor,
    target: Tensor,
    *,
    sync_batch_stats: bool = False,
    ignore_index: int | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
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
        logits: [B, C], raw logits. Gets the gradient.
        target: [B] class indices, or [B, C] probabilities with one or two labeled classes,
            never smoothed; the loss is summed over these classes.
        sync_batch_stats: Whether the mean in w_t runs over all processes; see `uskd_targets`.
        ignore_index: Samples with this class index count nothing, also in both means over B;
            without any other sample the loss is 0. For [B] labels.
        reduction: `"mean"` over B, `"sum"`, or `"none"`.

    Returns:
        A scalar, or [B] for `"none"`; in nats, at least float32.

    Raises:
        TypeError: Logits or target of a wrong dtype.
        ValueError: A wrong shape, label, setting or reduction; more than two labeled classes
            in a row.

    Deviations: the mean of mixed labels' second column runs over the rows that have one; the
    published code also counts an arbitrary class of the others.
    Numerics: that of `uskd_loss`.
    Distributed: w_t holds a mean over the batch; see `sync_batch_stats`.

    Example:
        >>> import torch
        >>> logits = torch.tensor([[2.0, 1.0, 0.5, -1.0, 0.0]])
        >>> tf_nkd_loss(logits, torch.tensor([0]))
        tensor(0.5744)
    """
    return uskd_loss(
        logits,
        None,
        target,
        target_weight=1.0,
        non_target_weight=0.0,
        weak_weight=0.0,
        squared=False,
        sync_batch_stats=sync_batch_stats,
        ignore_index=ignore_index,
        reduction=reduction,
    )


class TfNKDLoss(nn.Module):
    """tf-NKD as a module; see `tf_nkd_loss` for the equation and the settings.

    Args:
        sync_batch_stats: Whether the mean in w_t runs over all processes.
        ignore_index: Class index of samples that count nothing, or None.
        reduction: `"mean"`, `"sum"` or `"none"`.
    """

    inputs: ClassVar[Mapping[str, Input]] = {"logits": Logits(), "target": Target()}

    def __init__(
        self,
        *,
        sync_batch_stats: bool = False,
        ignore_index: int | None = None,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__()
        check_flag("sync_batch_stats", sync_batch_stats)
        check_ignore_index(ignore_index)
        check_choice("reduction", reduction, ("mean", "sum", "none"))
        self.sync_batch_stats = sync_batch_stats
        self.ignore_index = ignore_index
        self.reduction: Reduction = reduction

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Compute `tf_nkd_loss` with this module's settings."""
        return tf_nkd_loss(
            logits,
            target,
            sync_batch_stats=self.sync_batch_stats,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
        )

    def soft_labels(self, logits: Tensor, target: Tensor) -> SoftLabels:
        """w_t at the labels, and zeros for the other classes, of which nothing is learned."""
        # Never synchronized: a gallery is drawn on one process alone.
        soft = uskd_targets(
            logits, None, target, squared=False, rank_from="final", ignore_index=self.ignore_index
        )
        return SoftLabels(soft.target, torch.zeros_like(soft.target))
