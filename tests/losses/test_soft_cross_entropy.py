"""The cross-entropy that every method ends in: its closed-form gradient, in every use of it."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from shared.by_hand import assert_six_digits, logits_of, rows
from shared.draws import Batch, batches
from shared.loss_cases import CASES_AND_MAIN_KINDS, case_id
from softlabels.losses import NKDLoss, USKDLoss, ZipfLSLoss
from softlabels.losses._non_target import Labels, label_columns, softmax_parts
from softlabels.losses._soft_cross_entropy import (
    log_non_target_mass,
    soft_cross_entropy,
    soft_cross_entropy_terms,
)

WEIGHTS = (0.7, 1.3)

temperatures = st.sampled_from([0.5, 1.0, 3.0])


class Soft(NamedTuple):
    labels: Labels
    target_values: Tensor
    non_target: Tensor
    temperature: float


def soft_of(batch: Batch, temperature: float) -> Soft:
    """Soft labels that do not depend on the logits; target values of either sign."""
    labels = label_columns(batch.target, batch.logits)
    values = (batch.other_logits.gather(1, labels.classes) / 10) * labels.present()
    others = softmax_parts(batch.other_logits, labels, temperature)[1]
    return Soft(labels, values, others, temperature)


def fast(logits: Tensor, soft: Soft) -> Tensor:
    return soft_cross_entropy(logits, *soft, WEIGHTS)


def plain(logits: Tensor, soft: Soft) -> Tensor:
    terms = soft_cross_entropy_terms(logits, *soft)
    return WEIGHTS[0] * terms.target + WEIGHTS[1] * terms.non_target


def assert_close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-12)


def gradient(loss: Tensor, leaf: Tensor, outer: Tensor, **settings: bool) -> Tensor:
    (found,) = torch.autograd.grad(loss, leaf, outer, **settings)
    return found


def some_outer(batch: Batch) -> Tensor:
    return torch.linspace(-1.5, 2.5, len(batch.logits), dtype=torch.float64)


@given(batch=batches(most_labels=7), temperature=temperatures)
def test_value_and_gradient_equal_those_of_autograd_for_any_outer_gradient(batch, temperature):
    soft = soft_of(batch, temperature)
    leaf = batch.logits.clone().requires_grad_()
    closed, differentiated = fast(leaf, soft), plain(leaf, soft)

    assert closed.grad_fn.name().startswith("_ClosedForm")
    assert_close(closed, differentiated)
    for outer in (torch.ones(len(leaf)).double(), some_outer(batch)):
        expected = gradient(differentiated, leaf, outer, retain_graph=True)
        assert_close(gradient(closed, leaf, outer, retain_graph=True), expected)


@given(batch=batches(most_labels=7), temperature=temperatures)
def test_the_gradient_is_the_written_out_formula(batch, temperature):
    """w0 (A S_j - p_j) + w1 (N(S^t)_j - q_j) / t, the second term over non-target classes."""
    soft = soft_of(batch, temperature)
    leaf = batch.logits.clone().requires_grad_()

    found = gradient(fast(leaf, soft).sum(), leaf, torch.ones(()).double())

    p = torch.zeros_like(batch.logits)
    for column in range(soft.labels.classes.shape[1]):
        for row in range(len(p)):
            p[row, soft.labels.classes[row, column]] += soft.target_values[row, column]
    labeled = batch.labels > 0
    pulled = p.sum(1, keepdim=True) * batch.logits.softmax(1) - p
    prediction = (batch.logits / temperature).masked_fill(labeled, -torch.inf).softmax(1)
    difference = (prediction - soft.non_target) / temperature
    difference = torch.where(labeled, 0.0, difference)
    assert_close(found, WEIGHTS[0] * pulled + WEIGHTS[1] * difference)


@given(batch=batches(most_labels=7), temperature=temperatures)
def test_second_gradients_equal_those_of_the_plain_path(batch, temperature):
    soft = soft_of(batch, temperature)
    outer = some_outer(batch).requires_grad_()

    def second(loss) -> tuple[Tensor, Tensor]:
        leaf = batch.logits.clone().requires_grad_()
        first = gradient(loss(leaf, soft), leaf, outer, create_graph=True)
        return torch.autograd.grad(first.square().sum(), (leaf, outer))

    for found, expected in zip(second(fast), second(plain), strict=True):
        assert_close(found, expected)


@given(batch=batches(most_labels=7), temperature=temperatures)
def test_a_second_backward_pass_adds_the_same_gradient(batch, temperature):
    soft = soft_of(batch, temperature)
    leaf = batch.logits.clone().requires_grad_()
    loss = fast(leaf, soft).sum()

    loss.backward(retain_graph=True)
    once = leaf.grad.clone()
    loss.backward()

    assert_close(leaf.grad, 2 * once)


@given(batch=batches(most_labels=7), temperature=temperatures)
def test_the_loss_used_twice_in_one_graph_has_twice_the_gradient(batch, temperature):
    soft = soft_of(batch, temperature)
    leaf = batch.logits.clone().requires_grad_()

    value = fast(leaf, soft).sum()
    found = gradient(value * value, leaf, torch.ones(()).double())

    other = batch.logits.clone().requires_grad_()
    once = gradient(plain(other, soft).sum(), other, torch.ones(()).double())
    assert_close(found, 2 * value.detach() * once)


@given(batch=batches(most_labels=7))
def test_soft_labels_get_no_gradient(batch):
    soft = soft_of(batch, 1.0)
    values, others = soft.target_values.requires_grad_(), soft.non_target.requires_grad_()
    leaf = batch.logits.clone().requires_grad_()

    loss = soft_cross_entropy(leaf, soft.labels, values, soft.non_target)

    assert torch.autograd.grad(loss.sum(), (values, others), allow_unused=True) == (None, None)


@given(batch=batches(most_labels=7), steps=st.integers(-160, 160), temperature=temperatures)
def test_labeled_logits_have_no_influence_on_the_non_target_term(batch, steps, temperature):
    soft = soft_of(batch, temperature)
    moved = batch.logits + (steps / 16) * (batch.labels > 0)

    before = soft_cross_entropy_terms(batch.logits, *soft).non_target
    after = soft_cross_entropy_terms(moved, *soft).non_target

    torch.testing.assert_close(after, before)


def test_no_graph_is_made_without_need():
    batch_logits = torch.randn(3, 4)
    labels = label_columns(torch.tensor([0, 1, 2]), batch_logits)
    others = softmax_parts(batch_logits, labels)[1]

    value = soft_cross_entropy(batch_logits, labels, torch.ones(3, 1), others)

    assert not value.requires_grad


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_non_target_mass_by_hand(temperature):
    # S = (1, 4, 4) / 9 of which classes 1 and 2 are left; at temperature 2 (1, 2, 2) / 5.
    logits = logits_of([1, 4, 4])

    value = log_non_target_mass(logits, label_columns(torch.tensor([0]), logits), temperature)

    assert_six_digits(value.exp(), [8 / 9 if temperature == 1 else 4 / 5])


def test_the_non_target_mass_of_a_certain_target_keeps_its_digits():
    logits = torch.tensor([[40.0, 0.0, 0.0]], requires_grad=True)  # 1 - S_t is 0 in float32

    value = log_non_target_mass(logits, label_columns(torch.tensor([0]), logits))
    value.backward()

    torch.testing.assert_close(value.detach(), torch.tensor([2.0]).log() - 40)
    torch.testing.assert_close(logits.grad, torch.tensor([[-1.0, 0.5, 0.5]]))


def test_the_non_target_mass_of_no_class_is_one_without_gradient():
    logits = rows([1, 2]).requires_grad_()

    with torch.autograd.set_detect_anomaly(True):
        value = log_non_target_mass(logits, label_columns(rows([0.7, 0.3]), logits))
        value.backward()

    assert float(value.detach()) == 0
    assert not logits.grad.any()


# The same for the losses


@pytest.mark.parametrize(("case", "kind"), CASES_AND_MAIN_KINDS, ids=case_id)
def test_second_gradients_of_a_loss_equal_those_of_its_terms(case, kind):
    inputs = case.make(kind, dtype=torch.float64)
    leaves = [inputs[name].requires_grad_() for name in case.trained]

    def second(value: Tensor) -> list[Tensor]:
        first = torch.autograd.grad(value, leaves, create_graph=True)
        squares = sum(g.square().sum() for g in first)
        return list(torch.autograd.grad(squares, leaves))

    of_parts = sum(case.terms(inputs).values())
    for found, expected in zip(second(case(inputs)), second(of_parts), strict=True):
        assert_close(found, expected)


@pytest.mark.parametrize(("case", "kind"), CASES_AND_MAIN_KINDS, ids=case_id)
def test_a_loss_survives_two_backward_passes_and_double_use(case, kind):
    inputs = case.make(kind, dtype=torch.float64)
    leaves = [inputs[name].requires_grad_() for name in case.trained]
    loss = case(inputs)

    once = torch.autograd.grad(loss, leaves, retain_graph=True)
    again = torch.autograd.grad(loss, leaves, retain_graph=True)
    both = torch.autograd.grad(loss + 2 * case(inputs), leaves)

    for first, second, sum_of_three in zip(once, again, both, strict=True):
        assert_close(second, first)
        assert_close(sum_of_three, 3 * first)


@pytest.mark.parametrize("module", [NKDLoss(), USKDLoss(), ZipfLSLoss(rank_from="logits")])
def test_modules_take_the_closed_form(module):
    tensors = {name: torch.randn(3, 5, requires_grad=True) for name in module.inputs}
    tensors["target"] = torch.tensor([0, 4, 2])

    nodes, names = [module(**tensors).grad_fn], set()
    while nodes:
        node = nodes.pop()
        names.add(node.name())
        nodes += [following for following, _ in node.next_functions if following is not None]

    assert "_ClosedFormBackward" in names
