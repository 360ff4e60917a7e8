"""RKD: golden vectors, a loop over all triples, and what relations do not depend on."""

from __future__ import annotations

import math

import pytest
import torch

from shared.golden_vectors import assert_close, cases_of
from shared.terms import loss_and_terms
from softlabels.losses.rkd import RKDLoss

CASES = cases_of("rkd")


def features(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def weights_of(case):
    return {name: float(case[name]) for name in ("distance_weight", "angle_weight")}


@pytest.mark.parametrize("case", CASES)
def test_values_of_the_reference(case):
    loss, parts = loss_and_terms(
        RKDLoss(**weights_of(case)), [case["student_features"]], [case["teacher_features"]]
    )

    assert_close(loss, case["loss"])
    assert_close(parts["distance"], case["distance_weight"] * case["distance_loss"])
    assert_close(parts["angle"], case["angle_weight"] * case["angle_loss"])


# The last case has two equal rows, at which the reference's own gradient is useless.
@pytest.mark.parametrize("case", CASES[:-1])
def test_gradients_of_the_reference(case):
    student = case["student_features"].requires_grad_()
    for name, distance_weight, angle_weight in (
        ("grad_distance_loss_student_features", 1.0, 0.0),
        ("grad_angle_loss_student_features", 0.0, 1.0),
        ("grad_student_features", *weights_of(case).values()),
    ):
        loss = RKDLoss(distance_weight=distance_weight, angle_weight=angle_weight)(
            [student], [case["teacher_features"]]
        )
        (gradient,) = torch.autograd.grad(loss, student)
        assert_close(gradient, case[name])


def test_a_loop_over_pairs_and_triples():
    student, teacher = features(5, 3), features(5, 7, seed=1)

    def distances(rows):
        table = [[math.dist(a, b) for b in rows] for a in rows]
        mean = sum(map(sum, table)) / (len(rows) * (len(rows) - 1))
        return [[value / mean for value in line] for line in table]

    def cosine(rows, i, j, k):
        if j in (i, k):
            return 0.0
        first = [a - b for a, b in zip(rows[i], rows[j], strict=True)]
        second = [a - b for a, b in zip(rows[k], rows[j], strict=True)]
        product = sum(a * b for a, b in zip(first, second, strict=True))
        return product / math.hypot(*first) / math.hypot(*second)

    def smooth(difference):
        size = abs(difference)
        return size * size / 2 if size < 1 else size - 0.5

    ours, theirs = student.tolist(), teacher.tolist()
    of_ours, of_theirs = distances(ours), distances(theirs)
    everyone = range(5)
    pairs = [smooth(of_ours[i][j] - of_theirs[i][j]) for i in everyone for j in everyone]
    triples = [
        smooth(cosine(ours, i, j, k) - cosine(theirs, i, j, k))
        for i in everyone
        for j in everyone
        for k in everyone
    ]
    expected = 3.0 * sum(pairs) / 25 + 7.0 * sum(triples) / 125

    loss = RKDLoss(distance_weight=3.0, angle_weight=7.0)([student], [teacher])

    assert_close(loss, torch.tensor(expected, dtype=torch.float64))


def test_shift_scale_and_rotation_do_not_matter():
    teacher = features(6, 4)
    rotation = torch.linalg.qr(features(4, 4, seed=2)).Q

    assert_close(RKDLoss()([5.0 * teacher @ rotation + 3.0], [teacher]), torch.zeros(()).double())
    assert RKDLoss()([teacher * torch.tensor([1.0, 1.0, 1.0, 3.0])], [teacher]) > 0.01


def test_the_teacher_gets_no_gradient():
    student, teacher = features(4, 3).requires_grad_(), features(4, 3, seed=1).requires_grad_()

    RKDLoss()([student], [teacher]).backward()

    assert teacher.grad is None
    assert student.grad.abs().max() > 0


@pytest.mark.parametrize("gap", [0.0, 1e-9])
def test_equal_rows_have_a_moderate_gradient(gap):
    student = features(5, 4)
    student[3] = student[1] + gap
    student.requires_grad_()
    reference = features(5, 4).requires_grad_()
    teacher = features(5, 4, seed=1)

    RKDLoss()([student], [teacher]).backward()
    RKDLoss()([reference], [teacher]).backward()

    # Equal rows differ in nothing, but the other rows still draw at them.
    assert student.grad.isfinite().all()
    assert student.grad.abs().max() < 10 * reference.grad.abs().max()
    assert student.grad[1].abs().max() > 0


@pytest.mark.parametrize("size", [0.0, 1e-8, 1e4])
def test_hazards_stay_finite(size):
    student = (size * features(4, 3)).float().requires_grad_()

    loss = RKDLoss()([student], [torch.zeros(4, 5)])
    loss.backward()

    assert loss.isfinite()
    assert student.grad.isfinite().all()


def test_one_sample_alone_has_no_relations():
    student = features(1, 3).requires_grad_()

    loss = RKDLoss()([student], [features(1, 5)])
    loss.backward()

    assert loss == 0
    assert (student.grad == 0).all()


def test_half_precision_is_widened_also_under_autocast():
    student, teacher = features(5, 3).bfloat16(), features(5, 4, seed=1).bfloat16()

    expected = RKDLoss()([student.float()], [teacher.float()])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = RKDLoss()([student], [teacher])

    assert loss.dtype == torch.float32
    assert torch.equal(loss, expected)


def test_the_module_has_the_settings_of_the_function():
    student, teacher = features(4, 3), features(4, 5, seed=1)
    module = RKDLoss(distance_weight=2.0, angle_weight=0.5)

    loss, parts = loss_and_terms(module, [student], [teacher])

    assert loss == RKDLoss(distance_weight=2.0, angle_weight=0.5)([student], [teacher])
    assert loss == module([student], [teacher]) == parts["distance"] + parts["angle"]
    assert RKDLoss()([student], [teacher]) == RKDLoss()([student], [teacher])


def test_errors_say_what_was_got():
    good = features(4, 3)
    with pytest.raises(TypeError, match=r"student_features must be .* torch.int64"):
        RKDLoss()([torch.zeros(4, 3, dtype=torch.long)], [good])
    with pytest.raises(TypeError, match=r"teacher_features must be .*, got list"):
        RKDLoss()([good], [[good]])
    with pytest.raises(ValueError, match=r"teacher_features must be \[B, D\] .*\(4, 3, 1\)"):
        RKDLoss()([good], [good.unsqueeze(2)])
    with pytest.raises(ValueError, match=r"of one batch, got \(4, 3\) and \(3, 3\)"):
        RKDLoss()([good], [good[:3]])
    with pytest.raises(ValueError, match="angle_weight must be finite, 0 or more, got -1"):
        RKDLoss(angle_weight=-1.0)([good], [good])
    with pytest.raises(ValueError, match="distance_weight must be finite"):
        RKDLoss(distance_weight=float("inf"))
    with pytest.raises(ValueError, match="student_features must be a list of one tensor, got 2"):
        RKDLoss()([good, good], [good])
    with pytest.raises(ValueError, match=r"teacher_features must be a list of one .*, got Tensor"):
        RKDLoss()([good], good)
