"""Zipf's LS by hand: the shared vectors, ties, mixed labels, two classes."""

from __future__ import annotations

import pytest
import torch

from shared.by_hand import (
    MIXED_TARGET,
    STUDENT_LOGITS,
    TARGET,
    VOTES,
    assert_six_digits,
    logits_of,
    rows,
)
from softlabels.losses import ZipfLSLoss, zipf_ls_loss, zipf_ls_targets

THREE_LABELS = rows([0.5, 0.3, 0.2, 0, 0])


def test_the_shared_vectors():
    # Counts [5, 3, 1, 0, 0] and [1, 1, 5, 2, 0]: ranks [1, 2, 3, 4, 4] and [3, 3, 1, 2, 5].
    soft = zipf_ls_targets(STUDENT_LOGITS, TARGET, VOTES)
    values = zipf_ls_loss(STUDENT_LOGITS, TARGET, VOTES, reduction="none")

    assert_six_digits(
        soft, [0, 0.375, 0.25, 0.1875, 0.1875], [0.178571, 0.178571, 0.535714, 0, 0.107143]
    )
    assert_six_digits(values, 0.091942, 0.034486)
    assert_six_digits(zipf_ls_loss(STUDENT_LOGITS, TARGET, VOTES), 0.063214)


@pytest.mark.parametrize(
    ("votes", "expected"),
    [
        # One vote each for 1 and 3: ranks 3, 1, 3, 1, 3; without class 0: 1 : 1/3 : 1 : 1/3.
        ([1, 3], [0, 3 / 8, 1 / 8, 3 / 8, 1 / 8]),
        # All votes for the target: all others share rank 2.
        ([0, 0, 0], [0, 1 / 4, 1 / 4, 1 / 4, 1 / 4]),
        # Every class has one vote: all share rank 1.
        ([4, 3, 2, 1, 0], [0, 1 / 4, 1 / 4, 1 / 4, 1 / 4]),
        # Counts 2, 2, 2, 1, 0: ranks 1, 1, 1, 4, 5; 1 : 1 : 1/4 : 1/5 = 20 : 20 : 5 : 4.
        ([0, 0, 1, 1, 2, 2, 3], [0, 20 / 49, 20 / 49, 5 / 49, 4 / 49]),
        # Counts 0, 3, 1, 1, 0: ranks 4, 1, 2, 2, 4; 1 : 1/2 : 1/2 : 1/4 = 4 : 2 : 2 : 1.
        ([1, 1, 1, 2, 3], [0, 4 / 9, 2 / 9, 2 / 9, 1 / 9]),
        # A single vote: ranks 2, 2, 2, 2, 1; 1/2 : 1/2 : 1/2 : 1.
        ([4], [0, 1 / 5, 1 / 5, 1 / 5, 2 / 5]),
    ],
)
def test_classes_with_as_many_votes_share_the_smallest_rank(votes, expected):
    soft = zipf_ls_targets(torch.zeros(1, 5).double(), torch.tensor([0]), torch.tensor([votes]))

    assert_six_digits(soft, [expected])


@pytest.mark.parametrize(
    ("logits", "target", "expected"),
    [
        # Ranks 1, 1, 3, 4; without class 3: 1 : 1 : 1/3.
        ([1, 1, 0, -1], 3, [3 / 7, 3 / 7, 1 / 7, 0]),
        # Without class 0: 1 : 1/3 : 1/4 = 12 : 4 : 3.
        ([1, 1, 0, -1], 0, [0, 12 / 19, 4 / 19, 3 / 19]),
        # Ranks 4, 2, 1, 2: 1/2 : 1 : 1/2.
        ([-3, 0.5, 2, 0.5], 0, [0, 1 / 4, 1 / 2, 1 / 4]),
        # All equal.
        ([7, 7, 7, 7], 2, [1 / 3, 1 / 3, 0, 1 / 3]),
    ],
)
def test_equal_logits_share_the_smallest_rank(logits, target, expected):
    soft = zipf_ls_targets(rows(logits), torch.tensor([target]))

    assert_six_digits(soft, [expected])


def test_ranks_from_logits_of_the_shared_samples():
    # First row falls as 0, 1, 2, 4, 3: without class 0 1/2 : 1/3 : 1/5 : 1/4 = 30 : 20 : 12 : 15.
    # Second row: ranks 3, 4, 1, 2, 5; without class 3 1/3 : 1/4 : 1 : 1/5 = 20 : 15 : 60 : 12.
    soft = zipf_ls_targets(STUDENT_LOGITS, TARGET)

    assert_six_digits(
        soft,
        [0, 30 / 77, 20 / 77, 12 / 77, 15 / 77],
        [20 / 107, 15 / 107, 60 / 107, 0, 12 / 107],
    )


def test_the_power_bends_the_law():
    # Ranks 1, 2, 3, 4 of which the first is the target: 1/4 : 1/9 : 1/16 = 36 : 16 : 9.
    soft = zipf_ls_targets(rows([4, 3, 2, 1]), torch.tensor([0]), power=2.0)

    assert_six_digits(soft, [[0, 36 / 61, 16 / 61, 9 / 61]])


