"""Ranks of classes, and the weights that Zipf's law and others give to ranks.

Shapes: B samples, C classes, K votes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple, TypeAlias, get_args

import torch
from torch import Tensor

from softlabels.losses._checks import in_transform
from softlabels.losses._non_target import Labels, NonTarget, non_target_weights, softmax_parts

__all__ = ["DISTRIBUTIONS", "Distribution", "law", "zipf_by_order"]

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


class Ranks(NamedTuple):
    """Competition ranks, for columns of classes, [B, N] each."""

    rank: Tensor  # 1 + the number of classes with a better score, in the dtype of the logits
    ties: Tensor  # the number of classes with the same score, itself included


def _ranks_of_votes(votes: Tensor, like: Tensor) -> Ranks:
    """Ranks of the class of each vote, and in a last column of all classes without a vote.

    Work on [B, K]: at most K classes have votes, and all others share one rank.
    """
    (batch_size, num_votes), num_classes = votes.shape, like.shape[1]
    counts = votes.new_zeros(batch_size, num_classes, dtype=torch.int32)
    ones = torch.ones_like(votes, dtype=torch.int32)
    counts = counts.scatter_add_(1, votes, ones).gather(1, votes).long()
    # A class with n votes stands n times among the votes, so that 1/n of them are classes.
    classes = votes.new_zeros(batch_size, num_votes + 1, dtype=torch.int32)
    classes = classes.scatter_add_(1, counts, ones)
    classes = classes // torch.arange(num_votes + 1, device=votes.device).clamp(min=1)
    fewer = classes.cumsum(1)
    num_voted = fewer[:, -1:]
    rank = torch.cat((1 + num_voted - fewer.gather(1, counts), 1 + num_voted), 1)
    ties = torch.cat((classes.gather(1, counts), num_classes - num_voted), 1)
    return Ranks(rank.to(like.dtype), ties.to(like.dtype))


def _ranks_of_logits(logits: Tensor) -> Ranks:
    """Ranks of all classes by the sample's own logits."""
    logits = logits.contiguous()
    ascending = logits.sort(dim=1).values
    not_above = torch.searchsorted(ascending, logits, right=True)
    ties = not_above - torch.searchsorted(ascending, logits)
    return Ranks((1 + logits.shape[1] - not_above).to(logits.dtype), ties.to(logits.dtype))


_BY_LOGARITHM = ("exponential_decay", "unbiased_zipf")  # steep ones would over- or underflow


def _law(
    ranks: Ranks, distribution: Distribution, num_classes: int, settings: Mapping[str, float]
) -> Tensor:
    """Weight of each column by its rank, or its logarithm, for the laws without draws; [B, N]."""
    rank, ties = ranks
    if distribution == "constant":
        return torch.ones_like(rank)
    if distribution == "linear_decay":
        smallest = settings["smallest_probability"]
        gap = 2 * (1 - num_classes * smallest) / (num_classes * (num_classes - 1))
        return (num_classes - rank) * gap + smallest
    if distribution == "exponential_decay":
        return settings["decay"] * (1 - rank)
    power = settings["power"]
    if distribution == "zipf":
        return rank.pow(-power)
    lower, upper = settings["lower_bound"], settings["upper_bound"]
    interval = (upper - lower) / num_classes
    low = lower + (rank - 1) * interval
    width = torch.log1p(ties * interval / low)  # log(high / low)
    integral = width if power == 1 else ((1 - power) * width).expm1().abs()
    return integral.log() + (1 - power) * low.log() - ties.log()


def _draws(distribution: Distribution, like: Tensor) -> Tensor:
    """New draws for each class, [B, C]."""
    if distribution == "random_uniform":
        return torch.rand_like(like)
    if distribution == "random_gaussian":
        return torch.randn_like(like).abs()
    # Lomax, shape 1: (1 - u) / u for u uniform in (0, 1].
    return (1 - torch.rand_like(like)).reciprocal() - 1


def law(
    logits: Tensor,
    votes: Tensor | None,
    labels: Labels,
    distribution: Distribution,
    settings: Mapping[str, float],
) -> NonTarget:
    """A distribution over the non-target classes by the ranks of all classes.

    Args:
        logits: [B, C]; rank the classes if there are no votes.
        votes: [B, K], or None.
        labels: Which classes are removed, after the ranking.
        distribution: Which law.
        settings: Its parameters.
    """
    if distribution.startswith("random"):
        return non_target_weights(_draws(distribution, logits), labels)
    ranks = _ranks_of_logits(logits) if votes is None else _ranks_of_votes(votes.long(), logits)
    if distribution == "sorted_pareto":
        draws = _draws(distribution, logits).sort(dim=1, descending=True).values
        weights = draws.gather(1, ranks.rank.long().clamp(max=logits.shape[1]) - 1)
    else:
        weights = _law(ranks, distribution, logits.shape[1], settings)
    if votes is not None:
        weights = weights[:, -1:].expand_as(logits).scatter(1, votes.long(), weights[:, :-1])
    if distribution in _BY_LOGARITHM:
        return softmax_parts(weights, labels)[1]
    return non_target_weights(weights, labels)


def _sort_keys(scores: Tensor) -> Tensor:
    """Integers whose ascending order is the descending order of finite `scores`, [B, C].

    Sorting integers takes two thirds of the time of sorting floats, which watches for NaN. The
    bits of a float, read as an integer, are in order but for negative ones, which are reversed.
    """
    integer, width = (torch.int64, 63) if scores.dtype == torch.float64 else (torch.int32, 31)
    bits = (scores + 0.0).view(integer)  # -0.0 becomes 0.0, its equal
    return (bits >> width).bitwise_and_(torch.iinfo(integer).max).bitwise_xor_(bits).bitwise_not_()


def zipf_by_order(scores: Tensor) -> Tensor:
    """Zipf's law, [B, C]: 1/rank for the strict descending order of scores (ties: lower class)."""
    num_classes = scores.shape[1]
    # A tensor that older versions of torch (2.11) batch has no bits to be read.
    descending = not torch.compiler.is_compiling() and in_transform()
    keys = scores if descending else _sort_keys(scores)
    order = keys.sort(dim=1, stable=True, descending=descending).indices
    ranks = torch.arange(1, num_classes + 1, device=scores.device, dtype=scores.dtype)
    return torch.empty_like(scores).scatter(1, order, ranks.reciprocal().expand_as(scores))
