"""The algebra that all losses share: labeled classes, the non-target softmax, reductions.

Shapes: B samples, C classes, K columns of labels. A sample's *labeled* classes are those with a
positive label; the *non-target* classes are all others.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from softlabels.losses._checks import check_unsmoothed

__all__ = [
    "Labels",
    "MixedTarget",
    "Reduction",
    "RowSums",
    "SoftLabels",
    "checked_columns",
    "column_means",
    "finite_limit",
    "in_float32",
    "label_columns",
    "label_probabilities",
    "labeled_probabilities",
    "largest_label",
    "log_total",
    "non_target_weights",
    "reduce_terms",
    "removed",
    "row_sums",
    "single_mask",
    "softmax_parts",
    "spread",
    "total_of",
    "without_ignored",
]

Reduction: TypeAlias = Literal["mean", "sum", "none"]
MixedTarget: TypeAlias = Literal["largest", "all"]


class SoftLabels(NamedTuple):
    """The soft labels of a batch, taken apart into a target and a non-target part.

    Attributes:
        target: [B, C], the value that each labeled class is trained towards; 0 elsewhere.
        non_target: [B, C], a distribution over the non-target classes; 0 at labeled ones.
    """

    target: Tensor
    non_target: Tensor


class Labels(NamedTuple):
    """The labeled classes of each sample, as columns.

    Attributes:
        classes: [B, K] int64. An absent label repeats another labeled class of its row.
        values: [B, K], the labels, 0 where absent; the number 1 for a single column.
        kept: [B] boolean, which samples count in means over the batch; None: all.
    """

    classes: Tensor
    values: Tensor | float
    kept: Tensor | None = None

    # No properties: torch 2.6 does not compile those of tuples.

    def single(self) -> bool:
        """Whether each row has one label, of 1: the common case, in which none is absent."""
        return not isinstance(self.values, Tensor)

    def present(self) -> Tensor:
        """[B, K] boolean."""
        if not isinstance(self.values, Tensor):
            return torch.ones_like(self.classes, dtype=torch.bool)
        return self.values > 0

    def masked(self, values: Tensor, absent: float = 0.0) -> Tensor:
        """[B, K] values, with `absent` where the label is absent."""
        if not isinstance(self.values, Tensor):
            return values
        return values.masked_fill(self.values <= 0, absent)

    def weighted_sum(self, values: Tensor) -> Tensor:
        """The sum of [B, K] values times the labels, [B]."""
        if not isinstance(self.values, Tensor):
            return values.squeeze(1)
        return (self.values * values).sum(1)


def in_float32(tensor: Tensor) -> Tensor:
    """Return `tensor` in at least float32; float64 stays, half precision is widened."""
    if tensor.dtype in (torch.float32, torch.float64):
        return tensor
    return tensor.float()


def finite_limit(dtype: torch.dtype) -> float:
    """The largest size of a log-probability that is told apart; sums of such stay finite."""
    return float(torch.finfo(dtype).max ** 0.75)


def without_ignored(target: Tensor, ignore_index: int | None) -> tuple[Tensor, Tensor | None]:
    """Labels with class 0 for ignored samples, and which samples count, [B]; None: all."""
    if ignore_index is None or not isinstance(target, Tensor) or target.dim() != 1:
        return target, None
    kept = target != ignore_index
    return target.masked_fill(~kept, 0), kept


def largest_label(target: Tensor) -> Tensor:
    """The labeled class of each sample, [B] int64: of mixed labels the largest, then lowest."""
    return target.long() if target.dim() == 1 else target.argmax(1)


def label_columns(
    target: Tensor, logits: Tensor, mixed_target: Literal["largest", "two", "all"] = "all"
) -> Labels:
    """The labeled classes of a batch as columns.

    Args:
        target: [B] class indices or [B, C] probabilities.
        logits: [B, C], gives the dtype.
        mixed_target: For [B, C] labels. `"largest"` keeps one class per sample (ties: the lower
            class), with a label of 1; `"two"` the two largest; `"all"` each, as K = C columns.
    """
    if target.dim() == 1 or mixed_target == "largest":
        return Labels(largest_label(target).unsqueeze(1), 1.0)
    values = target.to(logits.dtype)
    first = values.argmax(1, keepdim=True)
    if mixed_target == "two":
        # argmax twice, not topk: on equal labels it is defined to give the lower class first.
        second = values.scatter(1, first, -1.0).argmax(1, keepdim=True)
        columns = torch.cat((first, second), 1)
        values = values.gather(1, columns)
    else:
        columns = torch.arange(values.shape[1], device=values.device).expand_as(values)
    return Labels(torch.where(values > 0, columns, first), values)


def checked_columns(target: Tensor, logits: Tensor, mixed_target: MixedTarget) -> Labels:
    """`label_columns`, after a check that labels of all classes are not smoothed.

    Raises:
        ValueError: A row has a label for every class.
    """
    if mixed_target == "all":
        check_unsmoothed(target)
    return label_columns(target, logits, mixed_target)


def label_probabilities(
    target: Tensor, logits: Tensor, mixed_target: MixedTarget = "all"
) -> Tensor:
    """Labels as [B, C] probabilities in the dtype of `logits`; see `label_columns`."""
    if target.dim() == 2 and mixed_target == "all":
        return target.to(logits.dtype)
    labels = label_columns(target, logits, mixed_target)
    return spread(labels, labels.values, logits)


def spread(labels: Labels, values: Tensor | float, like: Tensor) -> Tensor:
    """Put [B, K] values at the labeled classes of a [B, C] tensor; 0 elsewhere."""
    zeros = torch.zeros_like(like)
    if not isinstance(values, Tensor):
        return zeros.scatter(1, labels.classes, values)
    return zeros.scatter_add(1, labels.classes, labels.masked(values))


def removed(logits: Tensor, labels: Labels, value: float = -torch.inf) -> Tensor:
    """A copy of `logits` [B, C] with `value` at the labeled classes."""
    if labels.single() and torch.compiler.is_compiling():
        # The same as a scatter, which the compiler does not fuse with what comes next.
        return logits.masked_fill(single_mask(labels, logits), value)
    return logits.scatter(1, labels.classes, value)


def single_mask(labels: Labels, like: Tensor) -> Tensor:
    """[B, C] boolean, True at the first labeled class."""
    # int32: compiled comparisons of 64-bit integers cost as much as an exponential.
    classes = torch.arange(like.shape[1], device=like.device, dtype=torch.int32)
    return labels.classes[:, :1].to(torch.int32) == classes


class RowSums(NamedTuple):
    """Log-sums of exponentials of a row of logits over its non-target classes, [B, 1] each.

    Attributes:
        top: The largest non-target logit; 0 if there is none. No gradient.
        rest: Log-sum over the non-target classes; -inf if there is none.
        scaled: Log-sum over the non-target classes of `(logits - top) / temperature`.
    """

    top: Tensor
    rest: Tensor
    scaled: Tensor


def row_sums(logits: Tensor, labels: Labels, temperature: float = 1.0) -> RowSums:
    """The log-sums of `softmax_parts` alone."""
    return _exponentials(logits, labels, temperature)[0]


def softmax_parts(
    logits: Tensor, labels: Labels, temperature: float = 1.0
) -> tuple[RowSums, Tensor]:
    """Log-sums of exponentials of each row, and the non-target softmax at a temperature, [B, C].

    The labeled entries are left out, so that a target that is nearly certain does not blot the
    others out. Rows of the softmax sum to 1, or are 0 where no class is left.
    """
    sums, others, total = _exponentials(logits, labels, temperature)
    return sums, others / total


def _exponentials(
    logits: Tensor, labels: Labels, temperature: float
) -> tuple[RowSums, Tensor, Tensor]:
    """The log-sums, the softmax before it is divided by its sum, and that sum.

    Works in place on one [B, C] buffer (two besides temperature 1).
    """
    others = removed(logits, labels)
    top = others.detach().amax(1, keepdim=True)
    # A single label leaves another class in every row.
    empty = None if labels.single() else top == -torch.inf
    if empty is not None:
        top = top.masked_fill(empty, 0.0)
    others = others.sub_(top)

    def total(exponentials: Tensor) -> Tensor:
        found = exponentials.sum(1, keepdim=True)
        # Not clamp(min=1), which takes the gradient of a sum that is 1.
        return found if empty is None else found.masked_fill(empty, 1.0)

    if temperature == 1:
        others = others.exp_()
        rest = of_scaled = total(others)
    else:
        rest = total(others.exp())
        others = others.div_(temperature).exp_()
        of_scaled = total(others)
    scaled = of_scaled.log()
    rest = (scaled if temperature == 1 else rest.log()) + top
    if empty is not None:
        rest = rest.masked_fill(empty, -torch.inf)
    return RowSums(top, rest, scaled), others, of_scaled


def log_total(logits: Tensor, labels: Labels, rest: Tensor) -> Tensor:
    """Log-sum of exponentials over all classes, [B, 1], from that over the non-target ones."""
    labeled = logits.gather(1, labels.classes)
    if labels.single():
        return torch.logaddexp(rest, labeled)
    labeled = labels.masked(labeled, -torch.inf).logsumexp(1, keepdim=True)
    # The second gradient of logaddexp at -inf is NaN.
    empty = rest == -torch.inf
    return torch.where(empty, labeled, torch.logaddexp(rest.masked_fill(empty, 0.0), labeled))


def labeled_probabilities(logits: Tensor, labels: Labels, rest: Tensor) -> Tensor:
    """The softmax at the labeled classes, [B, K], 0 where absent; `rest` as of `row_sums`."""
    labeled = logits.gather(1, labels.classes)
    if labels.single():
        return (labeled - rest).sigmoid()
    return labels.masked((labeled - log_total(logits, labels, rest)).exp())


def non_target_weights(weights: Tensor, labels: Labels) -> Tensor:
    """Non-negative weights [B, C], without gradient, as a distribution over non-target classes.

    Rows sum to 1, or are 0 where all weights are.
    """
    kept = removed(weights, labels, 0.0)
    tiny = torch.finfo(kept.dtype).tiny
    return kept.div_(kept.sum(1, keepdim=True).clamp(min=tiny))


def column_means(values: Tensor, labels: Labels, *, sync: bool = False) -> Tensor:
    """Mean of [B, K] values over the rows that have the column and are kept, [K]; no gradient.

    `sync` takes sums and counts over all processes of the default group.
    """
    values = values.detach()
    sync = sync and torch.distributed.is_available() and torch.distributed.is_initialized()
    if labels.single() and labels.kept is None and not sync:
        return values.mean(0)
    counted = labels.present()
    if labels.kept is not None:
        counted = counted & labels.kept.unsqueeze(1)
    sums = torch.stack((torch.where(counted, values, 0.0), counted.to(values.dtype))).sum(1)
    if sync:
        torch.distributed.all_reduce(sums)
    return sums[0] / sums[1].clamp(min=1.0)


def reduce_terms(
    terms: Mapping[str, Tensor], reduction: Reduction, kept: Tensor | None = None
) -> dict[str, Tensor]:
    """Reduce each term over the samples of a batch.

    Args:
        terms: The weighted summands of a loss, [B] or scalar.
        reduction: `"mean"` over the kept samples (0 if there is none), `"sum"`, or `"none"`.
        kept: [B] boolean; samples that are not kept count nothing. None keeps all.
    """
    if kept is not None:
        terms = {name: torch.where(kept, term, 0.0) for name, term in terms.items()}
    if reduction == "none":
        return dict(terms)
    if reduction == "sum":
        return {name: term.sum() for name, term in terms.items()}
    if kept is None:
        return {name: term.mean() for name, term in terms.items()}
    count = kept.sum().clamp(min=1)
    return {name: term.sum() / count for name, term in terms.items()}


def total_of(terms: Mapping[str, Tensor]) -> Tensor:
    """The sum of all terms, in their order."""
    first, *others = terms.values()
    for term in others:
        first = first + term
    return first
