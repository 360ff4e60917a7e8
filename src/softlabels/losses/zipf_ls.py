"""Zipf's LS, Zipf's label smoothing: dense votes rank the wrong classes, a law weighs the ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal, TypeAlias

import torch
from torch import Tensor

from softlabels.inputs import AuxLogits, Input, Logits, Target, Votes
from softlabels.losses._checks import (
    check_choice,
    check_flag,
    check_ignore_index,
    check_logits,
    check_number,
    check_target,
    check_votes,
)
from softlabels.losses._method import Count, Defaults, Method, Positive, Range, Share, Weight
from softlabels.losses._non_target import (
    Labels,
    MixedTarget,
    Reduction,
    SoftLabels,
    checked_columns,
    in_float32,
    label_columns,
    largest_label,
    reduce_terms,
    spread,
    total_of,
    without_ignored,
)
from softlabels.losses._ranks import DISTRIBUTIONS, Distribution, Law, over_ranks
from softlabels.losses._soft_cross_entropy import soft_cross_entropy
from softlabels.losses._soft_target import label_cross_entropy

__all__ = ["Distribution", "RankFrom", "ZipfLSLoss", "zipf_ls_loss", "zipf_ls_targets"]

RankFrom: TypeAlias = Literal["votes", "logits"]


def zipf_ls_targets(
    logits: Tensor,
    target: Tensor,
    votes: Tensor | None = None,
    *,
    power: float = 1.0,
    distribution: Distribution = "zipf",
    smallest_probability: float = 1e-6,
    decay: float = 1.0,
    lower_bound: float = 0.001,
    upper_bound: float = 1.0,
    mixed_target: MixedTarget = "largest",
    ignore_index: int | None = None,
) -> Tensor:
    r"""Zipf's LS soft labels over the non-target classes, without gradient.

    Liang et al., "Efficient One Pass Self-distillation with Zipf's Label Smoothing",
    ECCV 2022 (arXiv 2207.12980); official code megvii-research/zipfls (PyTorch half).

    All classes are ranked, by their number of votes or by the sample's own logits; ties share
    the smallest rank (counts 5, 3, 1, 0, 0 give 1, 2, 3, 4, 4). Then
    :math:`q_i \propto \text{rank}_i^{-p}` for :math:`i \ne t`.

    The other distributions of that code, by the rank r, its n tied classes, and C:

    =====================  ==========================================================
    `distribution`         weight, before normalization
    =====================  ==========================================================
    `"constant"`           1
    `"random_uniform"`     a uniform draw in [0, 1)
    `"random_gaussian"`    the size of a standard normal draw
    `"random_pareto"`      a Lomax draw of shape 1
    `"sorted_pareto"`      the r-th largest of C such draws (there: in an order that
                           does not follow the ranks)
    `"linear_decay"`       (C - r) 2 (1 - C s) / (C (C - 1)) + s
    `"exponential_decay"`  exp(-d (r - 1))
    `"unbiased_zipf"`      the mean over the n tied classes of the integral of x^-p
                           over their cells, C of which divide [lower, upper]
    =====================  ==========================================================

    Draws come from torch's default generator, new ones at each call.

    Args:
        logits: [B, C], raw logits; they rank the classes if `votes` is None.
        target: [B] class indices, or [B, C] probabilities.
        votes: [B, K] class indices, one for each position of the last map; or None.
        power: p, in [0, 30]; 1 is Zipf's law. Of `"zipf"` and `"unbiased_zipf"`.
        distribution: `"zipf"`, or one of the table above.
        smallest_probability: s of `"linear_decay"`, at most 1 / C.
        decay: d of `"exponential_decay"`, in [0, 30].
        lower_bound: Of `"unbiased_zipf"`, above 0.
        upper_bound: Of `"unbiased_zipf"`, above `lower_bound`.
        mixed_target: For [B, C] labels: `"largest"` removes the class with the largest label
            (ties: the lower class), `"all"` removes every labeled class.
        ignore_index: A class index that may stand in [B] labels; such rows mean nothing here.

    Returns:
        [B, C], each row sums to 1, 0 at removed classes.

    Raises:
        TypeError: Logits, target or votes of a wrong dtype.
        ValueError: A wrong shape, label, vote or setting; with `mixed_target="all"`, a label
            for every one of more than two classes.

    Example:
        >>> import torch
        >>> votes = torch.tensor([[0, 0, 1, 1, 2, 0, 0, 1, 0]])
        >>> zipf_ls_targets(torch.zeros(1, 5), torch.tensor([0]), votes)
        tensor([[0.0000, 0.3750, 0.2500, 0.1875, 0.1875]])
    """
    check_logits(logits)
    check_ignore_index(ignore_index)
    target = without_ignored(target, ignore_index)[0]
    check_target(target, logits)
    check_choice("mixed_target", mixed_target, ("largest", "all"))
    law = _checked(Law(distribution, power, smallest_probability, decay, lower_bound, upper_bound))
    logits = in_float32(logits.detach())
    labels = checked_columns(target, logits, mixed_target)
    return _soft_labels(logits, votes, labels, law)


def _checked(law: Law) -> Law:
    """The law itself; ValueError or TypeError where it makes no sense."""
    check_choice("distribution", law.distribution, DISTRIBUTIONS)
    check_number("power", law.power, at_most=30)
    check_number("smallest_probability", law.smallest_probability, at_most=1)
    check_number("decay", law.decay, at_most=30)
    check_number("lower_bound", law.lower_bound, positive=True)
    check_number("upper_bound", law.upper_bound, positive=True)
    if law.upper_bound <= law.lower_bound:
        raise ValueError(
            f"upper_bound must be above lower_bound {law.lower_bound}, got {law.upper_bound}"
        )
    return law


def _soft_labels(logits: Tensor, votes: Tensor | None, labels: Labels, law: Law) -> Tensor:
    """The law over the ranks of the non-target classes, [B, C]."""
    num_classes = logits.shape[1]
    if law.distribution == "linear_decay" and law.smallest_probability * num_classes > 1:
        raise ValueError(
            f"smallest_probability must be at most 1 / {num_classes} for as many classes, "
            f"got {law.smallest_probability}"
        )
    if votes is not None:
        check_votes(votes, logits)
    return over_ranks(logits, votes, labels, law)


def zipf_ls_loss(
    logits: Tensor,
    target: Tensor,
    votes: Tensor | None = None,
    exit_logits: Sequence[Tensor] = (),
    *,
    power: float = 1.0,
    distribution: Distribution = "zipf",
    smallest_probability: float = 1e-6,
    decay: float = 1.0,
    lower_bound: float = 0.001,
    upper_bound: float = 1.0,
    mixed_target: MixedTarget = "largest",
    correct_only: bool = False,
    exit_weight: float = 0.0,
    ignore_index: int | None = None,
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

    The MegEngine half of that code also trains classifiers at inner stages: their votes join
    `votes`, and :math:`\text{exit\_weight} \cdot \sum_k CE(\text{exit}_k)` is added here.
    There that term is not multiplied by lambda; here all of the method is, so that its alpha
    (0.1 on CIFAR-100, 0.5 on TinyImageNet) is `method_weight * exit_weight`.

    Args:
        logits: [B, C], raw logits. Gets the gradient.
        target: [B] class indices, or [B, C] probabilities (mixup, cutmix).
        votes: [B, K] class indices, or None to rank by the sample's own logits.
        exit_logits: [B, C] each, raw logits of classifiers at inner stages. Get the gradient of
            their own cross-entropy.
        power: Exponent of the law, in [0, 30].
        distribution: `"zipf"`, or another of `zipf_ls_targets`, as for the next five.
        smallest_probability: Of `"linear_decay"`.
        decay: Of `"exponential_decay"`.
        lower_bound: Of `"unbiased_zipf"`.
        upper_bound: Of `"unbiased_zipf"`.
        mixed_target: `"largest"` or `"all"`.
        correct_only: Only samples whose largest logit is that of their (largest) label count,
            also in the mean; without any, the term is 0.
        exit_weight: Weight of the cross-entropy of each of `exit_logits`; 0 or more.
        ignore_index: Samples with this class index count nothing, also in the mean over B;
            without any other sample the loss is 0. For [B] labels.
        reduction: `"mean"` over B, `"sum"`, or `"none"`.

    Returns:
        A scalar, or [B] for `"none"`; in nats, at least float32.

    Raises:
        TypeError: Logits, target or votes of a wrong dtype.
        ValueError: A wrong shape, label, vote, setting or reduction.

    Numerics: computed in float32 or wider, also under autocast; no host synchronization.
    Distributed: each sample by itself, no batch statistics.

    Example:
        >>> import torch
        >>> zipf_ls_loss(torch.tensor([[2.0, 1.0, 0.5, -1.0, 0.0]]), torch.tensor([0]))
        tensor(0.0572)
    """
    check_ignore_index(ignore_index)
    check_flag("correct_only", correct_only)
    check_number("exit_weight", exit_weight)
    check_choice("mixed_target", mixed_target, ("largest", "all"))
    check_choice("reduction", reduction, ("mean", "sum", "none"))
    law = _checked(Law(distribution, power, smallest_probability, decay, lower_bound, upper_bound))
    target, kept = without_ignored(target, ignore_index)
    settings = mixed_target, exit_weight, correct_only, reduction
    terms = _terms(logits, target, votes, exit_logits, law, *settings, kept)
    return reduce_terms({"loss": total_of(terms)}, reduction, kept)["loss"]


