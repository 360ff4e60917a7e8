"""PKT: golden vectors, a loop over all pairs, and rows of zeros."""

from __future__ import annotations

import math

import pytest
import torch

from shared.golden_vectors import assert_close, cases_of
from softlabels.losses.pkt import PKTLoss


def features(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("case", cases_of("pkt"))
def test_values_and_gradients_of_the_reference(case):
    student = case["student_features"].requires_grad_()

    loss = PKTLoss()([student], [case["teacher_features"]])
    weighted = case["weight"] * loss
    weighted.backward()

    assert_close(loss, case["unweighted"])
    assert_close(weighted, case["loss"])
    assert_close(student.grad, case["grad_student_features"])


def test_a_loop_over_pairs():
    student, teacher = features(5, 3), features(5, 8, seed=1)

    def neighbors(rows):
        lengths = [math.hypot(*row) + 1e-7 for row in rows]
        kernel = [
            [(1 + sum(x * y for x, y in zip(a, b, strict=True)) / m / n) / 2 for b, n in both]
            for a, m in zip(rows, lengths, strict=True)
            for both in [list(zip(rows, lengths, strict=True))]
        ]
        return [[value / sum(line) for value in line] for line in kernel]

    ours, theirs = neighbors(student.tolist()), neighbors(teacher.tolist())
    expected = sum(
        theirs[i][j] * math.log((theirs[i][j] + 1e-7) / (ours[i][j] + 1e-7))
        for i in range(5)
        for j in range(5)
    )

    loss = PKTLoss()([student], [teacher])

    assert_close(loss, torch.tensor(expected / 25, dtype=torch.float64))


def test_lengths_do_not_matter_and_directions_do():
    teacher = features(4, 3)
    lengths = torch.tensor([[1.0], [20.0], [3.0], [7.0]])

    assert PKTLoss()([lengths * teacher], [teacher]).abs() < 1e-12
    assert PKTLoss()([teacher + 1.0], [teacher]) > 1e-3


def test_a_row_of_zeros_has_the_reference_value_and_no_gradient():
    # Zeros have the kernel 1/2 with all: rows (1, 1/2) / 1.5 and (1/2, 1/2) / 1 of the student,
    # halves of the teacher with itself: 1 at both. Mean of KL((1/2, 1/2) || (2/3, 1/3)) =
    # 1/2 ln(9/8) = 0.058892 and KL((1/2, 1/2) || (1/2, 1/2)) = 0, over 4: 0.014723.
    student = torch.tensor([[1.0, 0.0], [0.0, 0.0]], requires_grad=True)
    teacher = torch.ones(2, 3)

    loss = PKTLoss()([student], [teacher])
    loss.backward()

    torch.testing.assert_close(loss, torch.tensor(0.014723), rtol=0, atol=1e-6)
    assert student.grad.isfinite().all()
    assert (student.grad[1] == 0).all()


def test_hazards_stay_finite_also_in_half_precision():
    student = torch.tensor([[0.0, 0.0], [6e4, 6e4], [-6e4, -6e4], [1e-3, 0.0]]).half()
    student.requires_grad_()
    teacher = torch.tensor([[1.0], [-1.0], [0.0], [1.0]]).half().requires_grad_()

    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = PKTLoss()([student], [teacher])
    loss.backward()

    assert loss.dtype == torch.float32
    assert torch.equal(loss, PKTLoss()([student.float()], [teacher.float()]))
    assert loss.isfinite()
    assert student.grad.isfinite().all()
    assert teacher.grad is None


def test_one_sample_has_no_neighbors_to_choose_from():
    assert PKTLoss()([features(1, 3)], [features(1, 4)]) == 0


def test_the_module_is_the_function():
    student, teacher = features(4, 3), features(4, 5, seed=1)

    assert PKTLoss()([student], [teacher]) == PKTLoss()([student], [teacher])
    assert PKTLoss.defaults.weight == 30000


def test_errors_say_what_was_got():
    good = features(4, 3)
    with pytest.raises(TypeError, match=r"student_features must be .* torch.int64"):
        PKTLoss()([torch.zeros(4, 3, dtype=torch.long)], [good])
    with pytest.raises(ValueError, match=r"student_features must be \[B, D\] .* \(0, 3\)"):
        PKTLoss()([good[:0]], [good])
    with pytest.raises(ValueError, match=r"of one batch, got \(4, 3\) and \(3, 3\)"):
        PKTLoss()([good], [good[:3]])
    with pytest.raises(ValueError, match="teacher_features must be a list of one tensor, got 0"):
        PKTLoss()([good], [])
