"""tf-NKD: an independent computation, and its relation to USKD."""

from __future__ import annotations

import pytest
import torch

from shared.by_hand import MIXED_TARGET, STUDENT_LOGITS, TARGET, assert_six_digits, logits_of, rows
from shared.golden_vectors import assert_close
from softlabels.losses.tf_nkd import TfNKDLoss
from softlabels.losses.uskd import USKDLoss


def plain(logits, labels):
    """Sums over label columns: the largest labels, then the second largest."""
    probabilities = logits.softmax(1)
    order = labels.argsort(dim=1, descending=True)[:, :2]
    total = torch.zeros(len(logits), dtype=logits.dtype)
    for column in order.t():
        label = labels[torch.arange(len(labels)), column]
        share = probabilities[torch.arange(len(labels)), column]
        mean = share[label > 0].mean() if bool((label > 0).any()) else 0.0
        weight = torch.where(label > 0, share + label - mean, 0.0).detach()
        total = total - weight * share.log()
    return total


def test_two_samples_by_hand():
    # S_t is 1/2 and 1/4, their mean 3/8: w is 9/8 and 7/8.
    # (9/8 ln 2 + 7/8 ln 4) / 2 = 23/16 ln 2 = 0.996399.
    logits = logits_of([2, 1, 1], [1, 1, 2])

    assert_six_digits(TfNKDLoss()(logits, torch.tensor([0, 1])), 0.996399)


@pytest.mark.parametrize("mixed", [False, True])
def test_values_and_gradients_of_a_plain_computation(mixed):
    drawn = torch.randn(5, 7, generator=torch.Generator().manual_seed(3)).double()
    ours, theirs = drawn.clone().requires_grad_(), drawn.clone().requires_grad_()
    target = torch.tensor([6, 0, 2, 2, 5])
    labels = torch.nn.functional.one_hot(target, 7).double()
    if mixed:
        share = torch.tensor([0.6, 1.0, 0.9, 0.7, 0.55]).double().unsqueeze(1)
        labels = target = share * labels + (1 - share) * labels.roll(1, 1)

    value = TfNKDLoss(reduction="none")(ours, target)
    expected = plain(theirs, labels)
    value.mean().backward()
    expected.mean().backward()

    assert_close(value, expected)
    assert_close(ours.grad, theirs.grad)


def test_it_is_the_target_term_of_uskd_without_the_square():
    weak = torch.zeros_like(STUDENT_LOGITS)
    inputs = STUDENT_LOGITS, weak, MIXED_TARGET
    expected = USKDLoss(squared=False).reduced(*inputs)["target"]

    assert_close(TfNKDLoss()(STUDENT_LOGITS, MIXED_TARGET), expected)
    assert_close(TfNKDLoss().reduced(STUDENT_LOGITS, MIXED_TARGET)["target"], expected)
    squared = USKDLoss().reduced(*inputs)["target"]
    assert float(squared) != pytest.approx(float(expected))


def test_alone_in_its_batch_a_sample_has_the_cross_entropy():
    value = TfNKDLoss()(STUDENT_LOGITS[:1], TARGET[:1])

    assert_close(value, torch.nn.functional.cross_entropy(STUDENT_LOGITS[:1], TARGET[:1]))


def test_ignored_samples_count_in_no_mean():
    logits = STUDENT_LOGITS.repeat(2, 1)
    target = torch.tensor([0, 3, 9, 9])

    value = TfNKDLoss(ignore_index=9)(logits, target)

    assert_close(value, TfNKDLoss()(STUDENT_LOGITS, TARGET))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_extreme_logits_are_finite(dtype):
    largest = 1e4 if dtype == torch.float16 else 1e30
    logits = (largest * torch.tensor([[1.0, 0.0, -1.0]] * 2)).to(dtype).requires_grad_()

    loss = TfNKDLoss()(logits, torch.tensor([2, 0]))
    loss.backward()

    assert loss.dtype == torch.float32
    assert bool(torch.isfinite(loss))
    assert bool(torch.isfinite(logits.grad).all())


def test_soft_labels_are_the_weights_of_the_labels():
    logits = logits_of([2, 1, 1], [1, 1, 2])

    soft = TfNKDLoss().soft_labels(logits, torch.tensor([0, 1]))

    assert_close(soft.target, rows([9 / 8, 0, 0], [0, 7 / 8, 0]))
    assert not soft.non_target.any()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"sync_batch_stats": 1}, TypeError, "sync_batch_stats must be True or False"),
    ],
)
def test_wrong_settings_are_refused(change, error, message):
    with pytest.raises(error, match=message):
        TfNKDLoss(**change)


def test_smoothed_labels_are_refused():
    with pytest.raises(ValueError, match="5 labeled classes, at most two can be used"):
        TfNKDLoss()(STUDENT_LOGITS, torch.full((2, 5), 0.2))
