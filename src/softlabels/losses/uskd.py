"""USKD: universal self-knowledge distillation, no teacher."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from softlabels.losses.nontarget import (
    Reduction,
    SoftLabels,
    check_choice,
    check_logits,
    check_number,
    check_target,
    check_two_labels,
    class_mask,
    in_float32,
    label_probabilities,
    non_target_log_softmax,
    normalized,
    reduce_batch,
)
from softlabels.losses.reads import Logits, Signal, Target, WeakLogits

__all__ = ["RankBy", "USKDLoss", "uskd_loss", "uskd_targets"]

RankBy: TypeAlias = Literal["probability", "log_probability"]

_SMOOTHING = 0.1  # of the weak head's labels, fixed in equation 9
_EPSILON = 1e-6  # in both rank denominators, as in the official code


class _Labels(NamedTuple):
    """The one or two labelled classes of each sample, as columns."""

    classes: Tensor  # [B, K], K = 1 or 2; an absent second label points anywhere
    values: Tensor  # [B, K], 0 where the label is absent


def _labels(target: Tensor, logits: Tensor) -> _Labels:
    if target.dim() == 1:
        classes = target.long().unsqueeze(1)
        return _Labels(classes, torch.ones_like(classes, dtype=logits.dtype))
    target = target.to(logits.dtype)
    # argmax twice, not topk: on equal labels it is defined to give the lower class first.
    first = target.argmax(1)
    second = target.masked_fill(class_mask(first, target.shape[1]), -1.0).argmax(1)
    classes = torch.stack((first, second), 1)
    return _Labels(classes, target.gather(1, classes))


def _target_labels(probabilities: Tensor, labels: _Labels) -> Tensor:
    """Equation 6, [B, C]: S_t^2 + V_t - mean(S_t^2) at labelled classes, 0 elsewhere."""
    present = (labels.values > 0).to(probabilities.dtype)
    squared = probabilities.gather(1, labels.classes).square()
    mean = (squared * present).sum(0) / present.sum(0).clamp(min=1)
    values = (squared + labels.values - mean) * present
    return torch.zeros_like(probabilities).scatter(1, labels.classes, values)


def _rank_scores(
    log_probabilities: Tensor, weak_probabilities: Tensor, labelled: Tensor, rank_by: RankBy
) -> Tensor:
    """Equation 10, [B, C]: weak and final prediction, each over its non-target mass."""

    def rest(values: Tensor) -> Tensor:
        # 1 - sum over labelled classes, summed from the small side: exact when S_t is near 1.
        return values.masked_fill(labelled, 0.0).sum(1, keepdim=True) + _EPSILON

    weak = weak_probabilities / rest(weak_probabilities)
    if rank_by == "probability":
        probabilities = log_probabilities.exp()
        return weak + probabilities / rest(probabilities)
    labelled_sum = log_probabilities.masked_fill(~labelled, 0.0).sum(1, keepdim=True)
    return weak + log_probabilities / (1 - labelled_sum + _EPSILON)


def _zipf_by_order(scores: Tensor) -> Tensor:
    """Zipf's law, [B, C]: 1/rank for the strict descending order of scores (ties: lower class)."""
    num_classes = scores.shape[1]
    order = scores.argsort(dim=1, descending=True, stable=True)
    ranks = torch.arange(1, num_classes + 1, device=scores.device, dtype=scores.dtype)
    return torch.empty_like(scores).scatter(1, order, ranks.reciprocal().expand_as(scores))


