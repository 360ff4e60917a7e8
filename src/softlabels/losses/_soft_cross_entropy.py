"""Cross-entropy against soft labels that are taken apart into a target and a non-target part.

All methods end here: they differ in where their soft labels come from.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.nn import functional

from softlabels.losses._checks import in_transform
from softlabels.losses._non_target import (
    Labels,
    RowSums,
    finite_limit,
    log_total,
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
    target_values: Tensor | None,
    non_target: Tensor,
    temperature: float = 1.0,
    weights: tuple[float, float] = (1.0, 1.0),
    rest: Tensor | None = None,
) -> Tensor:
    """The weighted sum of `soft_cross_entropy_terms`, [B], with its gradient in closed form.

    The gradient is made along with the value, in three buffers of [B, C] at the most, soft labels
    included. A second gradient (`create_graph=True`) and `torch.func` transforms differentiate
    the terms in the ordinary way.

    Args:
        logits: [B, C], float32 or float64. Gets the gradient.
        labels: The labeled classes.
        target_values: [B, K], p at the labeled classes, no gradient; None: no target term.
        non_target: [B, C], q over the other classes, 0 at labeled ones; no gradient.
        temperature: lambda, of the non-target term.
        weights: Of the target and of the non-target term.
        rest: [B, 1], `row_sums(logits, labels).rest`, where it is known.
    """
    values = labels.values if isinstance(labels.values, Tensor) else None
    tensors = logits, labels.classes, values, target_values, non_target
    if not torch.compiler.is_compiling() and in_transform():
        given = _given(*tensors, temperature, weights)
        return _value(given, *_log_sums(given))
    return cast("Tensor", _ClosedForm.apply(*tensors, temperature, weights, rest))


def soft_cross_entropy_terms(
    logits: Tensor,
    labels: Labels,
    target_values: Tensor,
    non_target: Tensor,
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
    everything = log_total(logits, labels, sums.rest)
    target = _target_term(logits, labels, target_values, everything)
    return Terms(target, _non_target_term(logits, non_target, temperature, sums))


def log_non_target_mass(logits: Tensor, labels: Labels, temperature: float = 1.0) -> Tensor:
    """log(1 - sum of S over the labeled classes), [B].

    0, without gradient, where no other class is left: its true value, the logarithm of 0, is
    never wanted but times 0.
    """
    limit = finite_limit(logits.dtype)
    if temperature != 1:
        logits = (logits / temperature).clamp(-limit, limit)
    rest = row_sums(logits, labels).rest
    everything = log_total(logits, labels, rest)
    empty = rest == -torch.inf
    mass = torch.where(empty, 0.0, rest) - torch.where(empty, 0.0, everything)
    return mass.clamp(min=-limit).squeeze(1)


def _target_term(logits: Tensor, labels: Labels, values: Tensor, everything: Tensor) -> Tensor:
    labeled = logits.gather(1, labels.classes) - everything
    return -(values * labeled.clamp(min=-finite_limit(logits.dtype))).sum(1)


def _non_target_term(
    logits: Tensor, non_target: Tensor, temperature: float, sums: RowSums
) -> Tensor:
    limit = finite_limit(logits.dtype)
    others = logits - sums.top
    if temperature != 1:
        others = others.div_(temperature)
    # Bound from above too: a labeled class may lie far above the others, where its q is 0. In two
    # steps, since vmap has no rule for clamp_.
    others = others.clamp_min_(-limit).clamp_max_(limit)
    return sums.scaled.squeeze(1) - others.mul_(non_target).sum(1)


class _Given(NamedTuple):
    """The arguments of `soft_cross_entropy`."""

    logits: Tensor
    labels: Labels
    target_values: Tensor | None
    non_target: Tensor
    temperature: float
    weights: tuple[float, float]


def _given(logits: Tensor, classes: Tensor, values: Tensor | None, *others: Any) -> _Given:
    """From what an autograd function takes, whose tensors stand alone."""
    return _Given(logits, Labels(classes, 1.0 if values is None else values), *others)


def _log_sums(given: _Given) -> tuple[RowSums, Tensor]:
    """Those of each row over the non-target classes, and that over all."""
    sums = row_sums(given.logits, given.labels, given.temperature)
    return sums, log_total(given.logits, given.labels, sums.rest)


def _value(given: _Given, sums: RowSums, everything: Tensor) -> Tensor:
    """The weighted sum, [B], with autograd's own gradient."""
    logits, labels, target_values, non_target, temperature, weights = given
    value = weights[1] * _non_target_term(logits, non_target, temperature, sums)
    if target_values is None:
        return value
    # Not `+=`, which torch 2.11 compiles to gradients of zero.
    return value + weights[0] * _target_term(logits, labels, target_values, everything)


