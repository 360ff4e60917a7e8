"""Tf-KD with an earlier run as teacher: the vectors of the published code, and by hand."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from shared.by_hand import STUDENT_LOGITS, TARGET, TEACHER_LOGITS, logits_of
from shared.golden_vectors import assert_close, cases_of
from softlabels.losses.kd import KDLoss, kd_loss
from softlabels.losses.tf_kd_self import TfKDSelfLoss


def test_values_and_gradients_of_the_published_code():
    cases = cases_of("tf_kd_self")
    assert len(cases) == 3
    for case in cases:
        student = case["student_logits"].requires_grad_()
        teacher = case["teacher_logits"].requires_grad_()
        alpha = case["alpha"]
        method = TfKDSelfLoss(
            temperature=float(case["temperature"]), multiplier=float(case["multiplier"])
        )
        term = method(student, teacher)
        task = functional.cross_entropy(student, case["target"])
        whole = (1 - alpha) * task + alpha * term
        whole.backward()

        assert_close(term, case["multiplier"] * case["kl_element_mean_scaled"])
        assert_close(whole, case["loss"])
        assert_close(student.grad, case["grad_student_logits"])
        assert teacher.grad is None


def test_the_recommended_weights_are_the_published_ones():
    alphas = {float(case["alpha"]) for case in cases_of("tf_kd_self")}
    defaults = TfKDSelfLoss.defaults
    assert defaults.weight in alphas
    assert defaults.task_weight == pytest.approx(1 - defaults.weight)


def test_one_sample_by_hand():
    # Square roots of T (16 : 1 : 1) are 4 : 1 : 1, of S (1 : 1 : 16) are 1 : 1 : 4.
    # (4 ln 4 + 1 ln 1 - 1 ln 4) / 6 = ln 2 = 0.693147; times 2^2 * 6 / 3 classes = 5.545177.
    method = TfKDSelfLoss(temperature=2.0, multiplier=6.0)
    value = method(logits_of([1, 1, 16]), logits_of([16, 1, 1]))

    assert float(value) == pytest.approx(5.545177, abs=1e-6)


def test_a_multiplier_of_the_classes_gives_kd():
    value = TfKDSelfLoss(temperature=3.0, multiplier=5.0)(STUDENT_LOGITS, TEACHER_LOGITS)

    assert_close(value, kd_loss(STUDENT_LOGITS, TEACHER_LOGITS, temperature=3.0))


def test_half_precision_is_computed_in_float32():
    student = STUDENT_LOGITS.half().requires_grad_()

    loss = TfKDSelfLoss()(student, TEACHER_LOGITS.half())
    loss.backward()

    assert loss.dtype == torch.float32
    assert torch.equal(loss, TfKDSelfLoss()(student.float(), TEACHER_LOGITS.half()))
    assert bool(torch.isfinite(student.grad).all())


def test_the_soft_labels_are_the_teachers():
    method = TfKDSelfLoss(temperature=2.0, multiplier=7.0)

    soft = method.soft_labels(STUDENT_LOGITS, TEACHER_LOGITS, TARGET)

    expected = KDLoss(temperature=2.0).soft_labels(STUDENT_LOGITS, TEACHER_LOGITS, TARGET)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(soft, expected, strict=True))


def test_logits_of_another_shape_are_refused():
    with pytest.raises(ValueError, match="teacher_logits must have the shape of logits"):
        TfKDSelfLoss()(STUDENT_LOGITS, TEACHER_LOGITS[:, :4])