def uskd_targets(
    logits: Tensor,
    weak_logits: Tensor,
    target: Tensor,
    *,
    rank_by: RankBy = "probability",
) -> SoftLabels:
    r"""USKD's customised soft labels, without gradient.

    Yang et al., ICCV 2023 (arXiv 2303.13005), equations 6, 10, 11; official code
    yzd-v/cls_KD.

    .. math::
        P_t &= S_t^2 + V_t - \text{mean}_B(S_t^2) \\
        R_i &= W_i / (1 - W_t) + S_i / (1 - S_t) \\
        Z_i &= 1 / \text{rank}(R_i), \quad \text{renormalised over } i \ne t

    The rank runs over all classes, the labelled ones included, which are removed afterwards
    (as in the official code). Equal scores rank the lower class first.

    Args:
        logits: [B, C], raw logits of the network (softmax S).
        weak_logits: [B, C], raw logits of the weak head (softmax W).
        target: [B] class indices, or [B, C] probabilities V with one or two labelled classes.
            P_t is taken per label column (major, minor), each with the mean over the rows that
            have this column.
        rank_by: `"probability"`: equation 10. `"log_probability"`: the later reference code,
            which ranks with log S_i / (1 - log S_t) in place of the second fraction.

    Returns:
        `SoftLabels(target, non_target)`, both [B, C]: P_t at labelled classes (it may exceed 1
        or be negative), and N(Z) over the others.

    Raises:
        TypeError: Logits or target of a wrong dtype.
        ValueError: A wrong shape, label or setting; more than two labelled classes in a row
            (pass unsmoothed labels).

    Distributed: the mean over B is that of this process, as in the paper's runs.

    Example:
        >>> import torch
        >>> logits = torch.tensor([[2.0, 1.0, 0.5], [0.2, 1.5, 0.7]])
        >>> uskd_targets(logits, torch.zeros(2, 3), torch.tensor([0, 1])).non_target
        tensor([[0.0000, 0.6000, 0.4000],
                [0.4000, 0.0000, 0.6000]])
    """
    check_logits(logits)
    check_logits(weak_logits, "weak_logits", like=logits)
    check_target(target, logits)
    check_two_labels(target)
    check_choice("rank_by", rank_by, ("probability", "log_probability"))
    logits = in_float32(logits.detach())
    weak_logits = in_float32(weak_logits.detach()).to(logits.dtype)
    labelled = label_probabilities(target, logits) > 0
    log_probabilities = logits.log_softmax(1)
    scores = _rank_scores(log_probabilities, weak_logits.softmax(1), labelled, rank_by)
    return SoftLabels(
        _target_labels(log_probabilities.exp(), _labels(target, logits)),
        normalized(_zipf_by_order(scores), labelled),
    )