def _terms(
    logits: Tensor,
    target: Tensor,
    votes: Tensor | None,
    exit_logits: Sequence[Tensor],
    law: Law,
    mixed_target: MixedTarget,
    exit_weight: float,
    correct_only: bool,
    reduction: Reduction,
    kept: Tensor | None,
) -> dict[str, Tensor]:
    """The summands, [B] each."""
    check_logits(logits)
    check_target(target, logits)
    logits = in_float32(logits)
    labels = checked_columns(target, logits, mixed_target)
    soft = _soft_labels(logits.detach(), votes, labels, law)
    # Temperature and weights as constants: dynamic compiled code takes a default for an input.
    cross_entropy = soft_cross_entropy(logits, labels, None, soft, 1.0, (1.0, 1.0))
    terms = {"non_target": cross_entropy + torch.xlogy(soft, soft).sum(1)}
    if correct_only:
        correct = logits.detach().argmax(1) == largest_label(target)
        correct = correct if kept is None else correct & kept
        terms["non_target"] = _of_correct(terms["non_target"], correct, kept, reduction)
    if exit_logits:
        labels = label_columns(target, logits)
        exits = {}
        for number, own in enumerate(exit_logits):
            name = f"exit_logits[{number}]"
            check_logits(own, name, like=logits)
            exits[name] = label_cross_entropy(in_float32(own).to(logits.dtype), labels)
        terms["exits"] = exit_weight * total_of(exits)
    return terms


