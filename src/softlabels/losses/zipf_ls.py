"""Zipf's label smoothing: dense votes rank the wrong classes, no teacher."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from softlabels.losses.nontarget import (
    MixedTarget,
    Reduction,
    SoftLabels,
    check_choice,
    check_logits,
    check_number,
    check_target,
    check_votes,
    in_float32,
    label_probabilities,
    non_target_log_softmax,
    normalized,
    reduce_batch,
)
from softlabels.losses.reads import Logits, Signal, Target, Votes

__all__ = ["RankFrom", "ZipfLSLoss", "zipf_ls_loss", "zipf_ls_targets"]

RankFrom: TypeAlias = Literal["votes", "logits"]


def _ranks_of_counts(votes: Tensor, num_classes: int) -> Tensor:
    """Competition ranks of the classes by votes, [B, C]: 1 + the number of classes with more."""
    batch_size, num_votes = votes.shape
    ones = torch.ones_like(votes)
    counts = votes.new_zeros(batch_size, num_classes).scatter_add(1, votes, ones)
    # A histogram of the counts replaces the sort: C classes share at most K + 1 counts.
    histogram = votes.new_zeros(batch_size, num_votes + 1)
    histogram = histogram.scatter_add(1, counts, torch.ones_like(counts))
    at_most = histogram.cumsum(1)
    return 1 + num_classes - at_most.gather(1, counts)


def _ranks_of_scores(scores: Tensor) -> Tensor:
    """Competition ranks of the classes by score, [B, C]."""
    scores = scores.contiguous()
    at_most = torch.searchsorted(scores.sort(dim=1).values, scores, right=True)
    return 1 + scores.shape[1] - at_most


def zipf_ls_targets(
    logits: Tensor,
    target: Tensor,
    votes: Tensor | None = None,
    *,
    power: float = 1.0,
    mixed_target: MixedTarget = "largest",
) -> Tensor:
    r"""Zipf's LS soft labels over the non-target classes, without gradient.

    Liang et al., "Efficient One Pass Self-distillation with Zipf's Label Smoothing",
    ECCV 2022 (arXiv 2207.12980); official code megvii-research/zipfls (PyTorch half).

    All classes are ranked, by their number of votes or by the sample's own logits; ties share
    the smallest rank (counts 5, 3, 1, 0, 0 give 1, 2, 3, 4, 4). Then
    :math:`q_i \propto \text{rank}_i^{-p}` for :math:`i \ne t`.

    Args:
        logits: [B, C], raw logits; they rank the classes if `votes` is None.
        target: [B] class indices, or [B, C] probabilities.
        votes: [B, K] class indices, one for each position of the last map; or None.
        power: p, 0 or more; 1 is Zipf's law.
        mixed_target: For [B, C] labels: `"largest"` removes the class with the largest label
            (ties: the lower class), `"all"` removes every labelled class.

    Returns:
        [B, C], each row sums to 1, 0 at removed classes.

    Raises:
        TypeError: Logits, target or votes of a wrong dtype.
        ValueError: A wrong shape, label, vote or setting.

    Example:
        >>> import torch
        >>> votes = torch.tensor([[0, 0, 1, 1, 2, 0, 0, 1, 0]])
        >>> zipf_ls_targets(torch.zeros(1, 5), torch.tensor([0]), votes)
        tensor([[0.0000, 0.3750, 0.2500, 0.1875, 0.1875]])
    """
    check_logits(logits)
    check_target(target, logits)
    check_number("power", power)
    check_choice("mixed_target", mixed_target, ("largest", "all"))
    logits = in_float32(logits.detach())
    if votes is None:
        ranks = _ranks_of_scores(logits)
    else:
        check_votes(votes, logits)
        ranks = _ranks_of_counts(votes.long(), logits.shape[1])
    labelled = label_probabilities(target, logits, mixed_target) > 0
    return normalized(ranks.to(logits.dtype).pow(-power), labelled)


def zipf_ls_loss(
    logits: Tensor,
    target: Tensor,
    votes: Tensor | None = None,
    *,
    power: float = 1.0,
    mixed_target: MixedTarget = "largest",
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Zipf's LS: non-target predictions are drawn to a Zipf distribution over their ranks.

    Liang et al., ECCV 2022 (arXiv 2207.12980); official code megvii-research/zipfls
    (PyTorch half, whose ranking runs on the CPU; the values are the same).

    .. math:: L = \sum_{i \ne t} q_i (\log q_i - \log \hat p_i)

    with q from `zipf_ls_targets` and :math:`\hat p` the softmax over the non-target logits.
    It is *added* to the task's own loss (cross-entropy), with the paper's lambda (0.1 on
    CIFAR-100 and ImageNet, 1.0 on TinyImageNet and iNat21) as the Distiller's
    `method_weight`.

    Args:
        logits: [B, C], raw logits. Gets the gradient.
        target: [B] class indices, or [B, C] probabilities (mixup, cutmix).
        votes: [B, K] class indices, or None to rank by the sample's own logits.
        power: Exponent of the law, 0 or more.
        mixed_target: `"largest"` or `"all"`, see `zipf_ls_targets`.
        reduction: `"mean"` over B, `"sum"`, or `"none"`.

    Returns:
        A scalar, or [B] for `"none"`; in nats, at least float32.

    Raises:
        TypeError: Logits, target or votes of a wrong dtype.
        ValueError: A wrong shape, label, vote, setting or reduction.

    Numerics: computed in float32 or wider, also under autocast; no host synchronisation.
    Distributed: each sample by itself, no batch statistics.

    Example:
        >>> import torch
        >>> zipf_ls_loss(torch.tensor([[2.0, 1.0, 0.5, -1.0, 0.0]]), torch.tensor([0]))
        tensor(0.0572)
    """
    soft = zipf_ls_targets(logits, target, votes, power=power, mixed_target=mixed_target)
    logits = in_float32(logits)
    labelled = label_probabilities(target, logits, mixed_target) > 0
    log_probabilities = non_target_log_softmax(logits, labelled)
    divergence = (torch.xlogy(soft, soft) - soft * log_probabilities).sum(1)
    return reduce_batch(divergence, reduction)


