"""Ranks of classes, and the weights that Zipf's law and others give to ranks.

Shapes: B samples, C classes, K votes.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, TypeAlias, get_args

import torch
from torch import Tensor

from softlabels.losses._checks import in_transform
from softlabels.losses._non_target import Labels, non_target_weights, softmax_parts

__all__ = ["DISTRIBUTIONS", "Distribution", "Law", "over_ranks", "zipf_by_order"]

Distribution: TypeAlias = Literal[
    "zipf",
    "constant",
    "random_uniform",
    "random_gaussian",
    "random_pareto",
    "sorted_pareto",
    "linear_decay",
    "exponential_decay",
    "unbiased_zipf",
]

DISTRIBUTIONS: tuple[str, ...] = get_args(Distribution)


class Law(NamedTuple):
    """Which weight a rank has; the attributes are settings of Zipf's LS."""

    distribution: Distribution
    power: float
    smallest_probability: float
    decay: float
    lower_bound: float
    upper_bound: float


class Ranks(NamedTuple):
    """Competition ranks, for columns of classes, [B, N] each."""

    rank: Tensor  # 1 + the number of classes with a better score, in the dtype of the logits
    ties: Tensor | None  # the number of classes with the same score, where a law asks for it


def _ranks_of_counts(votes: Tensor, like: Tensor, with_ties: bool) -> tuple[Ranks, Tensor]:
    """Ranks of a class with 0 to K votes, [B, K + 1], and how many votes each vote's class has.

    Work on [B, K]: at most K classes have votes, and all others share one rank.
    """
    (batch_size, num_votes), num_classes = votes.shape, like.shape[1]
    ones = torch.ones_like(votes, dtype=like.dtype)
    counts = votes.new_zeros(batch_size, num_classes, dtype=like.dtype)
    counts = counts.scatter_add_(1, votes, ones).gather(1, votes).long()
    # A class with n votes stands n times among the votes, so that 1/n of them are classes.
    classes = votes.new_zeros(batch_size, num_votes + 1, dtype=like.dtype)
    times = torch.arange(num_votes + 1, device=votes.device, dtype=like.dtype).clamp_(min=1)
    classes = classes.scatter_add_(1, counts, ones).div_(times)
    fewer = classes.cumsum(1)
    num_voted = fewer[:, -1:]
    ties = torch.cat((num_classes - num_voted, classes[:, 1:]), 1) if with_ties else None
    return Ranks((1 + num_voted) - fewer, ties), counts


def _ranks_of_logits(logits: Tensor, with_ties: bool) -> Ranks:
    """Ranks of all classes by the sample's own logits."""
    logits = logits.contiguous()
    ascending = logits.sort(dim=1).values
    not_above = torch.searchsorted(ascending, logits, right=True)
    rank = (1 + logits.shape[1] - not_above).to(logits.dtype)
    if not with_ties:
        return Ranks(rank, None)
    return Ranks(rank, (not_above - torch.searchsorted(ascending, logits)).to(logits.dtype))


_BY_LOGARITHM = ("exponential_decay", "unbiased_zipf")  # steep ones would over- or underflow


def _weights(ranks: Ranks, law: Law, num_classes: int) -> Tensor:
    """Weight of each column by its rank, or its logarithm, for the laws without draws; [B, N]."""
    rank, ties = ranks
    if law.distribution == "constant":
        return torch.ones_like(rank)
    if law.distribution == "linear_decay":
        smallest = law.smallest_probability
        gap = 2 * (1 - num_classes * smallest) / (num_classes * (num_classes - 1))
        return (num_classes - rank) * gap + smallest
    if law.distribution == "exponential_decay":
        return law.decay * (1 - rank)
    if law.distribution == "zipf":
        return rank.pow(-law.power)
    assert ties is not None
    interval = (law.upper_bound - law.lower_bound) / num_classes
    low = law.lower_bound + (rank - 1) * interval
    width = torch.log1p(ties * interval / low)  # log(high / low)
    integral = width if law.power == 1 else ((1 - law.power) * width).expm1().abs()
    return integral.log() + (1 - law.power) * low.log() - ties.log()


def _draws(distribution: Distribution, like: Tensor) -> Tensor:
    """New draws for each class, [B, C]."""
    if distribution == "random_uniform":
        return torch.rand_like(like)
    if distribution == "random_gaussian":
        return torch.randn_like(like).abs()
    # Lomax, shape 1: (1 - u) / u for u uniform in (0, 1].
    return (1 - torch.rand_like(like)).reciprocal() - 1


def over_ranks(logits: Tensor, votes: Tensor | None, labels: Labels, law: Law) -> Tensor:
    """A distribution over the non-target classes by the ranks of all classes, [B, C].

    Votes, [B, K], rank the classes, or the logits if there are none.
    """
    if law.distribution.startswith("random"):
        return non_target_weights(_draws(law.distribution, logits), labels)
    num_classes = logits.shape[1]
    with_ties = law.distribution == "unbiased_zipf"
    counts = None
    if votes is None:
        ranks = _ranks_of_logits(logits, with_ties)
    else:
        votes = votes.long()
        ranks, counts = _ranks_of_counts(votes, logits, with_ties)
    if law.distribution == "sorted_pareto":
        draws = _draws(law.distribution, logits).sort(dim=1, descending=True).values
        weights = draws.gather(1, ranks.rank.long().clamp(max=num_classes) - 1)
    else:
        weights = _weights(ranks, law, num_classes)
    if votes is not None and counts is not None:  # those of no vote everywhere, then the others
        nothing = weights[:, :1].expand_as(logits)
        weights = nothing.scatter(1, votes, weights.gather(1, counts))
    if law.distribution in _BY_LOGARITHM:
        return softmax_parts(weights, labels)[1]
    return non_target_weights(weights, labels)


def _sort_keys(scores: Tensor, signed: bool) -> Tensor:
    """Integers in the order of finite `scores`, [B, C].

    Sorting integers takes two thirds of the time of sorting floats, which watches for NaN. The
    bits of a float, read as an integer, are in order but for negative ones, which are reversed.
    """
    integer, width = (torch.int64, 63) if scores.dtype == torch.float64 else (torch.int32, 31)
    if not signed:
        return scores.view(integer)
    bits = (scores + 0.0).view(integer)  # -0.0 becomes 0.0, its equal
    return (bits >> width).bitwise_and_(torch.iinfo(integer).max).bitwise_xor_(bits)


def zipf_by_order(scores: Tensor, signed: bool = True) -> Tensor:
    """Zipf's law, [B, C]: 1/rank for the strict descending order of scores (ties: lower class).

    Args:
        scores: [B, C], finite.
        signed: Whether some may be below 0 or -0.0; it saves a few operations if not.
    """
    # A tensor that older versions of torch (2.11) batch has no bits to be read.
    batched = not torch.compiler.is_compiling() and in_transform()
    keys = scores if batched else _sort_keys(scores, signed)
    order = keys.sort(dim=1, stable=True, descending=True).indices
    ranks = torch.arange(1, scores.shape[1] + 1, device=scores.device, dtype=scores.dtype)
    # Every entry is written: into the scores, for want of another tensor of that shape.
    return scores.scatter(1, order, ranks.reciprocal().expand_as(scores))