class _ClosedForm(torch.autograd.Function):
    """`_value` with its gradient in closed form."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        classes: Tensor,
        values: Tensor | None,
        target_values: Tensor | None,
        non_target: Tensor,
        temperature: float,
        weights: tuple[float, float],
        rest: Tensor | None,
    ) -> Tensor:
        tensors = logits, classes, values, target_values, non_target
        given = _given(*tensors, temperature, weights)
        gradient = None
        if given.labels.single():
            value, gradient = _of_single_labels(given, rest, ctx.needs_input_grad[0])
        else:
            sums = _log_sums(given)
            value = _value(given, *sums)
            if ctx.needs_input_grad[0]:
                gradient = _gradient(given, *sums)
        ctx.settings = temperature, weights
        if torch.compiler.is_compiling():  # where there is no second gradient
            ctx.save_for_backward(gradient)
        else:
            ctx.save_for_backward(gradient, *tensors)
        return value

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        found, *tensors = ctx.saved_tensors
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph=True
            given = _given(*tensors, *ctx.settings)
            value = _value(given, *_log_sums(given))
            (found,) = torch.autograd.grad(value, tensors[0], outer, create_graph=True)
        else:
            found = found * outer[0].unsqueeze(1)
        return found, None, None, None, None, None, None, None


def _of_single_labels(
    given: _Given, rest: Tensor | None, with_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """Value, [B], and gradient, [B, C], of `_value` for one label a row, in few operations.

    With one label all follows from the log-odds r of the other classes against it, without a
    softmax over all classes: -log S_t = softplus(r), and 1 - S_t = sigmoid(r).
    """
    logits, labels, target_values, non_target, temperature, weights = given
    limit = finite_limit(logits.dtype)
    pushed = weights[1] / temperature
    sums = row_sums(logits, labels, temperature) if rest is None or temperature != 1 else None
    rest = sums.rest if sums is not None else rest
    assert rest is not None
    # 1. -log N(S) of each class; at the label it is r. Bounded, so that times a q of 0 it is 0.
    far = (rest - logits).clamp_(-limit, limit)
    odds = far.gather(1, labels.classes)
    if sums is not None and temperature != 1:
        far = (sums.top - logits).div_(temperature).add_(sums.scaled).clamp_(-limit, limit)
    # 2. The value. In place, and made again below: so no step needs another buffer.
    value = far.mul_(non_target).sum(1)
    del far
    if target_values is None:
        value = weights[1] * value
        moved = torch.zeros_like(odds)
    else:
        pulled = target_values if weights[0] == 1 else weights[0] * target_values
        # Above the threshold softplus is r itself, to the last bit.
        of_target = pulled * functional.softplus(odds, threshold=50.0)
        value = torch.add(of_target.squeeze(1), value, alpha=weights[1])
        moved = pulled * odds.sigmoid()  # what the target term moves from the others to the label
    if not with_gradient:
        return value, None
    # 3. The gradient at the others, where S is N(S) (1 - S_t): both terms are multiples of N(S),
    # but for q. At the label, which is written last, the exponent may be anything.
    found = (logits - rest).exp_()
    if sums is not None and temperature != 1:
        others = (logits - sums.top).div_(temperature).sub_(sums.scaled).exp_()
        found = found.mul_(moved).add_(others, alpha=pushed)
    else:
        found = found.mul_(moved + pushed)
    found = found.sub_(non_target, alpha=pushed)
    if torch.compiler.is_compiling():  # which does not fuse a scatter
        return value, torch.where(single_mask(labels, logits), -moved, found)
    return value, found.scatter_(1, labels.classes, -moved)


def _gradient(given: _Given, sums: RowSums, everything: Tensor) -> Tensor:
    """Gradient of `_value` with respect to the logits, [B, C], for a batch sum."""
    logits, labels, target_values, non_target, temperature, weights = given
    if target_values is None:
        target_values = torch.zeros_like(labels.classes, dtype=logits.dtype)
    pulled = weights[0] * target_values.sum(1, keepdim=True)
    pushed = weights[1] / temperature
    filled = torch.full_like(sums.rest, pushed).masked_fill(sums.rest == -torch.inf, 0.0)
    scale = pulled * (sums.rest - everything).exp()  # S over N(S)
    if temperature == 1:
        scale = scale + filled
    # At labeled classes, which are replaced below, the exponent may be anything.
    found = (logits - sums.rest).clamp_(max=0.0).exp_().mul_(scale)
    if temperature != 1:
        others = (logits - sums.top).div_(temperature).sub_(sums.scaled).clamp_(max=0.0)
        found = found.add_(others.exp_().mul_(filled))
    found = found.sub_(non_target, alpha=pushed)
    labeled = (logits.gather(1, labels.classes) - everything).exp()
    labeled = labels.masked(pulled * labeled - weights[0] * target_values)
    return found.scatter_(1, labels.classes, 0.0).scatter_add_(1, labels.classes, labeled)