def uskd_loss(
    logits: Tensor,
    weak_logits: Tensor,
    target: Tensor,
    *,
    target_weight: float = 1.0,
    non_target_weight: float = 0.1,
    weak_weight: float = 0.005,
    rank_by: RankBy = "probability",
    reduction: Reduction = "mean",
) -> Tensor:
    r"""USKD: the network learns from soft labels that it makes itself; no teacher.

    Yang et al., "From Knowledge Distillation to Self-Knowledge Distillation", ICCV 2023
    (arXiv 2303.13005), equations 6-13; official code yzd-v/cls_KD (its later rank is
    `rank_by="log_probability"`). Differs from that code in one edge case: a row of mixed
    labels with a single labelled class has no second column here, while there an arbitrary
    class takes that place.

    .. math::
        L = -\alpha P_t \log S_t
            - \beta \sum_{i \ne t} N(Z)_i \log N(S)_i
            - \mu \sum_i \tilde V_i \log W_i,
        \quad \tilde V = 0.9 V + 0.1 / C

    ========  ==================================================================
    symbol    meaning
    ========  ==================================================================
    S, W      softmax of `logits`, of `weak_logits`
    P_t, Z    the soft labels, see `uskd_targets`; constant for the gradient
    N(.)      renormalised over the classes without a label
    alpha     `target_weight`
    beta      `non_target_weight`
    mu        `weak_weight`
    ========  ==================================================================

    It is *added* to the task's own loss (cross-entropy), with weight 1.

    Args:
        logits: [B, C], raw logits. Gets the gradient of the first two terms.
        weak_logits: [B, C], raw logits of a linear head on a middle feature. Gets the gradient
            of the last term, which reaches the network up to that feature.
        target: [B] class indices, or [B, C] probabilities with one or two labelled classes,
            never smoothed.
        target_weight: alpha, 0 or more. 1 on ImageNet, 0.1 on CIFAR-100.
        non_target_weight: beta, 0 or more. 0.1.
        weak_weight: mu, 0 or more. 0.005 on ImageNet, 0.1 on CIFAR-100.
        rank_by: `"probability"` (the paper) or `"log_probability"` (later reference code).
        reduction: `"mean"` over B, `"sum"`, or `"none"`.

    Returns:
        A scalar, or [B] for `"none"`; in nats, at least float32.

    Raises:
        TypeError: Logits or target of a wrong dtype.
        ValueError: A wrong shape, label, setting or reduction; more than two labelled classes
            in a row.

    Numerics: computed in float32 or wider, also under autocast; no host synchronisation.
    Distributed: P_t holds a mean over the batch, here over this process' batch.

    Example:
        >>> import torch
        >>> logits = torch.tensor([[2.0, 1.0, 0.5, -1.0, 0.0]])
        >>> uskd_loss(logits, torch.zeros(1, 5), torch.tensor([0]))
        tensor(0.7208)
    """
    check_number("target_weight", target_weight)
    check_number("non_target_weight", non_target_weight)
    check_number("weak_weight", weak_weight)
    soft = uskd_targets(logits, weak_logits, target, rank_by=rank_by)

    logits = in_float32(logits)
    weak_logits = in_float32(weak_logits).to(logits.dtype)
    labels = label_probabilities(target, logits)
    target_term = -(soft.target * logits.log_softmax(1)).sum(1)
    non_target_term = -(soft.non_target * non_target_log_softmax(logits, labels > 0)).sum(1)
    smoothed = (1 - _SMOOTHING) * labels + _SMOOTHING / logits.shape[1]
    weak_term = -(smoothed * weak_logits.log_softmax(1)).sum(1)
    per_sample = (
        target_weight * target_term + non_target_weight * non_target_term + weak_weight * weak_term
    )
    return reduce_batch(per_sample, reduction)


class USKDLoss(nn.Module):
    """USKD as a module; see `uskd_loss` for the equation and the settings.

    Args:
        target_weight: Weight of the target term; 0 or more.
        non_target_weight: Weight of the non-target term; 0 or more.
        weak_weight: Weight of the weak head's own loss; 0 or more.
        rank_by: `"probability"` or `"log_probability"`.
        reduction: `"mean"`, `"sum"` or `"none"`.
    """

    reads: ClassVar[Mapping[str, Signal]] = {
        "logits": Logits(),
        "weak_logits": WeakLogits(tap="middle"),
        "target": Target(),
    }

    def __init__(
        self,
        *,
        target_weight: float = 1.0,
        non_target_weight: float = 0.1,
        weak_weight: float = 0.005,
        rank_by: RankBy = "probability",
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__()
        check_number("target_weight", target_weight)
        check_number("non_target_weight", non_target_weight)
        check_number("weak_weight", weak_weight)
        check_choice("rank_by", rank_by, ("probability", "log_probability"))
        check_choice("reduction", reduction, ("mean", "sum", "none"))
        self.target_weight = target_weight
        self.non_target_weight = non_target_weight
        self.weak_weight = weak_weight
        self.rank_by: RankBy = rank_by
        self.reduction: Reduction = reduction

    def forward(self, logits: Tensor, weak_logits: Tensor, target: Tensor) -> Tensor:
        """Compute `uskd_loss` with this module's settings."""
        return uskd_loss(
            logits,
            weak_logits,
            target,
            target_weight=self.target_weight,
            non_target_weight=self.non_target_weight,
            weak_weight=self.weak_weight,
            rank_by=self.rank_by,
            reduction=self.reduction,
        )

    def soft_labels(self, logits: Tensor, weak_logits: Tensor, target: Tensor) -> SoftLabels:
        """A value from the network's own confidence, and Zipf's law over its own ranking."""
        return uskd_targets(logits, weak_logits, target, rank_by=self.rank_by)