def _of_correct(term: Tensor, correct: Tensor, kept: Tensor | None, reduction: Reduction) -> Tensor:
    """A term of the correct samples alone, such that its mean over B is the mean over them."""
    term = torch.where(correct, term, 0.0)
    if reduction != "mean":
        return term
    count = len(term) if kept is None else kept.sum().clamp(min=1)
    return term * count / correct.sum().clamp(min=1)


class ZipfLSLoss(Method, name="zipf_ls"):
    """Zipf's LS as a method; see `zipf_ls_loss` for the equation.

    Args:
        power: Exponent of the law, in [0, 30].
        distribution: `"zipf"` (the method itself), or another law of `zipf_ls_targets`:
            `"constant"`, `"random_uniform"`, `"random_gaussian"`, `"random_pareto"`,
            `"sorted_pareto"`, `"linear_decay"`, `"exponential_decay"`, `"unbiased_zipf"`.
        smallest_probability: Of `"linear_decay"`; at most 1 / classes.
        decay: Of `"exponential_decay"`; in [0, 30].
        lower_bound: Of `"unbiased_zipf"`; above 0.
        upper_bound: Of `"unbiased_zipf"`; above `lower_bound`.
        rank_from: `"votes"`: the head's prediction at every position of the last map;
            `"logits"`: the sample's own logits.
        vote_upsample: Factor by which the last map is enlarged before voting; 2 in the
            paper's CIFAR-100 ResNet-18 runs.
        vote_interpolation: `"bilinear"` or `"bicubic"`, how it is enlarged.
        exit_taps: Places in the network (`"middle"` or dotted paths) that get linear heads of
            their own, whose votes count too, as in the reference's MegEngine half.
        exit_weight: Weight of the cross-entropy of each such head.
        mixed_target: `"largest"` or `"all"`, for mixed labels.
        correct_only: Whether only samples that are predicted correctly count.
    """

    power: Annotated[float, Range(at_most=30)] = 1.0
    distribution: Distribution = "zipf"
    smallest_probability: Share = 1e-6
    decay: Annotated[float, Range(at_most=30)] = 1.0
    lower_bound: Positive = 0.001
    upper_bound: Positive = 1.0
    rank_from: RankFrom = "votes"
    vote_upsample: Count = 1
    vote_interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    exit_taps: tuple[str, ...] = ()
    exit_weight: Weight = 0.0
    mixed_target: MixedTarget = "largest"
    correct_only: bool = False

    defaults = Defaults(weight=0.1)

    def check_settings(self) -> None:
        """Raise ValueError where settings do not fit each other."""
        _checked(self._law())
        if self.exit_taps and self.rank_from != "votes":
            raise ValueError("exit_taps need rank_from='votes', got rank_from='logits'")
        if self.exit_taps and self.exit_weight == 0:
            raise ValueError(
                "exit_weight must be above 0 with exit_taps, got 0: nothing else trains their "
                "heads, and untrained ones would vote at random"
            )

    @property
    def inputs(self) -> Mapping[str, Input]:
        """What these settings need: votes only if they rank."""
        inputs: dict[str, Input] = {"logits": Logits(), "target": Target()}
        if self.rank_from == "votes":
            inputs["votes"] = Votes(upsample=self.vote_upsample, mode=self.vote_interpolation)
        if self.exit_taps:
            inputs["exits"] = AuxLogits(taps=self.exit_taps)
        return inputs

    def terms(
        self,
        logits: Tensor,
        target: Tensor,
        votes: Tensor | None = None,
        exits: Sequence[Tensor] = (),
        *,
        kept: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """`"non_target"`, and with `exits` `"exits"`, weighted.

        `exits` is what the input `AuxLogits` gives: logits and votes of each head in turn.
        """
        votes = self._joined(votes, exits)
        settings = self.mixed_target, self.exit_weight, self.correct_only, self.reduction
        return _terms(logits, target, votes, exits[::2], self._law(), *settings, kept)

    def _law(self) -> Law:
        return Law(*(getattr(self, name) for name in Law._fields))

    def _joined(self, votes: Tensor | None, exits: Sequence[Tensor]) -> Tensor | None:
        """The votes of all heads."""
        if (votes is None) == (self.rank_from == "votes"):
            got = "none" if votes is None else "some"
            raise ValueError(f"rank_from={self.rank_from!r} decides whether votes rank, got {got}")
        if len(exits) != 2 * len(self.exit_taps):
            raise ValueError(
                f"exits must hold logits and votes of {len(self.exit_taps)} heads, "
                f"got {len(exits)} tensors"
            )
        if votes is None or not exits:
            return votes
        return torch.cat((votes, *exits[1::2]), 1)

    def soft_labels(
        self,
        logits: Tensor,
        target: Tensor,
        votes: Tensor | None = None,
        exits: Sequence[Tensor] = (),
    ) -> SoftLabels:
        """The label, and Zipf's law over the wrong classes as the network itself ranks them."""
        check_logits(logits)
        target = without_ignored(target, self.ignore_index)[0]
        check_target(target, logits)
        logits = in_float32(logits.detach())
        labels = checked_columns(target, logits, self.mixed_target)
        soft = _soft_labels(logits, self._joined(votes, exits), labels, self._law())
        return SoftLabels(spread(labels, labels.values, soft), soft)