class ZipfLSLoss(nn.Module):
    """Zipf's LS as a module; see `zipf_ls_loss` for the equation.

    Args:
        power: Exponent of the law, 0 or more.
        rank_from: `"votes"`: the head's prediction at every position of the last map;
            `"logits"`: the sample's own logits.
        vote_upsample: Factor by which the last map is enlarged before voting; 2 in the
            paper's CIFAR-100 ResNet-18 runs.
        mixed_target: `"largest"` or `"all"`, for mixed labels.
        reduction: `"mean"`, `"sum"` or `"none"`.
    """

    recommended_weight = 0.1

    def __init__(
        self,
        *,
        power: float = 1.0,
        rank_from: RankFrom = "votes",
        vote_upsample: int = 1,
        mixed_target: MixedTarget = "largest",
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__()
        check_number("power", power)
        check_choice("rank_from", rank_from, ("votes", "logits"))
        check_number("vote_upsample", vote_upsample, positive=True)
        if not isinstance(vote_upsample, int):
            raise TypeError(f"vote_upsample must be a whole number, got {vote_upsample!r}")
        check_choice("mixed_target", mixed_target, ("largest", "all"))
        check_choice("reduction", reduction, ("mean", "sum", "none"))
        self.power = power
        self.rank_from: RankFrom = rank_from
        self.vote_upsample = vote_upsample
        self.mixed_target: MixedTarget = mixed_target
        self.reduction: Reduction = reduction

    @property
    def reads(self) -> Mapping[str, Signal]:
        """The signals that these settings need: votes only if they rank."""
        reads: dict[str, Signal] = {"logits": Logits(), "target": Target()}
        if self.rank_from == "votes":
            reads["votes"] = Votes(upsample=self.vote_upsample)
        return reads

    def forward(self, logits: Tensor, target: Tensor, votes: Tensor | None = None) -> Tensor:
        """Compute `zipf_ls_loss` with this module's settings.

        Raises:
            ValueError: Votes are missing though they rank, or given though they do not.
        """
        self._check_votes(votes)
        return zipf_ls_loss(
            logits,
            target,
            votes,
            power=self.power,
            mixed_target=self.mixed_target,
            reduction=self.reduction,
        )

    def _check_votes(self, votes: Tensor | None) -> None:
        if (votes is None) == (self.rank_from == "votes"):
            got = "none" if votes is None else "some"
            raise ValueError(f"rank_from={self.rank_from!r} decides whether votes rank, got {got}")

    def soft_labels(
        self, logits: Tensor, target: Tensor, votes: Tensor | None = None
    ) -> SoftLabels:
        """The label, and Zipf's law over the wrong classes as the network itself ranks them."""
        self._check_votes(votes)
        return SoftLabels(
            label_probabilities(target, in_float32(logits), self.mixed_target),
            zipf_ls_targets(
                logits, target, votes, power=self.power, mixed_target=self.mixed_target
            ),
        )
