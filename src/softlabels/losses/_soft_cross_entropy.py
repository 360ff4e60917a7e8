"""Cross-entropy against soft labels that are taken apart into a target and a non-target part.

All methods end here: they differ in where their soft labels come from.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from softlabels.losses._checks import in_transform
from softlabels.losses._non_target import (
    Labels,
    NonTarget,
    RowSums,
    finite_limit,
    row_sums,
    single_mask,
)

__all__ = ["Terms", "log_non_target_mass", "soft_cross_entropy", "soft_cross_entropy_terms"]


class Terms(NamedTuple):
    """The two terms of a sample's loss, [B] each, in nats."""

    target: Tensor
    non_target: Tensor


def soft_cross_entropy(
    logits: Tensor,
    labels: Labels,
    target_values: Tensor,
    non_target: NonTarget,
    temperature: float = 1.0,
    weights: tuple[float, float] = (1.0, 1.0),
) -> Tensor:
    """The weighted sum of `soft_cross_entropy_terms`, [B], with its gradient in closed form.

    The gradient is made along with the value, in three buffers of [B, C] at the most, soft labels
    included. A second gradient (`create_graph=True`) and `torch.func` transforms differentiate
    the terms in the ordinary way.

    Args:
        logits: [B, C], float32 or float64. Gets the gradient.
        labels: The labeled classes.
        target_values: [B, K], p at the labeled classes; no gradient.
        non_target: q over the other classes; no gradient.
        temperature: lambda, of the non-target term.
        weights: Of the target and of the non-target term.
    """
    # One by one: torch 2.6 compiles no slices of named tuples.
    tensors = labels.classes, labels.values, target_values, non_target.weights, non_target.total
    if not torch.compiler.is_compiling() and in_transform():
        return _weighted(logits, *tensors, temperature, weights)
    return cast("Tensor", _ClosedForm.apply(logits, *tensors, temperature, weights))


def soft_cross_entropy_terms(
    logits: Tensor,
    labels: Labels,
    target_values: Tensor,
    non_target: NonTarget,
    temperature: float = 1.0,
) -> Terms:
    r"""Cross-entropy of soft labels, target and non-target part each by itself.

    .. math::
        -\sum_{i \in L} p_i \log S_i, \qquad -\sum_{i \notin L} q_i \log N(S^\lambda)_i

    with S the softmax over all classes and :math:`N(S^\lambda)` that of the logits over lambda
    with the labeled classes L left out. With :math:`A = \sum p`, their gradients are
    :math:`A S_j - p_j` and :math:`(N(S^\lambda)_j - q_j) / \lambda`.

    Log-probabilities below `-finfo.max ** 0.75` count as that. Arguments as above.
    """
    sums = row_sums(logits, labels, temperature)
    target = _target_term(logits, labels, target_values, sums)
    return Terms(target, _non_target_term(logits, non_target, temperature, sums))


def log_non_target_mass(logits: Tensor, labels: Labels, temperature: float = 1.0) -> Tensor:
    """log(1 - sum of S over the labeled classes), [B].

    0, without gradient, where no other class is left: its true value, the logarithm of 0, is
    never wanted but times 0.
    """
    limit = finite_limit(logits.dtype)
    if temperature != 1:
        logits = (logits / temperature).clamp(-limit, limit)
    sums = row_sums(logits, labels)
    empty = sums.rest == -torch.inf
    mass = torch.where(empty, 0.0, sums.rest) - torch.where(empty, 0.0, sums.everything)
    return mass.clamp(min=-limit).squeeze(1)


def _target_term(logits: Tensor, labels: Labels, values: Tensor, sums: RowSums) -> Tensor:
    labeled = logits.gather(1, labels.classes) - sums.everything
    return -(values * labeled.clamp(min=-finite_limit(logits.dtype))).sum(1)


def _non_target_term(
    logits: Tensor, non_target: NonTarget, temperature: float, sums: RowSums
) -> Tensor:
    limit = finite_limit(logits.dtype)
    others = logits - sums.top
    if temperature != 1:
        others = others.div_(temperature)
    # Bound from above too: a labeled class may lie far above the others, where its q is 0.
    others = others.clamp_min_(-limit).clamp_max_(limit)
    others = others.mul_(non_target.weights).sum(1, keepdim=True)
    return (sums.scaled - others / non_target.total).squeeze(1)


def _weighted(
    logits: Tensor,
    classes: Tensor,
    values: Tensor,
    target_values: Tensor,
    others: Tensor,
    total: Tensor,
    temperature: float,
    weights: tuple[float, float],
) -> Tensor:
    terms = soft_cross_entropy_terms(
        logits, Labels(classes, values), target_values, NonTarget(others, total), temperature
    )
    return weights[0] * terms.target + weights[1] * terms.non_target


class _ClosedForm(torch.autograd.Function):
    """`_weighted` with its gradient in closed form."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        classes: Tensor,
        values: Tensor,
        target_values: Tensor,
        others: Tensor,
        total: Tensor,
        temperature: float,
        weights: tuple[float, float],
    ) -> Tensor:
        labels, non_target = Labels(classes, values), NonTarget(others, total)
        sums = row_sums(logits, labels, temperature)
        value = weights[0] * _target_term(logits, labels, target_values, sums)
        # Not `+=`, which torch 2.11 compiles to gradients of zero.
        value = value + weights[1] * _non_target_term(logits, non_target, temperature, sums)
        if ctx.needs_input_grad[0]:
            gradient = _gradient(
                logits, labels, target_values, non_target, temperature, weights, sums
            )
            ctx.settings = temperature, weights
            if torch.compiler.is_compiling():  # where there is no second gradient
                ctx.save_for_backward(gradient)
            else:
                tensors = logits, classes, values, target_values, others, total
                ctx.save_for_backward(gradient, *tensors)
        return value

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        found, *tensors = ctx.saved_tensors
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph=True
            value = _weighted(*tensors, *ctx.settings)
            (found,) = torch.autograd.grad(value, tensors[0], outer, create_graph=True)
        else:
            found = found * outer[0].unsqueeze(1)
        return found, None, None, None, None, None, None, None


def _gradient(
    logits: Tensor,
    labels: Labels,
    target_values: Tensor,
    non_target: NonTarget,
    temperature: float,
    weights: tuple[float, float],
    sums: RowSums,
) -> Tensor:
    """Gradient of `_weighted` with respect to the logits, [B, C], for a batch sum."""
    pulled = weights[0] * target_values.sum(1, keepdim=True)
    pushed = weights[1] / temperature
    filled = torch.where(sums.rest == -torch.inf, 0.0, pushed * non_target.total)
    scale = pulled * (sums.rest - sums.everything).exp() * non_target.total  # S over N(S)
    if temperature == 1:
        scale = scale + filled
    # Times the total until the end: so no step needs another buffer. At labeled classes, which
    # are replaced below, the exponent may be anything.
    found = (logits - sums.rest).clamp_(max=0.0).exp_().mul_(scale)
    if temperature != 1:
        others = (logits - sums.top).div_(temperature).sub_(sums.scaled).clamp_(max=0.0)
        found = found.add_(others.exp_().mul_(filled))
    found = found.sub_(non_target.weights, alpha=pushed).div_(non_target.total)
    labeled = (logits.gather(1, labels.classes) - sums.everything).exp()
    labeled = torch.where(labels.present(), pulled * labeled - weights[0] * target_values, 0.0)
    if labels.classes.shape[1] == 1 and torch.compiler.is_compiling():
        return torch.where(single_mask(labels, logits), labeled, found)
    return found.scatter_(1, labels.classes, 0.0).scatter_add_(1, labels.classes, labeled)
