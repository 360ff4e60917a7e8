"""USKD, universal self-knowledge distillation: soft labels that the network itself makes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

from softlabels.inputs import Input, Logits, Target, TeacherLogits, WeakLogits
from softlabels.losses._checks import (
    check_choice,
    check_flag,
    check_ignore_index,
    check_logits,
    check_number,
    check_target,
    check_two_labels,
    fully_labeled_row,
)
from softlabels.losses._method import Method, Weight
from softlabels.losses._non_target import (
    Labels,
    Reduction,
    SoftLabels,
    column_means,
    finite_limit,
    in_float32,
    label_columns,
    labeled_probabilities,
    log_total,
    non_target_weights,
    reduce_terms,
    row_sums,
    spread,
    total_of,
    without_ignored,
)
from softlabels.losses._ranks import zipf_by_order
from softlabels.losses._soft_cross_entropy import (
    log_non_target_mass,
    soft_cross_entropy,
    soft_cross_entropy_terms,
)
from softlabels.losses.nkd import TargetTerm

__all__ = [
    "RankBy",
    "TargetFrom",
    "USKDLoss",
    "USKDRankFrom",
    "target_labels",
    "uskd_loss",
    "uskd_targets",
]

RankBy: TypeAlias = Literal["probability", "log_probability"]
USKDRankFrom: TypeAlias = Literal["both", "both_unnormalized", "weak", "final"]
TargetFrom: TypeAlias = Literal["self", "teacher"]

_RANKS_BY = ("probability", "log_probability")
_RANKS_FROM = ("both", "both_unnormalized", "weak", "final")

_SMOOTHING = 0.1  # of the weak head's labels, fixed in equation 9
_EPSILON = 1e-6  # in both rank denominators, as in the official code
_LOG_EPSILON = math.log(_EPSILON)


class _Inputs(NamedTuple):
    """What the soft labels are made from, checked, without gradient, at least float32."""

    logits: Tensor  # [B, C]
    weak_logits: Tensor | None  # [B, C]
    teacher_logits: Tensor | None  # [B, C]
    labels: Labels


def _inputs(
    logits: Tensor,
    weak_logits: Tensor | None,
    target: Tensor,
    teacher_logits: Tensor | None,
    kept: Tensor | None,
) -> _Inputs:
    check_logits(logits)
    if weak_logits is not None:
        check_logits(weak_logits, "weak_logits", like=logits)
    if teacher_logits is not None:
        check_logits(teacher_logits, "teacher_logits", like=logits)
    check_target(target, logits)
    check_two_labels(target)
    logits = in_float32(logits.detach())

    def alike(other: Tensor | None) -> Tensor | None:
        return None if other is None else in_float32(other.detach()).to(logits.dtype)

    labels = label_columns(target, logits, "two")._replace(kept=kept)
    return _Inputs(logits, alike(weak_logits), alike(teacher_logits), labels)


class _Making(NamedTuple):
    """How the soft labels are made; settings of `uskd_targets`."""

    squared: bool
    rank_from: USKDRankFrom
    rank_by: RankBy
    sync_batch_stats: bool

    def checked(self) -> _Making:
        """Itself; TypeError or ValueError where a setting makes no sense."""
        check_flag("squared", self.squared)
        check_choice("rank_from", self.rank_from, _RANKS_FROM)
        check_choice("rank_by", self.rank_by, _RANKS_BY)
        check_flag("sync_batch_stats", self.sync_batch_stats)
        return self


def _target_values(inputs: _Inputs, rest: Tensor, making: _Making) -> Tensor:
    """Equation 6 at the labeled classes, [B, K]; 0 where absent. With a teacher its T_t."""
    labels = inputs.labels
    if inputs.teacher_logits is not None:
        rest = row_sums(inputs.teacher_logits, labels).rest
        return labeled_probabilities(inputs.teacher_logits, labels, rest)
    values = labeled_probabilities(inputs.logits, labels, rest)
    values = values.square() if making.squared else values
    values = values + labels.values - column_means(values, labels, sync=making.sync_batch_stats)
    return labels.masked(values)


def _share_of_rest(logits: Tensor, labels: Labels, rest: Tensor) -> Tensor:
    """One fraction of equation 10, [B, C]: probabilities over their non-target mass + epsilon.

    Both log-sums are made from the small side: 1 - S_t is 0 in float32 where S_t is nearly 1.
    """
    of_epsilon = log_total(logits, labels, rest) + _LOG_EPSILON
    return (logits - torch.logaddexp(rest, of_epsilon)).exp_()


def _zipf(inputs: _Inputs, rest: Tensor, making: _Making) -> Tensor:
    """Zipf's law over what the classes are ranked by, [B, C]."""
    logits, weak_logits, labels = inputs.logits, inputs.weak_logits, inputs.labels
    rank_from, rank_by = making.rank_from, making.rank_by
    if rank_from == "final":  # the order of the logits is that of their softmax
        return zipf_by_order(logits)
    if weak_logits is None:
        raise ValueError(f"rank_from={rank_from!r} ranks by weak_logits, got None")
    if rank_from == "weak":
        return zipf_by_order(weak_logits)
    signed = rank_by == "log_probability"
    if rank_from == "both" and not signed:
        final = _share_of_rest(logits, labels, rest)
    else:
        final = logits - log_total(logits, labels, rest)
        final = final if signed else final.exp_()
    if rank_from == "both_unnormalized":
        return zipf_by_order(final.add_(weak_logits.softmax(1)), signed)
    if signed:
        labeled = labels.masked(final.gather(1, labels.classes)).sum(1, keepdim=True)
        final = final.div_(1 - labeled + _EPSILON)
    of_weak = _share_of_rest(weak_logits, labels, row_sums(weak_logits, labels).rest)
    return zipf_by_order(final.add_(of_weak), signed)


