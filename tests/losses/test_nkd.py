"""NKD by hand: the shared vectors, and mixed labels."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from shared.by_hand import (
    MIXED_TARGET,
    STUDENT_LOGITS,
    TARGET,
    TEACHER_LOGITS,
    assert_six_digits,
    logits_of,
    rows,
)
from softlabels.losses import NKDLoss, nkd_loss

# S and T of one sample with three labels. -ln 0.4 = 0.916291, -ln 0.3 = 1.203973,
# -ln 0.1 = 2.302585, -ln 0.6 = 0.510826.
STUDENT = logits_of([0.4, 0.3, 0.1, 0.12, 0.08])
TEACHER = logits_of([0.3, 0.2, 0.1, 0.3, 0.1])
THREE_LABELS = rows([0.5, 0.3, 0.2, 0, 0])


def terms(temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """The target term, and the non-target term with its squared temperature."""

    def value(weight: float) -> Tensor:
        return nkd_loss(
            STUDENT_LOGITS,
            TEACHER_LOGITS,
            TARGET,
            temperature=temperature,
            non_target_weight=weight,
        )

    return value(0), value(1) - value(0)


@pytest.mark.parametrize(
    ("temperature", "weight", "target_term", "non_target_term", "total"),
    [(1.0, 1.5, 0.382463, 1.125758, 2.071100), (3.0, 3.5, 0.382463, 12.098847, 42.728428)],
)
def test_the_shared_vectors(temperature, weight, target_term, non_target_term, total):
    value = nkd_loss(
        STUDENT_LOGITS,
        TEACHER_LOGITS,
        TARGET,
        temperature=temperature,
        non_target_weight=weight,
    )

    assert_six_digits(terms(temperature)[0], target_term)
    assert_six_digits(terms(temperature)[1], non_target_term)
    assert_six_digits(value, total)


def test_three_labels_all_of_them_targets():
    # Target: 0.3 * 0.916291 + 0.2 * 1.203973 + 0.1 * 2.302585 = 0.745941.
    # Others: N(T) = (3/4, 1/4), N(S) = (0.6, 0.4): 0.75 * 0.510826 + 0.25 * 0.916291 = 0.612192.
    # 0.745941 + 1.5 * 0.612192 = 1.664229.
    value = nkd_loss(STUDENT, TEACHER, THREE_LABELS, mixed_target="all")

    assert_six_digits(value, 1.664229)


def test_three_labels_the_largest_is_the_target():
    # Target: 0.3 * 0.916291 = 0.274887. Others, classes 1 to 4: N(T) = (2, 1, 3, 1) / 7,
    # N(S) = (1/2, 1/6, 1/5, 2/15), whose -ln are 0.693147, 1.791759, 1.609438, 2.014903:
    # (2 * 0.693147 + 1.791759 + 3 * 1.609438 + 2.014903) / 7 = 1.431610.
    # 0.274887 + 1.5 * 1.431610 = 2.422302.
    value = nkd_loss(STUDENT, TEACHER, THREE_LABELS, mixed_target="largest")

    assert_six_digits(value, 2.422302)


def test_the_size_of_labels_does_not_matter_only_which_classes_have_one():
    other_sizes = rows([0.1, 0.1, 0.8, 0, 0])

    value = nkd_loss(STUDENT, TEACHER, other_sizes, mixed_target="all")

    assert_six_digits(value, 1.664229)


def test_a_row_with_one_label_among_mixed_ones_is_a_plain_label():
    mixed = torch.cat((MIXED_TARGET[:1], rows([0, 0, 0, 1, 0])))

    for mixed_target in ("largest", "all"):
        settings = {"mixed_target": mixed_target, "reduction": "none"}
        value = nkd_loss(STUDENT_LOGITS, TEACHER_LOGITS, mixed, **settings)
        plain = nkd_loss(STUDENT_LOGITS, TEACHER_LOGITS, TARGET, **settings)
        both = nkd_loss(STUDENT_LOGITS, TEACHER_LOGITS, MIXED_TARGET, **settings)

        torch.testing.assert_close(value, torch.stack((both[0], plain[1])))


def test_by_default_the_largest_label_is_the_target():
    # The largest labels of MIXED_TARGET are TARGET, so this is the shared vector again.
    assert_six_digits(nkd_loss(STUDENT_LOGITS, TEACHER_LOGITS, MIXED_TARGET), 2.071100)


def test_equal_labels_the_lower_class_is_the_target():
    equal = rows([0, 0.25, 0, 0.25, 0.5], [0, 0.5, 0, 0.5, 0])

    value = nkd_loss(STUDENT_LOGITS, TEACHER_LOGITS, equal)

    expected = nkd_loss(STUDENT_LOGITS, TEACHER_LOGITS, torch.tensor([4, 1]))
    torch.testing.assert_close(value, expected)


def test_two_classes_leave_only_the_target_term():
    # One wrong class has all of the non-target mass on both sides: its term is -1 * ln 1 = 0.
    # 0.6 * -ln 0.25 = 0.6 * 1.386294 = 0.831777.
    value = nkd_loss(logits_of([0.25, 0.75]), logits_of([0.6, 0.4]), torch.tensor([0]))

    assert_six_digits(value, 0.831777)


def test_if_every_class_has_a_label_there_is_no_non_target_term():
    # T = (0.6, 0.4), S = (0.25, 0.75): 0.6 * 1.386294 + 0.4 * 0.287682 = 0.946850.
    logits = logits_of([0.25, 0.75]).requires_grad_()

    value = nkd_loss(logits, logits_of([0.6, 0.4]), rows([0.5, 0.5]), mixed_target="all")
    value.backward()

    assert_six_digits(value.detach(), 0.946850)
    assert_six_digits(logits.grad, [[0.25 - 0.6, 0.75 - 0.4]])


def test_soft_labels_are_the_teachers_probabilities():
    soft = NKDLoss(mixed_target="all").soft_labels(STUDENT, TEACHER, THREE_LABELS)

    assert_six_digits(soft.target, [[0.3, 0.2, 0.1, 0, 0]])
    assert_six_digits(soft.non_target, [[0, 0, 0, 0.75, 0.25]])


def test_soft_labels_take_the_temperature_for_the_wrong_classes_only():
    # T = (0.5, 0.4, 0.1); at temperature 2 the wrong classes are sqrt(0.4) : sqrt(0.1) = 2 : 1.
    teacher_logits = logits_of([0.5, 0.4, 0.1])

    soft = NKDLoss(temperature=2.0).soft_labels(
        torch.zeros_like(teacher_logits), teacher_logits, torch.tensor([0])
    )

    assert_six_digits(soft.target, [[0.5, 0, 0]])
    assert_six_digits(soft.non_target, [[0, 2 / 3, 1 / 3]])