def test_the_loss_of_one_sample():
    # q = (0, 12, 4, 3) / 19 as above. p = e^(1, 0, -1) normalized: logsumexp 1.407606,
    # -ln p = 0.407606, 1.407606, 2.407606. Entropy of q: 12/19 * 0.459532 + 4/19 * 1.558145
    # + 3/19 * 1.845827 = 0.909708. Cross-entropy: (12 * 0.407606 + 4 * 1.407606 + 3 * 2.407606)
    # / 19 = 0.933922. Difference 0.024214.
    value = zipf_ls_loss(rows([1, 1, 0, -1]), torch.tensor([0]))

    assert_six_digits(value, 0.024214)


# Mixed labels


def test_by_default_the_largest_label_is_the_target():
    assert_six_digits(zipf_ls_loss(STUDENT_LOGITS, MIXED_TARGET, VOTES), 0.063214)


def test_all_labeled_classes_are_removed():
    # Row 1: ranks [1, 2, 3, 4, 4] without 0 and 2: 1/2 : 1/4 : 1/4.
    # Row 2: ranks [3, 3, 1, 2, 5] without 1 and 3: 1/3 : 1 : 1/5 = 5 : 15 : 3.
    soft = zipf_ls_targets(STUDENT_LOGITS, MIXED_TARGET, VOTES, mixed_target="all")

    assert_six_digits(soft, [0, 0.5, 0, 0.25, 0.25], [5 / 23, 0, 15 / 23, 0, 3 / 23])


def test_a_row_with_one_label_among_mixed_ones_is_a_plain_label():
    labels = torch.cat((MIXED_TARGET[:1], rows([0, 0, 0, 1, 0])))

    soft = zipf_ls_targets(STUDENT_LOGITS, labels, VOTES, mixed_target="all")

    assert_six_digits(soft, [0, 0.5, 0, 0.25, 0.25], [0.178571, 0.178571, 0.535714, 0, 0.107143])


def test_equal_labels_the_lower_class_is_the_target():
    equal = rows([0, 0.25, 0, 0.25, 0.5], [0, 0.5, 0, 0.5, 0])

    soft = zipf_ls_targets(STUDENT_LOGITS, equal, VOTES)

    torch.testing.assert_close(soft, zipf_ls_targets(STUDENT_LOGITS, torch.tensor([4, 1]), VOTES))


def test_three_labels_all_of_them_removed():
    # Ranks by logits 1, 2, 3, 5, 4; classes 3 and 4 remain, 1/5 : 1/4 = 4 : 5.
    # p over them: e^-1 : e^0, -ln p = 1.313262, 0.313262.
    # 4/9 * (ln 4/9 + 1.313262) + 5/9 * (ln 5/9 + 0.313262) = 0.223258 - 0.152514 = 0.070745.
    soft = zipf_ls_targets(STUDENT_LOGITS[:1], THREE_LABELS, mixed_target="all")
    value = zipf_ls_loss(STUDENT_LOGITS[:1], THREE_LABELS, mixed_target="all")

    assert_six_digits(soft, [[0, 0, 0, 4 / 9, 5 / 9]])
    assert_six_digits(value, 0.070745)


def test_three_labels_the_largest_removed():
    # Ranks by logits 1, 2, 3, 5, 4 without class 0: as for the plain label 0.
    soft = zipf_ls_targets(STUDENT_LOGITS[:1], THREE_LABELS)

    assert_six_digits(soft, [[0, 30 / 77, 20 / 77, 12 / 77, 15 / 77]])


# No choice left


def test_two_classes_have_no_loss_and_no_gradient():
    logits = logits_of([0.25, 0.75]).requires_grad_()

    value = zipf_ls_loss(logits, torch.tensor([1]))
    value.backward()

    assert float(value.detach()) == 0
    assert not logits.grad.any()


@pytest.mark.parametrize("votes", [None, torch.tensor([[0, 1, 1]])])
def test_if_both_of_two_classes_have_a_label_there_is_no_loss_and_no_gradient(votes):
    logits = logits_of([0.25, 0.75]).requires_grad_()
    labels = rows([0.7, 0.3])

    value = zipf_ls_loss(logits, labels, votes, mixed_target="all")
    value.backward()

    assert float(value.detach()) == 0
    assert not logits.grad.any()


def test_soft_labels_of_the_module_are_the_labels_and_the_zipf_targets():
    module = ZipfLSLoss(mixed_target="all", power=2.0)

    soft = module.soft_labels(STUDENT_LOGITS, MIXED_TARGET, VOTES)

    expected = zipf_ls_targets(STUDENT_LOGITS, MIXED_TARGET, VOTES, power=2.0, mixed_target="all")
    torch.testing.assert_close(soft.target, MIXED_TARGET)
    torch.testing.assert_close(soft.non_target, expected)


def test_soft_labels_of_the_module_name_one_class_by_default():
    soft = ZipfLSLoss().soft_labels(STUDENT_LOGITS, MIXED_TARGET, VOTES)

    assert_six_digits(soft.target, [1, 0, 0, 0, 0], [0, 0, 0, 1, 0])


@pytest.mark.parametrize("distribution", ["zipf", "unbiased_zipf"])
def test_a_power_of_zero_is_uniform(distribution):
    soft = zipf_ls_targets(
        rows([4, 3, 2, 1]), torch.tensor([0]), power=0, distribution=distribution
    )

    assert_six_digits(soft, [[0, 1 / 3, 1 / 3, 1 / 3]])
