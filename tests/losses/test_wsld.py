"""WSLD: the vectors of the published code, a second witness, and its corner cases."""

from __future__ import annotations

import math

import pytest
import torch

from shared.by_hand import STUDENT_LOGITS, TARGET, TEACHER_LOGITS
from shared.golden_vectors import assert_close, cases_of
from softlabels.losses.kd import KDLoss
from softlabels.losses.wsld import WSLDLoss


def test_values_and_gradients_of_the_published_code():
    cases = cases_of("wsld")
    assert len(cases) == 8
    for case in cases:
        student = case["student_logits"].requires_grad_()
        teacher = case["teacher_logits"].requires_grad_()
        assert float(case["alpha"]) == WSLDLoss.defaults.weight
        module = WSLDLoss(temperature=float(case["temperature"]))
        loss = WSLDLoss.defaults.weight * module(student, teacher, case["target"])
        loss.backward()

        assert_close(loss, case["loss"])
        assert_close(student.grad, case["grad_student_logits"])
        assert teacher.grad is None


def loop(student, teacher, labels, temperature):
    """Sample by sample, in Python's own numbers."""

    def softmax(row, temperature=1.0):
        powers = [math.exp(value / temperature) for value in row]
        return [power / sum(powers) for power in powers]

    losses = []
    for s, t, label in zip(student.tolist(), teacher.tolist(), labels.tolist(), strict=True):
        of_student, of_teacher = (
            -sum(value * math.log(p) for value, p in zip(label, softmax(row), strict=True))
            for row in (s, t)
        )
        weight = 1 - math.exp(-of_student / (of_teacher + 1e-7))
        pairs = zip(softmax(t, temperature), softmax(s, temperature), strict=True)
        losses.append(temperature**2 * weight * -sum(p * math.log(q) for p, q in pairs))
    return torch.tensor(losses, dtype=torch.float64)


@pytest.mark.parametrize("mixed", [False, True])
def test_a_loop_over_samples(mixed):
    drawn = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(1)).double()
    student, teacher = 2 * drawn
    target = torch.tensor([6, 0, 2, 2, 5])
    labels = torch.nn.functional.one_hot(target, 7).double()
    if mixed:
        labels = target = 0.6 * labels + 0.4 * labels.roll(1, 1)

    value = WSLDLoss(temperature=3.0, reduction="none")(student, teacher, target)

    assert_close(value, loop(student, teacher, labels, 3.0))


def test_a_student_ahead_of_its_teacher_learns_little():
    # Cross-entropy of the labels: almost 0 for a sure student, 10 and more for the teacher.
    sure = torch.tensor([[20.0, 0.0, 0.0]])
    wrong = torch.tensor([[0.0, 10.0, 0.0]])
    label = torch.tensor([0])

    ahead = WSLDLoss()(sure, wrong, label)
    behind = WSLDLoss()(wrong, sure, label)

    assert float(ahead) < 1e-6
    # The teacher's loss is almost 0, so that the weight is 1: what is left is KD's cross-entropy.
    believed = (sure / 4).softmax(1)
    plain = -16 * (believed * (wrong / 4).log_softmax(1)).sum()
    torch.testing.assert_close(behind, plain)


def test_reductions_and_ignored_samples():
    target = torch.tensor([0, 9])
    none = WSLDLoss(ignore_index=9, reduction="none")(STUDENT_LOGITS, TEACHER_LOGITS, target)
    alone = WSLDLoss()(STUDENT_LOGITS[:1], TEACHER_LOGITS[:1], target[:1])
    mean = WSLDLoss(ignore_index=9)(STUDENT_LOGITS, TEACHER_LOGITS, target)

    assert_close(none, torch.stack((alone, torch.zeros_like(alone))))
    assert_close(mean, alone)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_certain_and_extreme_logits_are_finite(dtype):
    largest = 1e4 if dtype == torch.float16 else 1e30
    row = torch.tensor([[largest, 0.0, -largest]])
    for teacher in (row, -row, torch.zeros(1, 3)):
        for target in ([0], [2]):
            student = row.to(dtype).requires_grad_()
            loss = WSLDLoss()(student, teacher.to(dtype), torch.tensor(target))
            loss.backward()

            assert loss.dtype == torch.float32
            assert bool(torch.isfinite(loss))
            assert bool(torch.isfinite(student.grad).all())


def test_the_module_computes_the_function_and_shows_the_teacher():
    settings = {"temperature": 2.0, "ignore_index": 9, "reduction": "sum"}
    module = WSLDLoss(**settings)
    target = torch.tensor([0, 9])

    value = module(STUDENT_LOGITS, TEACHER_LOGITS, target)
    soft = module.soft_labels(STUDENT_LOGITS, TEACHER_LOGITS, TARGET)

    assert torch.equal(value, WSLDLoss(**settings)(STUDENT_LOGITS, TEACHER_LOGITS, target))
    expected = KDLoss(temperature=2.0).soft_labels(STUDENT_LOGITS, TEACHER_LOGITS, TARGET)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(soft, expected, strict=True))
    ignored = module.soft_labels(STUDENT_LOGITS, TEACHER_LOGITS, target)
    assert torch.equal(ignored.target[0], soft.target[0])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"temperature": -1.0}, ValueError, "temperature must be finite, above 0"),
        ({"reduction": "max"}, ValueError, "reduction must be one of"),
        ({"ignore_index": "9"}, TypeError, "ignore_index must be a whole number"),
    ],
)
def test_wrong_settings_are_refused(change, error, message):
    with pytest.raises(error, match=message):
        WSLDLoss(**change)(STUDENT_LOGITS, TEACHER_LOGITS, TARGET)
    with pytest.raises(error, match=message):
        WSLDLoss(**change)


def test_wrong_inputs_are_refused():
    with pytest.raises(ValueError, match="teacher_logits must have the shape of logits"):
        WSLDLoss()(STUDENT_LOGITS, TEACHER_LOGITS[:1], TARGET)
    with pytest.raises(TypeError, match="logits must be a floating-point tensor"):
        WSLDLoss()(STUDENT_LOGITS.long(), TEACHER_LOGITS, TARGET)
    with pytest.raises(ValueError, match="target must hold 2 labels"):
        WSLDLoss()(STUDENT_LOGITS, TEACHER_LOGITS, TARGET[:1])
