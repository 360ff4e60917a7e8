"""KD by hand: the shared vectors."""

from __future__ import annotations

import pytest
import torch

from shared.by_hand import STUDENT_LOGITS, TEACHER_LOGITS, assert_six_digits, logits_of, rows
from softlabels.losses import KDLoss, kd_loss


@pytest.mark.parametrize(
    ("temperature", "divergence", "cross_entropy"),
    [(1.0, 0.097673, 1.075084), (4.0, 0.202310, 25.072085)],
)
def test_the_shared_vectors(temperature, divergence, cross_entropy):
    value = kd_loss(STUDENT_LOGITS, TEACHER_LOGITS, temperature=temperature)

    # The cross-entropy form is the divergence plus the entropy of the teacher.
    softened = (TEACHER_LOGITS / temperature).softmax(1)
    entropy = -(softened * softened.log()).sum(1).mean()
    assert_six_digits(value, divergence)
    assert_six_digits(value + temperature**2 * entropy, cross_entropy)


def test_one_sample_at_temperature_one():
    # T = (1/2, 1/4, 1/4), S = (1/4, 1/4, 1/2): 1/2 ln 2 + 0 + 1/4 ln(1/2) = 1/4 ln 2 = 0.173287.
    value = kd_loss(logits_of([0.25, 0.25, 0.5]), logits_of([0.5, 0.25, 0.25]), temperature=1.0)

    assert_six_digits(value, 0.173287)


def test_one_sample_at_temperature_two_with_its_square():
    # Square roots of T (16 : 1 : 1) are 4 : 1 : 1, of S (1 : 1 : 16) are 1 : 1 : 4.
    # (4 ln 4 + 1 ln 1 - 1 ln 4) / 6 = ln 2 = 0.693147; times 2^2 = 2.772589.
    value = kd_loss(logits_of([1, 1, 16]), logits_of([16, 1, 1]), temperature=2.0)

    assert_six_digits(value, 2.772589)


def test_soft_labels_are_the_softened_teacher_split_at_the_labels():
    # At temperature 2: (4, 2, 1, 1) / 8.
    teacher_logits = logits_of([16, 4, 1, 1])
    module = KDLoss(temperature=2.0)

    one = module.soft_labels(torch.zeros(1, 4), teacher_logits, torch.tensor([1]))
    two = module.soft_labels(torch.zeros(1, 4), teacher_logits, rows([0.7, 0, 0.3, 0]))

    assert_six_digits(one.target, [[0, 0.25, 0, 0]])
    assert_six_digits(one.non_target, [[4 / 6, 0, 1 / 6, 1 / 6]])
    assert_six_digits(two.target, [[0.5, 0, 0.125, 0]])
    assert_six_digits(two.non_target, [[0, 2 / 3, 0, 1 / 3]])


def test_a_teacher_beyond_the_students_range_gives_no_nan():
    # In float32 its second class is impossible, so T = (1/2, 0, 1/2) and S = (1/3, 1/3, 1/3).
    teacher_logits = torch.tensor([[0.0, -1e300, 0.0]], dtype=torch.float64)

    value = kd_loss(torch.zeros(1, 3), teacher_logits, temperature=1.0)

    assert_six_digits(value.double(), 0.405465)  # ln 3 - ln 2