def uskd_targets(
    logits: Tensor,
    weak_logits: Tensor | None,
    target: Tensor,
    teacher_logits: Tensor | None = None,
    *,
    squared: bool = True,
    rank_from: USKDRankFrom = "both",
    rank_by: RankBy = "probability",
    sync_batch_stats: bool = False,
    ignore_index: int | None = None,
) -> SoftLabels:
    r"""USKD's customized soft labels, without gradient.

    Yang et al., ICCV 2023 (arXiv 2303.13005), equations 6, 10, 11; official code
    yzd-v/cls_KD.

    .. math::
        P_t &= S_t^2 + V_t - \text{mean}_B(S_t^2) \\
        R_i &= W_i / (1 - W_t) + S_i / (1 - S_t) \\
        Z_i &= 1 / \text{rank}(R_i), \quad \text{renormalized over } i \ne t

    The rank runs over all classes, the labeled ones included, which are removed afterwards
    (as in the official code). Equal scores rank the lower class first.

    Args:
        logits: [B, C], raw logits of the network (softmax S).
        weak_logits: [B, C], raw logits of the weak head (softmax W); None only with
            `rank_from="final"`.
        target: [B] class indices, or [B, C] probabilities V with one or two labeled classes.
            P_t is taken per label column (major, minor), each with the mean over the rows that
            have this column.
        teacher_logits: [B, C], raw logits of a trained teacher (softmax T), or None. With them
            P_t is T_t (the last row of the paper's table 8).
        squared: False takes S_t in place of its square (table 12; tf-NKD).
        rank_from: `"both"`: equation 10. The paper's table 9 has the others:
            `"both_unnormalized"`: W + S; `"weak"`: W; `"final"`: S.
        rank_by: `"probability"`: equation 10. `"log_probability"`: the later reference code,
            which ranks with log S_i / (1 - log S_t) in place of the second fraction (and with
            log S in place of S, unnormalized).
        sync_batch_stats: Take the mean over the batches of all processes of torch's default
            group, which must all call this; False: over this process' batch, as in the
            paper's runs.
        ignore_index: Samples with this class index are left out of the mean; their rows here
            mean nothing. For [B] labels.

    Returns:
        `SoftLabels(target, non_target)`, both [B, C]: P_t at labeled classes (it may exceed 1
        or be negative), and N(Z) over the others.

    Raises:
        TypeError: Logits or target of a wrong dtype.
        ValueError: A wrong shape, label or setting; more than two labeled classes in a row
            (pass unsmoothed labels).

    Distributed: see `sync_batch_stats`.

    Example:
        >>> import torch
        >>> logits = torch.tensor([[2.0, 1.0, 0.5], [0.2, 1.5, 0.7]])
        >>> uskd_targets(logits, torch.zeros(2, 3), torch.tensor([0, 1])).non_target
        tensor([[0.0000, 0.6000, 0.4000],
                [0.4000, 0.0000, 0.6000]])
    """
    making = _Making(squared, rank_from, rank_by, sync_batch_stats).checked()
    check_ignore_index(ignore_index)
    target, kept = without_ignored(target, ignore_index)
    inputs = _inputs(logits, weak_logits, target, teacher_logits, kept)
    soft = _soft(inputs, making)
    return SoftLabels(spread(inputs.labels, soft.target, inputs.logits), soft.non_target)


