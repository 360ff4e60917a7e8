"""USKD by hand: the shared vectors, rows with one label among mixed ones, ties, edge cases."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from shared.by_hand import (
    MIXED_TARGET,
    STUDENT_LOGITS,
    TARGET,
    WEAK_LOGITS,
    assert_six_digits,
    logits_of,
    rows,
)
from softlabels.losses import USKDLoss, uskd_loss, uskd_targets

both_rankings = pytest.mark.parametrize("rank_by", ["probability", "log_probability"])


def term(name: str, *inputs: Tensor, **settings: str) -> Tensor:
    """One of the three terms alone, without its weight."""
    weights = dict.fromkeys(("target_weight", "non_target_weight", "weak_weight"), 0.0)
    return uskd_loss(*inputs, **{**weights, name: 1.0}, **settings)


# The shared vectors


def test_target_labels_of_the_shared_vectors():
    # S_t = 0.563021, 0.223589; squares 0.316993, 0.049992, mean 0.183492.
    soft = uskd_targets(STUDENT_LOGITS, WEAK_LOGITS, TARGET)

    assert_six_digits(soft.target, [1.133500, 0, 0, 0, 0], [0, 0, 0, 0.866500, 0])


@pytest.mark.parametrize(
    ("rank_by", "second_row"),
    [
        # Ranks [4, 3, 1, 2, 5] and [3, 4, 1, 2, 5]; class 3 is the target.
        ("probability", [0.140187, 0.186916, 0.560748, 0, 0.112150]),
        ("log_probability", [0.186916, 0.140187, 0.560748, 0, 0.112150]),
    ],
)
def test_non_target_labels_of_the_shared_vectors(rank_by, second_row):
    # First row: ranks [1, 2, 3, 5, 4], the target is ranked 1. 1/2 + 1/3 + 1/5 + 1/4 = 77/60.
    first_row = [0, 30 / 77, 20 / 77, 12 / 77, 15 / 77]

    soft = uskd_targets(STUDENT_LOGITS, WEAK_LOGITS, TARGET, rank_by=rank_by)

    assert_six_digits(soft.non_target, first_row, second_row)


def test_target_and_weak_term_of_the_shared_vectors():
    inputs = STUDENT_LOGITS, WEAK_LOGITS, TARGET

    assert_six_digits(term("target_weight", *inputs), 0.974547)
    assert_six_digits(0.005 * term("weak_weight", *inputs), 0.00823543)


@pytest.mark.parametrize(
    ("rank_by", "non_target_term", "total"),
    [("probability", 1.291003, 1.111882), ("log_probability", 1.279321, 1.110714)],
)
def test_non_target_term_and_total_of_the_shared_vectors(rank_by, non_target_term, total):
    inputs = STUDENT_LOGITS, WEAK_LOGITS, TARGET

    assert_six_digits(term("non_target_weight", *inputs, rank_by=rank_by), non_target_term)
    assert_six_digits(uskd_loss(*inputs, rank_by=rank_by), total)


@both_rankings
def test_mixed_labels_of_the_shared_vectors(rank_by):
    inputs = STUDENT_LOGITS, WEAK_LOGITS, MIXED_TARGET

    soft = uskd_targets(*inputs, rank_by=rank_by)

    assert_six_digits(soft.target, [0.833500, 0, 0.304508, 0, 0], [0, 0.395492, 0, 0.466500, 0])
    assert_six_digits(
        soft.non_target, [0, 0.526316, 0, 0.210526, 0.263158], [0.172414, 0, 0.689655, 0, 0.137931]
    )
    assert_six_digits(term("target_weight", *inputs, rank_by=rank_by), 1.398592)
    assert_six_digits(term("non_target_weight", *inputs, rank_by=rank_by), 0.969248)
    assert_six_digits(0.005 * term("weak_weight", *inputs, rank_by=rank_by), 0.00785293)
    # 1.398592 + 0.1 * 0.969248 + 0.00785293.
    assert_six_digits(uskd_loss(*inputs, rank_by=rank_by), 1.503370)


# A row with one label among mixed ones: three samples, four classes

FINAL = logits_of([0.4, 0.3, 0.2, 0.1], [0.1, 0.15, 0.25, 0.5], [0.2, 0.1, 0.4, 0.3])
WEAK = logits_of([0.25, 0.25, 0.25, 0.25], [0.25, 0.25, 0.25, 0.25], [0.1, 0.6, 0.2, 0.1])
LABELS = rows([0.6, 0.4, 0, 0], [0, 0, 0, 1], [0.3, 0, 0.7, 0])


def test_one_label_among_mixed_ones_target_labels():
    # Major column, classes 0, 3, 2: squares 0.16, 0.25, 0.16, mean 0.19:
    #   0.6 - 0.03 = 0.57, 1 + 0.06 = 1.06, 0.7 - 0.03 = 0.67.
    # Minor column, classes 1, none, 0: squares 0.09, 0.04, mean of these two 0.065:
    #   0.4 + 0.025 = 0.425, nothing, 0.3 - 0.025 = 0.275.
    soft = uskd_targets(FINAL, WEAK, LABELS)

    assert_six_digits(soft.target, [0.57, 0.425, 0, 0], [0, 0, 0, 1.06], [0.275, 0, 0.67, 0])


def test_one_label_among_mixed_ones_non_target_labels():
    # Rows 1 and 2: the weak head is uniform, so S ranks. Row 1: ranks 1, 2, 3, 4; classes 2 and 3
    #   remain, 1/3 : 1/4 = 4 : 3. Row 2: ranks 4, 3, 2, 1; all but class 3 remain,
    #   1/4 : 1/3 : 1/2 = 3 : 4 : 6.
    # Row 3: the non-target masses are 0.7 (weak) and 0.4: R = 0.1/0.7 + 0.2/0.4 = 0.643,
    #   0.6/0.7 + 0.1/0.4 = 1.107, 0.2/0.7 + 0.4/0.4 = 1.286, 0.1/0.7 + 0.3/0.4 = 0.893:
    #   ranks 4, 2, 1, 3; classes 1 and 3 remain, 1/2 : 1/3 = 3 : 2.
    soft = uskd_targets(FINAL, WEAK, LABELS)

    assert_six_digits(
        soft.non_target,
        [0, 0, 4 / 7, 3 / 7],
        [3 / 13, 4 / 13, 6 / 13, 0],
        [0, 0.6, 0, 0.4],
    )


def test_one_label_among_mixed_ones_terms():
    # -ln: 0.1 2.302585, 0.2 1.609438, 0.25 1.386294, 0.3 1.203973, 0.4 0.916291, 0.5 0.693147,
    #   0.6 0.510826, 1/3 1.098612, 2/3 0.405465, 0.75 0.287682.
    # Target: 0.57 * 0.916291 + 0.425 * 1.203973 = 1.033975; 1.06 * 0.693147 = 0.734736;
    #   0.67 * 0.916291 + 0.275 * 1.609438 = 1.056510.
    # Others: N(S) = (2/3, 1/3): (4 * 0.405465 + 3 * 1.098612) / 7 = 0.702528;
    #   (0.2, 0.3, 0.5): (3 * 1.609438 + 4 * 1.203973 + 6 * 0.693147) / 13 = 1.061776;
    #   (0.25, 0.75): 0.6 * 1.386294 + 0.4 * 0.287682 = 0.946850.
    # Weak: ln 4 = 1.386294 twice; labels 0.9 V + 0.025 = (0.295, 0.025, 0.655, 0.025):
    #   0.295 * 2.302585 + 0.025 * 0.510826 + 0.655 * 1.609438 + 0.025 * 2.302585 = 1.803780.
    inputs = FINAL, WEAK, LABELS

    def value(name: str) -> Tensor:
        return term(name, *inputs, reduction="none")

    assert_six_digits(value("target_weight"), 1.033975, 0.734736, 1.056510)
    assert_six_digits(value("non_target_weight"), 0.702528, 1.061776, 0.946850)
    assert_six_digits(value("weak_weight"), 1.386294, 1.386294, 1.803780)


def test_one_label_among_mixed_ones_does_not_depend_on_classes_without_a_label():
    """The reference code lets an arbitrary class take the place of the absent second label."""
    changed = FINAL.clone()
    changed[1] = logits_of([0.3, 0.12, 0.08, 0.5])[0]  # other wrong classes, the same S_t

    before, after = uskd_targets(FINAL, WEAK, LABELS), uskd_targets(changed, WEAK, LABELS)

    torch.testing.assert_close(after.target, before.target)


# The batch mean


def test_a_batch_of_one_keeps_its_labels():
    # S_t^2 - mean(S_t^2) = 0, so P_t = V_t; the target term is the cross-entropy 0.574438.
    inputs = STUDENT_LOGITS[:1], WEAK_LOGITS[:1], TARGET[:1]

    assert_six_digits(uskd_targets(*inputs).target, [[1, 0, 0, 0, 0]])
    assert_six_digits(term("target_weight", *inputs), 0.574438)


def test_target_labels_may_be_negative_or_above_one():
    # Major: squares 0.01 and 0.64, mean 0.325: 0.9 - 0.315 = 0.585, 0.9 + 0.315 = 1.215.
    # Minor: squares 0.64 and 0.01, mean 0.325: 0.1 + 0.315 = 0.415, 0.1 - 0.315 = -0.215.
    final = logits_of([0.1, 0.8, 0.1], [0.8, 0.1, 0.1])
    labels = rows([0.9, 0.1, 0], [0.9, 0.1, 0])

    soft = uskd_targets(final, torch.zeros_like(final), labels)
    values = term("target_weight", final, torch.zeros_like(final), labels, reduction="none")

    assert_six_digits(soft.target, [0.585, 0.415, 0], [1.215, -0.215, 0])
    # 0.585 * 2.302585 + 0.415 * 0.223144; 1.215 * 0.223144 - 0.215 * 2.302585.
    assert_six_digits(values, 1.439617, -0.223936)


def test_equal_labels_the_lower_class_is_the_major_column():
    # Row 1: classes 1 (major) and 3, squares 0.01 and 0.16. Row 2: 0 (major) and 2, squares
    # 0.25 and 0.04. Means 0.13 and 0.10: 0.5 - 0.12, 0.5 + 0.06; 0.8 + 0.12, 0.2 - 0.06.
    final = logits_of([0.3, 0.1, 0.2, 0.4], [0.5, 0.2, 0.2, 0.1])
    labels = rows([0, 0.5, 0, 0.5], [0.8, 0, 0.2, 0])

    soft = uskd_targets(final, torch.zeros_like(final), labels)

    assert_six_digits(soft.target, [0, 0.38, 0, 0.56], [0.92, 0, 0.14, 0])


# Ranks


@both_rankings
@pytest.mark.parametrize("num_classes", [5, 33])
def test_equal_scores_rank_the_lower_class_first(rank_by, num_classes):
    logits = torch.zeros(1, num_classes, dtype=torch.float64)
    zipf = [0.0 if index == 2 else 1 / (index + 1) for index in range(num_classes)]

    soft = uskd_targets(logits, logits, torch.tensor([2]), rank_by=rank_by)

    assert_six_digits(soft.non_target, [[value / sum(zipf) for value in zipf]])


def test_a_target_ranked_last_leaves_the_first_ranks():
    # S falls from class 0 to 3, the target 3 is ranked 4: 1 : 1/2 : 1/3 = 6 : 3 : 2.
    final = logits_of([0.4, 0.3, 0.2, 0.1])

    soft = uskd_targets(final, torch.zeros_like(final), torch.tensor([3]))

    assert_six_digits(soft.non_target, [[6 / 11, 3 / 11, 2 / 11, 0]])


def test_the_weak_head_can_change_the_order():
    # S = (0.4, 0.35, 0.25) for the target 2; weak (0.1, 0.5, 0.4):
    # R_0 = 0.1/0.6 + 0.4/0.75 = 0.700, R_1 = 0.5/0.6 + 0.35/0.75 = 1.3,
    # R_2 = 0.4/0.6 + 0.25/0.75 = 1.0: ranks 3, 1, 2; 1/3 : 1 = 1 : 3.
    soft = uskd_targets(logits_of([0.4, 0.35, 0.25]), logits_of([0.1, 0.5, 0.4]), torch.tensor([2]))

    assert_six_digits(soft.non_target, [[0.25, 0.75, 0]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ranks_are_right_where_the_target_is_nearly_certain(dtype):
    # 1 - S_t is 0 in float32: its parts are 1e-12 (class 1) and 3e-12 (class 2). With the epsilon
    # S counts little, 1e-6 and 3e-6, and the weak head decides if it differs by more.
    final = logits_of([1, 1e-12, 3e-12, 2e-12]).to(dtype)
    uniform = torch.zeros(1, 4, dtype=dtype)
    weak = logits_of([0.4, 0.3, 0.2, 0.1]).to(dtype)
    target = torch.tensor([0])

    # Ranks 1, 4, 2, 3: 1/4 : 1/2 : 1/3 = 3 : 6 : 4, and 1, 2, 3, 4: 1/2 : 1/3 : 1/4 = 6 : 4 : 3.
    by_final = uskd_targets(final, uniform, target).non_target
    by_weak = uskd_targets(final, weak, target).non_target

    assert_six_digits(by_final.double(), [[0, 3 / 13, 6 / 13, 4 / 13]])
    assert_six_digits(by_weak.double(), [[0, 6 / 13, 4 / 13, 3 / 13]])


# No class without a label


@both_rankings
def test_two_classes_with_two_labels_have_no_non_target_term(rank_by):
    # P = V for a batch of one; S = (0.25, 0.75): 0.7 * 1.386294 + 0.3 * 0.287682 = 1.056710.
    logits = logits_of([0.25, 0.75]).requires_grad_()
    weak_logits = logits_of([0.5, 0.5])
    labels = rows([0.7, 0.3])

    soft = uskd_targets(logits, weak_logits, labels, rank_by=rank_by)
    value = uskd_loss(
        logits, weak_logits, labels, non_target_weight=9.0, weak_weight=0, rank_by=rank_by
    )
    value.backward()

    assert_six_digits(soft.non_target, [[0.0, 0.0]])
    assert_six_digits(value.detach(), 1.056710)
    assert_six_digits(logits.grad, [[0.25 - 0.7, 0.75 - 0.3]])


def test_two_classes_with_one_label_have_a_non_target_term_of_zero():
    logits = logits_of([0.25, 0.75])

    assert_six_digits(term("non_target_weight", logits, logits, torch.tensor([1])), 0.0)


def test_soft_labels_of_the_module_follow_its_ranking():
    inputs = STUDENT_LOGITS, WEAK_LOGITS, TARGET

    for rank_by in ("probability", "log_probability"):
        soft = USKDLoss(rank_by=rank_by).soft_labels(*inputs)
        expected = uskd_targets(*inputs, rank_by=rank_by)
        torch.testing.assert_close(soft.target, expected.target)
        torch.testing.assert_close(soft.non_target, expected.non_target)
