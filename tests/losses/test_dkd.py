"""DKD: the vectors of the published code, a second witness, and its corner cases."""

from __future__ import annotations

import pytest
import torch

from shared.by_hand import (
    MIXED_TARGET,
    STUDENT_LOGITS,
    TARGET,
    TEACHER_LOGITS,
    assert_six_digits,
    logits_of,
    rows,
)
from shared.golden_vectors import assert_close, cases_of
from shared.terms import loss_and_terms
from softlabels.losses.dkd import DKDLoss


def logits(batch_size=4, num_classes=6, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(2, batch_size, num_classes, generator=generator, dtype=torch.float64)
    return (3 * drawn).to(dtype).unbind()


def test_values_and_gradients_of_the_published_code():
    cases = cases_of("dkd")
    assert len(cases) == 8
    for case in cases:
        student = case["student_logits"].requires_grad_()
        teacher = case["teacher_logits"].requires_grad_()
        loss = DKDLoss(
            target_weight=float(case["alpha"]),
            non_target_weight=float(case["beta"]),
            temperature=float(case["temperature"]),
        )(student, teacher, case["target"])
        loss.backward()

        assert_close(loss, case["loss"])
        assert_close(student.grad, case["grad_student_logits"])
        assert teacher.grad is None


def test_the_shared_vectors():
    at_four = loss_and_terms(DKDLoss(), STUDENT_LOGITS, TEACHER_LOGITS, TARGET)
    at_one = DKDLoss(temperature=1.0, non_target_weight=0.5)(STUDENT_LOGITS, TEACHER_LOGITS, TARGET)

    assert_six_digits(at_four.loss, 1.558960)
    assert_six_digits(at_four.terms["target"], 0.074803)
    assert_six_digits(at_one, 0.124002)


@pytest.mark.parametrize("mixed_target", ["largest", "all"])
def test_mixed_labels_against_sums_of_probabilities(mixed_target):
    temperature = 2.0
    expected = 0.0
    softened = [(given / temperature).softmax(1) for given in (STUDENT_LOGITS, TEACHER_LOGITS)]
    for row, label in enumerate(MIXED_TARGET):
        kept = label < (label.max() if mixed_target == "largest" else 1e-9)
        student, teacher = (shares[row] for shares in softened)
        for weight, s, t in (
            (3.0, torch.stack((student[~kept].sum(), student[kept].sum())), None),
            (0.7, student[kept] / student[kept].sum(), teacher[kept] / teacher[kept].sum()),
        ):
            if t is None:
                t = torch.stack((teacher[~kept].sum(), teacher[kept].sum()))
            expected += weight * temperature**2 * float((t * (t / s).log()).sum()) / 2

    value = DKDLoss(
        target_weight=3.0, non_target_weight=0.7, temperature=temperature, mixed_target=mixed_target
    )(STUDENT_LOGITS, TEACHER_LOGITS, MIXED_TARGET)

    assert float(value) == pytest.approx(expected, rel=1e-12)


def test_equal_networks_have_no_loss_and_no_gradient():
    student, _ = logits()
    student.requires_grad_()

    loss = DKDLoss()(student, student.detach(), torch.tensor([0, 1, 5, 2]))
    loss.backward()

    assert float(loss.detach()) == 0
    assert float(student.grad.abs().max()) < 1e-14


def test_the_non_target_part_knows_nothing_of_the_target_logit():
    student, teacher = logits()
    target = torch.tensor([0, 1, 5, 2])
    changed = student.scatter_add(1, target.unsqueeze(1), torch.full((4, 1), 50.0).double())

    def part(given):
        return loss_and_terms(DKDLoss(), given, teacher, target).terms["non_target"]

    assert_close(part(changed), part(student))


def test_two_classes_leave_nothing_to_the_non_target_part():
    student, teacher = logits(3, 2)
    output = loss_and_terms(DKDLoss(), student, teacher, torch.tensor([0, 1, 1]))

    assert float(output.terms["non_target"]) == 0
    assert float(output.terms["target"]) > 0


def test_parts_reductions_and_ignored_samples():
    student, teacher = logits()
    target = torch.tensor([0, -1, 5, 2])
    kept = target >= 0

    none = loss_and_terms(DKDLoss(ignore_index=-1, reduction="none"), student, teacher, target)
    alone = DKDLoss(reduction="none")(student[kept], teacher[kept], target[kept])

    assert_close(none.loss[kept], alone)
    assert float(none.loss[1]) == 0
    assert_close(sum(none.terms.values()), none.loss)
    for reduction, expected in (("mean", alone.mean()), ("sum", alone.sum())):
        value = DKDLoss(ignore_index=-1, reduction=reduction)(student, teacher, target)
        assert_close(value, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("num_classes", [2, 5])
def test_certain_and_extreme_logits_are_finite(dtype, num_classes):
    signs = torch.ones(3, num_classes)
    signs[:, 0] = -1
    largest = 1e4 if dtype == torch.float16 else 1e30
    for student_sign, teacher_sign in ((1, 1), (1, -1), (-1, 1), (0, 1)):
        student = (student_sign * largest * signs).to(dtype).requires_grad_()
        teacher = (teacher_sign * largest * signs).to(dtype)
        loss = DKDLoss()(student, teacher, torch.tensor([0, 1, 1]))
        loss.backward()

        assert loss.dtype == torch.float32
        assert bool(torch.isfinite(loss))
        assert bool(torch.isfinite(student.grad).all())


def test_the_module_computes_the_function():
    student, teacher = logits()
    target = rows(*[[0.3, 0.7, 0, 0, 0, 0]] * 4)
    settings = {
        "target_weight": 2.0,
        "non_target_weight": 0.5,
        "temperature": 1.5,
        "mixed_target": "all",
        "reduction": "sum",
    }
    module = DKDLoss(**settings)

    assert torch.equal(
        module(student, teacher, target), DKDLoss(**settings)(student, teacher, target)
    )
    parts = loss_and_terms(module, student, teacher, target).terms
    assert list(parts) == ["target", "non_target"]
    assert float(DKDLoss(non_target_weight=0.0)(student, teacher, target)) == pytest.approx(
        float(loss_and_terms(DKDLoss(), student, teacher, target).terms["target"])
    )


def test_soft_labels_are_the_two_parts_of_the_softened_teacher():
    teacher_logits = logits_of([16, 4, 1, 1])
    mixed = rows([0.7, 0, 0.3, 0])

    soft = DKDLoss(temperature=2.0).soft_labels(teacher_logits, teacher_logits, mixed)
    both = DKDLoss(temperature=2.0, mixed_target="all").soft_labels(
        teacher_logits, teacher_logits, mixed
    )

    # Square roots: 4, 2, 1, 1, which sum to 8.
    torch.testing.assert_close(soft.target, rows([0.5, 0, 0, 0]))
    torch.testing.assert_close(soft.non_target, rows([0, 0.5, 0.25, 0.25]))
    torch.testing.assert_close(both.target, rows([0.5, 0, 0.125, 0]))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"temperature": 0.0}, ValueError, "temperature must be finite, above 0"),
        ({"target_weight": -1.0}, ValueError, "target_weight must be finite, 0 or more"),
        ({"non_target_weight": "1"}, TypeError, "non_target_weight must be a number"),
        ({"mixed_target": "two"}, ValueError, "mixed_target must be one of"),
        ({"reduction": "max"}, ValueError, "reduction must be one of"),
        ({"ignore_index": 1.0}, TypeError, "ignore_index must be a whole number"),
    ],
)
def test_wrong_settings_are_refused(change, error, message):
    student, teacher = logits()
    with pytest.raises(error, match=message):
        DKDLoss(**change)(student, teacher, torch.tensor([0, 1, 5, 2]))
    with pytest.raises(error, match=message):
        DKDLoss(**change)


def test_wrong_inputs_are_refused():
    student, teacher = logits()
    target = torch.tensor([0, 1, 5, 2])
    with pytest.raises(ValueError, match="teacher_logits must have the shape of logits"):
        DKDLoss()(student, teacher[:, :5], target)
    with pytest.raises(ValueError, match="target must lie in"):
        DKDLoss()(student, teacher, target + 1)
    with pytest.raises(ValueError, match="label for every class"):
        DKDLoss(mixed_target="all")(student, teacher, torch.full((4, 6), 1 / 6))