def target_labels(
    logits: Tensor, target: Tensor, *, squared: bool, sync_batch_stats: bool, kept: Tensor | None
) -> tuple[Labels, Tensor]:
    """The labeled classes, and P_t of equation 6 at them, [B, K], without gradient."""
    inputs = _inputs(logits, None, target, None, kept)
    rest = row_sums(inputs.logits, inputs.labels).rest
    making = _Making(squared, "final", "probability", sync_batch_stats)
    return inputs.labels, _target_values(inputs, rest, making)


def uskd_loss(
    logits: Tensor,
    weak_logits: Tensor | None,
    target: Tensor,
    teacher_logits: Tensor | None = None,
    *,
    target_weight: float = 1.0,
    non_target_weight: float = 0.1,
    weak_weight: float = 0.005,
    target_term: TargetTerm = "T1",
    squared: bool = True,
    rank_from: USKDRankFrom = "both",
    rank_by: RankBy = "probability",
    sync_batch_stats: bool = False,
    ignore_index: int | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""USKD: the network learns from soft labels that it makes itself; no teacher.

    Yang et al., "From Knowledge Distillation to Self-Knowledge Distillation", ICCV 2023
    (arXiv 2303.13005), equations 6-13; official code yzd-v/cls_KD (its later rank is
    `rank_by="log_probability"`). Differs from that code in one edge case: a row of mixed
    labels with a single labeled class has no second column here, while there an arbitrary
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
    N(.)      renormalized over the classes without a label
    alpha     `target_weight`
    beta      `non_target_weight`
    mu        `weak_weight`
    ========  ==================================================================

    It is *added* to the task's own loss (cross-entropy), with weight 1. Its ancestor tf-NKD
    (arXiv 2208.10139) is `squared=False, non_target_weight=0, weak_weight=0`.

    Args:
        logits: [B, C], raw logits. Gets the gradient of the first two terms.
        weak_logits: [B, C], raw logits of a linear head on a middle feature. Gets the gradient
            of the last term, which reaches the network up to that feature. None only if no
            term needs it: `weak_weight=0`, and `non_target_weight=0` or `rank_from="final"`.
        target: [B] class indices, or [B, C] probabilities with one or two labeled classes,
            never smoothed.
        target_weight: alpha, 0 or more. 1 on ImageNet, 0.1 on CIFAR-100.
        non_target_weight: beta, 0 or more. 0.1.
        weak_weight: mu, 0 or more. 0.005 on ImageNet, 0.1 on CIFAR-100.
        teacher_logits: [B, C] or None; a trained teacher for P_t, see `uskd_targets`.
        target_term: `"T1"`: the first term above. `"T2"`: :math:`-(1 - P_t) \log(1 - S_t)` in
            its place, `"both"`: their sum (the paper's table 15).
        squared: See `uskd_targets`, as for the next four.
        rank_from: `"both"`, `"both_unnormalized"`, `"weak"` or `"final"`.
        rank_by: `"probability"` (the paper) or `"log_probability"` (later reference code).
        sync_batch_stats: Whether the mean in P_t runs over all processes.
        ignore_index: Samples with this class index count nothing, also in the mean over B;
            without any other sample the loss is 0.
        reduction: `"mean"` over B, `"sum"`, or `"none"`.

    Returns:
        A scalar, or [B] for `"none"`; in nats, at least float32.

    Raises:
        TypeError: Logits or target of a wrong dtype.
        ValueError: A wrong shape, label, setting or reduction; more than two labeled classes
            in a row; T2 where every class has a label.

    Numerics: computed in float32 or wider, also under autocast; no host synchronization.
    Distributed: P_t holds a mean over the batch; see `sync_batch_stats`.

    Example:
        >>> import torch
        >>> logits = torch.tensor([[2.0, 1.0, 0.5, -1.0, 0.0]])
        >>> uskd_loss(logits, torch.zeros(1, 5), torch.tensor([0]))
        tensor(0.7208)
    """
    check_number("target_weight", target_weight)
    check_number("non_target_weight", non_target_weight)
    check_number("weak_weight", weak_weight)
    making = _Making(squared, rank_from, rank_by, sync_batch_stats).checked()
    check_ignore_index(ignore_index)
    check_choice("target_term", target_term, ("T1", "T2", "both"))
    check_choice("reduction", reduction, ("mean", "sum", "none"))
    target, kept = without_ignored(target, ignore_index)
    inputs = _inputs(logits, weak_logits, target, teacher_logits, kept)
    if target_term != "T1":
        _check_others(target)
    weights = target_weight, non_target_weight, weak_weight
    fused = target_term == "T1"
    terms = _terms(logits, weak_logits, inputs, making, weights, target_term, fused=fused)
    return reduce_terms({"loss": total_of(terms)}, reduction, kept)["loss"]


class _Soft(NamedTuple):
    """The soft labels, and what the loss needs beside them."""

    target: Tensor  # [B, K], P_t at the labeled classes
    non_target: Tensor  # [B, C], N(Z) over the others
    rest: Tensor  # [B, 1], log-sum of the others


def _soft(inputs: _Inputs, making: _Making, with_ranks: bool = True) -> _Soft:
    """Make the soft labels; without ranks the non-target part is 0."""
    rest = row_sums(inputs.logits, inputs.labels).rest
    values = _target_values(inputs, rest, making)
    if with_ranks:
        others = non_target_weights(_zipf(inputs, rest, making), inputs.labels)
    else:
        others = torch.zeros_like(rest).expand_as(inputs.logits)
    return _Soft(values, others, rest)


def _terms(
    logits: Tensor,
    weak_logits: Tensor | None,
    inputs: _Inputs,
    making: _Making,
    weights: tuple[float, float, float],
    target_term: TargetTerm,
    *,
    fused: bool,
) -> dict[str, Tensor]:
    """The summands, [B] each; `fused`: target and non-target term as one, in closed form."""
    logits, labels = in_float32(logits), inputs.labels
    of_target, of_others, of_weak = weights
    soft = _soft(inputs, making, with_ranks=of_others != 0)
    terms: dict[str, Tensor] = {}
    if fused:
        terms["loss"] = soft_cross_entropy(
            logits, labels, soft.target, soft.non_target, 1.0, (of_target, of_others), soft.rest
        )
    else:
        pair = soft_cross_entropy_terms(logits, labels, soft.target, soft.non_target)
        if target_term != "T2":
            terms["target"] = of_target * pair.target
        if target_term != "T1":
            rest = (soft.target.sum(1) - 1) * log_non_target_mass(logits, labels)
            terms["rest"] = of_target * rest
        terms["non_target"] = of_others * pair.non_target
    return {**terms, **_weak_terms(weak_logits, labels, of_weak, logits.dtype)}


def _weak_terms(
    weak_logits: Tensor | None, labels: Labels, weight: float, dtype: torch.dtype
) -> dict[str, Tensor]:
    """The weak head's own loss, by its name: equation 9, cross-entropy with smoothed labels.

    Also with a weight of 0: a head that only ranks then has a gradient, of zeros, as DDP wants.
    """
    if weak_logits is None:
        if not weight:
            return {}
        raise ValueError("weak_weight is not 0, so weak_logits are needed, got None")
    log_probabilities = in_float32(weak_logits).to(dtype).log_softmax(1)
    num_classes = weak_logits.shape[1]
    # threshold is clamp(min=...), whose gradient is three operations.
    lowest, lowest_sum = -finite_limit(dtype), -finite_limit(dtype) * num_classes
    labeled = functional.threshold(log_probabilities.gather(1, labels.classes), lowest, lowest)
    of_all = functional.threshold(log_probabilities.sum(1), lowest_sum, lowest_sum)
    of_labels = labels.weighted_sum(labeled) * (-weight * (1 - _SMOOTHING))
    return {"weak": torch.add(of_labels, of_all, alpha=-weight * _SMOOTHING / num_classes)}


def _check_others(target: Tensor) -> None:
    """Raise ValueError if a row of [B, C] labels leaves no other class, where T2 is log 0."""
    row = fully_labeled_row(target)
    if row is not None:
        raise ValueError(
            f"target_term T2 is undefined for row {row} of target: every class has a label, so "
            "that 1 - S_t is 0 and its logarithm does not exist"
        )


class USKDLoss(Method, name="uskd"):
    """USKD as a method; see `uskd_loss` for the equation and the settings.

    Args:
        target_weight: Weight of the target term; 0 or more.
        non_target_weight: Weight of the non-target term; 0 or more.
        weak_weight: Weight of the weak head's own loss; 0 or more.
        target_term: `"T1"` (the method itself), `"T2"` or `"both"`.
        target_from: `"self"` (the method itself), or `"teacher"`: its T_t is the target label.
        squared: Whether the target label holds S_t squared (the method itself) or S_t.
        rank_from: `"both"` (the method itself), `"both_unnormalized"`, `"weak"` or `"final"`.
        rank_by: `"probability"` (the paper) or `"log_probability"` (later reference code).
        sync_batch_stats: Whether the mean in the target label runs over all processes.

    Distributed: the target label holds a mean over the batch; see `sync_batch_stats`.
    """

    target_weight: Weight = 1.0
    non_target_weight: Weight = 0.1
    weak_weight: Weight = 0.005
    target_term: TargetTerm = "T1"
    target_from: TargetFrom = "self"
    squared: bool = True
    rank_from: USKDRankFrom = "both"
    rank_by: RankBy = "probability"
    sync_batch_stats: bool = False

    @property
    def inputs(self) -> Mapping[str, Input]:
        """What these settings need: no weak head if no term uses it."""
        inputs: dict[str, Input] = {"logits": Logits(), "target": Target()}
        if self.weak_weight or (self.non_target_weight and self.rank_from != "final"):
            inputs["weak_logits"] = WeakLogits(tap="middle")
        if self.target_from == "teacher":
            inputs["teacher_logits"] = TeacherLogits()
        return inputs

    def terms(
        self,
        logits: Tensor,
        weak_logits: Tensor | None = None,
        target: Tensor | None = None,
        teacher_logits: Tensor | None = None,
        *,
        kept: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """`"target"` (T1), `"rest"` (T2), `"non_target"` and `"weak"`, weighted.

        `weak_logits` may be left out where `inputs` does without them; `target` may not.
        """
        return self._terms(logits, weak_logits, target, teacher_logits, kept=kept, fused=False)

    def fused(self, **inputs: Any) -> Tensor | None:
        """The sum of the terms; None where it is not USKD's own."""
        return total_of(self._terms(**inputs, fused=True)) if self.target_term == "T1" else None

    def _terms(
        self,
        logits: Tensor,
        weak_logits: Tensor | None = None,
        target: Tensor | None = None,
        teacher_logits: Tensor | None = None,
        *,
        kept: Tensor | None,
        fused: bool,
    ) -> dict[str, Tensor]:
        inputs = self._checked(logits, weak_logits, target, teacher_logits, kept)
        making = _Making(self.squared, self.rank_from, self.rank_by, self.sync_batch_stats)
        weights = self.target_weight, self.non_target_weight, self.weak_weight
        return _terms(logits, weak_logits, inputs, making, weights, self.target_term, fused=fused)

    def _checked(
        self,
        logits: Tensor,
        weak_logits: Tensor | None,
        target: Tensor | None,
        teacher_logits: Tensor | None,
        kept: Tensor | None = None,
    ) -> _Inputs:
        if target is None:
            raise TypeError("target must be a tensor, got None")
        if (teacher_logits is None) == (self.target_from == "teacher"):
            got = "none" if teacher_logits is None else "some"
            raise ValueError(
                f"target_from={self.target_from!r} decides whether teacher_logits are read, "
                f"got {got}"
            )
        if self.target_term != "T1":
            _check_others(target)
        return _inputs(logits, weak_logits, target, teacher_logits, kept)

    def soft_labels(
        self,
        logits: Tensor,
        weak_logits: Tensor | None = None,
        target: Tensor | None = None,
        teacher_logits: Tensor | None = None,
    ) -> SoftLabels:
        """A value from the network's own confidence, and Zipf's law over its own ranking.

        `weak_logits` may be left out, as in a call: the ranking is that of `logits` then.

        Raises:
            TypeError: No target.
            ValueError: As a call.
        """
        kept = None
        if target is not None:
            target, kept = without_ignored(target, self.ignore_index)
        inputs = self._checked(logits, weak_logits, target, teacher_logits, kept)
        # Never synchronized: a gallery is drawn on one process alone.
        rank_from: USKDRankFrom = "final" if weak_logits is None else self.rank_from
        soft = _soft(inputs, _Making(self.squared, rank_from, self.rank_by, False))
        return SoftLabels(spread(inputs.labels, soft.target, inputs.logits), soft.non_target)
