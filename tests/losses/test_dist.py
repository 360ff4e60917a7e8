"""DIST: the vectors of the published code, a second witness, and its corner cases."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from shared.by_hand import STUDENT_LOGITS, TARGET, TEACHER_LOGITS
from shared.golden_vectors import assert_close, cases_of
from shared.terms import loss_and_terms
from softlabels.losses.dist import DISTLoss
from softlabels.losses.kd import KDLoss


@pytest.mark.parametrize("squared", [True, False])
def test_values_and_gradients_of_the_published_code(squared):
    cases = cases_of("dist")
    assert len(cases) == 4
    kind = "" if squared else "without_temperature_squared_"
    for case in cases:
        student = case["student_logits"].requires_grad_()
        teacher = case["teacher_logits"].requires_grad_()
        output = loss_and_terms(
            DISTLoss(
                inter_weight=float(case["beta"]),
                intra_weight=float(case["gamma"]),
                temperature=float(case["temperature"]),
                temperature_squared=squared,
            ),
            student,
            teacher,
        )
        output.loss.backward()

        factor = case["temperature"] ** 2 if squared else 1.0
        assert_close(output.loss, case["loss" if squared else "loss_without_temperature_squared"])
        assert_close(output.terms["inter"], factor * case["beta"] * case["inter"])
        assert_close(output.terms["intra"], factor * case["gamma"] * case["intra"])
        assert_close(student.grad, case[f"grad_{kind}student_logits"])
        assert teacher.grad is None


def test_correlations_of_numpy():
    drawn = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0)).double()
    student, teacher = (rows.numpy() for rows in (drawn / 2).softmax(2))
    of_samples = [np.corrcoef(student[b], teacher[b])[0, 1] for b in range(5)]
    of_classes = [np.corrcoef(student[:, c], teacher[:, c])[0, 1] for c in range(3)]
    expected = 4 * (1.5 * (1 - np.mean(of_samples)) + 0.5 * (1 - np.mean(of_classes)))

    value = DISTLoss(inter_weight=1.5, intra_weight=0.5, temperature=2.0)(*drawn)

    # Not closer: 1e-8 is added to the product of norms.
    assert float(value) == pytest.approx(expected, rel=1e-6)


def test_equal_networks_have_no_loss():
    value = DISTLoss()(TEACHER_LOGITS, TEACHER_LOGITS)

    # All but what 1e-8 beside the product of norms leaves.
    assert abs(float(value)) < 1e-5


def test_a_class_that_hardly_varies_counts_as_uncorrelated():
    # Its probabilities are about 1e-6 and 2e-6: the product of norms is 5e-13.
    logits = torch.tensor([[0.0, 0.0, -13.8], [0.0, 0.0, -13.1]]).double()

    parts = loss_and_terms(DISTLoss(), logits, logits).terms

    assert float(parts["intra"]) > 0.99


def test_a_batch_of_one_has_no_relation_within_classes():
    logits = STUDENT_LOGITS[:1].clone().requires_grad_()

    output = loss_and_terms(DISTLoss(), logits, TEACHER_LOGITS[:1])
    (of_intra,) = torch.autograd.grad(output.terms["intra"], logits, retain_graph=True)
    (of_inter,) = torch.autograd.grad(output.terms["inter"], logits)

    assert float(output.terms["intra"].detach()) == 1
    assert not of_intra.any()
    assert bool(of_inter.any())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_constant_certain_and_extreme_logits_are_finite(dtype):
    largest = 1e4 if dtype == torch.float16 else 1e30
    steps = largest * torch.tensor([[1.0, 0.0, -1.0]] * 2)
    for student in (steps, torch.zeros(2, 3), torch.full((2, 3), 7.5)):
        for teacher in (steps, steps.flip(1), torch.zeros(2, 3)):
            logits = student.to(dtype).requires_grad_()
            loss = DISTLoss()(logits, teacher.to(dtype))
            loss.backward()

            assert loss.dtype == torch.float32
            assert bool(torch.isfinite(loss))
            assert bool(torch.isfinite(logits.grad).all())


def test_the_module_computes_the_function_and_shows_the_teacher():
    settings = {
        "inter_weight": 2.0,
        "intra_weight": 0.5,
        "temperature": 3.0,
        "temperature_squared": False,
    }
    module = DISTLoss(**settings)

    output = loss_and_terms(module, STUDENT_LOGITS, TEACHER_LOGITS)
    soft = module.soft_labels(STUDENT_LOGITS, TEACHER_LOGITS, TARGET)

    expected = DISTLoss(**settings)(STUDENT_LOGITS, TEACHER_LOGITS)
    assert torch.equal(module(STUDENT_LOGITS, TEACHER_LOGITS), expected)
    assert torch.equal(output.loss, expected)
    assert list(output.terms) == ["inter", "intra"]
    of_kd = KDLoss(temperature=3.0).soft_labels(STUDENT_LOGITS, TEACHER_LOGITS, TARGET)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(soft, of_kd, strict=True))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"inter_weight": -1.0}, ValueError, "inter_weight must be finite, 0 or more"),
        ({"intra_weight": float("inf")}, ValueError, "intra_weight must be finite, 0 or more"),
        ({"temperature": 0.0}, ValueError, "temperature must be finite, above 0"),
        ({"temperature_squared": 2}, TypeError, "temperature_squared must be True or False"),
    ],
)
def test_wrong_settings_are_refused(change, error, message):
    with pytest.raises(error, match=message):
        DISTLoss(**change)(STUDENT_LOGITS, TEACHER_LOGITS)
    with pytest.raises(error, match=message):
        DISTLoss(**change)


def test_logits_of_another_shape_are_refused():
    with pytest.raises(ValueError, match="teacher_logits must have the shape of logits"):
        DISTLoss()(STUDENT_LOGITS, TEACHER_LOGITS[:, :4])
