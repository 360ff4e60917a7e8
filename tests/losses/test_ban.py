"""BAN by hand in its three forms."""

from __future__ import annotations

import pytest
import torch

from shared.by_hand import assert_six_digits, logits_of, rows
from softlabels.losses.ban import BANLoss
from softlabels.losses.kd import kd_loss

FORMS = ("plain", "confidence_weighted", "permuted")
TARGET = torch.tensor([1, 0])


def logits(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_plain_by_hand_is_kd_at_temperature_one():
    # p = (1/2, 1/4, 1/4), q = (1/4, 1/4, 1/2): 1/2 ln 2 + 0 + 1/4 ln(1/2) = 1/4 ln 2 = 0.173287.
    student, teacher = logits_of([0.25, 0.25, 0.5]), logits_of([0.5, 0.25, 0.25])

    assert_six_digits(BANLoss()(student, teacher), 0.173287)
    assert BANLoss()(student, teacher) == kd_loss(student, teacher, temperature=1.0)


def test_plain_has_the_gradient_of_the_papers_cross_entropy():
    student, teacher = logits(4, 5).requires_grad_(), logits(4, 5, seed=1)

    BANLoss()(student, teacher).backward()

    torch.testing.assert_close(student.grad, (student.softmax(1) - teacher.softmax(1)).detach() / 4)


def test_confidence_weighted_by_hand():
    # Confidences 1/2 and 3/4 have the mean 5/8, so that the weights are 0.8 and 1.2.
    # Labels at q = 1/4 and 1/8: 0.8 ln 4 = 1.109035, 1.2 ln 8 = 2.495330; mean 1.802183.
    # The second teacher is sure of a wrong class, which counts as well.
    student = logits_of([0.25, 0.25, 0.5], [0.125, 0.5, 0.375])
    teacher = logits_of([0.5, 0.25, 0.25], [0.125, 0.75, 0.125])
    form = "confidence_weighted"

    each = BANLoss(form=form, reduction="none")(student, teacher, TARGET)

    assert_six_digits(each, 1.109035, 2.495330)
    assert_six_digits(BANLoss(form=form)(student, teacher, TARGET), 1.802183)


def test_confidence_weighted_with_mixed_labels():
    # One sample has the weight 1: 3/4 ln 4 + 1/4 ln 2 = 1.213008.
    student, teacher = logits_of([0.25, 0.25, 0.5]), logits_of([0.5, 0.25, 0.25])

    loss = BANLoss(form="confidence_weighted")(student, teacher, rows([0, 0.75, 0.25]))

    assert_six_digits(loss, 1.213008)


def test_permuted_by_hand():
    # phi(p) keeps 1/2 at class 0; 3/8, 1/8, 0 come in any of 6 orders. With q = (1/2, 1/4, 1/8,
    # 1/8), in bits 1, 2, 3, 3, the cross-entropy is 1/2 + 2 a + 3 (1/2 - a) = 2 - a bits for the
    # mass a at class 1. Less the entropy of phi, 1/2 + 0.530639 + 3/8 = 1.405639 bits, this is
    # 0.219361, 0.469361, 0.594361 for a = 3/8, 1/8, 0, twice each; times ln 2: 0.152049,
    # 0.325336, 0.411980 nats.
    student = logits_of([0.5, 0.25, 0.125, 0.125]).expand(600, 4)
    teacher = logits_of([0.5, 0.125, 0.375, 1e-12]).expand(600, 4)
    torch.manual_seed(0)

    each = BANLoss(form="permuted", reduction="none")(student, teacher)

    for value in (0.152049, 0.325336, 0.411980):
        assert abs(int(((each - value).abs() < 2e-6).sum()) - 200) < 50


def test_permuted_keeps_the_largest_and_every_value():
    teacher = logits(40, 6)
    torch.manual_seed(1)

    label = BANLoss(form="permuted").soft_labels(teacher, teacher, target=teacher.argmax(1))

    largest = teacher.softmax(1).amax(1)
    torch.testing.assert_close(label.target.sum(1), largest)
    shuffled = label.non_target * (1 - largest).unsqueeze(1)
    expected = teacher.softmax(1).sort(1).values[:, :-1]
    torch.testing.assert_close(shuffled.sort(1).values[:, 1:], expected)
    assert (shuffled - teacher.softmax(1)).abs().amax(1).gt(1e-3).sum() > 35


@pytest.mark.parametrize("form", FORMS)
def test_the_teacher_gets_no_gradient_and_extremes_stay_finite(form):
    student = torch.tensor([[1e4, 0.0, -1e4], [0.0, 0.0, 0.0]]).half().requires_grad_()
    teacher = torch.tensor([[-1e4, 1e4, 0.0], [0.0, 0.0, 0.0]]).half().requires_grad_()

    loss = BANLoss(form=form)(student, teacher, TARGET)
    loss.backward()

    assert loss.dtype == torch.float32
    assert loss.isfinite()
    assert student.grad.isfinite().all()
    assert teacher.grad is None


def test_weighted_labels_are_the_soft_labels():
    teacher = logits_of([0.5, 0.25, 0.25], [0.125, 0.75, 0.125])

    soft = BANLoss(form="confidence_weighted").soft_labels(teacher, teacher, TARGET)

    assert_six_digits(soft.target, [0, 0.8, 0], [1.2, 0, 0])
    assert (soft.non_target == 0).all()


def test_errors_say_what_was_got():
    good = logits(2, 4)
    with pytest.raises(ValueError, match=r"form must be one of 'plain', .* got 'other'"):
        BANLoss(form="other")
    with pytest.raises(ValueError, match="'confidence_weighted' needs a target, got none"):
        BANLoss(form="confidence_weighted")(good, good)
    with pytest.raises(ValueError, match=r"teacher_logits must have the shape of logits \(2, 4\)"):
        BANLoss(form="permuted")(good, good[:, :3])
    with pytest.raises(TypeError, match="teacher_logits must be a floating-point tensor"):
        BANLoss(form="permuted")(good, good.long())
    with pytest.raises(ValueError, match=r"target must lie in \[0, 4\)"):
        BANLoss(form="confidence_weighted")(good, good, torch.tensor([4, 0]))
    with pytest.raises(ValueError, match="reads no labels"):
        BANLoss(form="permuted", ignore_index=9)


def test_labels_are_an_input_only_where_they_are_learned_from():
    assert {form for form in FORMS if "target" in BANLoss(form=form).inputs} == {
        "confidence_weighted"
    }


def test_ignored_samples_count_neither_in_the_loss_nor_in_the_mean_confidence():
    student, teacher = logits(3, 4), 3 * logits(3, 4, seed=1)
    target, kept = torch.tensor([1, 9, 0]), torch.tensor([0, 2])
    method = BANLoss(form="confidence_weighted", ignore_index=9)
    of_kept = student[kept], teacher[kept], target[kept]

    torch.testing.assert_close(
        method(student, teacher, target), BANLoss(form="confidence_weighted")(*of_kept)
    )
    label = method.soft_labels(student, teacher, target).target
    expected = BANLoss(form="confidence_weighted").soft_labels(*of_kept).target
    torch.testing.assert_close(label[kept], expected)
