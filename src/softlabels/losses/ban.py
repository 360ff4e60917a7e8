"""BAN, born-again networks: each generation learns the predictions of the one before."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from softlabels.inputs import Input, Logits, Target, TeacherLogits
from softlabels.losses._checks import check_logits, check_target
from softlabels.losses._method import Defaults, Method
from softlabels.losses._non_target import (
    Labels,
    SoftLabels,
    column_means,
    in_float32,
    label_columns,
    spread,
    without_ignored,
)
from softlabels.losses._soft_target import soft_target_cross_entropy, softened_labels
from softlabels.losses.kd import kd_loss

__all__ = ["BANForm", "BANLoss"]

BANForm: TypeAlias = Literal["plain", "confidence_weighted", "permuted"]


class BANLoss(Method, name="ban"):
    r"""BAN: each generation is taught by the predictions of the one before.

    Furlanello et al., "Born Again Neural Networks", ICML 2018 (arXiv 1805.04770), equations
    5-11; there is no official code. The teacher is a network of the student's own architecture,
    trained before it; the next generation learns from this one.

    .. math::
        L_\text{plain} &= \sum_i p_i (\log p_i - \log q_i) \\
        L_\text{permuted} &= \sum_i \phi(p)_i (\log \phi(p)_i - \log q_i) \\
        L_\text{confidence} &= -\frac{\max_i p_i}{\frac{1}{B} \sum_u \max_i p_i^u}
        \sum_i y_i \log q_i

    ==========  =====================================================================
    symbol      meaning
    ==========  =====================================================================
    q, p        softmax of the student and of the teacher
    phi         keeps the teacher's largest probability and shuffles the others
    y           the labels
    u           the samples of the batch
    ==========  =====================================================================

    Deviations: KL in place of the paper's cross-entropy, with the same gradient. The shuffle is
    a new one for each sample; the paper says only that the outputs besides the largest are
    permuted, and one order for all would keep what they say in other words. Confidence weights
    are the paper's, times B under `"sum"` and `"none"`, so that `"mean"` is its sum.

    The paper trains on this alone, without the task's cross-entropy (`task_weight` 0); its
    BAN+L adds that (`task_weight` 1).

    Distributed: each sample by itself, but the mean confidence, which is that of the batch of
    each process.

    Args:
        form: `"plain"`; `"confidence_weighted"` (CWTM): the labels, each sample weighted by the
            teacher's confidence; `"permuted"` (DKPP): the teacher without what its smaller
            probabilities say about classes, from draws of torch's default generator.

    Example:
        >>> import torch
        >>> logits = torch.tensor([[2.0, 1.0, 0.5, -1.0, 0.0]])
        >>> BANLoss()(logits, logits)
        tensor(0.)
    """

    form: BANForm = "plain"

    defaults = Defaults(task_weight=0.0, taught_by_itself=True)

    @property
    def inputs(self) -> Mapping[str, Input]:
        """What these settings need: labels only if they are learned from."""
        inputs: dict[str, Input] = {"logits": Logits(), "teacher_logits": TeacherLogits()}
        if self.form == "confidence_weighted":
            inputs["target"] = Target()
        return inputs

    def terms(
        self,
        logits: Tensor,
        teacher_logits: Tensor,
        target: Tensor | None = None,
        *,
        kept: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """`"divergence"`, or for `"confidence_weighted"` `"label"`.

        `target` is of `"confidence_weighted"` alone, which needs it; samples that are not `kept`
        do not count in the mean confidence.
        """
        check_logits(logits)
        check_logits(teacher_logits, "teacher_logits", like=logits)
        if self.form == "confidence_weighted":
            if target is None:
                raise ValueError("form='confidence_weighted' needs a target, got none")
            labels = _weighted_labels(teacher_logits, target, kept)
            return {"label": soft_target_cross_entropy(logits, labels)}
        if self.form == "permuted":
            teacher_logits = _permuted(teacher_logits)
        divergence = kd_loss(logits, teacher_logits, temperature=1.0, reduction="none")
        return {"divergence": divergence}

    def soft_labels(self, logits: Tensor, teacher_logits: Tensor, target: Tensor) -> SoftLabels:
        """What is learned from: the teacher's (shuffled) beliefs, or the weighted labels."""
        check_logits(teacher_logits, "teacher_logits")
        if self.form == "confidence_weighted":
            target, kept = without_ignored(target, self.ignore_index)
            labels = _weighted_labels(teacher_logits, target, kept)
            return SoftLabels(labels, torch.zeros_like(labels))
        if self.form == "permuted":
            teacher_logits = _permuted(teacher_logits)
        return softened_labels(teacher_logits, target, 1.0)


def _permuted(teacher_logits: Tensor) -> Tensor:
    """Each row with its largest logit in place and the others in a random order."""
    teacher_logits = teacher_logits.detach()
    largest = teacher_logits.argmax(1, keepdim=True)
    keys = torch.rand(teacher_logits.shape, device=teacher_logits.device)
    # The largest logit comes first in both orders.
    places = keys.scatter(1, largest, -1.0).argsort(1)
    return torch.zeros_like(teacher_logits).scatter(
        1, places, teacher_logits.sort(1, descending=True).values
    )


def _weighted_labels(teacher_logits: Tensor, target: Tensor, kept: Tensor | None) -> Tensor:
    """Labels times the teacher's confidence, in units of its mean over the batch, [B, C]."""
    check_target(target, teacher_logits)
    teacher_logits = in_float32(teacher_logits.detach())
    confidence = teacher_logits.softmax(1).amax(1, keepdim=True)
    labels = label_columns(target, teacher_logits)
    every = Labels(labels.classes[:, :1], 1.0, kept)
    weight = confidence / column_means(confidence, every)
    return weight * spread(labels, labels.values, teacher_logits)
